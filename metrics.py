"""What the study reports: accuracy, average precision, MAP, WGAP, IoU, and the tables made of them.

    python metrics.py table1 --protocol small     results/small/table1/*/seed*.json -> results/small/table1.md
    python metrics.py table2                      the same for Table 2, protocol report
    python metrics.py attention --protocol small  where the surrogates look, what ties and shifts do to them
    python metrics.py claims --protocol small     the verdict on each of the report's claims

All values are fractions in [0, 1]; the tables print them as percent. Counts are int64 and ratios
float64: a training split has 59 million pixels, and float32 counts stop being exact at 2^24.
"""

import argparse
import fcntl
import functools
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab.progress import progress
from lab.statistics import LEVEL, Part, claim, evidence, half_width, holm, own_spread, row_spreads, sign_flip, sum_of

# The report's tables, in percent, in its order: name, then the value of each column. The first row is absolute,
# the others are differences from it. Rows that the report lacks have None.
COLUMNS = {"table1": (("test accuracy", "test", "accuracy"), ("train accuracy", "train", "accuracy")),
           "table2": (("test MAP", "test", "map"), ("WGAP", "test", "wgap"), ("train MAP", "train", "map"))}
REPORT = {
    "table1": {
        "maxpool-2-32": ("VGG-ResNet(2,32,maxpool)", 92.41, 99.04),
        "stride-2-32": ("VGG-ResNet(2,32,stride)", -1.15, -0.28),
        "stride-2-32-noskip": ("VGG-ResNet(2,32,stride) - skip", 0.42, -0.31),
        "stride-2-32-nobn": ("VGG-ResNet(2,32,stride) - BatchNorm", -0.41, -0.80),
        "stride-2-32-noact": ("VGG-ResNet(2,32,stride) - activation", -1.79, -1.40),
        "stride-2-32-gelu": ("VGG-ResNet(2,32,stride) with GELU", 0.02, 0.30),
        "stride-1-32": ("VGG-ResNet(1,32,stride)", -1.54, -0.14),
        "stride-4-32": ("VGG-ResNet(4,32,stride)", -0.99, -0.05),
        "stride-2-16": ("VGG-ResNet(2,16,stride)", -1.21, -0.19),
        "stride-2-64": ("VGG-ResNet(2,64,stride)", -0.77, 0.21),
        "maxpool-1-32": ("VGG-ResNet(1,32,maxpool)", -0.52, 0.32),
        "maxpool-4-32": ("VGG-ResNet(4,32,maxpool)", 0.26, -0.01),
        "maxpool-2-16": ("VGG-ResNet(2,16,maxpool)", 0.28, 0.20),
        "maxpool-2-64": ("VGG-ResNet(2,64,maxpool)", -0.16, -0.20),
        "maxpool-2-32-noact": ("VGG-ResNet(2,32,maxpool) - activation", None, None),
        "maxpool-2-32-transformer": ("VGG-ResNet(2,32,maxpool), last stage Transformer", None, None),
        "blurpool-2-32": ("VGG-ResNet(2,32,blurpool)", None, None),
    },
    "table2": {
        "standard": ("HourGlass(2*32), weighted cross entropy", 73.9, 46.8, 89.5),
        "unet": ("U-Net (benchmark)", -4.88, -5.37, 2.08),
        "no-intra-skip": ("Standard - intra skip", 1.55, 0.63, 1.11),
        "no-inter-skip": ("Standard - inter skip", -4.00, -17.00, -12.3),
        "no-bn": ("Standard - BatchNorm", -7.8, -16.50, -9.2),
        "no-act": ("Standard - activation", -33.22, -37.5, -50.97),
        "ce": ("Standard with cross entropy", -0.61, -8.78, 2.68),
        "dice": ("Standard with Dice loss", -54.59, -45.3, -70.13),
        "hourglass-1-32": ("HourGlass(1*32)", -0.40, -4.79, 3.25),
        "hourglass-4-32": ("HourGlass(4*32)", -0.90, -6.8, -2.80),
        "hourglass-2-16": ("HourGlass(2*16)", -2.50, -5.80, -3.27),
        "hourglass-2-64": ("HourGlass(2*64)", 1.00, 1.00, 4.30),
        "no-dropout": ("Standard - dropout", None, None, None),
    },
}
# The report's conclusions. Each is one or more differences (table, row, other row, metric, low, high), in points of the
# test split: the claim says that row - other (or the row's own value) lies in [low, high]. "About 8" is taken as 8 give
# or take half of it, "matters" as more than one point, "does not hurt" as less than half a point, "does not change" as
# less than one, "collapses" as more than twenty.
INF = math.inf
CLAIMS = {
    "C1": ("On Fashion-MNIST architecture choices matter little: all rows within 2 points of the base",
           [("table1", row, "maxpool-2-32", "accuracy", -2, 2) for row in REPORT["table1"] if row != "maxpool-2-32"]),
    "C2": ("Removing the non-linearity does not hurt when max-pooling is there",
           [("table1", "maxpool-2-32-noact", "maxpool-2-32", "accuracy", -0.5, INF)]),
    "C3": ("Convolution is translation invariant: the cell of the garment does not change the frozen model's accuracy",
           [("attention", "frozen-tie0", None, f"cell{cell}_minus_cell0", -1, 1) for cell in (1, 2, 3)]),
    "C4": ("The spurious digit (tie 0.9) did not hurt the classification of untied grids",
           [("attention", f"{kind}-tie0.9", f"{kind}-tie0", "accuracy", -0.5, INF) for kind in ("frozen", "scratch")]),
    "C5": ("Attention lies on the garment: more than half of the true class's positive CAM mass (tie 0.9)",
           [("attention", f"{kind}-tie0.9", None, "mass", 50, INF) for kind in ("frozen", "scratch")]),
    "C6": ("Weighted cross entropy raises WGAP by about 8 points", [("table2", "standard", "ce", "wgap", 4, 12)]),
    "C7": ("Dice does not improve MAP", [("table2", "dice", "standard", "map", -INF, 0)]),
    "C8": ("Inter skips matter, for MAP and for WGAP", [("table2", "no-inter-skip", "standard", "map", -INF, -1),
                                                        ("table2", "no-inter-skip", "standard", "wgap", -INF, -1)]),
    "C9": ("BatchNorm matters", [("table2", "no-bn", "standard", "map", -INF, -1)]),
    "C10": ("Without activations segmentation collapses", [("table2", "no-act", "standard", "map", -INF, -20)]),
    "C11": ("Wider beats deeper", [("table2", "hourglass-2-64", "hourglass-4-32", "map", 0, INF)]),
    "C12": ("The hourglass with sums beats U-Net with concatenation", [("table2", "standard", "unet", "map", 0, INF)]),
    "C13": ("Dropout 0.2 adds about 5 points of test MAP", [("table2", "standard", "no-dropout", "map", 2.5, 7.5)]),
}
# settings that all rows of a table must share: a row differs by its own switch and by nothing else
SHARED = ("protocol", "split", "epochs", "batch", "lr", "weight_decay", "warmup", "precision", "compile", "size",
          "train_images", "weight_power")


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of samples whose largest logit is the target's; logits (N, C, ...), target (N, ...)."""
    return (logits.argmax(1) == target).double().mean().item()


