"""Claims that differences between rows lie in a range, judged by records: docs/statistics.md."""

import bisect
import math

import numpy as np

from lab.estimates import Estimate, Estimator
from lab.records import training_seconds
from lab.statistics import LEVEL, claim, detectable, evidence, holm

# {name: (what it says, its effects: (table, row, other row or None, metric, low, high))}, in points
# of the test split: row - other, or the row's own value, lies in [low, high]
Claims = dict[str, tuple[str, list[tuple]]]
FEW = 3  # effects of a claim that are all shown; of more, a table has the others
MOST = 100  # seeds: a plan looks no further


def judge(claims: Claims, tables: dict[str, dict], estimate: Estimator) -> dict[str, dict]:
    """The verdict on every claim: {claim: effects, p values, verdict}.

    tables are {table: rows of records}.

    A claim is supported if all its effects lie inside their ranges, contradicted if one lies
    outside. Both are tested, see `statistics.claim`, and the p values are corrected across claims
    by Holm. At 0.05 the claim is decided, else undecided.
    """
    found = {}
    for name, (_, parts) in claims.items():
        effects = []
        for table, row, other, key, low, high in parts:
            one = estimate(tables.get(table, {}), row, other, "test", key)
            # an effect that was not run shows nothing, nor does one on a single test image
            inside, outside = 1.0, 1.0
            if not math.isnan(one.half):
                inside, outside = map(float, evidence(np.float64(one.mean), one.error, low, high))
            effects.append({"row": row, "other": other, "metric": key, "mean": one.mean,
                            "half": one.half, "seeds": len(one.values), "inside": inside,
                            "outside": outside, "estimate": one})
        p, holds = claim(*(np.array([effect[side] for effect in effects])
                           for side in ("inside", "outside")))
        found[name] = {"effects": effects, "p": float(p),
                       "leans": "supported" if holds else "contradicted"}
    for one, p in zip(found.values(), holm(np.array([one["p"] for one in found.values()]))):
        one["p_holm"] = float(p)
        one["verdict"] = one["leans"] if p < LEVEL else "undecided"
    return found


def span(low: float, high: float) -> str:
    """A claim's range in words."""
    if math.isinf(low) or math.isinf(high):
        return f"< {high:g}" if math.isinf(low) else f"> {low:g}"
    return f"{low:g} to {high:g}"


def deciding_first(one: dict, parts: list[tuple]) -> list[tuple[dict, tuple]]:
    """A judged claim's effects that were run, each with its part of the claim.

    The one that decides comes first: the weakest link of what leans to be supported, the strongest
    objection to what leans to be contradicted.
    """
    run = [pair for pair in zip(one["effects"], parts) if pair[0]["seeds"]]
    if one["leans"] == "supported":
        return sorted(run, key=lambda pair: -pair[0]["inside"])
    return sorted(run, key=lambda pair: (pair[0]["outside"], -abs(pair[0]["mean"])))


def render(claims: Claims, found: dict[str, dict]) -> str:
    """The verdicts as Markdown: a line for each claim and for each of up to FEW effects."""
    lines = ["| claim | effect (points) | 95 % interval | range claimed | seeds | p (Holm) "
             "| verdict |", "|---|---|--:|--:|--:|--:|---|"]
    for name, one in found.items():
        parts = claims[name][1]
        run = deciding_first(one, parts)
        if not run:
            ranges = dict.fromkeys(span(*part[4:]) for part in parts)
            lines.append(f"| {name} {claims[name][0]} | not run | | {', '.join(ranges)} | 0 | | "
                         f"{one['verdict']} |")
            continue
        ends = f"| {one['p_holm']:.3f} | **{one['verdict']}** |"
        many = f" (one of {len(parts)})" if len(parts) > FEW else ""
        for i, (effect, part) in enumerate(run[:1] if many else run):
            low, high = effect["mean"] - effect["half"], effect["mean"] + effect["half"]
            reach = "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
            where = f"`{effect['row']}`" + (f" - `{effect['other']}`" if effect["other"] else "")
            says = f"{name} {claims[name][0]}" if i == 0 else ""
            lines.append(f"| {says} | {effect['mean']:+.2f} {effect['metric']}, {where}{many} | "
                         f"{reach} | {span(*part[4:])} | {effect['seeds']} "
                         f"{ends if i == 0 else '| | |'}")
    lines.append("\nA claim holds if each of its effects lies in its range. The first one is the "
                 "one that decides; p and verdict are the claim's.")
    return "\n".join(lines) + "\n"


