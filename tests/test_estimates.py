"""The error of a difference: the choice of test images, in groups or not, and the seeds."""

import math

import numpy as np
import pytest
import torch
from made_records import table, verdicts, write_record

import study
import train_cls
from lab import estimates, records, statistics
from lab.batches import Split
from lab.files import BadInput


def rows_of(tmp_path, **arrays):
    """Two rows of one seed, whose records lie beside their arrays."""
    records.load_arrays.cache_clear()
    rows = {}
    for row in ("base", "other"):
        path = tmp_path / row / "seed0.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, target=arrays["target"], prediction=arrays[row],
                 **({"group": arrays["group"]} if "group" in arrays else {}))
        right = float((arrays[row] == arrays["target"]).mean())
        rows[row] = {0: {"path": str(path.with_suffix(".json")),
                         "metrics": {"test": {"accuracy": right, "map": 0.5}}}}
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
    assert alone.dof == 199
    assert found.variance == pytest.approx(5 * alone.variance * (40 / 39) / (200 / 199))


def test_the_variance_of_a_sample_is_that_of_its_population(tmp_path):
    """Divided by n - 1: with few images, or few groups, n would make every interval too narrow."""
    right = {"target": np.ones(4, np.uint8), "base": np.array([0, 0, 1, 1], np.uint8),
             "other": np.array([1, 1, 1, 0], np.uint8)}
    assert part(tmp_path, **right).variance == pytest.approx(np.var([1, 1, 0, -1], ddof=1) / 4)
    grouped = part(tmp_path, **right, group=np.array([0, 0, 1, 1]))
    assert grouped.variance == pytest.approx(np.var([2, -1], ddof=1) * 2 / 4**2)  # of two sums
    assert grouped.dof == 1


@pytest.mark.parametrize("group", [None, [7, 7, 9, 9]])
def test_crops_of_one_photo_are_no_independent_images(tmp_path, group):
    """In segmentation, where a photo may have several: a mean over images needs their groups."""
    records.load_arrays.cache_clear()
    rows, counts = {}, np.zeros((2, 1, 3), np.int64)
    for row, values in (("base", [0.5, 0.5, 0.5, 0.5]), ("other", [0.7, 0.8, 0.4, 0.5])):
        path = tmp_path / f"{row}.npz"
        np.savez(path, hits=counts, misses=counts, groups=[7, 9], miou=values,
                 **({} if group is None else {"group": group}))
        rows[row] = {0: {"path": str(path.with_suffix(".json")),
                         "metrics": {"test": {"miou": sum(values) / 4}}}}
    of_images = lambda: estimates.test_set_part(rows, "other", "base", "miou", {})
    if group is None:
        with pytest.raises(BadInput, match="other.npz has miou of each image and not what group"):
            of_images()
    else:
        assert of_images().dof == 1  # two photos


@pytest.mark.parametrize("group, units", [(None, 8), (np.arange(8) // 2, 4)])
def test_rows_that_agree_on_every_image_may_differ_on_the_next(tmp_path, group, units):
    """As all do on a small and easy set: the next image, or group, may be the first."""
    right = dict.fromkeys(("target", "base", "other"), np.ones(8, np.uint8))
    found = part(tmp_path, **right, **({} if group is None else {"group": group}))
    assert (found.variance, found.dof) == (pytest.approx(1 / units**2), units - 1)


def test_so_do_redrawn_metrics_that_agree_on_every_draw(tmp_path):
    rows = rows_of(tmp_path, **dict.fromkeys(("target", "base", "other"), np.ones(8, np.uint8)))
    for row in rows:
        np.savez(tmp_path / row / "seed0.npz", hits=np.ones((8, 1, 4)), misses=np.ones((8, 1, 4)),
                 groups=np.arange(8))
    records.load_arrays.cache_clear()
    of = lambda variance: estimates.test_set_part(rows, "other", "base", "map", {
        "map": lambda record: np.array([0, 1] if "other" in record["path"] else [0, 0]) * variance})
    assert of(0).variance == pytest.approx(1 / 64) and of(0).dof == 7
    assert of(0.02).variance == pytest.approx(0.01**2 * 8 / 7)  # one that is seen stands


def test_one_image_tells_nothing_of_the_next(tmp_path):
    one = part(tmp_path, **dict.fromkeys(("target", "base", "other"), np.ones(1, np.uint8)))
    assert np.isnan(one.variance)


def test_a_small_and_easy_set_decides_nothing(tmp_path):
    """All rows right on all of 8 images of one's own: no interval of 0, and no verdict."""
    for row in ("maxpool-2-32", "maxpool-2-32-noact"):
        for seed in range(3):
            path = write_record(tmp_path, row, seed, 1.0)
            np.savez(path.with_suffix(".npz"), prediction=np.ones(8), target=np.ones(8))
    assert table(tmp_path)["maxpool-2-32-noact"][0] == "+0.00 ± 29.56"  # 2.3646 / 8
    found = verdicts(tmp_path)["C2"]
    assert found["verdict"] == "undecided" and found["p"] > 0.5


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


# ---- a difference by numbers ----

def test_a_difference_has_the_spreads_of_both_its_rows_by_all_runs():
    """Each row's own spread, after what a seed does to all rows alike: no paired t-test."""
    of = {"a": [0.90, 0.91, 0.905], "b": [0.80, 0.86, 0.83], "c": [0.85, 0.84, 0.86]}
    rows = {row: {seed: {"path": "x", "metrics": {"train": {"accuracy": value}}}
                  for seed, value in enumerate(values)} for row, values in of.items()}
    variance, dof = statistics.row_spreads(100 * np.array([*of.values()]))
    expected = statistics.sum_of(*map(statistics.Part, variance[:2], dof[:2]))
    error, = study.estimate(rows, "b", "a", "train", "accuracy").error
    assert error.variance == pytest.approx(expected.variance / 3)
    assert error.dof == pytest.approx(expected.dof)


def test_the_choice_of_test_images_is_in_a_prediction_and_in_no_training_metric(tmp_path):
    base, row = "maxpool-2-32", "maxpool-2-32-noact"
    for name, right in ((base, (900, 900)), (row, (850, 849))):
        for seed in (0, 1):
            path = write_record(tmp_path, name, seed, right[seed] / 1000, 0.99 + seed / 1000)
            np.savez(path.with_suffix(".npz"), prediction=np.arange(1000) < right[seed],
                     target=np.ones(1000, bool))
    rows = study.load_records(tmp_path / "desk/table1", "desk")
    train, test = (study.estimate(rows, row, base, split, "accuracy")
                   for split in ("train", "test"))
    assert len(train.error) == 1 and train.seeds_alone
    seeds, images = test.error
    assert test.one_more[0].variance == pytest.approx(3 * seeds.variance)  # of two and one more
    assert test.one_more[1].variance == images.variance > 0
    typical = estimates.typical_errors(rows, base, "accuracy", {})
    assert typical["test_set"] == pytest.approx(math.sqrt(images.variance))


def test_the_redrawn_test_sets_are_the_same_in_every_process():
    first = study.photo_draws(67)
    study.photo_draws.cache_clear()
    assert np.array_equal(study.photo_draws(67), first)
    assert first.shape == (1000, 67) and (first.sum(1) == 67).all()
