"""The error of a difference due to the choice of test images, where images belong to groups."""

import numpy as np
import pytest
import torch

import train_cls
from lab import estimates, records
from lab.batches import Split


def rows_of(tmp_path, **arrays):
    """Two rows of one seed, whose records lie beside their arrays."""
    records.load_arrays.cache_clear()
    rows = {}
    for row in ("base", "other"):
        path = tmp_path / row / "seed0.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, target=arrays["target"], prediction=arrays[row],
                 **({"group": arrays["group"]} if "group" in arrays else {}))
        rows[row] = {0: {"path": str(path.with_suffix(".json"))}}
    return rows


def part(tmp_path, **arrays):
    return estimates.test_set_part(rows_of(tmp_path, **arrays), "other", "base", "accuracy", {})


def classified(groups=40, each=5, alike=True):
    """Predictions of two rows; `alike`: all images of a group are right, or all are wrong."""
    pick = np.random.default_rng(0)
    drawn, times = (1, each) if alike else (each, 1)
    hit = lambda: (pick.random((groups, drawn)) < 0.7).repeat(times, 1)
    return {"target": np.ones(groups * each, np.uint8),
            "base": hit().reshape(-1).astype(np.uint8), "other": hit().reshape(-1).astype(np.uint8)}


def test_groups_are_resampled_as_a_bootstrap_does(tmp_path):
    arrays, group = classified(), np.arange(40).repeat(5)
    found = part(tmp_path, **arrays, group=group)
    difference = (arrays["other"] - arrays["base"].astype(float)).reshape(40, 5)
    draws = np.random.default_rng(1).integers(40, size=(4000, 40))
    assert found.variance == pytest.approx(difference[draws].mean((1, 2)).var(), rel=0.06)
    assert found.dof == 39
    alone = part(tmp_path, **arrays)
    assert alone.dof == 199 and found.variance == pytest.approx(5 * alone.variance)


def test_a_group_an_image_is_the_rule_for_images(tmp_path):
    arrays = classified(alike=False)
    expected, found = part(tmp_path, **arrays), part(tmp_path, **arrays, group=np.arange(200)[::-1])
    assert found.variance == pytest.approx(expected.variance, rel=1e-12)
    assert found.dof == expected.dof


def test_groups_of_unequal_sizes(tmp_path):
    arrays, group = classified(), np.repeat(np.arange(20), np.arange(1, 20).tolist() + [10])
    found = part(tmp_path, **arrays, group=group)
    difference, pick = arrays["other"] - arrays["base"].astype(float), np.random.default_rng(1)
    means = []
    for _ in range(4000):
        images = np.concatenate([np.flatnonzero(group == g) for g in pick.integers(20, size=20)])
        means.append(difference[images].mean())
    assert found.variance == pytest.approx(np.var(means), rel=0.25)  # linearised


def test_a_run_keeps_the_groups_of_its_images():
    images, targets = torch.zeros(3, 1, 4, 4), torch.zeros(3, dtype=torch.uint8)
    of = lambda *groups: train_cls.per_image(torch.eye(3), Split(images, targets,
                                                                 torch.tensor(groups)))
    assert of(4, 2, 4)["group"].tolist() == [4, 2, 4] and "group" not in of(2, 1, 0)
