"""A corpus of broken input, made by code: each case ends in one line (what, where, what to do) and exit code 2."""

import gzip
import io
import json
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_root
from PIL import EpsImagePlugin, Image

import data
import export
import interpret
import train_cls
import train_seg
from lab import cli, files

SCRIPTS = {"train_cls": train_cls, "train_seg": train_seg, "interpret": interpret, "export": export}
IMAGE, MASK = "train/eecs442_0002.jpg", "train/eecs442_0002.png"


def refused(capsys, script, *argv):
    """The one line that a script gives for its bad input."""
    code = cli.guard(lambda: SCRIPTS[script].main([str(value) for value in argv]))
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("NOTE")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


# ---- data sets: images, masks, folders ----

def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def save(array, **how):
    return lambda path: Image.fromarray(array).save(path, **how)


def bomb(path):
    """A PNG of a few bytes that says it is 60000x60000."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) +
                     chunk(b"IEND", b""))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def dangling_link(path):
    path.unlink()
    path.symlink_to("nowhere")


def grey(value, size=(32, 32), dtype=np.uint8):
    return np.full(size, value, dtype)


FACADES = {
    "photo without a mask": (MASK, Path.unlink, "eecs442_0002.jpg has no eecs442_0002.png beside it"),
    "mask without a photo": (IMAGE, Path.unlink, "eecs442_0002.png has no eecs442_0002.jpg beside it"),
    "photo of no bytes": (IMAGE, cut(0), "eecs442_0002.jpg cannot be read as an image"),
    "photo cut to a quarter": (IMAGE, cut(0.25), "eecs442_0002.jpg cannot be read as an image"),
    "photo that lacks its end": (IMAGE, cut(0.9), "eecs442_0002.jpg cannot be read as an image"),
    "photo that is text": (IMAGE, lambda path: path.write_text("hello"), "cannot be read as an image"),
    "photo that is a bomb": (IMAGE, bomb, "eecs442_0002.jpg cannot be read as an image"),
    "photo that is a folder": (IMAGE, replace_by_folder, "eecs442_0002.jpg: Is a directory"),
    "photo that is a dangling link": (IMAGE, dangling_link, "eecs442_0002.jpg: No such file"),
    "photo of another size than its mask": (IMAGE, save(grey(9, (32, 48)), format="JPEG"), "48x32 but its mask"),
    "photo whose mask alone is turned": (("train/eecs442_0005.jpg",), save(grey(1, (48, 32))),
                                         "32x48 but its mask"),
    "mask of no bytes": (MASK, cut(0), "eecs442_0002.png cannot be read as an image"),
    "mask cut in half": (MASK, cut(0.5), "eecs442_0002.png cannot be read as an image"),
    "mask with a flipped bit": (MASK, flip_a_bit, "eecs442_0002.png cannot be read as an image"),
    "mask that is text": (MASK, lambda path: path.write_text("P5 1 1"), "cannot be read as an image"),
    "mask that is a bomb": (MASK, bomb, "eecs442_0002.png cannot be read as an image"),
    "mask that is a JPEG": (MASK, save(grey(1), format="JPEG"), "is a JPEG of mode L; a mask must be"),
    "mask that is a GIF": (MASK, save(grey(1), format="GIF"), "is a GIF of mode"),
    "mask in colours": (MASK, save(grey(1, (32, 32, 3))), "is a PNG of mode RGB; a mask must be a palette or grey"),
    "mask with transparency": (MASK, save(grey(1, (32, 32, 4))), "is a PNG of mode RGBA"),
    "mask of 16 bits": (MASK, save(grey(1, dtype=np.uint16)), "is a PNG of mode I;16"),
    "mask with the class 5": (MASK, save(grey(5)), "has the value 5 in 1024 pixels; the classes are 0 others"),
    "mask with the value 254": (MASK, save(grey(254)), "has the value 254 in 1024 pixels"),
    "mask of another size": (MASK, save(grey(1, (16, 32))), "is 32x32 but its mask eecs442_0002.png is 32x16"),
    "test mask with a bad value": ("test_dev/eecs442_0007.png", save(grey(7)), "test_dev/eecs442_0007.png has the"),
}


@pytest.mark.parametrize("case", FACADES)
def test_facades(tiny_root, tmp_path, capsys, case):
    names, damage, message = FACADES[case]
    for name in [names] if isinstance(names, str) else names:
        damage(tiny_root / "mini_facade" / name)
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--data-root", tiny_root, "--out", tmp_path / "out")
    assert message in said and not (tmp_path / "out").exists()


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what was found on the path before
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(data.BadInput, match="cannot be read as an image"):
        files.read_image(Path("photo.jpg"), postscript)
    assert not (tmp_path / "started").exists()
    with pytest.raises(OSError):  # Pillow alone would start it
        Image.open(io.BytesIO(postscript)).load()
    assert (tmp_path / "started").exists()


FOLDERS = {
    "no test part": (lambda root: (root / "mini_facade/test_dev").rename(root / "elsewhere"), "test_dev has no .jpg"),
    "empty train part": (lambda root: [path.unlink() for path in (root / "mini_facade/train").iterdir()], "no .jpg"),
    "a file in place of the set": (lambda root: ((root / "mini_facade").rename(root / "x"),
                                                 (root / "mini_facade").write_text("")), "has no .jpg"),
    "photos alone": (lambda root: [path.unlink() for path in (root / "mini_facade/train").glob("*.png")], "beside it"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(tiny_root, tmp_path, capsys, case):
    damage, message = FOLDERS[case]
    damage(tiny_root)
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--data-root", tiny_root, "--out", tmp_path / "out")
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
    "labels with a flipped bit": (LABELS, lambda old: old[:500] + bytes([old[500] ^ 1]) + old[501:]),
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
    said = refused(capsys, "train_cls", "--protocol", "smoke", "--data-root", raw.parents[1], "--out", tmp_path / "o")
    assert f"{raw} is damaged" in said and "delete it and run python data.py" in said and not (tmp_path / "o").exists()


# ---- flags ----

FLAGS = {
    "train_cls --epochs 0": "--epochs 0: must be at least 1",
    "train_cls --epochs two": "argument --epochs: invalid int value: 'two'",
    "train_cls --batch -1": "--batch -1: must be at least 1",
    "train_cls --lr 0": "--lr 0.0: must be above 0",
    "train_cls --lr nan": "--lr nan: must be above 0",
    "train_cls --weight-decay inf": "--weight-decay inf: must be at least 0",
    "train_seg --weight-power nan": "--weight-power nan: must be finite",
    "train_cls --warmup 1": "--warmup 1.0: must be in [0, 1)",
    "train_cls --seed -1": "--seed -1: must be in [0, 2^31)",
    "train_cls --seed 4294967296": "must be in [0, 2^31)",
    "train_cls --depth 0": "--depth 0: must be at least 1",
    "train_cls --down average": "argument --down: invalid choice: 'average'",
    "train_cls --dwn stride": "unrecognized arguments: --dwn stride",
    "train_cls --dep 3": "unrecognized arguments: --dep 3",
    "train_cls stride": "unrecognized arguments: stride",
    "train_cls --tie 0.5": "--tie is of the digits in --composites: give both",
    "train_cls --composites --tie 1.5": "--tie 1.5: must be in [0, 1]",
    "train_cls --frozen": "--frozen takes its features from --base: give both",
    "train_cls --base x.pt": "--frozen takes its features from --base: give both",
    "train_cls --device tpu9": "--device tpu9: not usable here",
    "train_cls --data-root /no/such/place": "data root /no/such/place (from --data-root) is not a folder",
    "train_seg --width ten": "argument --width: invalid int value: 'ten'",
    "train_seg --width": "argument --width: expected one argument",
    "train_seg --act tanh": "argument --act: invalid choice: 'tanh'",
    "train_seg --protocol quick": "argument --protocol: invalid choice: 'quick'",
    "train_seg --precision int8": "argument --precision: invalid choice: 'int8'",
    "train_seg --split train": "argument --split: invalid choice: 'train'",
    "train_seg --device cuda:99": "--device cuda:99: not usable here",
    "train_seg --size 100": "--size 100: must be a multiple of 16",
    "train_seg --size 0": "--size 0: must be a multiple of 16",
    "train_seg --hourglasses 0": "--hourglasses 0: must be at least 1",
    "train_cls --train-images 0": "--train-images 0: must be at least 1",
    "train_seg --dropout 1": "--dropout 1.0: must be in [0, 1)",
    "train_seg --loss focal": "argument --loss: invalid choice: 'focal'",
    "train_seg --arch unet --no-inter-skip": "--inter-skip switches another network; --arch unet takes width",
    "interpret --figure x.bmp": "--figure x.bmp: must end in .png, .pdf or .svg",
    "interpret measure --images 0": "--images and --sweep-images must be at least 1",
    "interpret measure --checkpoint x.pt": "measure needs --checkpoint",
    "interpret --image x.png": "--checkpoint is missing",
    "interpret --checkpoint no.pt": "no.pt: No such file or directory",
    "export": "--checkpoint is missing",
    "export --checkpoint no.pt": "no.pt: No such file or directory",
}


@pytest.mark.parametrize("line", FLAGS)
def test_flags(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_fashion", lambda *a, **k: pytest.fail("read data before refusing"))
    assert FLAGS[line] in refused(capsys, *line.split())
    assert not os.listdir(tmp_path)


# ---- checkpoints and records ----

def resaved(change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        torch.save(change(state) or state, path)
    return damage


def deflated(path):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def with_setting(**settings):
    return resaved(lambda state: state["record"]["config"].update(settings))


CHECKPOINTS = {
    "of no bytes": (cut(0), "is no checkpoint of this project, or damaged"),
    "cut": (cut(0.7), "is no checkpoint of this project, or damaged"),
    "with a flipped bit": (flip_a_bit, "is no checkpoint of this project, or damaged"),
    "that is text": (lambda path: path.write_text("weights"), "is no checkpoint of this project, or damaged"),
    "that is a list": (resaved(lambda state: [1, 2]), "is no checkpoint of this project, or damaged"),
    "that is bare weights": (resaved(lambda state: state["model"]), "is no checkpoint of this project, or damaged"),
    "that holds code": (lambda path: torch.save({"identity": Path("x"), "epoch": 1, "model": print}, path),
                        "is no checkpoint of this project, or damaged"),
    "that is compressed, to any size": (deflated, "is no checkpoint of this project, or damaged"),
    "of a width that would take all memory": (with_setting(width=20000), "its settings and its weights do not fit"),
    "of a seed that leads out of the folder": (with_setting(seed="0/../../x"), "its settings and its weights do not"),
    "of an unknown architecture": (with_setting(arch="?"), "its settings and its weights do not fit"),
    "of an unfinished run": (resaved(lambda state: state.pop("record") and None), "is of an unfinished run (epoch 2)"),
    "of another data set": (resaved(lambda state: state["record"].update(data="0" * 64)), "the checkpoint was trained"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on the synthetic facades: its seed0.pt and data root."""
    folder = tmp_path_factory.mktemp("finished")
    make_tiny_root(folder / "root")
    argv = ["--protocol", "smoke", "--width", "4", "--device", "cpu", "--data-root", str(folder / "root")]
    assert cli.guard(lambda: train_seg.main([*argv, "--out", str(folder)])) == 0
    return folder / "seed0.pt", folder / "root"


@pytest.mark.parametrize("script", ["interpret", "export"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(finished, tmp_path, capsys, case, script):
    damage, message = CHECKPOINTS[case]
    path = tmp_path / "seed0.pt"
    path.write_bytes(finished[0].read_bytes())
    damage(path)
    said = refused(capsys, script, "--checkpoint", path, "--data-root", finished[1], "--device", "cpu")
    assert message in said and (case == "of another data set" or str(path) in said)
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == ["seed0.pt"]


RECORDS = {"of no bytes": "", "that is half": '{"config": {', "that is a list": "[]",
           "without metrics": json.dumps({"config": {}, "data": ""})}


@pytest.mark.parametrize("case", RECORDS)
def test_records(finished, tmp_path, capsys, case):
    (tmp_path / "seed0.json").write_text(RECORDS[case])
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--width", 4, "--device", "cpu", "--data-root",
                   finished[1], "--out", tmp_path)
    assert "seed0.json is no run record, or damaged" in said and "delete it" in said


def test_the_corpus_is_as_large_as_it_should_be():
    assert sum(map(len, (FACADES, FOLDERS, IDX, FLAGS, RECORDS))) + 2 * len(CHECKPOINTS) >= 60
