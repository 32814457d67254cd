"""Pictures of images side by side: predictions, attention, and what a shift does to them.

Functions take arrays and records and return a matplotlib Figure, as those of lab/figures.py do.
"""

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from lab.batches import VOID, Dataset
from lab.figures import Figure, across_seeds, literal, subplots

WRONG = np.array((204, 121, 167), dtype=np.uint8)  # Okabe and Ito's purple
# against a class, neither, for it: the page's colours (web/js/draw.js), which every kind of colour
# vision tells apart
EVIDENCE = LinearSegmentedColormap.from_list("evidence", np.array(
    [(70, 160, 240), (255, 255, 255), (230, 120, 0)]) / 255)
# frames around maps in those colours
TRUE = {"color": "black", "linewidth": 3}
MISTAKE = {"color": "#8b1a89", "linewidth": 3, "linestyle": (0, (2, 1)),
           "capstyle": "butt"}  # other ends of dashes would fill the gaps
COLUMNS = 20  # classes side by side: more are too small to see
PANEL = 512  # pixels that an image keeps under a map: a panel is half as wide, the rest is time


# ---- predictions of one run ----

def title_of(dataset: Dataset, score: str) -> str:
    return f"{literal(dataset.name)}, {len(dataset.test)} {dataset.held_out} images: {score}"


