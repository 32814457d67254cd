"""Pictures of images side by side, for sets of any kind; the study's are in test_interpret.py."""

import io
import math

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
