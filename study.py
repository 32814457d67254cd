"""The report's numbers and claims, and what the run records say of them.

    python study.py table1 --protocol desk     results/desk/table1/ROW/seed<k>.json -> table1.md
    python study.py table2                     the same for Table 2, protocol report
    python study.py attention --protocol desk  where the surrogates look, what moves them
    python study.py claims --protocol desk     the verdict on each of the report's claims
    python study.py figures --protocol desk    all pictures that records alone can give

Values in records are fractions; here they are points, percent of one.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np

import data
import metrics
from lab import claims, cli, estimates, records, tables
from lab.files import BadInput, write_atomic
from lab.records import cell, number, paired

# The columns of each table: what heads one, and where a record holds it.
COLUMNS = {"table1": {"test": ("test accuracy", "test", "accuracy"),
                      "train": ("train accuracy", "train", "accuracy")},
           "table2": {"map": ("test MAP", "test", "map"), "wgap": ("WGAP", "test", "wgap"),
                      "miou": ("test mIoU", "test", "miou"),
                      "train": ("train MAP", "train", "map")}}
# The report's tables, in percent, in its order: a row's name, then its value in each column. The
# first row is absolute, the others are differences from it. Rows and columns that the report lacks
# have no value.
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
        "standard": ("HourGlass(2*32), weighted cross entropy",
                     dict(map=73.9, wgap=46.8, train=89.5)),
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
        "stride": ("Standard, strides instead of max-pooling", {}),
        "stride-no-act": ("Standard, strides, - activation: linear", {}),
    },
}
# The report's conclusions. Each is one or more differences (table, row, other row, metric, low,
# high), in points of the test split: the claim says that row - other (or the row's own value) lies
# in [low, high]. "About 8" is taken as 8 give or take half of it, "matters" as more than one point,
# "does not hurt" as less than half a point, "does not change" as less than one, "collapses" as more
# than twenty.
INF = math.inf
CLAIMS = {
    "C1": ("On Fashion-MNIST architecture choices matter little: all rows within 2 points of the "
           "base",
           [("table1", row, "maxpool-2-32", "accuracy", -2, 2)
            for row in REPORT["table1"] if row != "maxpool-2-32"]),
    "C2": ("Removing the non-linearity does not hurt when max-pooling is there",
           [("table1", "maxpool-2-32-noact", "maxpool-2-32", "accuracy", -0.5, INF)]),
    "C3": ("Convolution is translation invariant: the cell of the garment does not change the "
           "frozen model's accuracy",
           [("attention", "frozen-tie0", None, f"cell{cell}_minus_cell0", -1, 1)
            for cell in (1, 2, 3)]),
    "C4": ("The spurious digit (tie 0.9) did not hurt the classification of untied grids",
           [("attention", f"{kind}-tie0.9", f"{kind}-tie0", "accuracy", -0.5, INF)
            for kind in ("frozen", "scratch")]),
    "C5": ("Attention lies on the garment: more than half of the true class's positive CAM mass "
           "(tie 0.9)",
           [("attention", f"{kind}-tie0.9", None, "mass", 50, INF)
            for kind in ("frozen", "scratch")]),
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
# Those that ask something of any images: which is better, and not by how many points on the
# report's own (C1, C6, C13), nor of its grids (C3 to C5).
OWN_CLAIMS = ("C2", "C7", "C8", "C9", "C10", "C11", "C12")
# settings that all rows of a table must share: a row differs by its own switch and by nothing else
SHARED = ("protocol", "split", "epochs", "batch", "lr", "weight_decay", "warmup", "precision",
          "deterministic", "compile", "size", "flip", "train_images", "weight_power")
PROTOCOLS = ("report", "desk", "smoke")


def load_records(folder: Path, protocol: str) -> dict[str, dict[int, dict]]:
    """{row: {seed: record}} of one table's folder, see `records.load`, in the report's order."""
    order = REPORT.get(folder.name, ())
    # surrogates differ in training
    return records.load(folder, protocol, order, SHARED if order else ())


def is_own(rows: dict[str, dict[int, dict]]) -> bool:
    """Whether records are of a set of the user's own, of which the report says nothing."""
    return any(record.get("about_data", {}).get("own") for record in records.each_of(rows))


