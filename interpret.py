"""Look at what a trained model does.

    python interpret.py --study small                    figures of a protocol's records, into results/small/
    python interpret.py --checkpoint runs/.../seed0.pt --figure predictions.png

The first draws, from records alone, each row's difference from the base row beside the report's,
the training curves of all rows, and the class imbalance (the report's Figure 3). The second draws
predictions for the held-out images of a finished run. Segmentation: image, truth, prediction and
errors of the best, the median and the worst images by mean IoU. Classification: of each class the
first image that is predicted right and the first that is predicted wrong.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

import data
import engine
import metrics
from data import BadInput, Dataset
from engine import flag

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

PALETTE = np.array(data.FACADE_PALETTE, dtype=np.uint8)
WRONG = np.array((204, 121, 167), dtype=np.uint8)  # the same set's purple, no class has it


@dataclass(frozen=True, kw_only=True)
class Config:
    study: str | None = flag(None, "protocol whose records to draw: report, small or smoke")
    results: str = flag("results", "folder of the records")
    checkpoint: str | None = flag(None, "seed<k>.pt of a finished run")
    figure: str = flag("predictions.png", "picture to write: .png, .pdf or .svg")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, else ./data)")


def draw_segmentation(dataset: Dataset, logits: Tensor, title: str) -> Figure:
    """Four columns (image, truth, prediction, errors), a row for the best, the median and the two worst images."""
    names, split, prediction = dataset.classes, dataset.test, logits.argmax(1).cpu()
    scores = []
    for guess, truth in zip(prediction, split.targets):
        iou = metrics.ious(metrics.confusion(guess, truth, len(names)))
        scores.append(metrics.mean_present(iou))
    order = np.argsort(scores)[::-1]
    n = len(order)
    rows = {"best": 0, "median": n // 2, "next to worst": n - 2, "worst": n - 1}
    figure, axes = plt.subplots(len(rows), 4, figsize=(8.4, 2.15 * len(rows) + 0.9), layout="constrained")
    for row, (label, rank) in zip(axes, rows.items()):
        i = int(order[max(rank, 0)])
        image, truth = split.images[i].permute(1, 2, 0).numpy(), split.targets[i].numpy()
        grey = np.repeat(image.mean(2, keepdims=True) * 0.5 + 110, 3, 2).astype(np.uint8)
        wrong = (prediction[i].numpy() != truth)[..., None]
        panels = {"image": image, "truth": PALETTE[truth], "prediction": PALETTE[prediction[i].numpy()],
                  "errors": np.where(wrong, WRONG, grey)}
        for ax, (name, panel) in zip(row, panels.items()):
            ax.imshow(panel, interpolation="nearest")
            ax.set(xticks=[], yticks=[], title=name if label == "best" else "")
        row[0].set_ylabel(f"{label}: no. {i}\nmean IoU {100 * scores[i]:.0f} %")
        row[3].set_xlabel(f"{100 * wrong.mean():.0f} % of pixels wrong")
    figure.legend(handles=[Patch(facecolor=colour / 255, edgecolor="black", label=name)
                           for name, colour in zip(names, PALETTE)], loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title)
    return figure


def draw_classification(dataset: Dataset, logits: Tensor, title: str) -> Figure:
    """Two rows, a column for each class: its first image that is predicted right, its first that is wrong."""
    probability, prediction = (t.cpu() for t in logits.softmax(1).max(1))
    right = prediction == dataset.test.targets
    figure, axes = plt.subplots(2, len(dataset.classes), figsize=(12, 3.5), layout="constrained")
    for row, (label, hit) in zip(axes, (("right", right), ("wrong", ~right))):
        row[0].set_ylabel(label)
        for c, (ax, name) in enumerate(zip(row, dataset.classes)):
            ax.set(xticks=[], yticks=[], title=name if label == "right" else "")
            found = (hit & (dataset.test.targets == c)).nonzero().flatten()
            if len(found):
                i = int(found[0])
                ax.imshow(dataset.test.images[i, 0].numpy(), cmap="gray")
                ax.set_xlabel(f"{dataset.classes[prediction[i]]}\n{100 * probability[i]:.0f} %")
            else:
                ax.text(0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes)
    figure.suptitle(title)
    return figure


def draw_differences(rows: dict, table: str) -> Figure:
    """A row's difference from the base in each test metric: ours with its 95 % interval, and the report's."""
    columns = [(i, *column) for i, column in enumerate(metrics.COLUMNS[table]) if column[1] == "test"]
    base_row, *others = rows
    figure, axes = plt.subplots(1, len(columns), sharey=True, squeeze=False, layout="constrained",
                                figsize=(3 + 3.4 * len(columns), 1.6 + 0.27 * len(others)))
    for ax, (i, name, split, key) in zip(axes[0], columns):
        for y, row in enumerate(others):
            values = [100 * difference for difference in metrics.paired(rows, row, base_row, split, key)]
            if values:
                mean, half = metrics.interval(values)
                ax.errorbar(mean, y + 0.12, xerr=None if np.isnan(half) else half, fmt="o", color="#0072B2", capsize=3)
            reported = metrics.REPORT[table].get(row, [None] * 4)[i + 1]
            if reported is not None:
                ax.plot(reported, y - 0.12, "D", color="#E69F00", mec="black", mew=0.6)
        ax.axvline(0, color="black", lw=0.8)
        ax.grid(axis="x", alpha=0.3)
        ax.set(xlabel=f"difference in {name} (points)", yticks=range(len(others)), yticklabels=others)
    axes[0, 0].set_ylim(len(others) - 0.5, -0.5)
    handles = [plt.Line2D([], [], marker="o", color="#0072B2", ls="", label=f"ours, {seeds_of(rows)}"),
               plt.Line2D([], [], marker="D", color="#E69F00", mec="black", ls="", label="the report, one run")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def seeds_of(rows: dict) -> str:
    counts = sorted({len(seeds) for seeds in rows.values()})
    return f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} seed{'s' * (counts[-1] > 1)}"


def draw_curves(rows: dict) -> Figure:
    """Training loss by epoch: a small panel for each row over the base row's curves in grey."""
    columns = 4
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(lines, columns, sharex=True, sharey=True, squeeze=False, layout="constrained",
                                figsize=(2.4 * columns, 0.6 + 1.7 * lines))
    base = next(iter(rows.values()))
    for ax in axes.flat[len(rows):]:
        ax.set_visible(False)
    for ax, (row, seeds) in zip(axes.flat, rows.items()):
        for runs, style in ((base, {"color": "0.7", "lw": 2.5}), (seeds, {"color": "#0072B2", "marker": "."})):
            for record in runs.values():
                loss = record["curve"]["loss"]
                ax.plot(range(1, len(loss) + 1), loss, **style)
        ax.set_title(row, fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch (grey: the base row)")
    figure.supylabel("training loss")
    return figure


def draw_imbalance(record: dict) -> Figure:
    """The report's Figure 3: each class's share of the training pixels."""
    names, pixels = record["about_data"]["classes"], np.array(record["class_pixels"])
    figure, ax = plt.subplots(figsize=(5, 2.4), layout="constrained")
    bars = ax.barh(names, 100 * pixels / pixels.sum(), color=PALETTE / 255, edgecolor="black", linewidth=0.6)
    ax.bar_label(bars, fmt="%.1f %%", padding=3)
    ax.invert_yaxis()
    ax.set_xlim(0, 118 * pixels.max() / pixels.sum())
    ax.set(xlabel=f"share of the training pixels (%), {record['about_data']['name']}")
    return figure


def draw_study(protocol: str, folder: Path) -> None:
    for table in metrics.REPORT:
        rows = metrics.load_records(folder / table, protocol)
        if not rows:
            print(f"{folder / table} has no record yet, so no figure")
            continue
        figures = {f"{table}.png": draw_differences(rows, table), f"{table}-curves.png": draw_curves(rows)}
        if table == "table2":
            figures["imbalance.png"] = draw_imbalance(next(iter(next(iter(rows.values())).values())))
        for name, figure in figures.items():
            save(figure, folder / name)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"figure {path}")


