"""The study's pictures, drawn from arrays and run records; nothing here computes with a network.

Every function returns a matplotlib Figure, which `save` writes. Colours are Okabe and Ito's and
matplotlib's viridis and PuOr, which every kind of colour vision tells apart.
"""

import io
import os
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

import data
import metrics
import study
from lab import files, records
from lab.batches import Dataset
from lab.statistics import detectable

# A script that a notebook starts inherits the name of the notebook's way to show pictures, and
# matplotlib does not import where that is not installed. No pyplot: what draws to files alone
# leaves a user's own choice alone.
CHOSEN = os.environ.pop("MPLBACKEND", None)
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402

if CHOSEN is not None:
    os.environ["MPLBACKEND"] = CHOSEN
PALETTE = np.array(data.FACADE_PALETTE, dtype=np.uint8)
WRONG = np.array((204, 121, 167), dtype=np.uint8)  # the same set's purple, no class has it
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
PAGE = 10  # a user's images on one picture: about three screens high
PANEL = 512  # pixels that an image keeps under a map: a panel is half as wide, the rest is time


def subplots(rows: int = 1, columns: int = 1, figsize: tuple[float, float] = (6, 4),
             **how: typing.Any) -> tuple[Figure, typing.Any]:
    """A figure of so many inches and its axes, as pyplot's."""
    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **how)


def marked(figure: Figure, made_of: Iterable[dict]) -> Figure:
    """The figure, which says so in its title if its records or its model are of synthetic data."""
    if note := records.caveat(made_of):
        figure.suptitle(note)
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write the figure, whole or not at all, in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=path.suffix[1:])
    files.write_atomic(path, picture.getbuffer())


def save(figure: Figure, path: Path) -> None:
    write(figure, path)
    print(f"figure {path}")


def save_pages(draw: Callable[[tuple], Figure], items: tuple, path: Path) -> None:
    """Write draw(items), or a page of it for every PAGE items: PATH-1, PATH-2 and so on.

    They are drawn one at a time: a layout takes the longer for a panel the more it has.
    """
    pages = range(0, len(items), PAGE)
    for i in pages:
        page = path if len(pages) == 1 else path.with_stem(f"{path.stem}-{i // PAGE + 1}")
        write(draw(items[i:i + PAGE]), page)
    several = f"s {path.with_stem(f'{path.stem}-1')} to" if len(pages) > 1 else ""
    print(f"figure{several} {page}")


# ---- predictions of one run ----

def title_of(dataset: Dataset, score: str) -> str:
    return f"{dataset.name}, {len(dataset.test)} {dataset.held_out} images: {score}"