# ---- estimates ----

@functools.cache
def photo_draws(photos: int) -> np.ndarray:
    """float32 (1000, photos): how often each photo is in each of 1,000 test sets, for every run."""
    drawn = np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), 1000)
    return drawn.astype(np.float32)


REDRAWN: dict[Path, np.ndarray] = {}  # by the file of a run's arrays


def redrawn_average_precisions(record: dict) -> np.ndarray:
    """AP (1000, C) of a run on test sets of photos drawn with repetition.

    MAP and WGAP are no means over images, and crops of one photo are not independent: whole photos
    are redrawn, the same for every run.
    """
    path = records.arrays_file(record)
    if path not in REDRAWN:
        arrays = records.arrays_of(record, records.COUNTS)
        draws = photo_draws(len(arrays["groups"]))
        # in float32, where BLAS multiplies: exact to 2^24, and a few parts in 10^7 off beyond
        counts = (np.tensordot(draws, arrays[name].astype(np.float32), 1)
                  for name in ("hits", "misses"))
        REDRAWN[path] = metrics.binned_average_precision(*counts)
    return REDRAWN[path]


REDRAWS = {"map": lambda record: np.nanmean(redrawn_average_precisions(record), 1),
           "wgap": lambda record: np.nanmin(redrawn_average_precisions(record), 1)}
estimate = functools.partial(estimates.estimate, redraws=REDRAWS)


# ---- the tables ----

def base_of(table: str) -> str:
    return next(iter(REPORT[table]))


def render(rows: dict[str, dict[int, dict]], table: str, seeds: int) -> str:
    """The table as Markdown: differences from the base row, paired by seed, and the report's."""
    layout = tables.Layout(base_of(table), COLUMNS[table], REPORT[table])
    return tables.render(rows, layout, seeds, is_own(rows), estimate)


# ---- the claims ----

def judge(rows_of: dict[str, dict]) -> dict[str, dict]:
    """The verdict on every claim, see `claims.judge`; on images of the user's own, on some."""
    own = [table for table, rows in rows_of.items() if is_own(rows)]
    asked = {name: claim for name, claim in CLAIMS.items()
             if not own or name in OWN_CLAIMS and claim[1][0][0] in own}
    return claims.judge(asked, rows_of, estimate)


def render_claims(found: dict[str, dict]) -> str:
    return claims.render(CLAIMS, found)


# ---- attention ----

def surrogates(rows: dict) -> dict[tuple[str, float], dict[int, dict]]:
    """{(frozen or scratch, strength of the tie): records by seed}, by what the records say.

    Of several, as where a reader adds one with a switch more, the one that is called so.
    """
    found = {}
    for row, seeds in rows.items():
        one = next(iter(seeds.values()))
        kind = "frozen" if records.need(one, "config", "frozen") else "scratch"
        tie = records.need(one, "config", "tie", kind=(int, float))
        if (kind, tie) not in found or row == f"{kind}-tie{tie:g}":
            found[kind, tie] = seeds
    return found


def error_overlaps(frozen: dict[int, dict], scratch: dict[int, dict]) -> list[dict]:
    """How two surrogates' errors coincide, for each seed that both have."""
    found = []
    for seed in sorted(frozen.keys() & scratch.keys()):
        a, b = (records.arrays_of(one[seed], ("prediction", "target"))
                for one in (frozen, scratch))
        found.append(metrics.error_overlap(a["prediction"], b["prediction"], a["target"]))
    return found


