"""Random and mutated data sets for every reader: exactly what was written, or one error that says what is wrong."""

import contextlib
import functools
import gzip
import io
import lzma
import os
import resource
import runpy
import signal
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import data
from lab import fetch, folders
from lab.batches import VOID
from lab.fetch import Limits
from lab.files import BadInput, mask_to, tree_digest

read_pair = functools.partial(folders.read_pair, channels=3, legend=data.LEGEND)

scratch = functools.partial(tempfile.TemporaryDirectory, dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
# the same examples in every run; they are small, and to shrink one takes minutes
bounded = settings(max_examples=150, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


def outcome(named, read, *args):
    """What a reader returns, or the BadInput or OSError that it raises, which names its input. It may not hang."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))  # no Exception, so that no reader catches it
    signal.setitimer(signal.ITIMER_REAL, 5, 1)
    try:
        return read(*args)
    except (BadInput, OSError) as error:
        assert str(named) in str(error), error
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@st.composite
def mutated(draw, content):
    """The content after up to two edits: mostly a flipped bit, else bytes inserted, cut out, or all that follows."""
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        at = draw(st.integers(0, len(content)))
        if draw(st.sampled_from([True, True, False])):
            content = changed(content, at, *(byte ^ 1 << draw(st.integers(0, 7)) for byte in content[at:at + 1]))
        else:
            cut = draw(st.sampled_from([0, 1, 4, len(content)]))
            content = content[:at] + draw(st.binary(max_size=4)) + content[at + cut:]
    return content


def changed(content, at, *values):
    return content[:at] + bytes(values) + content[at + len(values):]


# ---- IDX files ----

def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


pixels = st.integers(0, 255)
idx_arrays = st.tuples(*(hnp.arrays(np.uint8, shape, elements=pixels) for shape in [
    st.tuples(*[st.integers(1, 5)] * 3), st.tuples(st.integers(1, 5))] * 2)).map(lambda arrays: dict(
        zip(data.IDX_FILES, arrays)))


@contextlib.contextmanager
def pinned(files, *sources):
    """An empty data root, with these files as Fashion-MNIST and these sources to fetch it from."""
    with scratch() as root, pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.IDX_DIGESTS, "FashionMNIST", tree_digest(list(files.items())))
        for name, source in zip(("from_mirror", "from_package"),
                                (*sources, unreachable, unreachable)):
            patch.setattr(data, name, source)
        yield Path(root)


def unreachable(name, folder):
    raise RuntimeError("no network")


def put(raw, files):
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return raw


def check_idx(found, arrays, files):
    """Splits that hold exactly these arrays, or an error where the files are not theirs."""
    exact = files == {name: idx(array) for name, array in arrays.items()}
    assert isinstance(found, tuple) == exact, found
    for split, (images, labels) in zip(found if exact else (), (data.IDX_FILES[:2], data.IDX_FILES[2:])):
        assert np.array_equal(split.images[:, 0], arrays[images]) and split.images.dtype == torch.uint8
        assert np.array_equal(split.targets, arrays[labels]) and split.targets.dtype == torch.uint8


@bounded
@given(idx_arrays, st.data())
def test_idx_files_are_read_exactly_or_refused(arrays, draws):
    files = {name: idx(array) for name, array in arrays.items()}
    damaged = draws.draw(st.sampled_from(data.IDX_FILES))
    other = draws.draw(st.sampled_from(data.IDX_FILES))
    content = draws.draw(st.one_of(mutated(files[damaged]), st.binary(), st.just(files[other]), st.none()))
    lying = {name: content if name == damaged else files[name] for name in files}
    lying = {name: content for name, content in lying.items() if content is not None}
    with pinned(files) as root:
        put(root / "FashionMNIST/raw", lying)
        check_idx(outcome(root, data.load_idx, root, "FashionMNIST"), arrays, lying)


@bounded
@given(idx_arrays, st.data())
def test_a_fetched_package_is_taken_exactly_or_leaves_nothing(arrays, draws):
    files = {name: idx(array) for name, array in arrays.items()}
    damaged = draws.draw(st.sampled_from(data.IDX_FILES))
    packed = {name: gzip.compress(content, mtime=0) for name, content in files.items()}
    packed[damaged] = draws.draw(st.one_of(mutated(packed[damaged]), st.binary()))

    def run(command, cwd, **kwargs):
        put(cwd / "usr/share/datasets/fashion-mnist", {f"{name}.gz": content for name, content in packed.items()})
        (cwd / "x.deb").touch()

    with pinned(files, unreachable, data.from_package) as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch.subprocess, "run", run)
        found = outcome(root, data.load_idx, root, "FashionMNIST")
        if isinstance(found, tuple):
            check_idx(found, arrays, files)
        else:
            assert not list(root.iterdir()) and packed[damaged] != gzip.compress(files[damaged], mtime=0)


# ---- facades ----

def saved(array, kind, palette=False, **how):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if palette:
        image.putpalette([value for colour in data.FACADE_PALETTE for value in colour] * 51)
    image.save(buffer, kind, **how)
    return buffer.getvalue()


masks = hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)), elements=st.integers(0, 4))


@bounded
@given(masks, st.sampled_from(["PNG", "JPEG"]), st.integers(0, 9), st.data())
def test_a_damaged_pair_is_read_exactly_or_refused(mask, kind, level, draws):
    image = np.stack([mask * 50, 255 - mask, mask], 2)
    contents = saved(image, kind), saved(mask, "PNG", compress_level=level)
    found = outcome("pair.", read_pair, Path("pair.jpg"), draws.draw(mutated(contents[0])),
                    Path("pair.png"), draws.draw(mutated(contents[1])))
    if not isinstance(found, Exception):
        assert found[0].shape == image.shape and found[0].dtype == np.uint8
        assert kind == "JPEG" or np.array_equal(found[0], image)  # a JPEG has no checksums
        assert np.array_equal(found[1], mask)


def pictures(*forms):
    """Strategy for the arguments of `picture`: forms that Pillow can write, and the highest value in it."""
    return st.tuples(st.sampled_from(forms), st.sampled_from([0, 1, 4, 5, 255, 1000]))


def picture(shape, form, top):
    kind, dtype, channels = form
    return np.resize(np.arange(top + 1)[::-1], shape if channels == 1 else (*shape, channels)).astype(dtype)


EXACT, ONE_BIT = ("PNG", np.uint8, 1), ("PNG", bool, 1)
DEEP = [("PNG", np.uint16, 1), ("TIFF", np.uint16, 1), ("PPM", np.uint16, 1)]  # of which the highest 8 bits count
TOO_DEEP = [("TIFF", np.int32, 1), ("TIFF", np.float32, 1)]
FORMS = [*((kind, np.uint8, channels) for kind in ("PNG", "TIFF") for channels in (1, 2, 3, 4)),
         ("GIF", np.uint8, 1), ("PNG", bool, 1)]
sides = st.sampled_from([(3, 4), (3, 4), (3, 4), (4, 3), (1, 1)])


@bounded
@given(sides, pictures(*FORMS, *DEEP, *TOO_DEEP), sides, pictures(*[EXACT] * 8, *FORMS, *DEEP, *TOO_DEEP),
       st.booleans())
def test_images_of_any_mode_are_read_exactly_or_refused(shape, form, mask_shape, mask_form, palette):
    image, mask = picture(shape, *form), picture(mask_shape, *mask_form)
    palette = palette and mask_form[0] == EXACT
    contents = saved(image, form[0][0]), saved(mask, mask_form[0][0], palette)
    found = outcome("pair.", read_pair, Path("pair.jpg"), contents[0], Path("pair.png"), contents[1])
    classes = np.isin(mask, (0, 1, 2, 3, 4, VOID)).all()  # True and False are 1 and 0
    fits = (form[0] not in TOO_DEEP and mask_form[0] in (EXACT, ONE_BIT) and classes
            and shape == mask_shape)
    assert isinstance(found, tuple) == fits, found
    if fits:
        image = (image >> 8).astype(np.uint8) if form[0] in DEEP else image
        grey = image[..., None] * (255 if image.dtype == bool else 1)
        colours = grey if image.ndim == 2 else image[..., :1] if image.shape[2] == 2 else image[..., :3]
        assert np.array_equal(found[0], np.broadcast_to(colours, (*shape, 3))) and np.array_equal(found[1], mask)


def read_part(folder):
    """Images and masks of a folder, 12x12, and the digests of their files by path."""
    digests = {}
    items = folders.masked(folder.parent, folder.name)
    return *folders.read(items, 12, 3, data.LEGEND, folder.parent, digests), digests


MASKS = [np.full(shape, value, np.uint8) for shape, value in (((3, 4), 1), ((3, 4), 4), ((4, 3), 0), ((3, 4), 5))]
stems = st.sampled_from(["a", "b", "é", ".c", "d.jpg", "*"])
kinds = st.sampled_from(["both", "both", "both", "jpg", "png", "folder"])


@bounded
@given(st.dictionaries(stems, st.tuples(st.sampled_from(MASKS), kinds), max_size=3))
def test_a_folder_is_read_exactly_or_refused(pairs):
    with scratch() as folder:
        folder = Path(folder)
        for name, (mask, which) in pairs.items():
            if which == "folder":
                (folder / f"{name}.jpg").mkdir()
            for suffix in (("jpg", "png") if which == "both" else (which,) if which != "folder" else ()):
                (folder / f"{name}.{suffix}").write_bytes(saved(mask, suffix.replace("jpg", "jpeg")))
        found = outcome(folder, read_part, folder)
    pairs = {name: pair for name, pair in pairs.items() if not name.startswith(".")}  # hidden
    good = [mask for _, (mask, which) in sorted(pairs.items()) if which == "both" and mask.max() < 5]
    fits = pairs and len(good) == len(pairs)
    assert isinstance(found, tuple) == bool(fits), found
    if fits:
        assert np.array_equal(found[1], np.stack([mask_to(mask, 12, 12) for mask in good]))
        assert found[0].shape == (len(good), 3, 12, 12)
        assert list(found[2]) == [f"{folder.name}/{name}.{suffix}" for name in sorted(pairs)
                                  for suffix in ("jpg", "png")]


# ---- the facade archive ----

FILES = {"mini_facade/train/a.jpg": b"image" * 300, "mini_facade/train/a.png": b"mask"}
# more than the unpackers read at once, so that damage shows in the middle of a member
LARGE = {**FILES, "mini_facade/train/a.jpg": np.random.default_rng(0).bytes(30_000)}


def member(name, kind=tarfile.REGTYPE, link="", size=None, body=b""):
    """One member's blocks, which may announce another size than they have."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(body) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def tar(members):
    return b"".join(member(**one) for one in members) + bytes(1024)


def members(files, parent="mini_facade"):
    return [{"name": name.replace("mini_facade", parent), "body": content} for name, content in files.items()]


def check_archive(content, files=FILES):
    """Unpacked to exactly these files, or refused without a trace; nothing else is written. True if unpacked.

    The content may be a function of the folder whose subfolder root is the data root.
    """
    digest = tree_digest([(name.removeprefix("mini_facade/"), content)
                          for name, content in files.items()])
    with scratch() as folder:
        folder = Path(folder)
        (folder / "archive").write_bytes(content(folder) if callable(content) else content)
        found = outcome(url := f"file://{folder}/archive", data.fetch_facades, folder / "root", url, digest)
        assert sorted(path.name for path in folder.iterdir()) == ["archive", "root"]
        left = [path for path in (folder / "root").rglob("*") if path.is_symlink() or not path.is_dir()]
        if found is None:
            assert not any(path.is_symlink() for path in (folder / "root").rglob("*"))
            assert {str(path.relative_to(folder / "root")): path.read_bytes() for path in left} == files
        else:
            assert not list((folder / "root").iterdir())
        return found is None


NAMES = [*FILES, "mini_facade", "./mini_facade/train/../train/a.png", "/mini_facade/train/b.png", "../escaped",
         "../../escaped", "FOLDER/escaped", "mini_facade/../../../escaped", "..\\escaped", "archive", ".", "..", "",
         "link/escaped", "mini_facade/é\n", "mini_facade/\udcff", "mini_facade/" + "a/" * 300 + "b",
         "mini_facade/" + "a" * 300]
names = st.sampled_from(NAMES)
odd_members = st.lists(st.fixed_dictionaries({
    "name": st.one_of(names, names, st.text(max_size=8), st.text(max_size=8).map("mini_facade/{}".format)),
    "kind": st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                             tarfile.FIFOTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE]),
    "link": st.sampled_from(["", ".", "..", "../..", "FOLDER", "/etc/passwd", "link", *FILES]),
    "size": st.sampled_from([None] * 8 + [-512, -1536, -1, 1 << 31, 1 << 62, 1 << 70]),
    "body": st.sampled_from([b"", b"!", *FILES.values()])}), max_size=2)


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


