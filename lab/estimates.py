"""A metric's difference between two rows of records, and the sources of its error.

The rule is in docs/statistics.md. Values in records are fractions; here they are points, percent
of one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lab.files import BadInput
from lab.records import arrays_file, arrays_of, paired, pairs_of, value_of
from lab.statistics import Part, half_width, own_spread, row_spreads, sum_of

# {metric that is no mean over images: a record -> float (draws,), its values on test sets whose
# groups were drawn with repetition, the same groups for every run}
Redraws = dict[str, Callable[[dict], np.ndarray]]
ROUNDING = 1e-9  # of a metric: redraws that differ by less agree


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
        """Half of the 95 % interval; NaN where one seed, or one test image, tells of no other."""
        return float(half_width(self.error)) if self.error else math.nan

    @property
    def seeds_alone(self) -> bool:
        """Does the interval leave the choice of images out?"""
        return len(self.error) == 1

    def holds(self, value: float) -> bool | None:
        """Is the value in the 95 % prediction interval of one more run? None where none is."""
        width = float(half_width(self.one_more)) if self.one_more else math.nan
        return None if math.isnan(width) else abs(value - self.mean) <= width


# (rows, row, other row or None, split, metric) -> estimate
Estimator = Callable[[dict, str, str | None, str, str], Estimate]


def each_image(record: dict, key: str) -> np.ndarray | None:
    """The values (images,) whose mean is a metric, None where the run kept none.

    BadInput where they cannot be that run's: another number of images, or another mean.
    """
    arrays, of_record = arrays_of(record), value_of(record, "test", key)
    if key in arrays:
        values = arrays[key].astype(np.float64)
    elif key == "accuracy":
        if not {"prediction", "target"} <= arrays.keys():
            raise BadInput(f"{arrays_file(record)} holds {', '.join(sorted(arrays))}, no accuracy "
                           f"of each image: it is of another kind of run")
        values = (arrays["prediction"] == arrays["target"]).astype(np.float64)
    else:
        return None
    # single precision, of a million images at most
    if not math.isnan(of_record) and abs(values.mean() - of_record) > 1e-5:
        raise BadInput(f"{arrays_file(record)} has a mean {key} of {values.mean():.6g}, the record "
                       f"{of_record:.6g}: it is another run's; delete {record['path']} and run it "
                       f"again")
    return values


def test_set_part(rows: dict, row: str, other: str | None, key: str,
                  redraws: Redraws) -> Part | None:
    """Error of a test metric's difference row - other due to the choice of images, over seeds.

    A metric in `redraws` is computed anew on redrawn groups of images; all others are means, so it
    is the variance over images divided by their number, or, where images belong to groups, that of
    the groups' sums: what redrawing groups would give. Variances are those of a sample, divided by
    one less than the number of units, images or groups.

    Where the units show less than that, a mean is taken to be as uncertain as if the rows differed
    by all of one unit: rows that agree on eight images may differ on the ninth. A metric in
    `redraws` is no mean, and one unit moves it by less: there only draws that all agree are taken
    so. With one unit the variance is NaN. None where the runs kept no values.
    """
    pairs = [(a, b) for a, b in pairs_of(rows, row, other)
             if not any(math.isnan(value_of(one, "test", key)) for one in (a, b) if one)]
    of = redraws.get(key) or (lambda record: each_image(record, key))
    found = [(of(a), of(b) if b else 0.0) for a, b in pairs]
    if not found or any(values is None for pair in found for values in pair):
        return None
    first = found[0][0].shape
    for records, pair in zip(pairs, found):
        for one, values in zip(records, pair):
            if one and values.shape != first:
                raise BadInput(f"{arrays_file(one)} has {len(values)} values of {key}, but "
                               f"{arrays_file(pairs[0][0])} has {first[0]}")
    values, arrays = np.mean([a - b for a, b in found], 0), arrays_of(pairs[0][0])
    if key in redraws:
        units, variance = len(arrays["groups"]), np.var(values)
        least = units**-2 if variance < ROUNDING**2 else 0.0
    else:
        sums = values - values.mean()
        if "group" in arrays:
            sums = np.bincount(np.unique(arrays["group"], return_inverse=True)[1], sums)
        elif "groups" in arrays:  # crops of one photo would count as so many photos
            raise BadInput(f"{arrays_file(pairs[0][0])} has {key} of each image and not what group "
                           f"each is of: keep that as `group` too (see docs/extending.md)")
        units, variance = len(sums), np.square(sums).sum() / len(values)**2
        least = units**-2
    if units < 2:
        return Part(math.nan, 0)
    return Part(max(float(variance) * units / (units - 1), least), units - 1)


def spreads(rows: dict, split: str, key: str) -> dict[str, Part]:
    """How much each row's runs vary in a metric, in points, less what a seed does to all rows."""
    seeds = sorted({seed for runs in rows.values() for seed in runs})
    value = lambda runs, seed: value_of(runs[seed], split, key) if seed in runs else math.nan
    scores = {row: [100 * value(runs, seed) for seed in seeds] for row, runs in rows.items()}
    scores = {row: values for row, values in scores.items() if not np.isnan(values).all()}
    parts = row_spreads(np.array([*scores.values()])) if scores else ()
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


def own_value(seeds: dict[int, dict], key: str) -> Estimate:
    """A test metric that is a mean over images, of the runs of one row alone."""
    return estimate({"": seeds}, "", None, "test", key, {})


def typical_errors(rows: dict, base: str, key: str, redraws: Redraws) -> dict | None:
    """Of a test metric, the medians over a table's rows of what `figures.draw_power` takes.

    None where the runs tell no spread, or no error by the choice of images.
    """
    parts = [test_set_part(rows, row, base, key, redraws) for row in rows if row != base]
    parts = [part for part in parts if part is not None and part.dof > 0]
    of_seeds = [part.variance for part in spreads(rows, "test", key).values() if part.dof > 0]
    if not parts or not of_seeds:
        return None
    typical = lambda variances: float(np.sqrt(np.median(variances)))
    return {"spread": typical(of_seeds), "units": parts[0].dof + 1, "rows": len(rows),
            "test_set": 100 * typical([part.variance for part in parts])}