def ascending(x: Tensor) -> Tensor:
    # NumPy's sort of plain floats uses the vector units of the CPU, torch's does not
    return x.sort().values if x.is_cuda else torch.from_numpy(np.sort(x.cpu().numpy()))


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Exact average precision of one class: sum over thresholds of (R_n - R_{n-1}) P_n.

    The definition and the tie handling are scikit-learn's `average_precision_score` (samples of one
    score enter together), without interpolation. Only thresholds that carry a positive move the
    recall, so positives and negatives are sorted apart, and the negatives above each are counted.

    scores (M,) float, half types are upcast; positive (M,) bool. NaN where nothing is positive.
    ValueError for scores that are not finite or not floating-point, and for shapes that differ.
    """
    if scores.shape != positive.shape or scores.ndim != 1:
        raise ValueError(f"scores {tuple(scores.shape)} and positive {tuple(positive.shape)} must be 1-D and equal")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating-point, got {scores.dtype}")
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if not scores.isfinite().all():
        raise ValueError("scores must be finite")
    positive = positive.bool()
    hits, misses = ascending(scores[positive]), ascending(scores[~positive])
    if len(hits) == 0:
        return math.nan
    thresholds, counts = torch.unique_consecutive(hits, return_counts=True)
    true = counts.flip(0).cumsum(0).flip(0)  # positives at or above each threshold
    false = len(misses) - torch.searchsorted(misses, thresholds)
    return (counts.double() / len(hits) * (true.double() / (true + false))).sum().item()


def average_precisions(scores: Tensor, target: Tensor) -> list[float]:
    """AP of every class over all pixels of all images, ranked across images.

    scores (N, C, ...), target (N, ...) with values in [0, C); NaN for a class the target lacks.
    """
    target = target.reshape(-1)
    classes = progress(range(scores.shape[1]), "average precision", unit="classes")
    return [average_precision(scores[:, c].reshape(-1), target == c) for c in classes]


BINS = 192  # of log-odds from -12 to 12, an eighth each


def score_histograms(probs: Tensor, target: Tensor, group: Tensor) -> dict[str, np.ndarray]:
    """How the scores of each class lie, per group of images: all that AP on resampled groups needs.

    probs (N, C, H, W) float32 in [0, 1], target (N, H, W), group (N,) an integer per image, such as
    its photo. Returns int32 (groups, C, BINS) `hits` and `misses`, pixels of the class and not of
    it by score, and `groups`, the sorted distinct values of `group`.
    """
    classes = probs.shape[1]
    groups, which = group.unique(return_inverse=True)
    bins = ((torch.logit(probs, eps=1e-6) + 12) * (BINS / 24)).long().clamp_(0, BINS - 1)
    is_class = target.unsqueeze(1) == torch.arange(classes, device=target.device).view(1, -1, 1, 1)
    cell = ((which.view(-1, 1, 1, 1) * classes + torch.arange(classes, device=target.device).view(1, -1, 1, 1)) * BINS
            + bins) * 2 + is_class
    counts = torch.bincount(cell.reshape(-1), minlength=len(groups) * classes * BINS * 2)
    counts = counts.reshape(len(groups), classes, BINS, 2).to(torch.int32).cpu().numpy()
    return {"hits": counts[..., 1], "misses": counts[..., 0], "groups": groups.cpu().numpy()}


def binned_average_precision(hits: np.ndarray, misses: np.ndarray) -> np.ndarray:
    """AP from pixel counts (..., BINS) by ascending score, NaN where there is no hit.

    The hits of a bin get the precision at its middle, as if its pixels were evenly mixed: taking
    them as tied would lose the ranking inside the bin and lower every AP.
    """
    hits, misses = hits[..., ::-1].astype(np.float64), misses[..., ::-1].astype(np.float64)
    true, false = (np.cumsum(counts, -1) - counts / 2 for counts in (hits, misses))
    total = hits.sum(-1)
    ranked = (hits * true / np.maximum(true + false, 0.5)).sum(-1)
    return np.divide(ranked, total, out=np.full_like(total, np.nan), where=total > 0)


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """int64 (classes, classes): how many of true class i (row) were predicted as j (column)."""
    index = target.reshape(-1).long() * classes + prediction.reshape(-1).long()
    return torch.bincount(index, minlength=classes**2).reshape(classes, classes)


def ious(counts: Tensor) -> list[float]:
    """IoU of each class from a confusion matrix; NaN for a class that the target lacks."""
    counts = counts.double()
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return iou.where(counts.sum(1) > 0, torch.nan).tolist()


def mean_present(values: list[float]) -> float:
    """Mean over the values that are not NaN, that is over the classes that are there; NaN if none is."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def worst_present(values: list[float]) -> float:
    """Smallest of the values that are not NaN: WGAP when the values are APs (report, section 3)."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def classification(logits: Tensor, target: Tensor, names: list[str]) -> dict:
    """Metrics of a split for the run record: accuracy, its per-class values, the confusion matrix.

    logits (N, C) float, target (N,). A class that the split lacks has NaN and is left out of no mean
    here: accuracy is over samples.
    """
    counts = confusion(logits.argmax(1), target, len(names)).double()
    recall = (counts.diag() / counts.sum(1)).tolist()  # 0/0 is NaN
    return {"accuracy": accuracy(logits, target), "class_accuracy": dict(zip(names, recall)),
            "confusion": counts.long().tolist(), "images": len(target)}


def segmentation(logits: Tensor, target: Tensor, names: list[str]) -> dict:
    """Metrics of a split for the run record.

    logits (N, C, H, W) float32, target (N, H, W). Headline: AP of the softmax probabilities, since
    raw logits rank differently across pixels; theirs is kept beside it. IoU is per class over the
    whole split. A class that no pixel of the target shows has NaN for AP and IoU and is left out of
    the means; `classes_counted` says how many were not.
    """
    counts = confusion(logits.argmax(1), target, len(names))
    iou = ious(counts)
    ap = average_precisions(logits.softmax(1), target)
    ap_logits = average_precisions(logits, target)
    return {"map": mean_present(ap), "wgap": worst_present(ap), "ap": dict(zip(names, ap)),
            "map_logits": mean_present(ap_logits), "ap_logits": dict(zip(names, ap_logits)),
            "miou": mean_present(iou), "iou": dict(zip(names, iou)),
            "pixel_accuracy": (counts.diag().sum() / counts.sum()).item(),
            "classes_counted": int((counts.sum(1) > 0).sum()), "images": len(target)}


def class_table(columns: dict[str, dict[str, float | None]]) -> str:
    """Text table of percentages per class: {column: {class: fraction, or None if absent}} -> lines."""
    lines = [" " * 10 + "".join(f"{column:>12}" for column in columns)]
    for name in next(iter(columns.values())):
        cells = ["absent" if values[name] is None else f"{100 * values[name]:.1f}" for values in columns.values()]
        lines.append(f"{name:<10}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


# ---- the tables, from run records ----

def load_records(folder: Path, protocol: str) -> dict[str, dict[int, dict]]:
    """{row: {seed: record}} of one table's folder; the report's rows first, in its order, then any others.

    ValueError names a record that does not belong: of another protocol, other data, other shared
    settings than the base row's, or another configuration than its own row's other seeds.
    """
    rows, known = {}, list(REPORT.get(folder.name, ()))
    shared = SHARED if known else ("protocol",)  # the surrogates are trained in different ways
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for row in [row for row in known if row in found] + [row for row in found if row not in known]:
        for path in sorted(folder.glob(f"{row}/seed*.json")):
            try:
                record = json.loads(path.read_text())
                seeds = rows.setdefault(row, {})
                seeds[record["config"]["seed"]] = {**record, "data": record["data"], "path": str(path)}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{path} is no run record, or damaged ({type(error).__name__}); delete it") from error
    records = [record for seeds in rows.values() for record in seeds.values()]
    for seeds in rows.values():
        first = next(iter(seeds.values()))
        for record in seeds.values():
            config, path = record["config"], record["path"]
            if config.get("protocol") != protocol:
                raise ValueError(f"{path} is of protocol {config.get('protocol')}, this is the {protocol} table")
            for key in shared:
                if config.get(key) != records[0]["config"].get(key):
                    raise ValueError(f"{path} has {key} {config.get(key)}, but {records[0]['path']} has "
                                     f"{records[0]['config'].get(key)}: a row may differ by its own switch alone")
            if record["data"] != records[0]["data"]:
                raise ValueError(f"{path} was made on other data than {records[0]['path']}")
            # a setting that one of them predates is not compared
            if any(config[key] != first["config"][key] for key in config.keys() & first["config"].keys() - {"seed"}):
                raise ValueError(f"{path} has another configuration than {first['path']}, a seed of the same row")
    return rows


def pairs_of(rows: dict, row: str, other: str) -> list[tuple[dict, dict]]:
    """The records of two rows by the seeds that both have, in order."""
    ours, theirs = rows.get(row, {}), rows.get(other, {})
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def paired(rows: dict, row: str, other: str | None, split: str, key: str) -> list[float]:
    """A metric's differences row - other, by the seeds that both have; without `other` the row's own values."""
    if other is None:
        return [record["metrics"][split][key] for _, record in sorted(rows.get(row, {}).items())]
    return [a["metrics"][split][key] - b["metrics"][split][key] for a, b in pairs_of(rows, row, other)]


def plain(text: str) -> str:
    """The name of a folder or a device, which in a Markdown table may neither end the cell nor be HTML."""
    return re.sub(r"[|<>`\r\n]", "?", text)


def number(mean: float, half: float, signed: bool) -> str:
    """"+0.42 ± 0.31"; the interval is missing where there is one seed."""
    return (f"{mean:+.2f}" if signed else f"{mean:.2f}") + ("" if math.isnan(half) else f" ± {half:.2f}")


def cell(values: list[float], signed: bool) -> str:
    """A number in percent, of values over seeds, with the 95 % interval that their spread gives."""
    variance, dof = own_spread(100 * np.array(values))
    return number(100 * float(np.mean(values)), float(half_width((Part(variance / len(values), dof),))), signed)


def each_of(rows: dict[str, dict[int, dict]]) -> list[dict]:
    return [record for seeds in rows.values() for record in seeds.values()]


def caveat(records: Iterable[dict]) -> str:
    """What a table or figure must say of the data that its records are made of, if anything."""
    drawn = any(record.get("about_data", {}).get("synthetic") for record in records)
    return "SYNTHETIC data: drawn, not photographed." if drawn else ""


def render(rows: dict[str, dict[int, dict]], table: str, seeds: int) -> str:
    """The table as Markdown: differences from the base row, paired by seed, beside the report's own."""
    base_row = next(iter(REPORT[table]))
    lines = ["| row | " + " | ".join(f"{name} | report" for name, _, _ in COLUMNS[table])
             + " | seeds | parameters | multiply-adds | training |",
             "|---|" + "--:|" * (2 * len(COLUMNS[table]) + 4)]
    held = {name: [] for name, _, _ in COLUMNS[table]}
    for row in [*REPORT[table], *(row for row in rows if row not in REPORT[table])]:
        label, *reported = REPORT[table].get(row, (plain(row), *[None] * len(COLUMNS[table])))
        records, cells, signed = rows.get(row, {}), [], row != base_row
        for (name, split, key), value in zip(COLUMNS[table], reported):
            ours = estimate(rows, row, base_row if signed else None, split, key)
            cells.append(number(ours.mean, ours.half, signed) if ours.values else "not run")
            holds = None if value is None else ours.holds(value)
            if holds is not None:
                held[name].append(holds)
            cells.append("" if value is None else (f"{value:+.2f}" if signed else f"{value:.2f}")
                         + {True: " ✓", False: " ✗", None: ""}[holds])
        cells.append(f"{len(ours.values)}" + ("" if len(ours.values) == seeds else f" of {seeds}"))
        if records:
            one = next(iter(records.values()))
            seconds = np.mean([record["train_seconds"] for record in records.values()])
            cells += [f"{one['parameters'] / 1e6:.2f} M", f"{one['multiply_adds'] / 1e6:,.0f} M", f"{seconds:,.0f} s"]
        else:
            cells += [""] * 3
        lines.append(f"| {label} `{plain(row)}` | " + " | ".join(cells) + " |")
    devices = sorted({plain(record["environment"]["device"]) for record in each_of(rows)})
    lines.append("\nPercent. First row: value; others: difference from it, paired by seed. ± is the 95 % interval, over "
                 "seeds and, on the test split, over its images. ✓: the report's number lies in the 95 % prediction "
                 "interval of one more such run; ✗: it does not. "
                 + ", ".join(f"{name}: {sum(marks)} of {len(marks)} do" for name, marks in held.items() if marks)
                 + f". Device: {'; '.join(devices) or 'none yet'}.")
    return "\n".join(lines) + f" {caveat(each_of(rows))}".rstrip() + "\n"


