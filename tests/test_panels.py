"""Pictures of images side by side, for sets of any kind; the study's are in test_interpret.py."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lab import batches, panels


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_pictures_of_any_set(task):
    """Of grey images, more classes than fit beside each other, void pixels, and odd names."""
    torch.manual_seed(0)
    classes = tuple(f"$\\frac {i}$" for i in range(40))  # no formula, which could not be drawn
    shape = (6, 16, 16) if task == "segmentation" else (6,)
    targets = torch.randint(0, 40, shape, dtype=torch.uint8)
    each = [0.5, math.nan, 0.1, 0.9, 0.3, 0.2]
    if task == "segmentation":
        targets[targets == 39] = targets[targets == 7] = 8  # class 39 is nowhere
        targets[5, 0, :3], targets[0, 0, 0], targets[1] = 7, 7, batches.VOID
    split = batches.Split(torch.randint(0, 255, (6, 1, 16, 16), dtype=torch.uint8), targets,
                          torch.arange(6))
    dataset = batches.Dataset("$my ^ set$", classes, (0.5,), (0.2,), "", False, split, split,
                              palette=((9, 9, 9),) * 40)
    logits = torch.randn(6, 40, *shape[1:])
    figure = (panels.draw_classification(dataset, logits, "") if task == "classification" else
              panels.draw_segmentation(dataset, logits, each, ""))
    figure.savefig(io.BytesIO())
    if task == "segmentation":
        labels = [row[0].get_ylabel() for row in np.reshape(figure.axes, (4, 4))]
        assert [label.split()[-2] for label in labels] == ["90", "30", "20", "10"]
        assert labels[2].startswith("most ") and "no. 5\n" in labels[2]
        assert figure.legends[0].get_texts()[-1].get_text() == "void"


def attention(predictions, ties="tie 0.9"):
    """Figure 1 of maps that favour class 1, whatever the networks say."""
    maps = np.zeros((3, 4, 4), np.float32)
    maps[1], maps[0, 0, 0] = 1, -1
    sample = {"index": 7, "grid": np.zeros((8, 8)), "target": 2, "cell": 1,
              "maps": dict.fromkeys(predictions, maps), "predictions": predictions}
    return panels.draw_attention([sample], ("a", "b", "c"), ties)


def test_right_and_wrong_are_the_networks_word_not_the_maps():
    """The classifier's bias is not in the maps, and may decide."""
    figure = attention({"frozen": 2, "scratch": 1})
    labels = [label for ax in figure.axes if (label := ax.get_ylabel())]
    assert [label.split("\n")[:2] for label in labels] == [["frozen: right", "c"],
                                                           ["scratch: wrong", "b"]]
    frames = [[ax.spines["top"].get_linewidth() > 1 for ax in figure.axes[i:i + 4]]
              for i in (0, 4)]
    assert frames == [[False, False, False, True], [False, False, True, True]]
    true, wrong = (figure.axes[i].spines["top"] for i in (7, 6))
    assert true.get_linestyle() != wrong.get_linestyle()  # told apart in grey, too


def test_evidence_has_the_colours_of_the_page():
    """What favours a class is orange and what speaks against it blue, here and in a browser."""
    script = (Path(__file__).parents[1] / "web/js/draw.js").read_text()
    page = [json.loads(re.search(rf"{name} = (\[[\d, ]+\])", script)[1])
            for name in ("FOR", "AGAINST")]
    assert [panels.EVIDENCE(end, bytes=True)[:3] for end in (1.0, 0.0)] == [*map(tuple, page)]
    drawn = attention({"frozen": 2}).axes[2].get_images()[0]
    own = panels.draw_overlays([np.zeros((9, 9), np.uint8)], [np.ones((1, 4, 4))], ["a"], [["b"]],
                               diverging=True).axes[1].get_images()[1]
    assert drawn.cmap is own.cmap is panels.EVIDENCE and drawn.norm.vmax == -drawn.norm.vmin == 1


def drawn(ax):
    return np.asarray(ax.get_images()[-1].get_array())


