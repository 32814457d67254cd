"""Claims that differences between rows lie in a range, judged by records: docs/statistics.md."""

import math
from collections.abc import Callable

import numpy as np

from lab.estimates import Estimate
from lab.statistics import LEVEL, claim, evidence, holm, sign_flip

# {name: (what it says, its effects: (table, row, other row or None, metric, low, high))}, in points
# of the test split: row - other, or the row's own value, lies in [low, high]
Claims = dict[str, tuple[str, list[tuple]]]


def judge(claims: Claims, tables: dict[str, dict],
          estimate: Callable[[dict, str, str | None, str, str], Estimate]) -> dict[str, dict]:
    """The verdict on every claim: {claim: effects, p values, verdict}.

    tables are {table: rows of records}; estimate(rows, row, other row, split, metric).

    A claim is supported if all its effects lie inside their ranges, contradicted if one lies
    outside. Both are tested, see `statistics.claim`, and the p values are corrected across claims
    by Holm. At 0.05 the claim is decided, else undecided. Sign-flip p values over the seeds stand
    beside it: with six seeds the smallest possible is 1/32, which Holm's correction can never pass,
    so they cannot decide.
    """
    found = {}
    for name, (_, parts) in claims.items():
        effects = []
        for table, row, other, key, low, high in parts:
            one = estimate(tables.get(table, {}), row, other, "test", key)
            inside, outside = 1.0, 1.0  # an effect that was not run shows nothing
            if one.error:
                inside, outside = map(float, evidence(np.float64(one.mean), one.error, low, high))
            effects.append({"row": row, "other": other, "metric": key, "mean": one.mean,
                            "half": one.half, "seeds": len(one.values),
                            "sign_flip": sign_flip(one.values), "inside": inside,
                            "outside": outside})
        p, holds = claim(*(np.array([effect[side] for effect in effects])
                           for side in ("inside", "outside")))
        found[name] = {"effects": effects, "p": float(p),
                       "leans": "supported" if holds else "contradicted"}
    for one, p in zip(found.values(), holm(np.array([one["p"] for one in found.values()]))):
        one["p_holm"] = float(p)
        one["verdict"] = one["leans"] if p < LEVEL else "undecided"
    return found


def render(claims: Claims, found: dict[str, dict]) -> str:
    """The verdicts as Markdown; of a claim with several effects the one that decides.

    That is the weakest link of what leans to be supported, the strongest objection to what leans
    to be contradicted.
    """
    lines = ["| claim | effect (points) | 95 % interval | seeds | p (Holm) | sign-flip p | "
             "verdict |", "|---|---|--:|--:|--:|--:|---|"]
    for name, one in found.items():
        run = [effect for effect in one["effects"] if effect["seeds"]]
        if not run:
            lines.append(f"| {name} {claims[name][0]} | not run | | 0 | | | {one['verdict']} |")
            continue
        if one["leans"] == "supported":
            shown = max(run, key=lambda effect: effect["inside"])
        else:
            shown = min(run, key=lambda effect: (effect["outside"], -abs(effect["mean"])))
        low, high = shown["mean"] - shown["half"], shown["mean"] + shown["half"]
        span = "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        where = f"`{shown['row']}`" + (f" - `{shown['other']}`" if shown["other"] else "")
        lines.append(f"| {name} {claims[name][0]} | {shown['mean']:+.2f} {shown['metric']}, "
                     f"{where} | {span} | {shown['seeds']} | {one['p_holm']:.3f} | "
                     f"{shown['sign_flip']:.3f} | **{one['verdict']}** |")
    return "\n".join(lines) + "\n"
