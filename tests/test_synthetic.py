"""Results of drawn facades are none of photographs: every place that shows one says SYNTHETIC."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import interpret
import models
import study
import train_seg
from lab import cli, engine, figures, forms


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of two finished runs on a few drawn facades, as of a root without the set."""
    folder = tmp_path_factory.mktemp("synthetic")
    patch = pytest.MonkeyPatch()
    drawn = [torch.from_numpy(np.stack(part)) for part in
             zip(*[data.synthetic_facade(i, 32) for i in range(6)])]
    pair = drawn[0].permute(0, 3, 1, 2), drawn[1]
    patch.setattr(data.synthetic, "drawn_splits", lambda counts, size: ([pair, pair], "0" * 64))
    (folder / "empty").mkdir()
    argv = ["--protocol", "smoke", "--width", "4", "--batch", "2", "--device", "cpu"]
    for seed in ("0", "1"):
        argv_of = [*argv, "--seed", seed, "--data-root", str(folder / "empty")]
        out = folder / "results/smoke/table2/standard"
        assert cli.guard(lambda: train_seg.main([*argv_of, "--out", str(out)])) == 0
    yield out
    patch.undo()


def test_scores(trained, capsys):
    argv = ["--protocol", "smoke", "--width", "4", "--batch", "2", "--device", "cpu"]
    argv += ["--data-root", str(trained.parents[3] / "empty"), "--out", str(trained)]
    assert cli.guard(lambda: train_seg.main(argv)) == 0  # complete: it shows the record
    told = [line for line in capsys.readouterr().out.splitlines() if ": MAP" in line]
    assert len(told) == 2
    assert all(line.endswith("(6 images of SYNTHETIC facades)") for line in told)


def test_tables_and_verdicts(trained):
    results = trained.parents[2]
    for what in ("table2", "claims"):
        study.main([what, "--protocol", "smoke", "--results", str(results)])
        text = (results / f"smoke/{what}.md").read_text()
        assert text.endswith("SYNTHETIC data: drawn, not photographed.\n")
    record = json.loads((trained / "seed0.json").read_text())
    record["about_data"]["synthetic"] = False
    assert "SYNTHETIC" not in study.render({"standard": {0: record}}, "table2", 1)


def test_figures(trained, monkeypatch):
    saved = {}
    monkeypatch.setattr(figures, "write", lambda figure, path: saved.update({path.name: figure}))
    argv = ["--checkpoint", str(trained / "seed0.pt"), "--device", "cpu"]
    argv += ["--data-root", str(trained.parents[3] / "empty")]
    photo = trained.parent / "photo.png"
    Image.fromarray(data.synthetic_facade(0, 32)[0]).save(photo)
    for flags in (argv, [*argv, "--image", str(photo), "--figure", "own.png"]):
        assert cli.guard(lambda: interpret.main(flags)) == 0
    study.main(["figures", "--protocol", "smoke", "--results", str(trained.parents[2])])
    assert set(saved) == {"predictions.png", "own.png", "table2.png", "table2-curves.png",
                          "imbalance.png"}
    for name, figure in saved.items():
        labels = [figure.get_suptitle(), *(ax.get_xlabel() for ax in figure.axes)]
        assert any("SYNTHETIC" in label for label in labels), name


def test_exported_forms(trained, capsys):
    model, record = engine.load_trained(trained / "seed0.pt", torch.device("cpu"), models.build)
    assert "NOTE" in (told := capsys.readouterr().err) and told.endswith("on SYNTHETIC facades\n")
    assert forms.describe(model, record)["data"] == "SYNTHETIC facades"