def draw_segmentation(dataset: Dataset, logits: Tensor, scores: dict) -> Figure:
    """Four columns (image, truth, prediction, errors), a row for the best, the median and the two worst images."""
    names, split, prediction = dataset.classes, dataset.test, logits.argmax(1).cpu()
    each = []
    for guess, truth in zip(prediction, split.targets):
        iou = metrics.ious(metrics.confusion(guess, truth, len(names)))
        each.append(metrics.mean_present(iou))
    order = np.argsort(each)[::-1]
    n = len(order)
    rows = {"best": 0, "median": n // 2, "next to worst": n - 2, "worst": n - 1}
    figure, axes = subplots(len(rows), 4, figsize=(8.4, 2.15 * len(rows) + 0.9))
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
        row[0].set_ylabel(f"{label}: no. {i}\nmean IoU {100 * each[i]:.0f} %")
        row[3].set_xlabel(f"{100 * wrong.mean():.0f} % of pixels wrong")
    figure.legend(handles=[Patch(facecolor=colour / 255, edgecolor="black", label=name)
                           for name, colour in zip(names, PALETTE)], loc="outside lower center", ncols=5, frameon=False)
    map_, wgap = 100 * scores["map"], 100 * scores["wgap"]
    figure.suptitle(title_of(dataset, f"MAP {map_:.1f} %, WGAP {wgap:.1f} %"))
    return figure


def draw_classification(dataset: Dataset, logits: Tensor, scores: dict) -> Figure:
    """Two rows, a column for each class: its first image that is predicted right, its first that is wrong."""
    probability, prediction = (t.cpu() for t in logits.softmax(1).max(1))
    right = prediction == dataset.test.targets
    figure, axes = subplots(2, len(dataset.classes), figsize=(12, 3.5))
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
    figure.suptitle(title_of(dataset, f"accuracy {100 * scores['accuracy']:.2f} %"))
    return figure


# ---- a table of the study, from its records ----

def draw_differences(rows: dict, table: str) -> Figure:
    """A row's difference from the base in each test metric: ours with its 95 % interval, and the report's."""
    columns = {column: (name, key) for column, (name, split, key) in study.COLUMNS[table].items()
               if split == "test"}
    base_row, *others = rows
    figure, axes = subplots(1, len(columns), sharey=True, squeeze=False,
                            figsize=(3 + 3.4 * len(columns), 1.6 + 0.27 * len(others)))
    for ax, (column, (name, key)) in zip(axes[0], columns.items()):
        for y, row in enumerate(others):
            ours = study.estimate(rows, row, base_row, "test", key)
            if ours.values:
                ax.errorbar(ours.mean, y + 0.12, xerr=None if np.isnan(ours.half) else ours.half, fmt="o",
                            color="#0072B2", capsize=3)
            reported = study.REPORT[table].get(row, ("", {}))[1].get(column)
            if reported is not None:
                ax.plot(reported, y - 0.12, "D", color="#E69F00", mec="black", mew=0.6)
        ax.axvline(0, color="black", lw=0.8)
        ax.grid(axis="x", alpha=0.3)
        ax.set(xlabel=f"difference in {name} (points)", yticks=range(len(others)), yticklabels=others)
    axes[0, 0].set_ylim(max(len(others), 1) - 0.5, -0.5)
    handles = [Line2D([], [], marker="o", color="#0072B2", ls="", label=f"ours, {seeds_of(rows)}"),
               Line2D([], [], marker="D", color="#E69F00", mec="black", ls="",
                      label="the report, one run")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return marked(figure, records.each_of(rows))


def draw_power(tables: dict[str, dict], protocol: str) -> Figure:
    """How large an effect so many seeds decide, in a row's own spread and in points of each table."""
    seeds = np.arange(3, 11)
    figure, (left, right) = subplots(1, 2, figsize=(9.6, 3.9))
    claims, rows = len(study.CLAIMS), max(len(report) for report in study.REPORT.values())
    effects = [detectable(n, rows, claims) for n in seeds]
    left.plot(seeds, effects, "o-", color="black")
    left.set(ylabel="effect decided (spreads of a row over seeds)", ylim=(0, 1.12 * effects[0]),
             title="two rows alike, without a test set's error")
    styles = zip((BLUE, ORANGE, GREEN), "osD")
    for (name, part), (colour, marker) in zip(study.median_errors(tables).items(), styles):
        found = [detectable(n, part["rows"], claims, part["spread"], part["test_set"], part["units"])
                 for n in seeds]
        right.plot(seeds, found, marker=marker, color=colour,
                   label=f"{name}: spread {part['spread']:.2f}, test set ± {part['test_set']:.2f}")
        for n in (3, 4, 6, 10):
            right.annotate(f"{found[n - 3]:.1f}", (n, found[n - 3]), xytext=(0, 6), ha="center",
                           textcoords="offset points", fontsize=8)
    for n in (3, 4, 6, 10):
        left.annotate(f"{effects[n - 3]:.1f}", (n, effects[n - 3]), xytext=(0, 6), ha="center",
                      textcoords="offset points", fontsize=8)
    right.set(ylabel="effect decided (points)", yscale="log", title=f"protocol {protocol}, median row")
    right.margins(y=0.12)
    right.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9,
                  title="standard deviation over seeds, and standard error by the choice of test images")
    for ax in (left, right):
        ax.set(xlabel="seeds of each row", xticks=seeds)
        ax.grid(alpha=0.3, which="both")
    figure.suptitle(f"Distance from the edge of a claim's range that is decided with 80 % probability, "
                    f"as the hardest of {claims} claims", fontsize=11)
    return marked(figure, [record for rows in tables.values() for record in records.each_of(rows)])


def seeds_of(rows: dict) -> str:
    counts = sorted({len(seeds) for seeds in rows.values()})
    return f"{counts[0]}{f' to {counts[-1]}' if len(counts) > 1 else ''} seed{'s' * (counts[-1] > 1)}"


def draw_curves(rows: dict) -> Figure:
    """Training loss by epoch: a small panel for each row over the base row's curves in grey."""
    columns = 4
    lines = -(-len(rows) // columns)
    figure, axes = subplots(lines, columns, sharex=True, sharey=True, squeeze=False,
                            figsize=(2.4 * columns, 0.6 + 1.7 * lines))
    base = next(iter(rows.values()))
    for ax in axes.flat[len(rows):]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(rows) - columns):len(rows)]:
        ax.tick_params(labelbottom=True)  # the lowest panel of its column, though not always in the last line
    for ax, (row, seeds) in zip(axes.flat, rows.items()):
        for runs, style in ((base, {"color": "0.7", "lw": 2.5}), (seeds, {"color": "#0072B2", "marker": "."})):
            for record in runs.values():
                loss = record["curve"]["loss"]
                ax.plot(range(1, len(loss) + 1), loss, **style)
        ax.set_title(row, fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch (grey: the base row)")
    figure.supylabel("training loss")
    return marked(figure, records.each_of(rows))


def draw_imbalance(record: dict) -> Figure:
    """The report's Figure 3: each class's share of the training pixels."""
    names, pixels = record["about_data"]["classes"], np.array(record["class_pixels"])
    figure, ax = subplots(figsize=(5, 2.4))
    bars = ax.barh(names, 100 * pixels / pixels.sum(), color=PALETTE / 255, edgecolor="black", linewidth=0.6)
    ax.bar_label(bars, fmt="%.1f %%", padding=3)
    ax.invert_yaxis()
    ax.set_xlim(0, 118 * pixels.max() / pixels.sum())
    ax.set(xlabel=f"share of the training pixels (%), {record['about_data']['name']}")
    return figure


def draw_architecture(blocks: list[dict], title: str) -> Figure:
    """The report's Figure 2: a network's blocks in the order they run, as high as their output is large.

    blocks: dicts of `name`, `kind`, `shape` (C, H, W) of the output, and `joins`, the index of the
    earlier block that is summed into this one's input, or None.
    """
    sizes = sorted({block["shape"][1] for block in blocks})
    top = {size: level for level, size in enumerate(sizes)}
    hue = dict(zip(dict.fromkeys(block["kind"] for block in blocks), ("0.35", BLUE, "#D55E00", GREEN, "#CC79A7")))
    figure, ax = subplots(figsize=(0.47 * len(blocks) + 1.2, 0.75 * len(sizes) + 1.6))
    for x, block in enumerate(blocks):
        channels, height, _ = block["shape"]
        y = top[height]
        if x:
            ax.annotate("", (x - 0.32, y), (x - 0.68, top[blocks[x - 1]["shape"][1]]),
                        arrowprops={"arrowstyle": "->", "color": "0.4", "shrinkA": 0, "shrinkB": 0})
        ax.add_patch(Rectangle((x - 0.32, y - 0.28), 0.64, 0.56, facecolor=hue[block["kind"]], edgecolor="black"))
        ax.text(x, y, channels, ha="center", va="center", fontsize=8, color="white", fontweight="bold")
        if block["joins"] is not None:
            ax.annotate("", (x, y + 0.3), (block["joins"], y + 0.3), arrowprops={
                "arrowstyle": "->", "color": "black", "ls": "--", "connectionstyle": "arc3,rad=-0.12"})
    ax.set(xlim=(-0.7, len(blocks) - 0.3), ylim=(-0.6, len(sizes) - 0.1), xticks=[], title=title,
           yticks=range(len(sizes)), yticklabels=[f"{size} x {size}" for size in sizes], ylabel="output (pixels)")
    handles = [Patch(facecolor=colour, edgecolor="black", label=kind) for kind, colour in hue.items()]
    handles.append(Line2D([], [], color="black", ls="--", label="inter skip: a sum"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


# ---- attention and shift invariance ----

def draw_attention(samples: list[dict], names: tuple[str, ...], title: str) -> Figure:
    """The report's Figure 1: grids, and the class activation maps of both surrogates for every class.

    samples: dicts of `grid` (H, W), `cell` 0 to 3, `target`, and for each surrogate in `maps` a name
    and an array (classes, h, w). All ten maps of a surrogate and a grid share one colour scale.
    """
    surrogates = list(samples[0]["maps"])
    rows = len(samples) * len(surrogates)
    figure, axes = subplots(rows, 1 + len(names), figsize=(13, 1.28 * rows + 0.8))
    for i, sample in enumerate(samples):
        target, (top, left) = sample["target"], divmod(sample["cell"], 2)
        for j, surrogate in enumerate(surrogates):
            row, maps = axes[i * len(surrogates) + j], sample["maps"][surrogate]
            scale, prediction = np.abs(maps).max(), int(maps.sum((1, 2)).argmax())
            for c, (ax, name) in enumerate(zip(row[1:], names)):
                ax.imshow(maps[c], cmap="PuOr", vmin=-scale, vmax=scale)
                side = maps.shape[-1] / 2
                ax.add_patch(Rectangle((left * side - 0.5, top * side - 0.5), side, side, fill=False, ec="0.3", ls=":"))
                ax.set(xticks=[], yticks=[], title=name if i == j == 0 else "")
                for spine in ax.spines.values():
                    mark = BLUE if c == target else "#D55E00" if c == prediction else None
                    spine.set(color=mark or "0.8", linewidth=3 if mark else 0.8)
            verdict = "right" if prediction == target else "wrong"
            row[1].set_ylabel(f"{surrogate}: {verdict}\n{names[prediction]}\n±{scale:.2f}", fontsize=9, rotation=0,
                              ha="right", va="center")
            row[0].set(xticks=[], yticks=[])
            row[0].axis("off")
        axes[i * len(surrogates), 0].axis("on")
        axes[i * len(surrogates), 0].imshow(sample["grid"], cmap="gray")
        axes[i * len(surrogates), 0].set_xlabel(f"no. {sample['index']}: {names[target]}", fontsize=9)
    figure.suptitle(title + "\nframe: blue the true class, red a wrong prediction; dots: the cell of the garment; "
                    "purple favours the class, orange speaks against it, ± is the end of a row's scale", fontsize=10)
    return figure


def across_seeds(seeds: dict[int, dict], key: str) -> tuple[float, float]:
    """Mean of a test metric over a row's records and the half width of its 95 % interval, in percent."""
    mean, half = records.interval([record["metrics"]["test"][key] for record in seeds.values()])
    return mean, 0.0 if np.isnan(half) else half


def draw_ties(rows: dict) -> Figure:
    """What the spurious digit does, by strength of the tie: accuracy, attention, and false Trousers."""
    panels = {"accuracy, untied grids (%)": ["accuracy"], "accuracy, tied grids (%)": ["accuracy_tied"],
              "CAM mass in garment's cell (%)": ["mass"],
              "other class taken for Trouser (%)": ["trouser_with_three", "trouser_without_three"]}
    strengths = sorted({row.split("-tie")[1] for row in rows}, key=float)
    figure, axes = subplots(1, 4, figsize=(12, 3.2))
    for ax, (label, keys) in zip(axes, panels.items()):
        for kind, colour, shift in (("frozen", BLUE, -0.06), ("scratch", ORANGE, 0.06)):
            for key, style, note in zip(keys, ("-o", "--s"), (", with a 3", ", without")):
                found = [(x, across_seeds(rows[f"{kind}-tie{strength}"], key)) for x, strength in enumerate(strengths)
                         if f"{kind}-tie{strength}" in rows]
                x, values = [x + shift for x, _ in found], np.array([value for _, value in found]).reshape(-1, 2)
                ax.errorbar(x, values[:, 0], yerr=values[:, 1], fmt=style, color=colour, capsize=3, ms=5,
                            label=kind + (note if len(keys) > 1 else ""))
        if keys == ["mass"]:
            ax.axhline(25, color="0.4", ls=":", label="chance")
        ax.set(xticks=range(len(strengths)), xticklabels=strengths, xlabel="strength of the tie", title=label)
        ax.title.set_fontsize(10)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False)
    return figure


def draw_shifts(name: str, seeds: dict[int, dict], sweep: dict[str, np.ndarray]) -> Figure:
    """Accuracy by cell, and accuracy and consistency over all shifts, of a surrogate without a tie.

    sweep: `sweep_accuracy` and `sweep_consistency`, (29, 29) fractions, means over the seeds.
    """
    figure, (places, *axes) = subplots(1, 3, figsize=(10, 3.4))
    cells = np.array([across_seeds(seeds, f"accuracy_cell{c}") for c in range(4)])
    places.imshow(cells[:, 0].reshape(2, 2), cmap="viridis", vmin=cells[:, 0].mean() - 5, vmax=cells[:, 0].mean() + 5)
    for c, (mean, half) in enumerate(cells):
        places.text(c % 2, c // 2, f"{mean:.1f} %\n± {half:.1f}", ha="center", va="center", bbox={
            "facecolor": "white", "alpha": 0.8, "lw": 0})
    places.set(xticks=[0, 1], yticks=[0, 1], xticklabels=["left", "right"], yticklabels=["top", "bottom"],
               title="accuracy by cell")
    places.set_ylabel(name, fontsize=12)
    titles = {"sweep_accuracy": "accuracy", "sweep_consistency": "same prediction as unshifted"}
    for ax, (key, title) in zip(axes, titles.items()):
        image = ax.imshow(100 * sweep[key], cmap="viridis")
        figure.colorbar(image, ax=ax, label="%")
        ax.set(xticks=range(0, 29, 4), yticks=range(0, 29, 4), xlabel="shift right (pixels)",
               ylabel="shift down (pixels)", title=title)
    return figure


def draw_equivariance(rows: dict) -> Figure:
    """Feature equivariance error by shift: a column for each way to halve the image, a line for each padding."""
    figure, axes = subplots(2, len(rows), figsize=(3 * len(rows) + 1.2, 6), squeeze=False)
    error = {(row, padding): np.mean([record["error"][padding] for record in seeds.values()], 0)
             for row, seeds in rows.items() for padding in ("zeros", "circular")}
    top = 100 * max(map(np.max, error.values()))
    for line, padding in zip(axes, ("zeros", "circular")):
        for ax, row in zip(line, rows):
            values = 100 * error[row, padding]
            image = ax.imshow(values, cmap="viridis", vmin=0, vmax=top)
            on_grid = (np.add.outer(np.arange(8) % 4, np.arange(8) % 4) == 0)
            moved = np.arange(64).reshape(8, 8) > 0
            ax.set(xticks=range(8), yticks=range(8), title=row if padding == "zeros" else "",
                   xlabel=f"shift right (pixels)\nmean of multiples of 4: {values[on_grid & moved].mean():.2g} %,\n"
                          f"of all other shifts: {values[~on_grid].mean():.1f} %")
        line[0].set_ylabel(f"{'zero padding (as trained)' if padding == 'zeros' else 'circular padding'}\nshift down")
    figure.colorbar(image, ax=axes, label="equivariance error (% of the features' norm)", shrink=0.6)
    return figure


def draw_confusions(counts: dict[str, np.ndarray], names: tuple[str, ...]) -> Figure:
    """A confusion matrix (classes, classes) for each surrogate, in percent of the true class."""
    figure, axes = subplots(1, len(counts), figsize=(5.4 * len(counts), 4.9), squeeze=False)
    for ax, (label, matrix) in zip(axes[0], counts.items()):
        share = 100 * matrix / matrix.sum(1, keepdims=True)
        ax.imshow(share, cmap="viridis", vmin=0, vmax=100)
        for i, j in zip(*np.nonzero(share > 0.5)):
            ax.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                    color="black" if share[i, j] > 60 else "white")
        ax.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names, ylabel="true",
               xlabel="predicted (% of the true class; blank: below 0.5)", title=label)
        ax.set_xticklabels(names, rotation=45, ha="right")
    return figure