def render_attention(rows: dict, equivariance: dict) -> str:
    """The surrogates' measurements as Markdown, and how far features move with the image."""
    columns = {"accuracy, untied": "accuracy", "accuracy, tied": "accuracy_tied",
               "CAM mass in its cell": "mass", "pointing game": "pointing",
               "mass, tied": "mass_tied", "others called Trouser, with a 3": "trouser_with_three",
               "without": "trouser_without_three"}

    alone = {}

    def own(seeds: dict[int, dict], key: str, signed: bool = False) -> str:
        one = estimates.own_value(seeds, key)
        alone[key] = alone.get(key) or one.seeds_alone
        # seeds that all found the same tell no interval
        half = one.half if one.half > 1e-9 else math.nan
        return number(one.mean, half, signed) if one.values else "not measured"

    lines = ["| surrogate | " + " | ".join(columns) + " | seeds |",
             "|---|" + "--:|" * (len(columns) + 1)]
    for row, seeds in rows.items():
        cells = [own(seeds, key) for key in columns.values()]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    kept_none = " and of ".join([*(f'"{heading}"' for heading, key in columns.items()
                                   if alone.get(key)), "coinciding errors", "equivariance"])
    lines.append("\nPercent, mean over seeds. ± is the 95 % interval, over seeds and over the "
                 f"test grids; of {kept_none} runs keep no value of each grid, so there it is over "
                 "seeds alone, and missing where all seeds found the same. Chance is 25 for the "
                 "CAM's mass and the pointing game.\n")
    found = surrogates(rows)
    for kind in ("frozen", "scratch"):
        if untied := found.get((kind, 0)):
            top_left, top_right, left, right = (own(untied, f"accuracy_cell{c}") for c in range(4))
            lines.append(f"- `{kind}-tie0`: accuracy with the garment top left {top_left}, top "
                         f"right {top_right}, bottom left {left}, bottom right {right}.")
    if untied := found.get(("frozen", 0)):
        lines.append("- `frozen-tie0`: accuracy over all 841 shifts, which cut digits, less that "
                     f"over moves by whole cells: {own(untied, 'shifted_minus_whole', True)}.")
    for tie in (0, 0.9):
        if one := error_overlaps(found.get(("frozen", tie), {}), found.get(("scratch", tie), {})):
            both, chance, same = (cell([overlap[key] for overlap in one], False)
                                  for key in ("both", "chance", "same"))
            lines.append(f"- Tie {tie}: frozen and scratch both err on {both} % of the grids; "
                         f"independent errors in a class would on {chance} %. Of these, both give "
                         f"{same} % the same wrong class.")
    if equivariance:
        lines += ["\n| equivariance error of the features | zero padding, as trained | circular "
                  "padding | seeds |", "|---|--:|--:|--:|"]
    for row, seeds in equivariance.items():
        cells = [cell(paired({"": seeds}, "", None, "test", f"equivariance_error_{padding}"), False)
                 for padding in ("zeros", "circular")]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    return "\n".join(lines) + "\n"


# ---- figures ----

TIES = {"accuracy, untied grids (%)": {"accuracy": ""},
        "accuracy, tied grids (%)": {"accuracy_tied": ""},
        "CAM mass in garment's cell (%)": {"mass": ""},
        "other class taken for Trouser (%)": {"trouser_with_three": ", with a 3",
                                              "trouser_without_three": ", without"}}


def typical_errors(rows: dict, table: str) -> dict[str, dict]:
    """{heading of a test metric: what `figures.draw_power` takes} of a table's rows."""
    found = {name: estimates.typical_errors(rows, base_of(table), key, REDRAWS)
             for name, split, key in COLUMNS[table].values() if split == "test"}
    return {name: one for name, one in found.items() if one}


def draw_table(rows: dict, table: str) -> dict[str, "figures.Figure"]:  # noqa: F821
    """{file: picture} of one table's records."""
    from lab import figures  # here and below: records, tables and claims need no matplotlib
    base, others = base_of(table), [row for row in rows if row != base_of(table)]
    report = {} if is_own(rows) else REPORT[table]
    asked = {key for _, effects in CLAIMS.values() for *_, key, _, _ in effects}
    differences = {name: {row: (estimate(rows, row, base, "test", key),
                                report.get(row, ("", {}))[1].get(column))
                          for row in others}
                   for column, (name, split, key) in COLUMNS[table].items()
                   if split == "test" and key in asked}
    found = {f"{table}.png": figures.draw_differences(differences, rows),
             f"{table}-curves.png": figures.draw_curves(rows, base, "loss")}
    first = records.each_of(rows)[0]
    if "class_pixels" in first:
        about = first["about_data"]  # the study's first records hold no palette
        palette = np.array(about.get("palette") or data.FACADE_PALETTE, dtype=np.uint8)
        found["imbalance.png"] = figures.draw_shares(
            np.array(first["class_pixels"]), about["classes"], palette, about["name"])
    return found


