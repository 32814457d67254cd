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
from lab import claims, cli, estimates, records
from lab.files import write_atomic
from lab.records import cell, number, paired, pairs_of, plain

# The columns of each table: what heads one, and where a record holds it.
COLUMNS = {"table1": {"test": ("test accuracy", "test", "accuracy"),
                      "train": ("train accuracy", "train", "accuracy")},
           "table2": {"map": ("test MAP", "test", "map"), "wgap": ("WGAP", "test", "wgap"),
                      "train": ("train MAP", "train", "map")}}
# The report's tables, in percent, in its order: a row's name, then its value in each column. The
# first row is absolute, the others are differences from it. Rows that the report lacks have no
# value.
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
          "deterministic", "compile", "size", "train_images", "weight_power")
PROTOCOLS = ("report", "desk", "small", "smoke")


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
def redrawn_average_precisions(path: Path) -> np.ndarray:
    """AP (1000, C) of a run on 1,000 test sets of photos drawn with repetition.

    MAP and WGAP are no means over images, and crops of one photo are not independent: whole photos
    are redrawn, the same for every run.
    """
    arrays = records.load_arrays(path)
    photos = len(arrays["groups"])
    # in float32, where BLAS multiplies: a count here is under 2^24
    draws = np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), 1000)
    draws = draws.astype(np.float32)
    counts = (arrays[name].astype(np.float32) for name in ("hits", "misses"))
    return metrics.binned_average_precision(*(np.tensordot(draws, count, 1) for count in counts))


REDRAWS = {"map": lambda path: np.nanmean(redrawn_average_precisions(path), 1),
           "wgap": lambda path: np.nanmin(redrawn_average_precisions(path), 1)}
estimate = functools.partial(estimates.estimate, redraws=REDRAWS)


def median_errors(tables: dict[str, dict]) -> dict[str, dict]:
    """Of each test metric, the medians over a table's rows of what `figures.draw_power` takes."""
    found = {}
    for table, rows in tables.items():
        base, *others = rows
        for name, split, key in COLUMNS[table].values():
            if split != "test":
                continue
            parts = [estimates.test_set_part(rows, row, base, key, REDRAWS)
                     for row in others if pairs_of(rows, row, base)]
            if None in parts:
                continue
            spreads = estimates.spreads(rows, split, key).values()
            typical = lambda variances: float(np.sqrt(np.median(variances)))
            found[name] = {"spread": typical([part.variance for part in spreads if part.dof > 0]),
                           "test_set": 100 * typical([part.variance for part in parts]),
                           "units": parts[0].dof + 1, "rows": len(rows)}
    return found


# ---- the tables ----

def render(rows: dict[str, dict[int, dict]], table: str, seeds: int) -> str:
    """The table as Markdown: differences from the base row, paired by seed, and the report's."""
    base_row, columns, own = next(iter(REPORT[table])), COLUMNS[table], is_own(rows)
    heads = " | ".join(name + " | report" * (not own) for name, _, _ in columns.values())
    lines = [f"| row | {heads} | seeds | parameters | multiply-adds | training |",
             "|---|" + "--:|" * ((2 - own) * len(columns) + 4)]
    held, seeds_alone = {name: [] for name, _, _ in columns.values()}, set()
    for row in [*REPORT[table], *(row for row in rows if row not in REPORT[table])]:
        label, reported = REPORT[table].get(row, (plain(row), {}))
        runs, cells, signed = rows.get(row, {}), [], row != base_row
        for column, (name, split, key) in columns.items():
            ours = estimate(rows, row, base_row if signed else None, split, key)
            value = None if own else reported.get(column)
            cells.append(number(ours.mean, ours.half, signed) if ours.values else "not run")
            if split == "test" and len(ours.error) == 1:
                seeds_alone.add(name)
            holds = None if value is None else ours.holds(value)
            if holds is not None:
                held[name].append(holds)
            mark = {True: " ✓", False: " ✗", None: ""}[holds]
            if not own:
                cells.append("" if value is None else number(value, math.nan, signed) + mark)
        of_all = "" if len(ours.values) == seeds else f" of {seeds}"
        cells.append(f"{len(ours.values)}{of_all}")
        if runs:
            one = next(iter(runs.values()))
            seconds = np.mean([record["train_seconds"] for record in runs.values()])
            cells += [f"{one['parameters'] / 1e6:.2f} M",
                      f"{one['multiply_adds'] / 1e6:,.0f} M", f"{seconds:,.0f} s"]
        else:
            cells += [""] * 3
        lines.append(f"| {label} `{plain(row)}` | " + " | ".join(cells) + " |")
    made_of = records.each_of(rows)
    devices = sorted({plain(record["environment"]["device"]) for record in made_of})
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
                f"{records.caveat(made_of)}".rstrip())
    return "\n".join([*lines, "", " ".join(note)]) + "\n"


# ---- the claims ----

def judge(tables: dict[str, dict]) -> dict[str, dict]:
    """The verdict on every claim, see `claims.judge`; on images of the user's own, on some."""
    own = [table for table, rows in tables.items() if is_own(rows)]
    asked = {name: claim for name, claim in CLAIMS.items()
             if not own or name in OWN_CLAIMS and claim[1][0][0] in own}
    return claims.judge(asked, tables, estimate)