# ---- the claims ----

def npz(record: dict) -> Path:
    return Path(record["path"]).with_suffix(".npz")


@functools.cache
def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays per image or photo that lie beside a record."""
    try:
        # np.load checks no sum where a damaged header asks for too little, nor what a damaged comment hides
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or any(entry.comment + entry.extra for entry in archive.infolist()):
                raise zipfile.BadZipFile("checksum")
        with np.load(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each raise their own for a damaged file
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it and its record, then run it again"
                         ) from error


@functools.cache
def redrawn_average_precisions(path: Path) -> np.ndarray:
    """AP (1000, C) of a run on 1,000 test sets of photos drawn with repetition, the same for every run."""
    arrays = load_arrays(path)
    photos = len(arrays["groups"])
    # in float32, where BLAS multiplies: a count here is under 2^24
    draws = np.random.default_rng(0).multinomial(photos, np.full(photos, 1 / photos), 1000).astype(np.float32)
    counts = (arrays[name].astype(np.float32) for name in ("hits", "misses"))
    return binned_average_precision(*(np.tensordot(draws, count, 1) for count in counts))


def each_image(record: dict, key: str) -> np.ndarray:
    """The values per test image whose mean is a metric: accuracy, and all that interpret.py measures."""
    arrays = load_arrays(npz(record))
    return (arrays[key] if key in arrays else arrays["prediction"] == arrays["target"]).astype(np.float64)


def test_set_part(rows: dict, row: str, other: str | None, key: str) -> Part:
    """Error of a test metric's difference row - other, averaged over seeds, due to the choice of test images.

    MAP and WGAP are no means over images, and crops of one photo are not independent: whole photos are
    redrawn. All other metrics are means, so it is the variance over images divided by their number.
    """
    if key in ("map", "wgap"):
        reduce = np.nanmean if key == "map" else np.nanmin
        score = lambda record: reduce(redrawn_average_precisions(npz(record)), 1)
        pairs = pairs_of(rows, row, other)
        redrawn = np.mean([score(a) - score(b) for a, b in pairs] if other else
                          [score(record) for record in rows[row].values()], 0)
        photos = len(load_arrays(npz(next(iter(rows[row].values()))))["groups"])
        return Part(float(np.var(redrawn)), photos - 1)
    if other is None:
        each = np.mean([each_image(record, key) for record in rows[row].values()], 0)
    else:
        each = np.mean([each_image(a, key) - each_image(b, key) for a, b in pairs_of(rows, row, other)], 0)
    return Part(float(np.var(each)) / len(each), len(each) - 1)


@dataclass(frozen=True)
class Estimate:
    """A metric's difference between two rows, or one row's value, in points: docs/statistics.md.

    values are those of the seeds, paired; error and one_more are the sources of error of their mean, and of
    what one more such run would give. Both are empty with fewer than two seeds.
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
        """Does the 95 % prediction interval of one more run hold the value? None where there is no interval."""
        return bool(abs(value - self.mean) <= half_width(self.one_more)) if self.one_more else None


