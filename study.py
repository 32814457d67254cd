"""The report's numbers and claims, and what the run records say of them: tables, verdicts, attention.

    python study.py table1 --protocol desk     results/desk/table1/*/seed*.json -> results/desk/table1.md
    python study.py table2                     the same for Table 2, protocol report
    python study.py attention --protocol desk  where the surrogates look, what ties and shifts do to them
    python study.py claims --protocol desk     the verdict on each of the report's claims

Values in records are fractions; here they are points, percent of one.
"""

import argparse
import functools
import math
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import metrics
from lab import cli, records
from lab.files import write_atomic
from lab.records import cell, number, paired, pairs_of, plain
from lab.statistics import LEVEL, Part, claim, evidence, half_width, holm, own_spread, row_spreads, sign_flip, sum_of

# The columns of each table: what heads one, and where a record holds it.
COLUMNS = {"table1": {"test": ("test accuracy", "test", "accuracy"),
                      "train": ("train accuracy", "train", "accuracy")},
           "table2": {"map": ("test MAP", "test", "map"), "wgap": ("WGAP", "test", "wgap"),
                      "train": ("train MAP", "train", "map")}}
# The report's tables, in percent, in its order: a row's name, then its value in each column. The first
# row is absolute, the others are differences from it. Rows that the report lacks have no value.
REPORT = {
    "table1": {
        "maxpool-2-32": ("VGG-ResNet(2,32,maxpool)", dict(test=92.41, train=99.04)),
        "stride-2-32": ("VGG-ResNet(2,32,stride)", dict(test=-1.15, train=-0.28)),
        "stride-2-32-noskip": ("VGG-ResNet(2,32,stride) - skip", dict(test=0.42, train=-0.31)),
        "stride-2-32-nobn": ("VGG-ResNet(2,32,stride) - BatchNorm", dict(test=-0.41, train=-0.80)),
        "stride-2-32-noact": ("VGG-ResNet(2,32,stride) - activation",
                              dict(test=-1.79, train=-1.40)),
        "stride-2-32-gelu": ("VGG-ResNet(2,32,stride) with GELU", dict(test=0.02, train=0.30)),
        "stride-1-32": ("VGG-ResNet(1,32,stride)", dict(test=-1.54, train=-0.14)),
        "stride-4-32": ("VGG-ResNet(4,32,stride)", dict(test=-0.99, train=-0.05)),
        "stride-2-16": ("VGG-ResNet(2,16,stride)", dict(test=-1.21, train=-0.19)),
        "stride-2-64": ("VGG-ResNet(2,64,stride)", dict(test=-0.77, train=0.21)),
        "maxpool-1-32": ("VGG-ResNet(1,32,maxpool)", dict(test=-0.52, train=0.32)),
        "maxpool-4-32": ("VGG-ResNet(4,32,maxpool)", dict(test=0.26, train=-0.01)),
        "maxpool-2-16": ("VGG-ResNet(2,16,maxpool)", dict(test=0.28, train=0.20)),
        "maxpool-2-64": ("VGG-ResNet(2,64,maxpool)", dict(test=-0.16, train=-0.20)),
        "maxpool-2-32-noact": ("VGG-ResNet(2,32,maxpool) - activation", {}),
        "maxpool-2-32-transformer": ("VGG-ResNet(2,32,maxpool), last stage Transformer", {}),
        "blurpool-2-32": ("VGG-ResNet(2,32,blurpool)", {}),
    },
    "table2": {
        "standard": ("HourGlass(2*32), weighted cross entropy", dict(map=73.9, wgap=46.8, train=89.5)),
        "unet": ("U-Net (benchmark)", dict(map=-4.88, wgap=-5.37, train=2.08)),
        "no-intra-skip": ("Standard - intra skip", dict(map=1.55, wgap=0.63, train=1.11)),
        "no-inter-skip": ("Standard - inter skip", dict(map=-4.00, wgap=-17.00, train=-12.3)),
        "no-bn": ("Standard - BatchNorm", dict(map=-7.8, wgap=-16.50, train=-9.2)),
        "no-act": ("Standard - activation", dict(map=-33.22, wgap=-37.5, train=-50.97)),
        "ce": ("Standard with cross entropy", dict(map=-0.61, wgap=-8.78, train=2.68)),
        "dice": ("Standard with Dice loss", dict(map=-54.59, wgap=-45.3, train=-70.13)),
        "hourglass-1-32": ("HourGlass(1*32)", dict(map=-0.40, wgap=-4.79, train=3.25)),
        "hourglass-4-32": ("HourGlass(4*32)", dict(map=-0.90, wgap=-6.8, train=-2.80)),
        "hourglass-2-16": ("HourGlass(2*16)", dict(map=-2.50, wgap=-5.80, train=-3.27)),
        "hourglass-2-64": ("HourGlass(2*64)", dict(map=1.00, wgap=1.00, train=4.30)),
        "no-dropout": ("Standard - dropout", {}),
    },
}
# The report's conclusions. Each is one or more differences (table, row, other row, metric, low, high), in
# points of the test split: the claim says that row - other (or the row's own value) lies in [low, high].
# "About 8" is taken as 8 give or take half of it, "matters" as more than one point, "does not hurt" as less
# than half a point, "does not change" as less than one, "collapses" as more than twenty.
INF = math.inf
CLAIMS = {
    "C1": ("On Fashion-MNIST architecture choices matter little: all rows within 2 points of the base",
           [("table1", row, "maxpool-2-32", "accuracy", -2, 2)
            for row in REPORT["table1"] if row != "maxpool-2-32"]),
    "C2": ("Removing the non-linearity does not hurt when max-pooling is there",
           [("table1", "maxpool-2-32-noact", "maxpool-2-32", "accuracy", -0.5, INF)]),
    "C3": ("Convolution is translation invariant: the cell of the garment does not change the frozen "
           "model's accuracy",
           [("attention", "frozen-tie0", None, f"cell{cell}_minus_cell0", -1, 1) for cell in (1, 2, 3)]),
    "C4": ("The spurious digit (tie 0.9) did not hurt the classification of untied grids",
           [("attention", f"{kind}-tie0.9", f"{kind}-tie0", "accuracy", -0.5, INF)
            for kind in ("frozen", "scratch")]),
    "C5": ("Attention lies on the garment: more than half of the true class's positive CAM mass (tie 0.9)",
           [("attention", f"{kind}-tie0.9", None, "mass", 50, INF) for kind in ("frozen", "scratch")]),
    "C6": ("Weighted cross entropy raises WGAP by about 8 points",
           [("table2", "standard", "ce", "wgap", 4, 12)]),
    "C7": ("Dice does not improve MAP", [("table2", "dice", "standard", "map", -INF, 0)]),
    "C8": ("Inter skips matter, for MAP and for WGAP",
           [("table2", "no-inter-skip", "standard", key, -INF, -1) for key in ("map", "wgap")]),
    "C9": ("BatchNorm matters", [("table2", "no-bn", "standard", "map", -INF, -1)]),
    "C10": ("Without activations segmentation collapses",
            [("table2", "no-act", "standard", "map", -INF, -20)]),
    "C11": ("Wider beats deeper", [("table2", "hourglass-2-64", "hourglass-4-32", "map", 0, INF)]),
    "C12": ("The hourglass with sums beats U-Net with concatenation",
            [("table2", "standard", "unet", "map", 0, INF)]),
    "C13": ("Dropout 0.2 adds about 5 points of test MAP",
            [("table2", "standard", "no-dropout", "map", 2.5, 7.5)]),
}
# settings that all rows of a table must share: a row differs by its own switch and by nothing else
SHARED = ("protocol", "split", "epochs", "batch", "lr", "weight_decay", "warmup", "precision", "compile",
          "size", "train_images", "weight_power")