def test_truth_prediction_and_errors_stand_under_their_names():
    targets = torch.zeros(2, 4, 4, dtype=torch.uint8)
    targets[1, 0], targets[1, 1] = 1, batches.VOID
    prediction = torch.zeros(2, 4, 4, dtype=torch.long)
    prediction[1, 1:3] = 1
    split = batches.Split(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), targets, torch.arange(2))
    palette = ((1, 2, 3), (4, 5, 6))
    dataset = batches.Dataset("", ("a", "b"), (0.5,) * 3, (0.2,) * 3, "", False, split, split,
                              palette=palette)
    logits = torch.nn.functional.one_hot(prediction, 2).movedim(-1, 1).float()
    worst = panels.draw_segmentation(dataset, logits, [1.0, 0.2], "").axes[12:16]
    void, (a, b) = (255, 255, 255), palette
    assert [tuple(row[0]) for row in drawn(worst[1])] == [b, void, a, a]
    assert [tuple(row[0]) for row in drawn(worst[2])] == [a, b, b, a]
    wrong = (drawn(worst[3]) == panels.WRONG).all(2)
    assert wrong[:, 0].tolist() == [True, False, True, False]  # void is no error
    assert worst[3].get_xlabel() == "67 % of pixels wrong"


def test_what_is_called_right_is_right_and_what_is_called_wrong_is_wrong():
    targets = torch.tensor([0, 0, 1, 1], dtype=torch.uint8)
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 4, 4)
    split = batches.Split(images, targets, torch.arange(4))
    dataset = batches.Dataset("", ("a", "b"), (0.5,), (0.2,), "", False, split, split)
    logits = torch.tensor([[0.0, 1], [1, 0], [0, 1], [1, 0]])
    axes = panels.draw_classification(dataset, logits, "").axes
    assert [int(drawn(ax)[0, 0]) for ax in axes] == [1, 2, 0, 3]
    assert [ax.get_xlabel().split("\n")[0] for ax in axes] == ["a", "b", "b", "a"]


def test_each_map_lies_over_the_image_under_its_own_caption():
    maps = np.stack([np.full((4, 4), value) for value in (0.1, 0.2, 0.3)])
    image = np.zeros((9, 9), np.uint8)
    axes = panels.draw_overlays([image], [maps], ["x"], [["p", "q", "r"]], diverging=False).axes
    assert [(ax.get_title(), drawn(ax)[0, 0]) for ax in axes[1:4]] == [
        ("p", 0.1), ("q", 0.2), ("r", 0.3)]


def test_the_dots_lie_around_the_garments_cell():
    """That of `attention` is cell 1, to the right above."""
    dots, = attention({"frozen": 2}).axes[1].patches
    assert (dots.get_xy(), dots.get_width(), dots.get_height()) == ((1.5, -0.5), 2, 2)


def test_accuracies_by_cell_lie_where_the_cells_do(monkeypatch):
    monkeypatch.setattr(panels, "across_seeds", lambda seeds, key: (float(key[-1]), 0.5))
    sweep = {key: np.zeros((29, 29)) for key in ("sweep_accuracy", "sweep_consistency")}
    ax = panels.draw_shifts("x", {}, sweep, (8, 2)).axes[0]
    assert drawn(ax).tolist() == [[0, 1], [2, 3]]  # numbered by rows
    assert [(text.get_position(), text.get_text()[:3]) for text in ax.texts] == [
        ((0, 0), "0.0"), ((1, 0), "1.0"), ((0, 1), "2.0"), ((1, 1), "3.0")]


def test_the_equivariance_error_of_each_padding_has_its_own_line():
    grid = np.add.outer(np.arange(8) % 4, np.arange(8) % 4) == 0
    error = {"zeros": np.full((8, 8), 0.5), "circular": np.where(grid, 0.0, 0.25)}
    axes = panels.draw_equivariance({"row": {0: {"error": error}}}).axes
    assert [drawn(ax)[1, 1] for ax in axes[:2]] == [50, 25]
    assert [ax.get_ylabel().split(" padding")[0] for ax in axes[:2]] == ["zero", "circular"]
    assert "of multiples of 4: 0 %,\nof all other shifts: 25.0 %" in axes[1].get_xlabel()