def estimate(rows: dict, row: str, other: str | None, split: str, key: str) -> Estimate:
    """The difference row - other of a metric (or the row's own value), and its sources of error.

    Two sources: the seeds, and, on a held-out split, the choice of its images. A row's spread over seeds is
    what remains once the seed's effect on all rows of the table is taken out; of a row's own value, all of
    it. Only seeds that both rows have are compared; all runs of the table tell the spread.
    """
    values = [100 * value for value in paired(rows, row, other, split, key)]
    n = len(values)
    if n < 2:
        return Estimate(values)
    if other is None:
        spread = Part(*own_spread(np.array(values)))
    else:
        seeds = sorted({seed for runs in rows.values() for seed in runs})
        scores = np.array([[100 * runs[seed]["metrics"][split].get(key, math.nan) if seed in runs else math.nan
                            for seed in seeds] for runs in rows.values()], float)
        known = ~np.isnan(scores).all(1)
        variances, dofs = row_spreads(scores[known])
        names = [name for name, there in zip(rows, known) if there]
        spread = sum_of(*(Part(variances[names.index(name)], dofs[names.index(name)]) for name in (row, other)))
    test_set = (test_set_part(rows, row, other, key).times(100**2),) if split == "test" else ()
    return Estimate(values, (spread.times(1 / n), *test_set), (spread.times(1 + 1 / n), *test_set))