Protocol = typing.Literal["report", "desk", "small", "smoke"]


def load_records(folder: Path, protocol: str) -> dict[str, dict[int, dict]]:
    """{row: {seed: record}} of one table's folder, see `records.load`; the report's rows first, in its order."""
    order = REPORT.get(folder.name, ())
    return records.load(folder, protocol, order, SHARED if order else ())  # surrogates differ in training


# ---- an estimate and its error ----

@functools.cache
def redrawn_average_precisions(path: Path) -> np.ndarray:
    """AP (1000, C) of a run on 1,000 test sets of photos drawn with repetition, the same for every run."""
    arrays = records.load_arrays(path)
    photos = len(arrays["groups"])
    # in float32, where BLAS multiplies: a count here is under 2^24
    draws = np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), 1000)
    draws = draws.astype(np.float32)
    counts = (arrays[name].astype(np.float32) for name in ("hits", "misses"))
    return metrics.binned_average_precision(*(np.tensordot(draws, count, 1) for count in counts))


def each_image(record: dict, key: str) -> np.ndarray:
    """The values per test image whose mean is a metric: accuracy, and all that interpret.py measures."""
    arrays = records.load_arrays(records.arrays_file(record))
    return (arrays[key] if key in arrays else arrays["prediction"] == arrays["target"]).astype(np.float64)