# ---- what undecided claims would take ----

def needed(one: Estimate, low: float, high: float, inside: bool, rows: int, claims: int,
           compared: int) -> tuple[float, float] | None:
    """Seeds that show such an effect to lie inside its range, or outside: `statistics.detectable`.

    And how many times the test images, where no number of seeds would do: (infinity, times). Seeds
    are MOST + 1 where it takes more. None where the runs tell no error.
    """
    if math.isnan(one.half):
        return None
    distance = min(one.mean - low, high - one.mean) * (1 if inside else -1)
    variances = [float(part.variance) for part in one.error]
    spread = math.sqrt(variances[0] * len(one.values) / compared)
    images = {} if one.seeds_alone else {"test_set": math.sqrt(variances[1]),
                                         "units": one.error[1].dof + 1}
    effect = lambda seeds, spread: detectable(seeds, rows, claims, spread, compared=compared,
                                              **images)
    if distance < (at_best := effect(2, 0)):
        return math.inf, (at_best / distance)**2 if distance > 0 else math.inf
    return bisect.bisect_left(range(MOST + 1), True, 2,
                              key=lambda seeds: distance >= effect(seeds, spread)), 1


def needs(judged: dict, parts: list[tuple], claims: int,
          tables: dict[str, dict]) -> tuple[tuple[float, float] | None, dict[str, dict]]:
    """What would show one of so many claims, see `needed`, and the rows {row: runs} that it is of.

    To be supported, every effect must lie inside its range: the hardest counts, and all rows. To be
    contradicted, one must lie outside: the easiest counts, and the rows that it compares.
    """
    found, inside = [], judged["leans"] == "supported"
    for effect, (table, row, other, _, low, high) in zip(judged["effects"], parts):
        rows, compared = tables.get(table, {}), [name for name in (row, other) if name]
        take = needed(effect["estimate"], low, high, inside, len(rows),
                      claims * (1 if inside else len(parts)), len(compared))
        found.append((take, {name: rows.get(name, {}) for name in compared}))
    told = sorted((one for one in found if one[0]), key=lambda one: one[0])
    if not told or inside and len(told) < len(found):
        return None, {}
    if not inside:
        return told[0]
    return told[-1][0], {name: runs for _, compared in found for name, runs in compared.items()}


def render_needs(claims: Claims, found: dict[str, dict], tables: dict[str, dict]) -> str:
    """What each undecided claim would take, as Markdown; nothing where no records tell."""
    lines = []
    for name, one in found.items():
        if one["verdict"] != "undecided":
            continue
        take, rows = needs(one, claims[name][1], len(found), tables)
        if take is None:
            continue
        seeds, times = take
        hours = sum(max(seeds - len(runs), 0) * training_seconds(runs)
                    for runs in rows.values()) / 3600
        have = min(map(len, rows.values()))
        if math.isinf(seeds):
            more = f"{times:,.{times < 10:d}f} times as many" if math.isfinite(times) else ""
            cells = f"no number would do | | {more} |"
        else:
            cells = f"more than {MOST} | | |" if seeds > MOST else f"{seeds} | {hours:,.1f} | |"
        lines.append(f"| {name} | {one['leans']} | {have} | {cells}")
    if not lines:
        return ""
    return "\n".join([
        "\n**What the undecided would take**, were effects and spreads what they are here: seeds "
        "of each row compared, and hours of training more, to decide the claim four times in five "
        f"as the hardest of {len(found)}. Where no number of seeds would do, the choice of test "
        "images leaves too much open, and it takes more of them, at least.\n",
        "| claim | leans to be | seeds here | seeds | hours more | test images |",
        "|---|---|--:|--:|--:|--:|", *lines]) + "\n"