def judge(tables: dict[str, dict]) -> dict[str, dict]:
    """The verdict on every claim: {claim: effects, p values, verdict}. The rule is in docs/statistics.md.

    A claim is supported if all its effects lie inside their ranges, contradicted if one lies outside.
    Both are tested, see `statistics.claim`, and the p values are corrected across claims by Holm. At 0.05
    the claim is decided, else undecided. Sign-flip p values over the seeds stand beside it: with six seeds
    the smallest possible is 1/32, which Holm's correction can never pass, so they cannot decide.
    """
    found = {}
    for name, (_, parts) in CLAIMS.items():
        effects, evidences = [], []
        for table, row, other, key, low, high in parts:
            one = estimate(tables.get(table, {}), row, other, "test", key)
            effects.append({"row": row, "other": other, "metric": key, "mean": one.mean, "half": one.half,
                            "seeds": len(one.values), "sign_flip": sign_flip(one.values)})
            if one.error:
                evidences.append(evidence(np.float64(one.mean), one.error, low, high))
        p, leans = 1.0, False
        if evidences:
            inside, outside = (np.array(side + (fill,) * (len(parts) - len(side)))  # an effect not run shows nothing
                               for side, fill in zip(zip(*evidences), (1.0, 1.0)))
            p, leans = (side.item() for side in claim(inside, outside))
        found[name] = {"effects": effects, "p": p, "leans": "supported" if leans else "contradicted"}
    for one, p in zip(found.values(), holm(np.array([one["p"] for one in found.values()]))):
        one["p_holm"] = float(p)
        one["verdict"] = one["leans"] if p < LEVEL else "undecided"
    return found


