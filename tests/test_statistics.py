"""The verdict rule (docs/statistics.md): by hand, against SciPy, and in simulated studies."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lab import statistics
from lab.statistics import Part

ROWS, PHOTOS = 13, 67  # about what Table 2 has


# ---- studies with a known truth ----

def studies(seeds: int, seed_share: float, unequal: float, away: float, count: int,
            test_error: float = 0.3):
    """A study's estimates of 12 rows' differences from a shared base: means, sources of error.

    Rows vary over seeds by 1 in the median, by lognormal factors of spread `unequal`; the base by
    1. The seed moves all rows alike, with this share of the variance. Each difference lies `away`
    of its row's spread beyond 0, the edge of its claim's range.
    """
    draw = np.random.default_rng([seeds, int(100 * seed_share), int(100 * unequal), int(away)])
    spread = np.exp(draw.normal(0, unequal, (count, ROWS)))
    spread[:, 0] = 1
    scores = draw.normal(size=(count, ROWS, seeds)) * spread[..., None]
    seed_effect = np.sqrt(seed_share / (1 - seed_share) * (spread**2).mean(1))
    scores += seed_effect[:, None, None] * draw.normal(size=(count, 1, seeds))
    differences = count, ROWS - 1
    scores[:, 1:] += (away * spread[:, 1:] + test_error * draw.normal(size=differences))[..., None]
    of_photos = draw.chisquare(PHOTOS - 1, differences) / (PHOTOS - 1)
    test_set = Part(test_error**2 * of_photos, PHOTOS - 1)
    variance, dof = statistics.row_spreads(scores)
    rows = statistics.sum_of(Part(variance[:, 1:], dof[1:]), Part(variance[:, :1], dof[:1]))
    return scores[:, 1:].mean(-1) - scores[:, :1].mean(-1), (rows.times(1 / seeds), test_set)


def decided(means, error) -> np.ndarray:
    """Which of 13 claims are decided, a study a line: of each difference, and of all, like C1."""
    inside, outside = statistics.evidence(means, error, 0.0, math.inf)
    each = [statistics.claim(inside[:, i:i + 1], outside[:, i:i + 1])[0] for i in range(ROWS - 1)]
    p_values = np.stack([*each, statistics.claim(inside, outside)[0]], -1)
    return statistics.holm(p_values) < statistics.LEVEL


@pytest.mark.parametrize("seeds", [3, 4, 6])
@pytest.mark.parametrize("seed_share, unequal", [(0.0, 0.0), (0.25, 0.35), (0.5, 0.7)])
def test_at_most_one_study_in_twenty_decides_anything_wrongly(seeds, seed_share, unequal):
    """With every effect on the edge of its range, so that each decision is one too many."""
    wrong = decided(*studies(seeds, seed_share, unequal, away=0, count=3000)).any(1).mean()
    assert 0.003 < wrong < 0.05  # 0.01 to 0.03: a rule that decides nothing would not do either


@pytest.mark.parametrize("seeds, least", [(3, 0.3), (4, 0.8), (6, 0.95)])
def test_effects_of_five_spreads_are_decided(seeds, least):
    share = decided(*studies(seeds, 0.25, 0.35, away=5, count=1000))[:, :-1].mean()
    assert share > least


def test_one_sum_over_all_sources_would_be_wrong():
    """Why each source keeps its own quantile: three seeds, close by luck, and a test set."""
    draw = np.random.default_rng(0)
    seed = Part(draw.chisquare(2, 200_000) / 2, 2.0)
    test_set = Part(0.5 * draw.chisquare(66, 200_000) / 66, 66.0)
    means = draw.normal(0, math.sqrt(1.5), 200_000)
    level = 0.05 / 26
    one_sum = statistics.sum_of(seed, test_set)
    assert (statistics.tail(means, (one_sum,)) < level).mean() > 1.5 * level
    assert (statistics.tail(means, (seed, test_set)) < level).mean() < level


@pytest.mark.parametrize("size, wrong", [(0, 0.044), (1, 0.062), (2, 0.093)])
def test_what_a_seed_does_to_half_the_rows_makes_intervals_too_narrow(size, wrong):
    """A limit that docs/statistics.md names: the model knows what a seed does to all rows alone."""
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(20_000, ROWS, 6)) + draw.normal(size=(20_000, 1, 6))
    scores[:, ROWS // 2:] += size * draw.normal(size=(20_000, 1, 6))
    variance, dof = statistics.row_spreads(scores)
    error = statistics.sum_of(*(Part(variance[:, i], dof[i]) for i in (0, -1))).times(1 / 6)
    away = np.abs(scores[:, -1].mean(-1) - scores[:, 0].mean(-1))
    found = (away > statistics.half_width((error,))).mean()
    assert found == pytest.approx(wrong, abs=0.006)  # three standard errors


@pytest.mark.parametrize("seeds", [3, 6])
def test_what_is_said_to_be_detectable_of_one_row_is_detected_four_times_in_five(seeds):
    effect = statistics.detectable(seeds, ROWS, 13, spread=1.0, test_set=0.3, units=PHOTOS,
                                   compared=1)
    draw = np.random.default_rng(5)
    values = draw.normal(size=(20_000, seeds))
    means = effect + values.mean(1) + 0.3 * draw.normal(size=len(values))
    of_photos = draw.chisquare(PHOTOS - 1, len(values)) / (PHOTOS - 1)
    error = (Part(*statistics.own_spread(values)).times(1 / seeds),
             Part(0.3**2 * of_photos, PHOTOS - 1))
    inside, _ = statistics.evidence(means, error, 0.0, math.inf)
    assert (2 * 13 * inside < statistics.LEVEL).mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("seeds", [3, 6])
def test_what_is_said_to_be_detectable_is_detected_four_times_in_five(seeds):
    effect = statistics.detectable(seeds, ROWS, 13, spread=1.0, test_set=0.3, units=PHOTOS)
    means, error = studies(seeds, 0.0, 0.0, away=0, count=4000)
    inside, _ = statistics.evidence(means + effect, error, 0.0, math.inf)
    assert (2 * 13 * inside < statistics.LEVEL).mean() == pytest.approx(0.8, abs=0.02)


# ---- by hand, and against SciPy ----

def test_two_rows_are_the_paired_t_test():
    scores = np.random.default_rng(1).normal(size=(2, 5))
    variance, dof = statistics.row_spreads(scores)
    error = statistics.sum_of(*(Part(v, d) for v, d in zip(variance, dof))).times(1 / 5)
    t = stats.ttest_rel(*scores)
    assert error.dof == pytest.approx(4) and t.statistic == pytest.approx(
        (scores[0] - scores[1]).mean() / math.sqrt(error.variance))
    mean = np.float64((scores[0] - scores[1]).mean())
    inside, outside = statistics.evidence(mean, (error,), 0.0, math.inf)
    assert 2 * min(inside, outside) == pytest.approx(t.pvalue)


def test_a_seed_effect_is_no_spread():
    scores = np.array([[1.0, 2, 3], [5, 6, 7], [0, 1, 2]]) + np.array([10.0, -4, 7])
    variance, dof = statistics.row_spreads(scores)
    assert variance == pytest.approx(0, abs=1e-20) and dof == pytest.approx([4 / 3] * 3)


def test_spreads_are_estimated_without_bias_where_equal_and_where_runs_are_missing():
    draw = np.random.default_rng(2)
    scores = 3 * draw.normal(size=(20_000, 5, 4)) + draw.normal(size=(20_000, 1, 4)) * 7
    scores[:, 1, 3] = scores[:, 4, :2] = math.nan
    variance, dof = statistics.row_spreads(scores)
    assert variance.mean(0) == pytest.approx(9, rel=0.05)
    assert dof.sum() == pytest.approx(17 - 5 - 4 + 1)
    assert dof[4] < dof[1] < dof[0]


def test_a_row_with_one_run_has_no_spread():
    scores = np.array([[1.0, 2, 4], [2.0, math.nan, math.nan], [0, 3, 1]])
    variance, dof = statistics.row_spreads(scores)
    assert math.isnan(variance[1]) and dof[1] == 0 and np.isfinite(variance[[0, 2]]).all()
    assert math.isnan(statistics.own_spread(np.array([1.0]))[0])


@pytest.mark.parametrize("dof, expected", [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227)])
def test_an_interval_is_students(dof, expected):
    assert statistics.half_width((Part(1.0, dof),)) == pytest.approx(expected, abs=1e-4)


def test_widths_of_two_sources_add_in_quadrature_and_tail_undoes_it():
    parts = (Part(1.0, 2.0), Part(4.0, 66.0))
    width = statistics.half_width(parts)
    assert width == pytest.approx(math.hypot(stats.t.ppf(0.975, 2), 2 * stats.t.ppf(0.975, 66)))
    for level in (0.4, 0.025, 1e-3, 1e-6):
        reach = statistics.reach(level, parts)
        assert statistics.tail(reach, parts) == pytest.approx(level, rel=0.02)
        assert statistics.tail(-reach, parts) == pytest.approx(1 - level, rel=0.02)


def test_evidence():
    narrow = (Part(0.01, 5),)
    def at(mean, low, high, parts=narrow):
        return statistics.evidence(np.float64(mean), parts, low, high)

    inside, outside = at(0.0, -2, 2)
    assert inside < 1e-5 and outside > 0.999
    inside, outside = at(-5.0, -math.inf, -1)
    assert inside < 1e-5 and outside > 0.999
    inside, outside = at(3.0, -math.inf, -1)
    assert inside > 0.999 and outside < 1e-5
    assert at(2.0, 2, math.inf, (Part(1.0, 2),))[0] == pytest.approx(0.5)


def test_without_any_spread_the_mean_decides():
    none = (Part(0.0, 1), Part(0.0, 66))
    found = statistics.evidence(np.float64(1.0), none, 0.0, math.inf)
    assert [float(p) for p in found] == pytest.approx([0, 1])


def test_claims_by_hand():
    p, leans = statistics.claim(np.array([0.01, 0.02]), np.array([0.99, 0.98]))
    assert p == pytest.approx(0.04) and leans  # the weaker effect counts, for two ways of looking
    p, leans = statistics.claim(np.array([0.001, 0.99]), np.array([0.999, 0.01]))
    assert p == pytest.approx(0.04) and not leans  # one of two effects outside


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.6]) == pytest.approx([1.0, 1.0])
    for order in itertools.permutations([0.01, 0.04, 0.03]):
        assert sorted(statistics.holm(order)) == pytest.approx([0.03, 0.06, 0.06])


def test_a_sum_of_unlike_sources_has_welchs_degrees_of_freedom():
    a = np.random.default_rng(0).normal(size=5)
    b = 9 * np.random.default_rng(1).normal(size=12)
    found = statistics.sum_of(Part(a.var(ddof=1) / 5, 4), Part(b.var(ddof=1) / 12, 11))
    assert found.dof == pytest.approx(stats.ttest_ind(a, b, equal_var=False).df)