def main(argv: list[str] | None = None) -> None:
    cfg = engine.parse(Config, __doc__, argv)
    if cfg.study is not None:
        return draw_study(cfg.study, Path(cfg.results, cfg.study))
    if cfg.checkpoint is None:
        raise BadInput("--checkpoint is missing: name the seed<k>.pt of a finished run, or a protocol with --study")
    if Path(cfg.figure).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--figure {cfg.figure}: must end in .png, .pdf or .svg")
    device = engine.pick_device(cfg.device)
    model, record = engine.load_trained(Path(cfg.checkpoint), device)
    dataset = data.load_recorded(record, data.find_root(cfg.data_root))
    on_device = dataset.to(device)
    logits = engine.predict(model, on_device, on_device.test, record["config"]["batch"],
                            getattr(torch, record["environment"]["precision"]))
    scores = record["metrics"][dataset.held_out]
    kind = f"{dataset.name}, {len(dataset.test)} {dataset.held_out} images"
    if "map" in scores:
        title = f"{kind}: MAP {100 * scores['map']:.1f} %, WGAP {100 * scores['wgap']:.1f} %"
        figure = draw_segmentation(dataset, logits, title)
    else:
        figure = draw_classification(dataset, logits, f"{kind}: accuracy {100 * scores['accuracy']:.2f} %")
    save(figure, Path(cfg.figure))


if __name__ == "__main__":
    sys.exit(engine.guard(main))
