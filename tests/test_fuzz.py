"""Random and mutated data sets for every reader: exactly what was written, or one error."""

import contextlib
import functools
import gzip
import io
import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import data
from lab import fetch, folders
from lab.batches import VOID
from lab.files import BadInput, mask_to, tree_digest

read_pair = functools.partial(folders.read_pair, channels=3, legend=data.LEGEND)

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
scratch = functools.partial(tempfile.TemporaryDirectory, dir=MEMORY)
# the same examples in every run; they are small, and to shrink one takes minutes
bounded = settings(max_examples=150, deadline=None, derandomize=True,
                   phases=[Phase.explicit, Phase.generate])


def outcome(named, read, *args):
    """What a reader returns, or the BadInput or OSError that names its input. It may not hang."""
    # no Exception, so that no reader catches it
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
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
    """The content after up to two edits: mostly a flipped bit, else bytes inserted or cut out."""
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        at = draw(st.integers(0, len(content)))
        if draw(st.sampled_from([True, True, False])):
            flipped = (byte ^ 1 << draw(st.integers(0, 7)) for byte in content[at:at + 1])
            content = changed(content, at, *flipped)
        else:
            cut = draw(st.sampled_from([0, 1, 4, len(content)]))
            content = content[:at] + draw(st.binary(max_size=4)) + content[at + cut:]
    return content


def changed(content, at, *values):
    return content[:at] + bytes(values) + content[at + len(values):]


# ---- IDX files ----

def idx(array):
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


pixels = st.integers(0, 255)
shapes = [st.tuples(*[st.integers(1, 5)] * 3), st.tuples(st.integers(1, 5))] * 2
idx_arrays = st.tuples(*(hnp.arrays(np.uint8, shape, elements=pixels) for shape in shapes)).map(
    lambda arrays: dict(zip(data.IDX_FILES, arrays)))


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
    names = data.IDX_FILES[:2], data.IDX_FILES[2:]
    for split, (images, labels) in zip(found if exact else (), names):
        assert split.images.dtype == split.targets.dtype == torch.uint8
        assert np.array_equal(split.images[:, 0], arrays[images])
        assert np.array_equal(split.targets, arrays[labels])


@bounded
@given(idx_arrays, st.data())
def test_idx_files_are_read_exactly_or_refused(arrays, draws):
    files = {name: idx(array) for name, array in arrays.items()}
    damaged = draws.draw(st.sampled_from(data.IDX_FILES))
    other = draws.draw(st.sampled_from(data.IDX_FILES))
    content = draws.draw(st.one_of(mutated(files[damaged]), st.binary(), st.just(files[other]),
                                   st.none()))
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
        put(cwd / "usr/share/datasets/fashion-mnist",
            {f"{name}.gz": content for name, content in packed.items()})
        (cwd / "x.deb").touch()

    with (pinned(files, unreachable, data.from_package) as root,
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(fetch.subprocess, "run", run)
        found = outcome(root, data.load_idx, root, "FashionMNIST")
        if isinstance(found, tuple):
            check_idx(found, arrays, files)
        else:
            assert not list(root.iterdir())
            assert packed[damaged] != gzip.compress(files[damaged], mtime=0)


# ---- facades ----

def saved(array, kind, palette=False, **how):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if palette:
        image.putpalette([value for colour in data.FACADE_PALETTE for value in colour] * 51)
    image.save(buffer, kind, **how)
    return buffer.getvalue()


masks = hnp.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20)),
                   elements=st.integers(0, 4))


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
    """Strategy for the arguments of `picture`: forms that Pillow can write, the highest value."""
    return st.tuples(st.sampled_from(forms), st.sampled_from([0, 1, 4, 5, 255, 1000]))


def picture(shape, form, top):
    kind, dtype, channels = form
    shape = shape if channels == 1 else (*shape, channels)
    return np.resize(np.arange(top + 1)[::-1], shape).astype(dtype)


EXACT, ONE_BIT = ("PNG", np.uint8, 1), ("PNG", bool, 1)
# of which the highest 8 bits count
DEEP = [("PNG", np.uint16, 1), ("TIFF", np.uint16, 1), ("PPM", np.uint16, 1)]
TOO_DEEP = [("TIFF", np.int32, 1), ("TIFF", np.float32, 1)]
FORMS = [*((kind, np.uint8, channels) for kind in ("PNG", "TIFF") for channels in (1, 2, 3, 4)),
         ("GIF", np.uint8, 1), ("PNG", bool, 1)]
sides = st.sampled_from([(3, 4), (3, 4), (3, 4), (4, 3), (1, 1)])


@bounded
@given(sides, pictures(*FORMS, *DEEP, *TOO_DEEP),
       sides, pictures(*[EXACT] * 8, *FORMS, *DEEP, *TOO_DEEP), st.booleans())
def test_images_of_any_mode_are_read_exactly_or_refused(
        shape, made, mask_shape, mask_made, palette):
    (form, _), (mask_form, _) = made, mask_made
    image, mask = picture(shape, *made), picture(mask_shape, *mask_made)
    found = outcome("pair.", read_pair, Path("pair.jpg"), saved(image, form[0]),
                    Path("pair.png"), saved(mask, mask_form[0], palette and mask_form == EXACT))
    classes = np.isin(mask, (0, 1, 2, 3, 4, VOID)).all()  # True and False are 1 and 0
    fits = (form not in TOO_DEEP and mask_form in (EXACT, ONE_BIT) and classes
            and shape == mask_shape)
    assert isinstance(found, tuple) == fits, found
    if fits:
        image = (image >> 8).astype(np.uint8) if form in DEEP else image
        if image.ndim == 2:
            image = image[..., None] * (255 if image.dtype == bool else 1)
        colours = image[..., :1] if image.shape[2] == 2 else image[..., :3]
        assert np.array_equal(found[0], np.broadcast_to(colours, (*shape, 3)))
        assert np.array_equal(found[1], mask)


def read_part(folder):
    """Images and masks of a folder, 12x12, and the digests of their files by path."""
    digests = {}
    items = folders.masked(folder.parent, folder.name)
    return *folders.read(items, 12, 3, data.LEGEND, folder.parent, digests), digests


MASKS = [np.full(shape, value, np.uint8)
         for shape, value in (((3, 4), 1), ((3, 4), 4), ((4, 3), 0), ((3, 4), 5))]
SUFFIXES = {"both": ("jpg", "png"), "jpg": ("jpg",), "png": ("png",), "folder": ()}
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
            for suffix in SUFFIXES[which]:
                content = saved(mask, suffix.replace("jpg", "jpeg"))
                (folder / f"{name}.{suffix}").write_bytes(content)
        found = outcome(folder, read_part, folder)
    pairs = {name: pair for name, pair in pairs.items() if not name.startswith(".")}  # hidden
    good = [mask for _, (mask, which) in sorted(pairs.items())
            if which == "both" and mask.max() < 5]
    fits = pairs and len(good) == len(pairs)
    assert isinstance(found, tuple) == bool(fits), found
    if fits:
        assert found[0].shape == (len(good), 3, 12, 12)
        assert np.array_equal(found[1], np.stack([mask_to(mask, 12, 12) for mask in good]))
        assert list(found[2]) == [f"{folder.name}/{name}.{suffix}" for name in sorted(pairs)
                                  for suffix in ("jpg", "png")]
