"""The pictures of a trained model: made from a finished run's checkpoint, of its own data alone."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch

import data
import engine
import interpret
import train_cls
import train_seg


@pytest.fixture
def trained(tiny_root, tmp_path):
    argv = ["--protocol", "smoke", "--size", "32", "--width", "4", "--device", "cpu", "--data-root", str(tiny_root)]
    assert engine.guard(lambda: train_seg.main([*argv, "--out", str(tmp_path)])) == 0
    return tmp_path / "seed0.pt"


def draw(*flags):
    return engine.guard(lambda: interpret.main([*map(str, flags), "--device", "cpu"]))


def test_segmentation_figure(trained, tiny_root, tmp_path):
    assert draw("--checkpoint", trained, "--data-root", tiny_root, "--figure", tmp_path / "new/figure.png") == 0
    picture = matplotlib.image.imread(tmp_path / "new/figure.png")
    assert picture.shape[0] > 800 and len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 500


def test_classification_figure(fashion_root, tmp_path):
    argv = ["--protocol", "smoke", "--device", "cpu", "--data-root", str(fashion_root), "--out", str(tmp_path)]
    assert engine.guard(lambda: train_cls.main(argv)) == 0
    assert draw("--checkpoint", tmp_path / "seed0.pt", "--data-root", fashion_root, "--figure", tmp_path / "f.png") == 0
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_rows_are_the_best_the_median_and_the_worst(tiny_root):
    dataset = data.load_facades(tiny_root, size=32)
    logits = 9.0 * torch.nn.functional.one_hot(dataset.test.targets.long(), 5).movedim(-1, 1)  # all right
    logits[1] = logits[1].flip(0)  # but for one image
    figure = interpret.draw_segmentation(dataset, logits, "title")
    labels = [ax.get_ylabel().split("\n") for ax in figure.axes[::4]]
    assert [label[0].split(":")[0] for label in labels] == ["best", "median", "next to worst", "worst"]
    assert labels[0][1] == "mean IoU 100 %" and labels[-1][0] == "worst: no. 1"
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "truth", "prediction", "errors"]


def test_figures_of_a_study_are_drawn_from_records_alone(trained, tmp_path, capsys):
    record = json.loads(trained.with_suffix(".json").read_text())
    for row in ("standard", "unet", "my-own"):
        for seed in (0, 1):
            record["config"]["seed"] = seed
            record["metrics"]["test"]["map"] += 0.01 * (seed + len(row)) / 10
            path = tmp_path / f"results/smoke/table2/{row}/seed{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record))
    assert draw("--study", "smoke", "--results", tmp_path / "results") == 0
    assert {path.name for path in (tmp_path / "results/smoke").glob("*.png")} == {"table2.png", "table2-curves.png",
                                                                                 "imbalance.png"}
    assert "table1 has no record yet" in capsys.readouterr().out


def test_differences_show_ours_and_the_reports():
    def record(value):
        return {"metrics": {"test": {"accuracy": value}}}
    rows = {"maxpool-2-32": {0: record(0.9), 1: record(0.9)}, "stride-2-32": {0: record(0.88), 1: record(0.89)},
            "my-own": {0: record(0.95)}}
    ax = interpret.draw_differences(rows, "table1").axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stride-2-32", "my-own"]
    drawn = sorted(round(float(line.get_xdata()[0]), 2) for line in ax.lines if line.get_marker() in ("o", "D"))
    assert drawn == [-1.5, -1.15, 5.0]  # ours, the report's, and a row that the report does not have


def test_refusals(trained, tiny_root, tmp_path, capsys):
    def message(*flags):
        assert draw(*flags) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--checkpoint is missing" in message()
    assert "nothing.pt: No such file" in message("--checkpoint", tmp_path / "nothing.pt")
    (tmp_path / "empty").mkdir()
    said = message("--checkpoint", trained, "--data-root", tmp_path / "empty")
    assert "the checkpoint was trained on mini facade" in said
    state = torch.load(trained, weights_only=True)
    del state["record"]
    torch.save(state, tmp_path / "half.pt")
    assert "half.pt is of an unfinished run (epoch 2)" in message("--checkpoint", tmp_path / "half.pt")
    assert "must end in .png" in message("--checkpoint", trained, "--figure", tmp_path / "figure.xyz")