def test_set_part(rows: dict, row: str, other: str | None, key: str) -> Part:
    """Error of a test metric's difference row - other, averaged over seeds, due to the choice of images.

    MAP and WGAP are no means over images, and crops of one photo are not independent: whole photos are
    redrawn. All other metrics are means, so it is the variance over images divided by their number.
    """
    pairs = pairs_of(rows, row, other) if other else [(one, None) for one in rows[row].values()]
    if key in ("map", "wgap"):
        reduce = np.nanmean if key == "map" else np.nanmin
        per_unit = lambda record: reduce(redrawn_average_precisions(records.arrays_file(record)), 1)
        units = len(records.load_arrays(records.arrays_file(pairs[0][0]))["groups"])
    else:
        per_unit = lambda record: each_image(record, key)
        units = len(per_unit(pairs[0][0]))
    values = np.mean([per_unit(a) - (per_unit(b) if b else 0) for a, b in pairs], 0)
    return Part(float(np.var(values)) / (1 if key in ("map", "wgap") else units), units - 1)


@dataclass(frozen=True)
class Estimate:
    """A metric's difference between two rows, or one row's value, in points: docs/statistics.md.

    values are those of the seeds, paired; error and one_more are the sources of error of their mean, and
    of what one more such run would give. Both are empty with fewer than two seeds.
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
        """Is the value in the 95 % prediction interval of one more run? None where there is none."""
        return bool(abs(value - self.mean) <= half_width(self.one_more)) if self.one_more else None


def spreads(rows: dict, split: str, key: str) -> dict[str, Part]:
    """How much the runs of each row vary in a metric, in points, without what the seed does to all rows."""
    seeds = sorted({seed for runs in rows.values() for seed in runs})
    scores = {row: [100 * (runs[seed]["metrics"][split].get(key, math.nan) if seed in runs else math.nan)
                    for seed in seeds] for row, runs in rows.items()}
    scores = {row: values for row, values in scores.items() if not np.isnan(values).all()}
    return {row: Part(*part) for row, *part in zip(scores, *row_spreads(np.array([*scores.values()])))}


def estimate(rows: dict, row: str, other: str | None, split: str, key: str) -> Estimate:
    """The difference row - other of a metric (or the row's own value), and its sources of error.

    Two sources: the seeds, and, on a held-out split, the choice of its images. A row's own value varies
    by its seed's effect too. Only seeds that both rows have are compared; all runs tell the spread.
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
    test_set = (test_set_part(rows, row, other, key).times(100**2),) if split == "test" else ()
    return Estimate(values, (spread.times(1 / n), *test_set), (spread.times(1 + 1 / n), *test_set))


def median_errors(tables: dict[str, dict]) -> dict[str, dict]:
    """{test metric: a row's spread over seeds, the test set's error of a difference, units, rows}: medians."""
    found = {}
    for table, rows in tables.items():
        base, *others = rows
        for name, split, key in COLUMNS[table].values():
            if split == "test":
                parts = [test_set_part(rows, row, base, key) for row in others if pairs_of(rows, row, base)]
                variances = [part.variance for part in spreads(rows, split, key).values() if part.dof > 0]
                found[name] = {"spread": float(np.sqrt(np.median(variances))), "rows": len(rows),
                               "test_set": 100 * float(np.sqrt(np.median([part.variance for part in parts]))),
                               "units": parts[0].dof + 1}
    return found


# ---- the tables ----

def render(rows: dict[str, dict[int, dict]], table: str, seeds: int) -> str:
    """The table as Markdown: differences from the base row, paired by seed, beside the report's own."""
    base_row, columns = next(iter(REPORT[table])), COLUMNS[table]
    lines = ["| row | " + " | ".join(f"{name} | report" for name, _, _ in columns.values())
             + " | seeds | parameters | multiply-adds | training |",
             "|---|" + "--:|" * (2 * len(columns) + 4)]
    held = {name: [] for name, _, _ in columns.values()}
    for row in [*REPORT[table], *(row for row in rows if row not in REPORT[table])]:
        label, reported = REPORT[table].get(row, (plain(row), {}))
        runs, cells, signed = rows.get(row, {}), [], row != base_row
        for column, (name, split, key) in columns.items():
            ours, value = estimate(rows, row, base_row if signed else None, split, key), reported.get(column)
            cells.append(number(ours.mean, ours.half, signed) if ours.values else "not run")
            holds = None if value is None else ours.holds(value)
            if holds is not None:
                held[name].append(holds)
            cells.append("" if value is None else (f"{value:+.2f}" if signed else f"{value:.2f}")
                         + {True: " ✓", False: " ✗", None: ""}[holds])
        cells.append(f"{len(ours.values)}" + ("" if len(ours.values) == seeds else f" of {seeds}"))
        if runs:
            one = next(iter(runs.values()))
            seconds = np.mean([record["train_seconds"] for record in runs.values()])
            cells += [f"{one['parameters'] / 1e6:.2f} M", f"{one['multiply_adds'] / 1e6:,.0f} M",
                      f"{seconds:,.0f} s"]
        else:
            cells += [""] * 3
        lines.append(f"| {label} `{plain(row)}` | " + " | ".join(cells) + " |")
    devices = sorted({plain(record["environment"]["device"]) for record in records.each_of(rows)})
    lines.append(
        "\nPercent. First row: value; others: difference from it, paired by seed. ± is the 95 % interval, over "
        "seeds and, on the test split, over its images. ✓: the report's number lies in the 95 % prediction "
        "interval of one more such run; ✗: it does not. "
        + "".join(f"{name}: {sum(marks)} of {len(marks)} do. " for name, marks in held.items() if marks)
        + f"Device: {'; '.join(devices) or 'none yet'}. {records.caveat(records.each_of(rows))}".rstrip())
    return "\n".join(lines) + "\n"


# ---- the claims ----

def judge(tables: dict[str, dict]) -> dict[str, dict]:
    """The verdict on every claim: {claim: effects, p values, verdict}. The rule is in docs/statistics.md.

    A claim is supported if all its effects lie inside their ranges, contradicted if one lies outside.
    Both are tested, see `statistics.claim`, and the p values are corrected across claims by Holm. At 0.05
    the claim is decided, else undecided. Sign-flip p values over the seeds stand beside it: with six seeds
    the smallest possible is 1/32, which Holm's correction can never pass, so they cannot decide.
    """
    found = {}
    for name, (_, parts) in CLAIMS.items():
        effects = []
        for table, row, other, key, low, high in parts:
            one = estimate(tables.get(table, {}), row, other, "test", key)
            inside, outside = 1.0, 1.0  # an effect that was not run shows nothing
            if one.error:
                inside, outside = map(float, evidence(np.float64(one.mean), one.error, low, high))
            effects.append({"row": row, "other": other, "metric": key, "mean": one.mean, "half": one.half,
                            "seeds": len(one.values), "sign_flip": sign_flip(one.values),
                            "inside": inside, "outside": outside})
        p, holds = claim(*(np.array([effect[side] for effect in effects]) for side in ("inside", "outside")))
        found[name] = {"effects": effects, "p": float(p), "leans": "supported" if holds else "contradicted"}
    for one, p in zip(found.values(), holm(np.array([one["p"] for one in found.values()]))):
        one["p_holm"] = float(p)
        one["verdict"] = one["leans"] if p < LEVEL else "undecided"
    return found


def render_claims(found: dict[str, dict]) -> str:
    """The verdicts as Markdown; of a claim with several effects the one that decides: the weakest link of what
    leans to be supported, the strongest objection to what leans to be contradicted."""
    lines = ["| claim | effect (points) | 95 % interval | seeds | p (Holm) | sign-flip p | verdict |",
             "|---|---|--:|--:|--:|--:|---|"]
    for name, one in found.items():
        run = [effect for effect in one["effects"] if effect["seeds"]]
        if not run:
            lines.append(f"| {name} {CLAIMS[name][0]} | not run | | 0 | | | {one['verdict']} |")
            continue
        shown = (max(run, key=lambda effect: effect["inside"]) if one["leans"] == "supported" else
                 min(run, key=lambda effect: (effect["outside"], -abs(effect["mean"]))))
        low, high = shown["mean"] - shown["half"], shown["mean"] + shown["half"]
        span = "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        where = f"`{shown['row']}`" + (f" - `{shown['other']}`" if shown["other"] else "")
        lines.append(f"| {name} {CLAIMS[name][0]} | {shown['mean']:+.2f} {shown['metric']}, {where} | {span} | "
                     f"{shown['seeds']} | {one['p_holm']:.3f} | {shown['sign_flip']:.3f} | "
                     f"**{one['verdict']}** |")
    return "\n".join(lines) + "\n"


# ---- attention ----

def render_attention(rows: dict, equivariance: dict) -> str:
    """The surrogates' measurements as Markdown, and how far features are from moving with the image."""
    columns = {"accuracy, untied": "accuracy", "accuracy, tied": "accuracy_tied",
               "CAM mass in its cell": "mass", "pointing game": "pointing", "mass, tied": "mass_tied",
               "others called Trouser, with a 3": "trouser_with_three", "without": "trouser_without_three"}
    own = lambda rows, row, key, signed=False: cell(paired(rows, row, None, "test", key), signed)
    lines = ["| surrogate | " + " | ".join(columns) + " | seeds |", "|---|" + "--:|" * (len(columns) + 1)]
    for row, seeds in rows.items():
        cells = [own(rows, row, key) for key in columns.values()]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    lines.append("\nPercent, mean over seeds ± 95 % interval (Student's t). Chance is 25 for the CAM's mass "
                 "and the pointing game.\n")
    for row in (row for row in ("frozen-tie0", "scratch-tie0") if row in rows):
        values = [own(rows, row, f"accuracy_cell{c}") for c in range(4)]
        lines.append(f"- `{row}`: accuracy with the garment top left {values[0]}, top right {values[1]}, "
                     f"bottom left {values[2]}, bottom right {values[3]}.")
    if "frozen-tie0" in rows:
        lines.append("- `frozen-tie0`: accuracy over all 841 shifts, which cut digits, less that over moves by "
                     f"whole cells: {own(rows, 'frozen-tie0', 'shifted_minus_whole', True)}.")
    for tie in ("0", "0.9"):
        found = []
        for pair in pairs_of(rows, f"frozen-tie{tie}", f"scratch-tie{tie}"):
            frozen, scratch = (records.load_arrays(records.arrays_file(record)) for record in pair)
            found.append(metrics.error_overlap(frozen["prediction"], scratch["prediction"], frozen["target"]))
        if found:
            both, chance, same = (cell([one[key] for one in found], False)
                                  for key in ("both", "chance", "same"))
            lines.append(f"- Tie {tie}: frozen and scratch both err on {both} % of the grids; independent "
                         f"errors in a class would on {chance} %. Of these, both give {same} % the same wrong "
                         "class.")
    if equivariance:
        lines += ["\n| equivariance error of the features | zero padding, as trained | circular padding | "
                  "seeds |", "|---|--:|--:|--:|"]
    for row, seeds in equivariance.items():
        cells = [own(equivariance, row, f"equivariance_error_{padding}") for padding in ("zeros", "circular")]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*REPORT, "attention", "claims"], help="what to render")
    parser.add_argument("--protocol", default="report", choices=typing.get_args(Protocol), help="which records (report)")
    parser.add_argument("--results", default="results", help="folder of the records (results)")
    parser.add_argument("--seeds", type=int, help="seeds a full row has (the most that any row has)")
    args = parser.parse_args(argv)
    folder = Path(args.results, args.protocol)
    read = lambda name: load_records(folder / name, args.protocol)
    if args.what == "claims":
        tables = {table: read(table) for table in (*REPORT, "attention")}
        text = render_claims(judge(tables))
        if note := records.caveat(record for rows in tables.values() for record in records.each_of(rows)):
            text += f"\n{note}\n"
    elif args.what == "attention":
        text = render_attention(read("attention"), read("equivariance"))
    else:
        rows = read(args.what)
        text = render(rows, args.what, args.seeds or max((len(runs) for runs in rows.values()), default=0))
    write_atomic(folder / f"{args.what}.md", text.encode())


if __name__ == "__main__":
    sys.exit(cli.guard(main))