def render_claims(found: dict[str, dict]) -> str:
    return claims.render(CLAIMS, found)


# ---- attention ----

def surrogates(rows: dict) -> dict[tuple[str, float], dict[int, dict]]:
    """{(frozen or scratch, strength of the tie): records by seed}, by what the records say."""
    found = {}
    for seeds in rows.values():
        config = next(iter(seeds.values()))["config"]
        found["frozen" if config["frozen"] else "scratch", config["tie"]] = seeds
    return found


def error_overlaps(frozen: dict[int, dict], scratch: dict[int, dict]) -> list[dict]:
    """How two surrogates' errors coincide, for each seed that both have."""
    found = []
    for seed in sorted(frozen.keys() & scratch.keys()):
        a, b = (records.load_arrays(records.arrays_file(one[seed])) for one in (frozen, scratch))
        found.append(metrics.error_overlap(a["prediction"], b["prediction"], a["target"]))
    return found


def render_attention(rows: dict, equivariance: dict) -> str:
    """The surrogates' measurements as Markdown, and how far features move with the image."""
    columns = {"accuracy, untied": "accuracy", "accuracy, tied": "accuracy_tied",
               "CAM mass in its cell": "mass", "pointing game": "pointing",
               "mass, tied": "mass_tied", "others called Trouser, with a 3": "trouser_with_three",
               "without": "trouser_without_three"}
    own = lambda seeds, key, signed=False: cell(paired({"": seeds}, "", None, "test", key), signed)
    lines = ["| surrogate | " + " | ".join(columns) + " | seeds |",
             "|---|" + "--:|" * (len(columns) + 1)]
    for row, seeds in rows.items():
        cells = [own(seeds, key) for key in columns.values()]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    lines.append("\nPercent, mean over seeds ± 95 % interval (Student's t). Chance is 25 for the "
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
        cells = [own(seeds, f"equivariance_error_{padding}") for padding in ("zeros", "circular")]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    return "\n".join(lines) + "\n"


# ---- figures ----

TIES = {"accuracy, untied grids (%)": {"accuracy": ""},
        "accuracy, tied grids (%)": {"accuracy_tied": ""},
        "CAM mass in garment's cell (%)": {"mass": ""},
        "other class taken for Trouser (%)": {"trouser_with_three": ", with a 3",
                                              "trouser_without_three": ", without"}}


def draw_table(rows: dict, table: str) -> dict[str, "figures.Figure"]:  # noqa: F821
    """{file: picture} of one table's records."""
    from lab import figures  # here and below: records, tables and claims need no matplotlib
    base_row, *others = rows
    report = {} if is_own(rows) else REPORT[table]
    differences = {name: {row: (estimate(rows, row, base_row, "test", key),
                                report.get(row, ("", {}))[1].get(column))
                          for row in others}
                   for column, (name, split, key) in COLUMNS[table].items() if split == "test"}
    found = {f"{table}.png": figures.draw_differences(differences, rows),
             f"{table}-curves.png": figures.draw_curves(rows)}
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
        pictures["shifts.png"] = panels.draw_shifts("frozen", swept, sweep)
    names = records.each_of(rows)[0]["trained"]["about_data"]["classes"]
    confusions = {f"{kind}-tie0.9, all seeds": records.summed_confusion(seeds, len(names))
                  for (kind, tie), seeds in found.items() if tie == 0.9}
    if confusions:
        pictures["confusion.png"] = figures.draw_confusions(confusions, names)
    return pictures


def draw(folder: Path, protocol: str) -> None:
    """All pictures that the records of a protocol can give, into its folder."""
    from lab import figures, panels
    tables = {table: load_records(folder / table, protocol) for table in REPORT}
    pictures = {}
    for table, rows in tables.items():
        if rows:
            pictures |= draw_table(rows, table)
        elif not any(map(is_own, tables.values())):
            print(f"{folder / table} has no record yet, so no figure")
    if rows := load_records(folder / "attention", protocol):
        pictures |= draw_measurements(rows)
    if rows := load_records(folder / "equivariance", protocol):
        pictures["equivariance.png"] = panels.draw_equivariance(rows)
    if all(len(next(iter(rows.values()), {})) > 1 for rows in tables.values()):
        power = figures.draw_power(
            median_errors(tables), max(map(len, REPORT.values())), len(CLAIMS),
            f"protocol {protocol}, median row",
            [record for rows in tables.values() for record in records.each_of(rows)])
        figures.save(power, folder.parent / "power.png")
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
    read = lambda name: load_records(folder / name, args.protocol)
    if args.what == "figures":
        return draw(folder, args.protocol)
    if args.what == "claims":
        tables = {table: read(table) for table in (*REPORT, "attention")}
        text = render_claims(judge(tables))
        made_of = [record for rows in tables.values() for record in records.each_of(rows)]
        if note := records.caveat(made_of):
            text += f"\n{note}\n"
    elif args.what == "attention":
        text = render_attention(read("attention"), read("equivariance"))
    else:
        rows = read(args.what)
        most = max((len(runs) for runs in rows.values()), default=0)
        text = render(rows, args.what, args.seeds or most)
    write_atomic(folder / f"{args.what}.md", text.encode())


if __name__ == "__main__":
    sys.exit(cli.guard(main))