@bounded
@given(odd_members, st.sampled_from(["mini_facade", "real"]), odd_members)
@example([], "mini_facade", [])
@example([], "mini_facade", [{"name": "../escaped"}])
@example([], "mini_facade", [{"name": "../../escaped"}])
@example([], "mini_facade", [{"name": "FOLDER/escaped"}])
@example([], "mini_facade", [{"name": "z", "size": -512}])  # sends tarfile in circles
@example([], "mini_facade", [{"name": "z", "size": -512, "kind": tarfile.GNUTYPE_SPARSE}])
@example([], "mini_facade", [{"name": "z", "size": 1 << 70, "kind": tarfile.GNUTYPE_LONGNAME}])
@example([], "mini_facade", [{"name": "mini_facade/z", "kind": HARD, "link": "nowhere"}])
@example([], "mini_facade", [{"name": "mini_facade/z", "kind": LINK, "link": "."}])
@example([], "mini_facade", [{"name": "mini_facade/\udcff"}])
@example([], "real", [{"name": "mini_facade", "kind": LINK, "link": "real"}])
def test_an_archive_of_odd_members_writes_nothing_but_the_set(before, parent, after):
    packed = [*before, *members(FILES, parent), *after]
    put = lambda value, folder: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
    unpacked = check_archive(lambda folder: tar([{key: put(value, folder) for key, value in one.items()}
                                                 for one in packed]))
    assert unpacked or before or after or parent == "real"


