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
        targets[1] = batches.VOID
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
