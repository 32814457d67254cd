"""What the study reports: accuracy, average precision, MAP, WGAP, IoU. Tensors in, numbers out.

All values are fractions in [0, 1]. Counts are int64 and ratios float64: a training split has 59
million pixels, and float32 counts stop being exact at 2^24. A pixel whose target is VOID counts
nowhere.
"""

import math

import numpy as np
import torch
from torch import Tensor

from lab.batches import VOID
from lab.progress import progress


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of images whose largest logit is the target's; logits (N, C), target (N,)."""
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
        raise ValueError(f"scores {tuple(scores.shape)} and positive {tuple(positive.shape)} must "
                         f"be 1-D and equal")
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
    above = true + len(misses)
    above -= torch.searchsorted(misses, thresholds)
    precision = true.double().div_(above)  # in place: a class can be most of the pixels
    return counts.double().div_(len(hits)).mul_(precision).sum().item()


def average_precisions(scores: Tensor, target: Tensor) -> list[float]:
    """AP of every class over all pixels of all images, ranked across images.

    scores (N, C, ...), target (N, ...) with values in [0, C) or VOID; NaN for a class the target
    lacks.
    """
    target = target.reshape(-1)
    labelled = target != VOID
    if labelled.all():
        labelled = slice(None)
    target = target[labelled]
    classes = progress(range(scores.shape[1]), "average precision", unit="classes")
    return [average_precision(scores[:, c].reshape(-1)[labelled], target == c) for c in classes]


BINS = 192  # of log-odds from -12 to 12, an eighth each


def score_histograms(probs: Tensor, target: Tensor, group: Tensor) -> dict[str, np.ndarray]:
    """How the scores of each class lie, per group of images: all that AP on resampled groups needs.

    probs (N, C, H, W) float32 in [0, 1], target (N, H, W), group (N,) an integer per image, such as
    its photo. Returns int32 (groups, C, BINS) `hits` and `misses`, pixels of the class and not of
    it by score, and `groups`, the sorted distinct values of `group`.
    """
    groups, which = group.unique(return_inverse=True)
    classes, cells, void = probs.shape[1], len(groups) * BINS * 2, target == VOID
    counts = which.new_empty((len(groups), classes, BINS, 2))
    for c in range(classes):  # one by one: int64 of all classes is four times their scores
        cell = torch.logit(probs[:, c], eps=1e-6).add_(12).mul_(BINS / 24).long()
        cell.clamp_(0, BINS - 1).add_(which.view(-1, 1, 1) * BINS).mul_(2).add_(target == c)
        cell.masked_fill_(void, cells)  # behind the last
        found = torch.bincount(cell.reshape(-1), minlength=cells)[:cells]
        counts[:, c] = found.reshape(-1, BINS, 2)
    counts = counts.to(torch.int32).cpu().numpy()
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
    counts = torch.bincount(index, minlength=classes**2)[:classes**2]  # void lies behind
    return counts.reshape(classes, classes)


def ious(counts: Tensor) -> list[float]:
    """IoU of each class from a confusion matrix; NaN for a class that the target lacks."""
    counts = counts.double()
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    return iou.where(counts.sum(1) > 0, torch.nan).tolist()


def mean_present(values: list[float]) -> float:
    """Mean over the values that are not NaN, the classes that are there; NaN if none is."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan


def worst_present(values: list[float]) -> float:
    """Smallest of the values that are not NaN: WGAP when the values are APs (report, section 3)."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def classification(logits: Tensor, target: Tensor, names: list[str]) -> dict:
    """Metrics of a split for the run record: accuracy, its per-class values, the confusion matrix.

    logits (N, C) float, target (N,). A class that the split lacks has NaN and is left out of no
    mean here: accuracy is over samples.
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
            "pixel_accuracy": (counts.diag().sum().double() / counts.sum()).item(),
            "classes_counted": int((counts.sum(1) > 0).sum()), "images": len(target)}


# {task: its metrics of a split, and those of them that sum it up, the first one first}
SCORES = {"classification": (classification, ("accuracy",)),
          "segmentation": (segmentation, ("map", "wgap", "miou"))}


def class_table(columns: dict[str, dict[str, float | None]]) -> str:
    """Text table of percentages: {column: {class: fraction, or None if absent}} -> lines."""
    names = list(next(iter(columns.values())))
    wide = max(10, *(len(name) + 1 for name in names))
    lines = [" " * wide + "".join(f"{column:>12}" for column in columns)]
    for name in names:
        cells = ["absent" if values[name] is None else f"{100 * values[name]:.1f}"
                 for values in columns.values()]
        lines.append(f"{name:<{wide}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def error_overlap(a: np.ndarray, b: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """How two classifiers' errors coincide: predictions and target (N,) -> fractions.

    `both`, the share of samples that both get wrong; `chance`, that share were errors independent
    given the true class (so that classes which both find hard do not count as agreement); `same`,
    the share of the samples that both get wrong to which both give the same class.
    """
    wrong_a, wrong_b = a != target, b != target
    both = wrong_a & wrong_b
    of_class = [target == c for c in np.unique(target)]
    chance = sum(wrong_a[one].mean() * wrong_b[one].mean() * one.mean() for one in of_class)
    return {"both": both.mean(), "chance": chance,
            "same": (a == b)[both].mean() if both.any() else math.nan}
