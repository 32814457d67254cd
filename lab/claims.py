"""Claims that differences between rows lie in a range, judged by records: docs/statistics.md."""

import math
from collections.abc import Callable

import numpy as np

from lab.estimates import Estimate
from lab.statistics import LEVEL, claim, evidence, holm

# {name: (what it says, its effects: (table, row, other row or None, metric, low, high))}, in points
# of the test split: row - other, or the row's own value, lies in [low, high]
Claims = dict[str, tuple[str, list[tuple]]]
FEW = 3  # effects of a claim that are all shown; of more, a table has the others


def judge(claims: Claims, tables: dict[str, dict],
          estimate: Callable[[dict, str, str | None, str, str], Estimate]) -> dict[str, dict]:
    """The verdict on every claim: {claim: effects, p values, verdict}.

    tables are {table: rows of records}; estimate(rows, row, other row, split, metric).

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
                            "outside": outside})
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


def render(claims: Claims, found: dict[str, dict]) -> str:
    """The verdicts as Markdown: a line for each claim and for each of up to FEW effects.

    Its first effect is the one that decides: the weakest link of what leans to be supported, the
    strongest objection to what leans to be contradicted.
    """
    lines = ["| claim | effect (points) | 95 % interval | range claimed | seeds | p (Holm) "
             "| verdict |", "|---|---|--:|--:|--:|--:|---|"]
    for name, one in found.items():
        both = [*zip(one["effects"], claims[name][1])]
        run = [(effect, part) for effect, part in both if effect["seeds"]]
        if not run:
            ranges = dict.fromkeys(span(*part[4:]) for _, part in both)
            lines.append(f"| {name} {claims[name][0]} | not run | | {', '.join(ranges)} | 0 | | "
                         f"{one['verdict']} |")
            continue
        if one["leans"] == "supported":
            run.sort(key=lambda pair: -pair[0]["inside"])
        else:
            run.sort(key=lambda pair: (pair[0]["outside"], -abs(pair[0]["mean"])))
        ends = f"| {one['p_holm']:.3f} | **{one['verdict']}** |"
        many = f" (one of {len(both)})" if len(both) > FEW else ""
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