def render_claims(found: dict[str, dict]) -> str:
    """The verdicts as Markdown; of a claim with several effects the one farthest from zero is shown."""
    lines = ["| claim | effect (points) | 95 % interval | seeds | p (Holm) | sign-flip p | verdict |",
             "|---|---|--:|--:|--:|--:|---|"]
    for name, claim in found.items():
        shown = [e for e in claim["effects"] if e["seeds"]]
        worst = max(shown, key=lambda e: abs(e["mean"]), default=None)
        if worst is None:
            lines.append(f"| {name} {CLAIMS[name][0]} | not run | | 0 | | | {claim['verdict']} |")
            continue
        low, high = worst["mean"] - worst["half"], worst["mean"] + worst["half"]
        span = "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"
        where = f"`{worst['row']}`" + (f" - `{worst['other']}`" if worst["other"] else "")
        lines.append(f"| {name} {CLAIMS[name][0]} | {worst['mean']:+.2f} {worst['metric']}, {where} | {span} | "
                     f"{worst['seeds']} | {claim['p_holm']:.3f} | {worst['sign_flip']:.3f} | **{claim['verdict']}** |")
    return "\n".join(lines) + "\n"


# ---- attention ----

def mean_arrays(seeds: dict[int, dict], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Means over a row's seeds of arrays that lie beside its records."""
    loaded = [load_arrays(npz(record)) for record in seeds.values()]
    return {name: np.mean([arrays[name] for arrays in loaded], 0) for name in names}


def summed_confusion(seeds: dict[int, dict], classes: int) -> np.ndarray:
    """int64 (classes, classes): true class by predicted one, over all seeds of a row."""
    total = np.zeros((classes, classes), np.int64)
    for record in seeds.values():
        arrays = load_arrays(npz(record))
        np.add.at(total, (arrays["target"], arrays["prediction"]), 1)
    return total


def error_overlap(a: np.ndarray, b: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """How two classifiers' errors coincide: predictions and target (N,) -> fractions.

    `both`, the share of samples that both get wrong; `chance`, that share were errors independent given
    the true class (so that classes which both find hard do not count as agreement); `same`, the share of
    the samples that both get wrong to which both give the same class.
    """
    wrong_a, wrong_b = a != target, b != target
    both = wrong_a & wrong_b
    chance = sum(wrong_a[target == c].mean() * wrong_b[target == c].mean() * (target == c).mean()
                 for c in np.unique(target))
    return {"both": both.mean(), "chance": chance, "same": (a == b)[both].mean() if both.any() else math.nan}


def render_attention(rows: dict, equivariance: dict) -> str:
    """The surrogates' measurements as Markdown, and how far features are from moving with the image."""
    columns = {"accuracy, untied": "accuracy", "accuracy, tied": "accuracy_tied", "CAM mass in its cell": "mass",
               "pointing game": "pointing", "mass, tied": "mass_tied",
               "others called Trouser, with a 3": "trouser_with_three", "without": "trouser_without_three"}
    lines = ["| surrogate | " + " | ".join(columns) + " | seeds |", "|---|" + "--:|" * (len(columns) + 1)]
    for row, seeds in rows.items():
        cells = [cell(paired(rows, row, None, "test", key), False) for key in columns.values()]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    lines.append("\nPercent, mean over seeds ± 95 % interval (Student's t). Chance is 25 for the CAM's mass and the "
                 "pointing game.\n")
    for row in (row for row in ("frozen-tie0", "scratch-tie0") if row in rows):
        values = [cell(paired(rows, row, None, "test", f"accuracy_cell{c}"), False) for c in range(4)]
        lines.append(f"- `{row}`: accuracy with the garment top left {values[0]}, top right {values[1]}, bottom left "
                     f"{values[2]}, bottom right {values[3]}.")
    if "frozen-tie0" in rows:
        moved = cell(paired(rows, "frozen-tie0", None, "test", "shifted_minus_whole"), True)
        lines.append(f"- `frozen-tie0`: accuracy over all 841 shifts, which cut digits, less that over moves by whole "
                     f"cells: {moved}.")
    for tie in ("0", "0.9"):
        pairs = pairs_of(rows, f"frozen-tie{tie}", f"scratch-tie{tie}")
        found = [error_overlap(*(load_arrays(npz(record))["prediction"] for record in pair),
                               load_arrays(npz(pair[0]))["target"])
                 for pair in pairs]
        if found:
            both, chance, same = (cell([one[key] for one in found], False) for key in ("both", "chance", "same"))
            lines.append(f"- Tie {tie}: frozen and scratch both err on {both} % of the grids; independent errors in "
                         f"a class would on {chance} %. Of these, both give {same} % the same wrong class.")
    if equivariance:
        lines += ["\n| equivariance error of the features | zero padding, as trained | circular padding | seeds |",
                  "|---|--:|--:|--:|"]
    for row, seeds in equivariance.items():
        cells = [cell(paired(equivariance, row, None, "test", f"equivariance_error_{padding}"), False)
                 for padding in ("zeros", "circular")]
        lines.append(f"| `{row}` | " + " | ".join(cells) + f" | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def put_between_markers(path: Path, marker: str, text: str) -> None:
    """Replace what stands between <!-- marker --> and <!-- /marker --> in a file, if it has them.

    The file is replaced whole, and by one process at a time: make renders several tables side by side.
    """
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        old = path.read_text()
        new = re.sub(rf"(<!-- {re.escape(marker)} -->\n).*?(<!-- /{re.escape(marker)} -->)",
                     lambda match: match[1] + text + match[2], old, flags=re.DOTALL)
        if new != old:
            written = path.with_name(f".{path.name}.tmp")
            written.write_text(new)
            os.replace(written, path)
    finally:
        os.close(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*REPORT, "attention", "claims"], help="what to render")
    parser.add_argument("--protocol", default="report", help="which records: report, small or smoke (report)")
    parser.add_argument("--results", default="results", help="folder of the records (results)")
    parser.add_argument("--seeds", type=int, default=None, help="seeds a full row has (the most that any row has)")
    parser.add_argument("--page", help="file to put it into as well, between <!-- PROTOCOL WHAT --> markers")
    args = parser.parse_args(argv)
    folder = Path(args.results, args.protocol)
    if args.what == "claims":
        tables = {table: load_records(folder / table, args.protocol)
                  for table in (*REPORT, "attention")}
        text = render_claims(judge(tables))
        if note := caveat(record for rows in tables.values() for record in each_of(rows)):
            text += f"\n{note}\n"
    elif args.what == "attention":
        text = render_attention(*(load_records(folder / name, args.protocol) for name in ("attention", "equivariance")))
    else:
        rows = load_records(folder / args.what, args.protocol)
        text = render(rows, args.what, args.seeds or max((len(found) for found in rows.values()), default=0))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.what}.md").write_text(text)
    if args.page:
        put_between_markers(Path(args.page), f"{args.protocol} {args.what}", text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
