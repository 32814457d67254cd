"""Verdicts on claims, by numbers, and what the undecided would take."""

import math
import re

import numpy as np
import pytest

import study
from lab import claims, records, statistics
from lab.estimates import Estimate
from lab.statistics import Part, sum_of

BETTER = ("t", "a", "b", "k", 0.0, math.inf)  # that row a is above row b


def test_the_ranges_of_all_claims():
    """They were fixed before the runs of protocol desk: docs/statistics.md."""
    found = {name: {effect[4:] for effect in effects}
             for name, (_, effects) in study.CLAIMS.items()}
    assert found == {
        "C1": {(-2, 2)}, "C2": {(-0.5, math.inf)}, "C3": {(-1, 1)}, "C4": {(-0.5, math.inf)},
        "C5": {(50, math.inf)}, "C6": {(4, 12)}, "C7": {(-math.inf, 0)}, "C8": {(-math.inf, -1)},
        "C9": {(-math.inf, -1)}, "C10": {(-math.inf, -20)}, "C11": {(0, math.inf)},
        "C12": {(0, math.inf)}, "C13": {(2.5, 7.5)}}


def test_a_verdict_is_corrected_for_all_claims():
    """By Holm: p is 0.0035 alone, and over 0.05 among thirty of its kind."""
    alike = lambda *_: Estimate([1.0] * 3, (Part(0.1, 30),))
    verdict = lambda count: {one["verdict"] for one in claims.judge(
        {f"X{i}": ("better", [BETTER]) for i in range(count)}, {}, alike).values()}
    assert verdict(1) == verdict(13) == {"supported"} and verdict(30) == {"undecided"}


def test_any_number_of_seeds_is_judged():
    rows = {row: {seed: {"config": {"seed": seed}, "metrics": {"test": {"k": value + seed / 1e4}}}
                  for seed in range(25)} for row, value in (("a", 0.5), ("b", 0.4))}
    asked = {"X": ("better", [BETTER])}
    seeds_alone = lambda rows, row, other, split, key: Estimate(
        records.paired(rows, row, other, split, key), (Part(1e-9, 24),))
    assert claims.judge(asked, {"t": rows}, seeds_alone)["X"]["verdict"] == "supported"


# ---- what the undecided would take ----

def study_of(effect, seeds, draw, units=4000, spread=0.1, images=0.01):
    """Rows a - b = effect in points, and an estimator whose two sources of error are known."""
    rows = {row: {seed: {"path": row, "train_seconds": 1800.0} for seed in range(seeds)}
            for row in "ab"}
    values = [float(x) for x in effect + draw.normal(size=seeds) * math.sqrt(2) * spread]
    of_seeds = (Part(spread**2 * draw.chisquare(seeds - 1) / (seeds - 1), (seeds - 1) / 2)
                for _ in rows)  # two rows: the paired t-test
    error = sum_of(*of_seeds).times(1 / seeds), Part(images**2, units - 1)
    return {"t": rows}, lambda *_: Estimate(values, error)


def needed(tables, estimate):
    """The cells that say what claim X would take; none if it is decided."""
    asked = {"X": ("better", [BETTER])}
    found = claims.judge(asked, tables, estimate)
    text = claims.render_needs(asked, found, tables)
    return [[cell.strip() for cell in line.split("|")[2:-1]]
            for line in text.splitlines() if line.startswith("| X ")]


def test_what_an_undecided_claim_is_said_to_take_decides_it():
    """In studies of the effect and the spread that three seeds showed, with as many as are said."""
    known = Part(0.1**2, 1)
    tables, _ = study_of(0.2, 3, np.random.default_rng(0))
    error = sum_of(known, known).times(1 / 3), Part(0.01**2, 3999)
    (leans, have, seeds, hours, images), = needed(tables, lambda *_: Estimate([0.2] * 3, error))
    seeds = int(seeds)
    assert (leans, have, images) == ("supported", "3", "") and seeds > 3
    assert float(hours) == 2 * (seeds - 3) * 0.5
    decided = {n: np.mean([not needed(*study_of(0.2, n, np.random.default_rng(i)))
                           for i in range(200)]) for n in (seeds - 1, seeds)}
    assert decided[seeds - 1] < 0.85 and decided[seeds] > 0.75


@pytest.mark.parametrize("effect, images, says", [
    (0.01, 1e-4, ["more than 100", "", ""]),
    (0.3, 0.2, ["no number would do", "", "3.5 times as many"])])
def test_some_claims_no_number_of_seeds_decides(effect, images, says):
    known = Part(0.1**2, 2)
    tables, _ = study_of(effect, 3, np.random.default_rng(0))
    error = sum_of(known, known).times(1 / 3), Part(images**2, 3999)
    (leans, have, *rest), = needed(tables, lambda *_: Estimate([effect] * 3, error))
    assert leans == "supported" and rest == says


def test_one_seed_tells_no_plan():
    tables, _ = study_of(0.3, 3, np.random.default_rng(0))
    assert needed(tables, lambda *_: Estimate([0.3])) == []


def rows_of_hours():
    return {"t": {row: dict.fromkeys(range(3), {"train_seconds": 3600.0, "path": row})
                  for row in "ab"}}


def known(mean):
    return Estimate([mean] * 3, (Part(0.01, 2), Part(1e-6, 999)))


def test_a_claim_of_several_effects_takes_what_the_deciding_one_takes():
    def take(leans, *means, among=13):
        judged = {"leans": leans, "effects": [{"estimate": known(mean)} for mean in means]}
        return claims.needs(judged, [BETTER] * len(means), among, rows_of_hours())[0][0]

    easy, hard = take("supported", 1.0), take("supported", 0.4)
    assert 3 < easy < hard <= claims.MOST
    assert take("supported", 1.0, 0.4) == hard  # all must lie inside
    # one must lie outside, and each of the three had its chance to by luck
    assert take("contradicted", -1.0, -0.4, 2.0) == take("contradicted", -1.0, among=39) > easy
    assert take("supported", 1.0, among=1) < easy
    alone, _ = claims.needed(known(0.4), 0.0, math.inf, True, 2, 13, 1)  # one row's own value
    reach = lambda seeds: statistics.detectable(seeds, 2, 13, math.sqrt(3 * 0.01), 1e-3, 1000,
                                                compared=1)
    assert reach(alone) <= 0.4 < reach(alone - 1)


def test_a_plan_counts_all_claims():
    seeds = []
    for count in (1, 13):
        asked = {f"X{i}": ("better", [BETTER]) for i in range(count)}
        judged = claims.judge(asked, rows_of_hours(), lambda *_: known(0.4))
        text = claims.render_needs(asked, judged, rows_of_hours())
        seeds.append(int(re.search(r"^\| X0 \|.*?\| 3 \| (\d+)", text, re.M)[1]))
    assert seeds[0] < seeds[1]