# ---- a user's own images ----

def draw_overlays(images: list[np.ndarray], maps: list[np.ndarray], names: list[str], captions: list[list[str]],
                  diverging: bool) -> Figure:
    """A line for each image: the image, then maps over it.

    images (H, W) or (H, W, 3) uint8; maps (panels, h, w), stretched over the image: class activation
    maps (`diverging`, a scale for each image) or probabilities in [0, 1]; a caption for each panel.
    """
    panels = max(len(layers) for layers in maps)
    figure, axes = subplots(len(images), 1 + panels, squeeze=False,
                            figsize=(2.2 * (1 + panels), 2.5 * len(images)))
    for line, image, layers, name, labels in zip(axes, images, maps, names, captions):
        extent = (0, image.shape[1], image.shape[0], 0)
        scale = np.abs(layers).max()
        small = Image.fromarray(image).convert("RGB")
        small.thumbnail((PANEL, PANEL))
        for ax in line:
            ax.imshow(small, extent=extent)
            ax.set(xticks=[], yticks=[])
        line[0].set_title(name, fontsize=9, parse_math=False)  # a file's name is no formula
        for ax, layer, label in zip(line[1:], layers, labels):
            drawn = ax.imshow(layer, extent=extent, alpha=0.65, cmap="PuOr" if diverging else "viridis",
                              vmin=-scale if diverging else 0, vmax=scale if diverging else 1)
            ax.set_title(label, fontsize=9)
        figure.colorbar(drawn, ax=line, shrink=0.8, label="evidence" if diverging else "probability")
    return figure
