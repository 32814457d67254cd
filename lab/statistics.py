"""Is a difference between rows of a table real? Spreads, intervals, p values and verdicts.

The rule, its sources and what a simulation says of it: docs/statistics.md. Every function works on
stacks of tables (leading axes), so that the simulation in the tests runs the code that judges a
study. SciPy is imported where a quantile is asked for: a machine that only makes records needs
none.
"""

from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # of a wrong decision anywhere in a study


def row_spreads(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much the runs of each row vary, once what their seed does to all rows is taken out.

    scores float (..., rows, seeds), NaN where a run is missing, in the same places of every table
    of the stack. Returns variances (..., rows) and degrees of freedom (rows,); NaN and 0 where they
    cannot be known.

    Row and seed effects are fitted by least squares to the cells that exist. A row's sum of squared
    residuals is divided by what it would be with equal spreads of one, its share of the residuals'
    degrees of freedom: (n - 1)(R - 1)/R where nothing is missing. With two rows this is the paired
    t-test.
    """
    *_, rows, seeds = scores.shape
    here = ~np.isnan(scores.reshape(-1, rows, seeds)[0])
    row, seed = np.nonzero(here)
    design = np.concatenate([row[:, None] == np.arange(rows),
                             seed[:, None] == np.arange(seeds)], 1).astype(float)
    residual_maker = np.eye(len(row)) - design @ np.linalg.pinv(design)
    residuals = scores[..., row, seed] @ residual_maker
    of_row = (row[:, None] == np.arange(rows)).astype(float)
    dof = residual_maker.diagonal() @ of_row
    dof = np.where(dof > 1e-9, dof, 0.0)
    # a row with one run, or a table with one row
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(dof > 0, residuals**2 @ of_row / dof, np.nan), dof


def own_spread(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Variance (...) over runs of a row's own values (..., seeds), seed effect and all; its dof."""
    dof = values.shape[-1] - 1
    return (np.var(values, axis=-1, ddof=1) if dof > 0 else np.full(values.shape[:-1], np.nan)), dof


@dataclass(frozen=True)
class Part:
    """One source of an estimate's error: the variance it causes, and how well that is known."""
    variance: np.ndarray | float
    dof: np.ndarray | float

    def times(self, factor: float) -> "Part":
        return Part(self.variance * factor, self.dof)


def sum_of(a: Part, b: Part) -> Part:
    """Two sources that are alike, such as two rows, as one (Welch 1947; Satterthwaite 1946)."""
    total = a.variance + b.variance
    with np.errstate(invalid="ignore", divide="ignore"):
        dof = total**2 / (np.square(a.variance) / a.dof + np.square(b.variance) / b.dof)
    return Part(total, np.where(total > 0, dof, np.minimum(a.dof, b.dof)))


def reach(level: np.ndarray | float, parts: tuple[Part, ...]) -> np.ndarray:
    """How far from the truth an estimate gets with probability `level`: a one-sided quantile.

    Each source has its own quantile t, and reach² is the sum of t² times variance: so t² is the
    mean of the sources' t², weighted by variance. Cochran and Cox weigh two samples in that way,
    but t itself; t² is never less. One Welch-Satterthwaite sum over all sources would not do:
    where few seeds happen to lie close together, it would take the many degrees of freedom of the
    test set for those of the whole (docs/statistics.md).
    """
    from scipy import stats
    return np.sqrt(sum(np.square(stats.t.isf(level, part.dof)) * part.variance for part in parts))


def half_width(parts: tuple[Part, ...]) -> np.ndarray:
    """Half of the 95 % interval of an estimate with these sources of error."""
    return reach(LEVEL / 2, parts)


def tail(distance: np.ndarray, parts: tuple[Part, ...]) -> np.ndarray:
    """One-sided p of an estimate that lies `distance` beyond a bound: the level of that reach."""
    from scipy import stats
    error = np.sqrt(np.maximum(sum(part.variance for part in parts), 1e-18))
    away = np.minimum(np.abs(distance) / error, 1e9)
    # the level lies between those that either source would give if all of the error were its own
    levels = [stats.t.sf(away, part.dof) for part in parts]
    low, high = np.log(np.maximum([np.minimum.reduce(levels), np.maximum.reduce(levels)], 1e-100))
    for _ in range(14 if len(parts) > 1 else 0):
        middle = (low + high) / 2
        nearer = reach(np.exp(middle), parts) > np.abs(distance)
        low, high = np.where(nearer, middle, low), np.where(nearer, high, middle)
    p = np.exp((low + high) / 2)
    return np.where(np.asarray(distance) > 0, p, 1 - p)


def evidence(mean: np.ndarray, parts: tuple[Part, ...], low: float,
             high: float) -> tuple[np.ndarray, np.ndarray]:
    """One-sided p values that the effect lies inside [low, high], and that it lies outside."""
    above_low = tail(mean - low, parts) if low > -np.inf else np.zeros_like(mean)
    below_high = tail(high - mean, parts) if high < np.inf else np.zeros_like(mean)
    return np.maximum(above_low, below_high), np.minimum(1 - above_low, 1 - below_high)


def claim(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p (...) of a claim that all its effects lie inside their ranges; does it lean to being true?

    inside, outside: p values (..., effects) from `evidence`. All must be shown inside, the largest
    p counts; one shown outside is enough, the smallest counts times their number (Bonferroni). The
    smaller of the two counts twice, for having looked both ways.
    """
    supported, contradicted = inside.max(-1), np.minimum(1, inside.shape[-1] * outside.min(-1))
    return np.minimum(1, 2 * np.minimum(supported, contradicted)), supported < contradicted


def holm(ps: np.ndarray) -> np.ndarray:
    """p values (..., claims), corrected for testing them all: Holm's step-down (Holm 1979)."""
    ps = np.asarray(ps, float)
    order = np.argsort(ps, -1)
    factor = ps.shape[-1] - np.arange(ps.shape[-1])
    adjusted = np.minimum(1, np.maximum.accumulate(np.take_along_axis(ps, order, -1) * factor, -1))
    back = np.empty_like(ps)
    np.put_along_axis(back, order, adjusted, -1)
    return back


def detectable(seeds: int, rows: int, claims: int, spread: float = 1.0, test_set: float = 0.0,
               units: int = 2, compared: int = 2, power: float = 0.8) -> float:
    """How far beyond the edge of its range a difference of two rows must lie to be decided.

    With so many seeds, in a table of so many rows, as the hardest of `claims` claims (Holm's first
    step), with this probability. spread is the standard deviation of one row over seeds, test_set
    the standard error that the choice of `units` held-out images or groups adds; the result is in
    their unit. compared=1: of one row's own value. Averaged over 4,000 draws of the spreads that so
    few seeds would show.
    """
    from scipy import stats
    draw, dof = np.random.default_rng(0), seeds - 1
    of_row = lambda: Part(spread**2 / seeds * draw.chisquare(seeds - 1, 4000) / (seeds - 1),
                          dof if compared == 1 else dof * (rows - 1) / rows)
    shown = of_row() if compared == 1 else sum_of(of_row(), of_row())
    needed = reach(LEVEL / 2 / claims, (shown, Part(test_set**2, units - 1)))
    error = np.sqrt(compared * spread**2 / seeds + test_set**2)
    low, high = 0.0, float(needed.max() + 10 * error)
    while high - low > 1e-4 * error:
        middle = (low + high) / 2
        enough = stats.norm.cdf((middle - needed) / error).mean() >= power
        low, high = (low, middle) if enough else (middle, high)
    return high