def test_a_size_below_zero_makes_no_room_for_a_bomb(tmp_path):
    sparse = tarfile.TarInfo("z")
    sparse.pax_headers = {"GNU.sparse.realsize": "-1000000"}
    bomb = sparse.tobuf(tarfile.PAX_FORMAT) + tar([{"name": "mini_facade/b", "body": bytes(100_000)}])
    (tmp_path / "archive").write_bytes(gzip.compress(bomb))
    with pytest.raises(BadInput, match="with 'z' it has too much for the set"):
        data.fetch_facades(tmp_path / "root", f"file://{tmp_path}/archive",
                           limits=Limits(size=200_000))


def test_an_archive_that_is_deeper_than_files_may_be_open_is_no_matter():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        assert check_archive(tar([*members(FILES), {"name": "mini_facade/" + "a/" * 200 + "b"}]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@bounded
@given(st.sampled_from([bytes, gzip.compress, lzma.compress]), st.data())
def test_a_damaged_archive_is_unpacked_exactly_or_refused(pack, draws):
    content = pack(tar(members(LARGE)))
    check_archive(draws.draw(st.one_of(mutated(content), mutated(content), st.binary())), LARGE)


@bounded
@given(st.sampled_from(["http://127.0.0.1:9/", "http://127.0.0.1:9", "http://", "file:///", "file:///no/such/", "data:",
                        "data:,", ""]), st.text(max_size=8))
@example("http://127.0.0.1:9/", "a b")
@example("http://127.0.0.1:", "port/")
def test_a_url_that_leads_nowhere_is_refused(start, rest):
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.getaddrinfo", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
        assert isinstance(outcome(start + rest, data.fetch_facades, Path(folder), start + rest), Exception)
        assert not list(Path(folder).iterdir())


def test_data_py_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", "--data-root", str(tmp_path), "--facades-url", "data:,x"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(data.__file__, run_name="__main__")
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())
