"""A metric's difference between two rows of records, and the sources of its error.

The rule is in docs/statistics.md. Values in records are fractions; here they are points, percent
of one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lab.records import arrays_file, load_arrays, paired, pairs_of
from lab.statistics import Part, half_width, own_spread, row_spreads, sum_of

# {metric that is no mean over images: the file of a run's arrays -> float (draws,), its values on
# test sets whose groups were drawn with repetition, the same groups for every run}
Redraws = dict[str, Callable[[Path], np.ndarray]]


@dataclass(frozen=True)
class Estimate:
    """A metric's difference between two rows, or one row's value, in points.

    values are those of the seeds, paired; error and one_more are the sources of error of their
    mean, and of what one more such run would give. Both are empty with fewer than two seeds.
    """
    values: list[float]
    error: tuple[Part, ...] = ()
    one_more: tuple[Part, ...] = ()

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def half(self) -> float:
        return float(half_width(self.error)) if self.error else math.nan

    def holds(self, value: float) -> bool | None:
        """Is the value in the 95 % prediction interval of one more run? None where none is."""
        if not self.one_more:
            return None
        return bool(abs(value - self.mean) <= half_width(self.one_more))


def each_image(record: dict, key: str) -> np.ndarray | None:
    """The values per test image whose mean is a metric, None where the run kept none."""
    arrays = load_arrays(arrays_file(record))
    if key == "accuracy" and key not in arrays:
        return (arrays["prediction"] == arrays["target"]).astype(np.float64)
    return arrays[key].astype(np.float64) if key in arrays else None


def test_set_part(rows: dict, row: str, other: str | None, key: str,
                  redraws: Redraws) -> Part | None:
    """Error of a test metric's difference row - other due to the choice of images, over seeds.

    A metric in `redraws` is computed anew on redrawn groups of images; all others are means, so it
    is the variance over images divided by their number, or, where images belong to groups, that of
    the groups' sums: what redrawing groups would give. None where the runs kept no values.
    """
    pairs = pairs_of(rows, row, other) if other else [(one, None) for one in rows[row].values()]
    if key in redraws:
        per_unit = lambda record: redraws[key](arrays_file(record))
        units = len(load_arrays(arrays_file(pairs[0][0]))["groups"])
    else:
        per_unit = lambda record: each_image(record, key)
        if (first := per_unit(pairs[0][0])) is None:
            return None
        units = len(first)
    values = np.mean([per_unit(a) - (per_unit(b) if b else 0) for a, b in pairs], 0)
    group = load_arrays(arrays_file(pairs[0][0])).get("group")
    if key not in redraws and group is not None:
        which = np.unique(group, return_inverse=True)[1]
        sums = np.bincount(which, values - values.mean())
        return Part(float(np.square(sums).sum()) / len(values)**2, len(sums) - 1)
    return Part(float(np.var(values)) / (1 if key in redraws else units), units - 1)


def spreads(rows: dict, split: str, key: str) -> dict[str, Part]:
    """How much each row's runs vary in a metric, in points, less what a seed does to all rows."""
    seeds = sorted({seed for runs in rows.values() for seed in runs})
    value = lambda runs, seed: (runs[seed]["metrics"][split].get(key, math.nan)
                                if seed in runs else math.nan)
    scores = {row: [100 * value(runs, seed) for seed in seeds] for row, runs in rows.items()}
    scores = {row: values for row, values in scores.items() if not np.isnan(values).all()}
    parts = row_spreads(np.array([*scores.values()]))
    return {row: Part(*part) for row, *part in zip(scores, *parts)}


def estimate(rows: dict, row: str, other: str | None, split: str, key: str,
             redraws: Redraws) -> Estimate:
    """The difference row - other of a metric (or the row's own value), and its sources of error.

    Two sources: the seeds, and, on a held-out split, the choice of its images, where the runs kept
    what tells it. A row's own value varies by its seed's effect too. Only seeds that both rows have
    are compared; all runs tell the spread.
    """
    values = [100 * value for value in paired(rows, row, other, split, key)]
    n = len(values)
    if n < 2:
        return Estimate(values)
    if other is None:
        spread = Part(*own_spread(np.array(values)))
    else:
        of_row = spreads(rows, split, key)
        spread = sum_of(of_row[row], of_row[other])
    part = None if split == "train" else test_set_part(rows, row, other, key, redraws)
    images = () if part is None else (part.times(100**2),)
    return Estimate(values, (spread.times(1 / n), *images), (spread.times(1 + 1 / n), *images))