def draw_measurements(rows: dict) -> dict[str, "figures.Figure"]:  # noqa: F821
    """{file: picture} of what was measured of the surrogates."""
    from lab import figures, panels
    found = surrogates(rows)
    pictures = {"ties.png": figures.draw_trends(found, TIES, "strength of the tie",
                                                {"CAM mass in garment's cell (%)": 25})}
    if swept := found.get(("frozen", 0)):
        sweep = records.mean_arrays(swept, ("sweep_accuracy", "sweep_consistency"))
        grids = [records.need(next(iter(swept.values())), "config", name, kind=int)
                 for name in ("images", "sweep_images")]
        pictures["shifts.png"] = panels.draw_shifts("frozen", swept, sweep, grids)
    names = records.need(records.each_of(rows)[0], "trained", "about_data", "classes", kind=list)
    confusions = {f"{kind}-tie0.9, all seeds": records.summed_confusion(seeds, len(names))
                  for (kind, tie), seeds in found.items() if tie == 0.9}
    if confusions:
        pictures["confusion.png"] = figures.draw_confusions(confusions, names)
    return pictures


def draw(folder: Path, protocol: str) -> None:
    """All pictures that the records of a protocol can give, into its folder."""
    from lab import figures, panels
    rows_of = {table: load_records(folder / table, protocol) for table in REPORT}
    pictures, errors = {}, {}
    for table, rows in rows_of.items():
        if base_of(table) in rows:
            pictures |= draw_table(rows, table)
            errors[table] = typical_errors(rows, table)
        elif rows or not any(map(is_own, rows_of.values())):
            what = f"record of its base row, {base_of(table)}" if rows else "record"
            print(f"{folder / table} has no {what} yet, so no figure")
    if rows := load_records(folder / "attention", protocol):
        pictures |= draw_measurements(rows)
    if rows := load_records(folder / "equivariance", protocol):
        pictures["equivariance.png"] = panels.draw_equivariance(rows)
    if all(errors.get(table) for table in REPORT):
        pictures["power.png"] = figures.draw_power(
            {name: one for found in errors.values() for name, one in found.items()},
            max(map(len, REPORT.values())), len(CLAIMS), f"protocol {protocol}, median row",
            [record for rows in rows_of.values() for record in records.each_of(rows)])
    for name, figure in pictures.items():
        figures.save(figure, folder / name)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*REPORT, "attention", "claims", "figures"],
                        help="what to render")
    parser.add_argument("--protocol", default="report", choices=PROTOCOLS,
                        help="which records (report)")
    parser.add_argument("--name", help="of your own data: what is in RESULTS/PROTOCOL-NAME")
    parser.add_argument("--results", default="results", help="folder of the records (results)")
    parser.add_argument("--seeds", type=int,
                        help="seeds a full row has (the most that any row has)")
    args = parser.parse_args(argv)
    folder = Path(args.results, f"{args.protocol}-{args.name}" if args.name else args.protocol)
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder, so there are no records: see --results, --protocol "
                       f"and --name")
    if args.what == "figures":
        return draw(folder, args.protocol)
    of = {"claims": (*REPORT, "attention"), "attention": ("attention", "equivariance")}
    rows_of = {name: load_records(folder / name, args.protocol)
               for name in of.get(args.what, (args.what,))}
    made_of = [record for rows in rows_of.values() for record in records.each_of(rows)]
    if not made_of:
        raise BadInput(f"{folder} has no record in {' or '.join(rows_of)}, so there is nothing to "
                       f"show: `make help` says what runs them")
    if args.what == "claims":
        found = judge(rows_of)
        text = render_claims(found) + claims.render_needs(CLAIMS, found, rows_of)
        if note := records.caveat(made_of):
            text += f"\n{note}\n"
    elif args.what == "attention":
        text = render_attention(*rows_of.values())
    else:
        rows = rows_of[args.what]
        text = render(rows, args.what, args.seeds or max(map(len, rows.values())))
    write_atomic(folder / f"{args.what}.md", text.encode())


if __name__ == "__main__":
    sys.exit(cli.guard(main))
