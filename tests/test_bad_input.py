"""Bad flags, checkpoints and records, made by code: each case ends in one line and exit code 2."""

import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import cut, flip_a_bit, make_tiny_root, refused, trained

import train_cls
import train_seg

# ---- flags ----

FLAGS = {
    "train_cls --epochs 0": "--epochs 0: must be at least 1",
    "train_cls --epochs two": "argument --epochs: invalid int value: 'two'",
    "train_cls --batch -1": "--batch -1: must be at least 1",
    "train_cls --lr 0": "--lr 0.0: must be above 0",
    "train_cls --lr nan": "--lr nan: must be above 0",
    "train_cls --weight-decay inf": "--weight-decay inf: must be at least 0",
    "train_seg --weight-power nan": "--weight-power nan: must be in [0, 2]",
    "train_seg --weight-power 4000": "--weight-power 4000.0: must be in [0, 2]",
    "train_seg --weight-power 1 --loss dice": "--weight-power is of --loss wce; --loss dice",
    "train_cls --warmup 1": "--warmup 1.0: must be in [0, 1)",
    "interpret --checkpoint x.pt --image a.png --data here": "--image and --data: show files, or",
    "train_seg --plan -2": "--plan -2: must be at least 1 seed",
    "train_cls --device meta": "--device meta: not usable here",
    "train_cls --seed -1": "--seed -1: must be in [0, 2^31)",
    "train_cls --seed 4294967296": "must be in [0, 2^31)",
    "train_cls --depth 0": "--depth 0: must be at least 1",
    "train_cls --down average": "argument --down: invalid choice: 'average'",
    "train_cls --dwn stride": "unrecognized arguments: --dwn stride",
    "train_cls --dep 3": "unrecognized arguments: --dep 3",
    "train_cls stride": "unrecognized arguments: stride",
    "train_cls --tie 0.5": "--tie is of the digits in --composites: give both",
    "train_cls --composites --tie 1.5": "--tie 1.5: must be in [0, 1]",
    "train_cls --size 32": "--size 32 is of images of your own: give --data too",
    "train_cls --data x --size 30": "--size 30: must be a multiple of 4",
    "train_cls --data x --composites": "--composites are made of Fashion-MNIST and MNIST, not of",
    "train_cls --data no/such": "no/such is no folder; --data wants FOLDER/train",
    "train_cls --frozen": "--frozen takes its features from --base: give both",
    "train_cls --base x.pt": "--frozen takes its features from --base: give both",
    "train_cls --device tpu9": "--device tpu9: not usable here",
    "train_cls --data-root /no/such/place":
        "data root /no/such/place (from --data-root) is not a folder",
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
    "train_seg --arch unet --no-inter-skip":
        "--inter-skip switches another network; --arch unet takes width",
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
    for script, name in ((train_cls, "load_fashion"), (train_cls, "load_composites"),
                         (train_seg, "load_facades")):
        monkeypatch.setattr(script, name, lambda *_: pytest.fail("read data before refusing"))
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


MISSING = "missing"


def with_value(place, value):
    """A checkpoint whose record has another value at a.b, or, with MISSING, none."""
    def change(state):
        *way, last = place.split(".")
        found = state["record"]
        for name in way:
            found = found[name]
        if value is MISSING:
            del found[last]
        else:
            found[last] = value
    return resaved(change)


NO_CHECKPOINT = "is no checkpoint of this project, or damaged"
UNFIT = "its settings and its weights do not fit together"
CHECKPOINTS = {
    "of no bytes": (cut(0), NO_CHECKPOINT),
    "cut": (cut(0.7), NO_CHECKPOINT),
    "with a flipped bit": (flip_a_bit, NO_CHECKPOINT),
    "that is text": (lambda path: path.write_text("weights"), NO_CHECKPOINT),
    "that is a list": (resaved(lambda state: [1, 2]), NO_CHECKPOINT),
    "that is bare weights": (resaved(lambda state: state["model"]), NO_CHECKPOINT),
    "that holds code": (lambda path: torch.save({"identity": Path("x"), "epoch": 1, "model": print},
                                                path), NO_CHECKPOINT),
    "that is compressed, to any size": (deflated, NO_CHECKPOINT),
    "of a width that would take all memory": (with_setting(width=20000), UNFIT),
    "of an unknown architecture": (with_setting(arch="?"), UNFIT),
    **{f"whose {place} is {value!r}": (with_value(place, value), f"its record is damaged ({place})")
       for place, value in (
           ("about_data.mean", ["x", 0.5, 0.5]), ("about_data.mean", []), ("about_data.mean", None),
           ("about_data.std", [1.0]), ("about_data.std", [0.0, 1.0, 1.0]),
           ("about_data.size", "x"), ("about_data.size", 0), ("about_data.size", 30),
           ("about_data.size", 1 << 30), ("about_data.task", "classification"),
           ("about_data.task", "x"), ("about_data.classes", {}), ("about_data.name", "a\nb"),
           ("about_data.classes", ["a", "b", "c", "d", 5]), ("about_data.palette", [[1, 2, 3]]),
           ("about_data", None), ("data", MISSING), ("environment", MISSING), ("metrics", MISSING),
           ("environment.precision", "int3"), ("config", MISSING), ("config.batch", MISSING),
           ("config.batch", 0), ("config.split", "x"), ("config.seed", "0/../../x"))},
    "whose record is a list": (resaved(lambda state: state.update(record=[1])),
                               "its record is damaged (config)"),
    "of an unfinished run": (resaved(lambda state: state.pop("record") and None),
                             "is of an unfinished run (epoch 2)"),
    "of another data set": (resaved(lambda state: state["record"].update(data="0" * 64)),
                            "the checkpoint was trained"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run on the synthetic facades: its seed0.pt and data root."""
    folder = tmp_path_factory.mktemp("finished")
    make_tiny_root(folder / "root")
    trained("train_seg", folder, "--width", 4, root=folder / "root")
    return folder / "seed0.pt", folder / "root"


@pytest.mark.parametrize("script", ["interpret", "export"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(finished, tmp_path, capsys, case, script):
    damage, message = CHECKPOINTS[case]
    path = tmp_path / "seed0.pt"
    path.write_bytes(finished[0].read_bytes())
    damage(path)
    said = refused(capsys, script, "--checkpoint", path, "--data-root", finished[1],
                   "--device", "cpu")
    assert message in said and (case == "of another data set" or str(path) in said)
    assert [item.name for item in tmp_path.iterdir() if item.is_file()] == ["seed0.pt"]


def test_a_step_of_one_value_a_channel_is_refused(finished, capsys, monkeypatch):
    """Its norm would have no variance, which torch says in the first step only."""
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    for plan in ((), ("--plan", 1)):
        said = refused(capsys, "train_seg", "--size", 16, "--batch", 1, "--width", 4, "--dry-run",
                       "--data-root", finished[1], *plan)
        assert "the network does not train on its images of (3, 16, 16), 1 a step" in said


def test_heads_that_cannot_share_a_width(fashion_root, capsys):
    said = refused(capsys, "train_cls", "--block", "transformer", "--width", 25, "--dry-run",
                   "--device", "cpu", "--data-root", fashion_root)
    assert "100 channels cannot share them among 3 heads; choose a --width that is a" in said


RECORDS = {"of no bytes": "", "that is half": '{"config": {', "that is a list": "[]",
           "without metrics": json.dumps({"config": {}, "data": ""})}


@pytest.mark.parametrize("case", RECORDS)
def test_records(finished, tmp_path, capsys, case):
    (tmp_path / "seed0.json").write_text(RECORDS[case])
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--width", 4, "--device", "cpu",
                   "--data-root", finished[1], "--out", tmp_path)
    assert "seed0.json is no run record, or damaged" in said and "delete it" in said


def test_the_corpus_is_as_large_as_it_should_be():
    assert len(FLAGS) + len(RECORDS) + 2 * len(CHECKPOINTS) >= 65
