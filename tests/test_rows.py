"""That a row trains what its name says: its flags reach the network, the data and the loss."""

import dataclasses
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, run, run_seg
from PIL import Image
from test_models import ROWS

import data
import metrics
import models
import train_cls
import train_seg
from lab import batches, cli, engine, folders, provenance

MAKEFILE = (Path(__file__).parents[1] / "Makefile").read_text()
FLAGS = dict(re.findall(r"^(table[12]/\S+|surrogates/\S+)\s*:=[ \t]*(.*)$", MAKEFILE, re.M))


def switched(script, *flags):
    """The settings that these flags change."""
    settings, defaults = (dataclasses.asdict(cli.parse(script.Config, "", [*argv, "--out", "x"],
                                                       script.PROTOCOLS)) for argv in (flags, ()))
    return {name: value for name, value in settings.items() if value != defaults[name]}


@pytest.mark.parametrize("name", [name for name in FLAGS if name.startswith("table")])
def test_a_rows_flags_are_what_its_name_says(name):
    table, row = name.split("/")
    script = train_cls if table == "table1" else train_seg
    if row in ("ce", "dice"):
        expected = {"loss": row}
    elif row == "unet":
        expected = {"arch": "unet"}
    elif row in ROWS:
        defaults = script.Config(out="x")
        expected = {key: value for key, value in ROWS[row][1].items()
                    if value != getattr(defaults, key)}
    else:
        depth, width = map(int, re.fullmatch(r"maxpool-(\d)-(\d\d)", row).groups())
        expected = {"depth": depth} if depth != 2 else {"width": width}
    assert switched(script, *shlex.split(FLAGS[name])) == expected


def test_a_surrogates_flags_are_what_its_name_says():
    names = [name.split("/")[1] for name in FLAGS if name.startswith("surrogates/")]
    assert len(names) == 8
    for name in names:
        flags = FLAGS[f"surrogates/{name}"]
        kind, tie = name.split("-tie")
        assert flags.endswith(f"--tie {tie}") and (kind == "frozen") == ("--frozen" in flags)


def test_split_dev_reaches_the_data(fashion_root, capsys):
    """In train_cls; what train_seg says of a set too small for it is in test_bad_data.py."""
    for split, name in (("dev", "val"), ("full", "test")):
        assert run("train_cls", "--split", split, "--width", 8, "--batch", 8, "--dry-run",
                   "--data-root", fashion_root) == 0
        assert f"\n{name} accuracy" in capsys.readouterr().out


def test_frozen_features_are_those_of_the_base(fashion_root, tmp_path):
    flags = ("--protocol", "smoke", "--width", 4, "--depth", 1, "--train-images", 256,
             "--data-root", fashion_root)
    base = tmp_path / "base/seed0.pt"
    assert run("train_cls", *flags, "--out", tmp_path / "base") == 0
    assert run("train_cls", *flags, "--composites", "--frozen", "--base", base,
               "--out", tmp_path / "frozen") == 0
    model, _ = engine.load_trained(base, torch.device("cpu"), models.build)
    record = json.loads((tmp_path / "frozen/seed0.json").read_text())
    assert record["features_sha256"] == provenance.weights_digest(model.stages)


def test_frozen_features_see_no_held_out_image_and_the_normalisation_they_know(
        shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))  # nothing of it is read
    flags = ("--protocol", "smoke", "--width", 4, "--depth", 1, "--size", 16, "--batch", 4)
    brighter = Path(shutil.copytree(shapes, tmp_path / "brighter"))
    for path in sorted(brighter.rglob("*.png")):
        Image.open(path).point(lambda value: value // 2 + 128).save(path)
    base = ("--frozen", "--base", tmp_path / "base/seed0.pt", "--data", brighter)
    assert run("train_cls", *flags, "--data", shapes, "--out", tmp_path / "base") == 0
    assert run("train_cls", *flags, *base, "--out", tmp_path / "frozen") == 0
    of_base, frozen = (json.loads((tmp_path / name / "seed0.json").read_text())["about_data"]
                       for name in ("base", "frozen"))
    assert (frozen["mean"], frozen["std"]) == (of_base["mean"], of_base["std"])
    said = refused(capsys, "train_cls", *flags, *base, "--split", "dev")
    assert "has split full, this run has dev" in said


@pytest.mark.parametrize("flag, flips", [((), True), (("--no-flip",), False)])
def test_images_are_mirrored_unless_left_and_right_differ(tiny_root, tmp_path, monkeypatch, flag,
                                                          flips):
    asked, shuffled = [], batches.shuffled
    monkeypatch.setattr(batches, "shuffled", lambda data, batch, seed, epoch, flip, first:
                        asked.append(flip) or shuffled(data, batch, seed, epoch, flip, first))
    assert run_seg(tiny_root, tmp_path, *flag) == 0
    assert asked == [flips] * 2


def test_class_weights_are_of_the_training_split(tiny_root, tmp_path):
    assert run_seg(tiny_root, tmp_path, "--weight-power", "0.25") == 0
    record = json.loads((tmp_path / "seed0.json").read_text())
    counts = data.load_facades(tiny_root, size=32).train.class_counts(5)
    assert record["class_pixels"] == counts.tolist()
    assert record["class_weights"] == models.class_weights(counts, 0.25).tolist()


def test_histograms_are_of_the_test_split_by_group_and_hold_the_records_ap(streets, tmp_path):
    assert run("train_seg", "--protocol", "smoke", "--data", streets, "--width", 4, "--batch", 2,
               "--epochs", 8, "--out", tmp_path) == 0
    record = json.loads((tmp_path / "seed0.json").read_text())
    arrays = np.load(tmp_path / "seed0.npz")
    test = folders.load(streets, "segmentation", 32).test
    assert arrays["groups"].tolist() == test.photos.unique().tolist()
    assert len(arrays["groups"]) < len(test)
    assert arrays["hits"].sum((0, 2)).tolist() == test.class_counts(7).tolist()
    hits, misses = arrays["hits"].sum(0), arrays["misses"].sum(0)
    for c, ap in enumerate(record["metrics"]["test"]["ap"].values()):
        # a bin has no order: the least that it can stand for, and the most
        least = [[1] * h + [0] * m for h, m in zip(hits[c], misses[c])]
        ranked = np.concatenate(least)[::-1]
        precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
        none = np.zeros_like(hits[c])
        most = metrics.binned_average_precision(np.stack([none, hits[c]], 1).reshape(1, -1),
                                                np.stack([misses[c], none], 1).reshape(1, -1))
        assert precision[ranked == 1].mean() - 1e-6 <= ap <= most[0] + 1e-6
        assert most[0] - precision[ranked == 1].mean() < 0.2  # so that this says something