def draw_segmentation(dataset: Dataset, logits: Tensor, each: list[float], score: str) -> Figure:
    """Image, truth, prediction, errors: of the best, the median and the worst image.

    And of the one that shows most of the split's rarest class. logits (N, classes, H, W) of the
    held-out split; each: an image's mean IoU.
    """
    names, split, prediction = dataset.classes, dataset.test, logits.argmax(1).cpu()
    palette = np.full((256, 3), 255, np.uint8)  # void is white
    palette[:len(names)] = dataset.palette
    labelled = np.flatnonzero(~np.isnan(each))
    order = labelled[np.argsort(np.array(each)[labelled])[::-1]]
    pixels = np.array([(split.targets == c).sum((1, 2)).numpy() for c in range(len(names))])
    rarest = np.where(pixels.any(1), pixels.sum(1), np.inf).argmin()
    rows = {"best": order[0], "median": order[len(order) // 2],
            f"most {literal(names[rarest])}": pixels[rarest].argmax(), "worst": order[-1]}
    figure, axes = subplots(len(rows), 4, figsize=(8.4, 2.15 * len(rows) + 0.9))
    for row, (label, i) in zip(axes, rows.items()):
        image, truth = split.images[i].permute(1, 2, 0).numpy(), split.targets[i].numpy()
        grey = image.mean(2, keepdims=True) * 0.5 + 110
        wrong = ((prediction[i].numpy() != truth) & (truth != VOID))[..., None]
        panels = {"image": image, "truth": palette[truth],
                  "prediction": palette[prediction[i].numpy()],
                  "errors": np.where(wrong, WRONG, np.repeat(grey, 3, 2).astype(np.uint8))}
        for ax, (name, panel) in zip(row, panels.items()):
            ax.imshow(panel, interpolation="nearest", cmap="gray")
            ax.set(xticks=[], yticks=[], title=name if label == "best" else "")
        row[0].set_ylabel(f"{label}: no. {i}\nmean IoU {100 * each[i]:.0f} %")
        row[3].set_xlabel(f"{100 * wrong.sum() / (truth != VOID).sum():.0f} % of pixels wrong")
    keys = dict(zip(names, palette))
    if (split.targets == VOID).any():
        keys["void"] = palette[VOID]
    figure.legend(handles=[Patch(facecolor=colour / 255, edgecolor="black", label=literal(name))
                           for name, colour in keys.items()],
                  loc="outside lower center", ncols=min(len(names), 7), frameon=False)
    figure.suptitle(title_of(dataset, score))
    return figure


def draw_classification(dataset: Dataset, logits: Tensor, score: str) -> Figure:
    """For each class its first image that is predicted right, and its first that is wrong.

    logits (N, classes) of the held-out split; of many classes the first are drawn.
    """
    names = [*map(literal, dataset.classes)]
    columns = min(len(names), COLUMNS)
    probability, prediction = (t.cpu() for t in logits.softmax(1).max(1))
    right = prediction == dataset.test.targets
    figure, axes = subplots(2, columns, figsize=(max(1.2 * columns, 4.5), 3.5), squeeze=False)
    for row, (label, hit) in zip(axes, (("right", right), ("wrong", ~right))):
        row[0].set_ylabel(label)
        for c, (ax, name) in enumerate(zip(row, names)):
            ax.set(xticks=[], yticks=[], title=name if label == "right" else "")
            found = (hit & (dataset.test.targets == c)).nonzero().flatten()
            if len(found):
                i = int(found[0])
                ax.imshow(dataset.test.images[i].permute(1, 2, 0).numpy(), cmap="gray")
                ax.set_xlabel(f"{names[prediction[i]]}\n{100 * probability[i]:.0f} %")
            else:
                ax.text(0.5, 0.5, "none", ha="center", va="center", transform=ax.transAxes)
    figure.suptitle(title_of(dataset, score))
    return figure


def draw_overlays(images: list[np.ndarray], maps: list[np.ndarray], names: list[str],
                  captions: list[list[str]], diverging: bool) -> Figure:
    """A line for each of a user's images: the image, then maps over it.

    images (H, W) or (H, W, 3) uint8; maps (panels, h, w), stretched over the image: class
    activation maps (`diverging`, a scale for each image) or probabilities in [0, 1]; a caption for
    each panel.
    """
    panels = max(len(layers) for layers in maps)
    figure, axes = subplots(len(images), 1 + panels, squeeze=False,
                            figsize=(2.2 * (1 + panels), 2.5 * len(images)))
    for line, image, layers, name, labels in zip(axes, images, maps, names, captions):
        extent = (0, image.shape[1], image.shape[0], 0)
        scale = np.abs(layers).max()
        colours = ({"cmap": EVIDENCE, "vmin": -scale, "vmax": scale} if diverging else
                   {"cmap": "viridis", "vmin": 0, "vmax": 1})
        small = Image.fromarray(image).convert("RGB")
        small.thumbnail((PANEL, PANEL))
        for ax in line:
            ax.imshow(small, extent=extent)
            ax.set(xticks=[], yticks=[])
        line[0].set_title(name, fontsize=9, parse_math=False)  # a file's name is no formula
        for ax, layer, label in zip(line[1:], layers, map(literal, labels)):
            drawn = ax.imshow(layer, extent=extent, alpha=0.65, **colours)
            ax.set_title(label, fontsize=9)
        figure.colorbar(drawn, ax=line, shrink=0.8,
                        label="evidence" if diverging else "probability")
    return figure


# ---- attention and shift invariance ----

def draw_attention(samples: list[dict], names: tuple[str, ...], title: str) -> Figure:
    """Grids, and the class activation maps of several networks for every class (report, Figure 1).

    samples: dicts of `grid` (H, W), `cell` 0 to 3, `target`, and by network `predictions`, classes,
    and `maps` (classes, h, w). All maps of a network and a grid share one colour scale.
    """
    networks = list(samples[0]["maps"])
    rows = len(samples) * len(networks)
    figure, axes = subplots(rows, 1 + len(names), squeeze=False,
                            figsize=(13, 1.28 * rows + 0.8))
    for i, sample in enumerate(samples):
        target, (top, left) = sample["target"], divmod(sample["cell"], 2)
        for j, network in enumerate(networks):
            row, maps = axes[i * len(networks) + j], sample["maps"][network]
            scale, prediction = np.abs(maps).max(), sample["predictions"][network]
            side = maps.shape[-1] / 2
            for c, (ax, name) in enumerate(zip(row[1:], names)):
                ax.imshow(maps[c], cmap=EVIDENCE, vmin=-scale, vmax=scale)
                ax.add_patch(Rectangle((left * side - 0.5, top * side - 0.5), side, side,
                                       fill=False, ec="0.3", ls=":"))
                ax.set(xticks=[], yticks=[], title=name if i == j == 0 else "")
                frame = (TRUE if c == target else MISTAKE if c == prediction else
                         {"color": "0.8", "linewidth": 0.8})
                for spine in ax.spines.values():
                    spine.set(**frame)
            verdict = "right" if prediction == target else "wrong"
            row[1].set_ylabel(f"{network}: {verdict}\n{names[prediction]}\n±{scale:.2f}",
                              fontsize=9, rotation=0, ha="right", va="center")
            row[0].set(xticks=[], yticks=[])
            row[0].axis("off")
        grid = axes[i * len(networks), 0]
        grid.axis("on")
        grid.imshow(sample["grid"], cmap="gray")
        grid.set_xlabel(f"no. {sample['index']}: {names[target]}", fontsize=9)
    figure.suptitle(f"{title}\nframe: the true class; dashed: a wrong prediction; dots: the cell "
                    "of the garment; orange favours the class, blue speaks against it, ± is the "
                    "end of a row's scale", fontsize=10)
    return figure


def draw_shifts(name: str, seeds: dict[int, dict], sweep: dict[str, np.ndarray],
                grids: tuple[int, int]) -> Figure:
    """Accuracy by cell, and accuracy and consistency over all shifts, of one row.

    sweep: `sweep_accuracy` and `sweep_consistency`, (29, 29) fractions, means over the seeds.
    grids: of how many the cells were measured, and the shifts.
    """
    figure, (places, *axes) = subplots(1, 3, figsize=(10, 3.4))
    cells = np.array([across_seeds(seeds, f"accuracy_cell{c}") for c in range(4)])
    mean = cells[:, 0].mean()
    places.imshow(cells[:, 0].reshape(2, 2), cmap="viridis", vmin=mean - 5, vmax=mean + 5)
    for c, (mean, half) in enumerate(cells):
        interval = "" if np.isnan(half) else f"\n± {half:.1f}"
        places.text(c % 2, c // 2, f"{mean:.1f} %{interval}", ha="center", va="center",
                    bbox={"facecolor": "white", "alpha": 0.8, "lw": 0})
    places.set(xticks=[0, 1], yticks=[0, 1], xticklabels=["left", "right"],
               yticklabels=["top", "bottom"], title=f"accuracy by cell,\n{grids[0]:,} grids")
    places.set_ylabel(name, fontsize=12)
    titles = {"sweep_accuracy": "accuracy", "sweep_consistency": "prediction unchanged"}
    for ax, (key, title) in zip(axes, titles.items()):
        image = ax.imshow(100 * sweep[key], cmap="viridis")
        figure.colorbar(image, ax=ax, label="%", shrink=0.75)
        ax.set(xticks=range(0, 29, 4), yticks=range(0, 29, 4), xlabel="shift right (pixels)",
               ylabel="shift down (pixels)", title=f"{title},\n{grids[1]:,} grids")
    return figure


def draw_equivariance(rows: dict) -> Figure:
    """Feature equivariance error by shift: a column for each row, a line for each padding."""
    figure, axes = subplots(2, len(rows), figsize=(3 * len(rows) + 1.2, 6), squeeze=False)
    paddings = {"zeros": "zero padding (as trained)", "circular": "circular padding"}
    error = {(row, padding): np.mean([record["error"][padding] for record in seeds.values()], 0)
             for row, seeds in rows.items() for padding in paddings}
    top = 100 * max(map(np.max, error.values()))
    on_grid = np.add.outer(np.arange(8) % 4, np.arange(8) % 4) == 0
    moved = np.arange(64).reshape(8, 8) > 0
    for line, (padding, label) in zip(axes, paddings.items()):
        for ax, row in zip(line, rows):
            values = 100 * error[row, padding]
            image = ax.imshow(values, cmap="viridis", vmin=0, vmax=top)
            ax.set(xticks=range(8), yticks=range(8), title=row if padding == "zeros" else "",
                   xlabel=f"shift right (pixels)\n"
                          f"mean of multiples of 4: {values[on_grid & moved].mean():.2g} %,\n"
                          f"of all other shifts: {values[~on_grid].mean():.1f} %")
        line[0].set_ylabel(f"{label}\nshift down")
    figure.colorbar(image, ax=axes, label="equivariance error (% of the features' norm)",
                    shrink=0.6)
    return figure
