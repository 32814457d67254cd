"""Broken data sets: each case ends in one line (what, where, what to do) and exit code 2."""

import gzip
import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import cut, flip_a_bit, make_tiny_root, refused
from PIL import EpsImagePlugin, Image

import data
from lab import files
from lab import idx as idx_files

IMAGE, MASK = "train/eecs442_0002.jpg", "train/eecs442_0002.png"


# ---- facades: images, masks, folders ----

def save(array, **how):
    return lambda path: Image.fromarray(array).save(path, **how)


def bomb(path):
    """A PNG of a few bytes that says it is 60000x60000."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


def text(path):
    path.write_text("P5 1 1")


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def grey(value, size=(32, 32), dtype=np.uint8):
    return np.full(size, value, dtype)


FACADES = {
    "photo without a mask": (MASK, Path.unlink,
                             "eecs442_0002.jpg has no eecs442_0002.png beside it"),
    "mask without a photo": (IMAGE, Path.unlink,
                             "eecs442_0002.png has no eecs442_0002.jpg beside it"),
    "photo of no bytes": (IMAGE, cut(0),
                          "eecs442_0002.jpg cannot be read as an image (of no known kind)"),
    "photo cut to a quarter": (IMAGE, cut(0.25), "eecs442_0002.jpg cannot be read as an image"),
    "photo that lacks its end": (IMAGE, cut(0.9), "eecs442_0002.jpg cannot be read as an image"),
    "photo that is text": (IMAGE, text, "eecs442_0002.jpg cannot be read as an image"),
    "photo that is a bomb": (IMAGE, bomb, "eecs442_0002.jpg cannot be read as an image"),
    "photo that is a folder": (IMAGE, replace_by_folder, "eecs442_0002.jpg: Is a directory"),
    "photo that is a dangling link": (IMAGE, dangling_link, "eecs442_0002.jpg: No such file"),
    "photo of another size than its mask": (IMAGE, save(grey(9, (32, 48)), format="JPEG"),
                                            "48x32 but its mask"),
    "photo whose mask alone is turned": (
        ("train/eecs442_0005.jpg",), save(grey(1, (48, 32))), "32x48 but its mask"),
    "mask of no bytes": (MASK, cut(0), "eecs442_0002.png cannot be read as an image"),
    "mask cut in half": (MASK, cut(0.5), "eecs442_0002.png cannot be read as an image"),
    "mask with a flipped bit": (MASK, flip_a_bit, "eecs442_0002.png cannot be read as an image"),
    "mask that is text": (MASK, text, "eecs442_0002.png cannot be read as an image"),
    "mask that is a bomb": (MASK, bomb, "eecs442_0002.png cannot be read as an image"),
    "mask that is a JPEG": (MASK, save(grey(1), format="JPEG"),
                            "is a JPEG of mode L; a mask must be"),
    "mask that is a GIF": (MASK, save(grey(1), format="GIF"), "is a GIF of mode"),
    "mask in colours": (MASK, save(grey(1, (32, 32, 3))),
                        "is a PNG of mode RGB; a mask must be a palette or grey"),
    "mask with transparency": (MASK, save(grey(1, (32, 32, 4))), "is a PNG of mode RGBA"),
    "mask of 16 bits": (MASK, save(grey(1, dtype=np.uint16)), "is a PNG of mode I;16"),
    "mask with the class 5": (MASK, save(grey(5)),
                              "has the value 5 in 1024 pixels; the classes are 0 others"),
    "mask with the value 254": (MASK, save(grey(254)), "has the value 254 in 1024 pixels"),
    "mask of another size": (MASK, save(grey(1, (16, 32))),
                             "is 32x32 but its mask eecs442_0002.png is 32x16"),
    "test mask with a bad value": ("test_dev/eecs442_0007.png", save(grey(7)),
                                   "test_dev/eecs442_0007.png has the"),
}


@pytest.mark.parametrize("case", FACADES)
def test_facades(tiny_root, tmp_path, capsys, case):
    names, damage, message = FACADES[case]
    for name in [names] if isinstance(names, str) else names:
        damage(tiny_root / "mini_facade" / name)
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--data-root", tiny_root,
                   "--out", tmp_path / "out")
    assert message in said and not (tmp_path / "out").exists()


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what was found on the path before
    postscript = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n"
                  b"showpage\n%%EOF\n")
    with pytest.raises(data.BadInput, match="cannot be read as an image"):
        files.read_image(Path("photo.jpg"), postscript)
    assert not (tmp_path / "started").exists()
    with pytest.raises(OSError):  # Pillow alone would start it
        Image.open(io.BytesIO(postscript)).load()
    assert (tmp_path / "started").exists()


def empty(folder: str, pattern: str = "*"):
    return lambda root: [path.unlink() for path in (root / folder).glob(pattern)]


def file_in_place(root: Path) -> None:
    (root / "mini_facade").rename(root / "x")
    (root / "mini_facade").write_text("")


FOLDERS = {
    "no test part": (lambda root: (root / "mini_facade/test_dev").rename(root / "elsewhere"),
                     "test_dev has no .jpg"),
    "empty train part": (empty("mini_facade/train"), "no .jpg"),
    "a file in place of the set": (file_in_place, "has no .jpg"),
    "photos alone": (empty("mini_facade/train", "*.png"), "beside it"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tiny_root, tmp_path, capsys, case):
    damage, message = FOLDERS[case]
    damage(tiny_root)
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--data-root", tiny_root,
                   "--out", tmp_path / "out")
    assert message in said and "must hold NAME.jpg photos, each with a NAME.png mask" in said


def renamed(*names):
    """Moves root/mini_facade to another place, of which `names` are the steps."""
    def damage(root):
        (root / "x").mkdir()
        (root / "mini_facade").rename(root / "x/set")
        root.joinpath(*names).parent.mkdir(parents=True, exist_ok=True)
        (root / "x/set").rename(root.joinpath(*names))
        (root / "x").rmdir()
    return damage


def unpacked_into_the_root(root):
    for part in ("train", "test_dev"):
        (root / "mini_facade" / part).rename(root / part)
    (root / "mini_facade").rmdir()


MISPLACED = {  # what is done to a root with the facades; the data root from there; what is named
    "the set's own folder as the root": (lambda root: None, "mini_facade", "/root/mini_facade"),
    "one of its two folders as the root": (lambda root: None, "mini_facade/train", "/train"),
    "the folder above the root": (lambda root: None, "..", "/root"),
    "both folders in the root": (unpacked_into_the_root, "", "/root"),
    "another case": (renamed("Mini_Facade"), "", "/root/Mini_Facade"),
    "another spelling": (renamed("mini-facade (1)"), "", "/root/mini-facade (1)"),
    "another name": (renamed("facades"), "", "/root/facades"),
    "a folder too deep": (renamed("course", "mini_facade"), "", "/root/course"),
    "still packed": (lambda root: (shutil.rmtree(root / "mini_facade"),
                                   (root / "mini_facade.zip").touch()), "", "/mini_facade.zip"),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_misplaced_facades_are_not_replaced_by_synthetic_ones(tiny_root, tmp_path, capsys, case):
    damage, root, named = MISPLACED[case]
    damage(tiny_root)
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--data-root", tiny_root / root,
                   "--out", tmp_path / "out")
    assert f"{named} looks like the facade set" in said
    assert "mini_facade/{train,test_dev}/NAME.jpg, each with a NAME.png mask" in said


def test_a_dangling_link_is_no_missing_set(tiny_root, tmp_path, capsys):
    shutil.rmtree(tiny_root / "mini_facade")
    (tiny_root / "mini_facade").symlink_to("nowhere")
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--data-root", tiny_root,
                   "--out", tmp_path / "out")
    assert "mini_facade/train has no .jpg image" in said


def test_the_dev_split_of_a_few_photos_is_refused(tmp_path, capsys):
    root = make_tiny_root(tmp_path / "root", train=60)
    said = refused(capsys, "train_seg", "--split", "dev", "--data-root", root, "--out", tmp_path)
    assert "--split dev holds out 60 photos and trains on the others, but" in said
    assert "mini_facade/train has 60: add photos" in said
    for suffix in (".jpg", ".png"):  # one more is enough, if for nothing good
        folder = root / "mini_facade/train"
        shutil.copy(folder / f"eecs442_0000{suffix}", folder / f"eecs442_9999{suffix}")
    assert len(data.load_facades(root, "dev", 32).train) == 1


# ---- IDX files ----

def idx(magic, *shape, values=b""):
    return struct.pack(f">{1 + len(shape)}i", magic, *shape) + values


LABELS, IMAGES = "t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
IDX = {
    "labels of no bytes": (LABELS, lambda old: b""),
    "labels cut in half": (LABELS, lambda old: old[:len(old) // 2]),
    "labels with a flipped bit": (LABELS,
                                  lambda old: old[:500] + bytes([old[500] ^ 1]) + old[501:]),
    "labels with a class 10": (LABELS, lambda old: old[:500] + b"\x0a" + old[501:]),
    "labels with another magic number": (LABELS, lambda old: idx(1234, 10000) + old[8:]),
    "labels that announce 2 billion": (LABELS, lambda old: idx(2049, 2**31 - 1) + old[8:]),
    "labels that announce fewer than none": (LABELS, lambda old: idx(2049, -1) + old[8:]),
    "images in place of labels": (LABELS, lambda old: idx(2051, 10000, 1, 1) + old[8:]),
    "labels still packed": (LABELS, gzip.compress),
    "a page of HTML for images": (IMAGES, lambda old: b"<html>404</html>"),
    "images of another size": (IMAGES, lambda old: idx(2051, 10000, 14, 56) + old[16:]),
    "images with bytes to spare": (IMAGES, lambda old: old + b"\0"),
}


@pytest.mark.parametrize("case", IDX)
def test_idx_files(fashion_root, tmp_path, capsys, case):
    raw = tmp_path / "root/FashionMNIST/raw"
    raw.mkdir(parents=True)
    name, damage = IDX[case]
    for other in data.IDX_FILES:
        source = fashion_root.resolve() / "FashionMNIST/raw" / other
        if other == name:
            (raw / other).write_bytes(damage(source.read_bytes()))
        else:
            (raw / other).symlink_to(source)
    said = refused(capsys, "train_cls", "--protocol", "smoke", "--data-root", raw.parents[1],
                   "--out", tmp_path / "o")
    assert f"{raw} is damaged" in said and "delete it and run python data.py" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("length", range(16))
def test_the_beginning_of_an_idx_file_is_none(length):
    """A reader of a set without a digest has this to go by alone."""
    whole = idx(0x0803, 1, 1, 1, values=b"\7")
    assert idx_files.parse(whole).tolist() == [[[7]]]
    with pytest.raises(ValueError):
        idx_files.parse(whole[:length])


def test_the_corpus_is_as_large_as_it_should_be():
    assert sum(map(len, (FACADES, FOLDERS, MISPLACED, IDX))) >= 50
