"""A table of rows as Markdown: differences from a base row, beside those that a report gives."""

import math
from dataclasses import dataclass

import numpy as np

from lab.estimates import Estimator
from lab.records import (
    caveat, each_of, need, number, pairs_of, plain, switches, training_seconds)


@dataclass(frozen=True)
class Layout:
    """What a table is of: its base row, its columns, and the rows that it always shows.

    columns: {name: (heading, split, metric)}; named: {row: (label, {column: the report's value, or
    its difference from the base})}.
    """
    base: str
    columns: dict[str, tuple[str, str, str]]
    named: dict[str, tuple[str, dict[str, float]]]


def missing(rows: dict, row: str, base: str | None) -> str:
    """Why a cell holds no number."""
    if row not in rows:
        return "not run"
    if base and base not in rows:
        return "no base row"
    return "not measured" if pairs_of(rows, row, base) else "no seed in common"


def render(rows: dict[str, dict[int, dict]], layout: Layout, seeds: int, own: bool,
           estimate: Estimator) -> str:
    """The table: differences from the base row, paired by seed, and, unless `own`, the report's."""
    columns = layout.columns
    compared = set() if own else {name for _, values in layout.named.values() for name in values}
    heads = " | ".join(name + " | report" * (column in compared)
                       for column, (name, _, _) in columns.items())
    lines = [f"| row | {heads} | seeds | parameters | multiply-adds | training |",
             "|---|" + "--:|" * (len(columns) + len(compared) + 4)]
    held, seeds_alone = {name: [] for name, _, _ in columns.values()}, set()
    for row in [*layout.named, *(row for row in rows if row not in layout.named)]:
        label, reported = layout.named.get(row, (plain(row), {}))
        base = None if row == layout.base else layout.base
        cells, count = [], 0
        for column, (name, split, key) in columns.items():
            ours = estimate(rows, row, base, split, key)
            value = reported.get(column) if column in compared else None
            cells.append(number(ours.mean, ours.half, bool(base)) if ours.values else
                         missing(rows, row, base))
            if split == "test":
                count = max(count, len(ours.values))
                if ours.seeds_alone:
                    seeds_alone.add(name)
            holds = None if value is None else ours.holds(value)
            if holds is not None:
                held[name].append(holds)
            mark = {True: " ✓", False: " ✗", None: ""}[holds]
            if column in compared:
                cells.append("" if value is None else number(value, math.nan, bool(base)) + mark)
        count = count or (len(rows.get(row, {})) if base not in rows else 0)
        cells.append(f"{count}" + (f" of {seeds}" if count < seeds else ""))
        lines.append(f"| {label} `{plain(row)}` | {' | '.join([*cells, *costs(rows.get(row))])} |")
    return "\n".join([*lines, "", notes(rows, held, seeds_alone, own),
                      *one_switch(rows, layout, estimate)]) + "\n"


def costs(runs: dict[int, dict] | None) -> list[str]:
    """Parameters, multiply-adds and mean training time of a row, each a cell."""
    if not runs:
        return [""] * 3
    one, numeric = next(iter(runs.values())), (int, float)
    return [f"{need(one, 'parameters', kind=numeric) / 1e6:.2f} M",
            f"{need(one, 'multiply_adds', kind=numeric) / 1e6:,.0f} M",
            f"{training_seconds(runs):,.0f} s"]


def notes(rows: dict, held: dict[str, list[bool]], seeds_alone: set[str], own: bool) -> str:
    """What the table's numbers are, in one paragraph."""
    made_of = each_of(rows)
    devices = sorted({plain(need(record, "environment", "device", kind=str))
                      for record in made_of})
    marked = "".join(f"{name}: {sum(marks)} of {len(marks)} do. "
                     for name, marks in held.items() if marks)
    alone = f"Of {', '.join(sorted(seeds_alone))} ± is over seeds alone. " if seeds_alone else ""
    about = made_of[0]["about_data"] if own else {}
    note = [f"{plain(about['name'])}, {about['size']} pixels a side."] if own else []
    note.append("Percent. First row: value; others: difference from it, paired by seed. ± is the "
                "95 % interval, over seeds and, on the test split, over its images.")
    if not own:
        note.append("✓: the report's number lies in the 95 % prediction interval of one more such"
                    " run; ✗: it does not.")
    note.append(f"{alone}{marked}Device: {'; '.join(devices) or 'none yet'}. "
                f"{caveat(made_of)}".rstrip())
    return " ".join(note)


def one_switch(rows: dict, layout: Layout, estimate: Estimator) -> list[str]:
    """Lines that hold a row of several switches against each row nearer to the base by one.

    Its difference from the base mixes what its switches do; what one of them does is the difference
    from the row that has the others. By the records' settings alone.
    """
    first = {row: next(iter(runs.values())) for row, runs in rows.items()}
    if layout.base not in first:
        return []
    far = {row: len(switches(one, first[layout.base])) for row, one in first.items()}
    heads = " | ".join(name for name, _, _ in layout.columns.values())
    lines = [f"| row | against | its one switch | {heads} | seeds |",
             "|---|---|---|" + "--:|" * (len(layout.columns) + 1)]
    for row, other in ((row, other) for row in rows for other in rows if far[row] > 1):
        found = switches(first[row], first[other])
        if len(found) != 1 or far[other] != far[row] - 1:
            continue
        (key, (ours, theirs)), = found.items()
        cells, counts = [], []
        for _, split, metric in layout.columns.values():
            one = estimate(rows, row, other, split, metric)
            cells.append(number(one.mean, one.half, True) if one.values else
                         missing(rows, row, other))
            counts.append(len(one.values))
        lines.append(f"| `{plain(row)}` | `{plain(other)}` | "
                     f"{plain(f'{key}: {ours}, not {theirs}')} | {' | '.join(cells)} | "
                     f"{max(counts)} |")
    if len(lines) == 2:
        return []
    return ["", "**One switch at a time.** These rows differ from the first row by two switches or "
            "more, and from the row that they are held against here by one.", "", *lines]
