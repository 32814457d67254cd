"""Pictures of a study, drawn from arrays and run records; nothing here computes with a network.

Every function returns a matplotlib Figure, which `save` writes. Colours are Okabe and Ito's and
matplotlib's viridis, which every kind of colour vision tells apart. Images side by side are in
lab/panels.py.
"""

import io
import itertools
import os
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from lab import files, records
from lab.estimates import Estimate, own_value
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
COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
PAGE = 10  # a user's images on one picture: about three screens high


def literal(text: str) -> str:
    """A user's name for something: two dollars in it make no formula."""
    return text.replace("$", r"\$")


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


def pages_of(count: int, path: Path) -> list[Path]:
    """The files of a picture of so many items: `path`, or for each PAGE of them PATH-1, PATH-2."""
    pages = -(-count // PAGE)
    return [path] if pages == 1 else [path.with_stem(f"{path.stem}-{i + 1}") for i in range(pages)]


def save_pages(draw: Callable[[tuple], Figure], items: tuple, path: Path) -> None:
    """Write draw(items), or a page of it for every PAGE items: see `pages_of`.

    They are drawn one at a time: a layout takes the longer for a panel the more it has.
    """
    pages = pages_of(len(items), path)
    for i, page in enumerate(pages):
        write(draw(items[i * PAGE:(i + 1) * PAGE]), page)
    several = f"s {pages[0]} to" if len(pages) > 1 else ""
    print(f"figure{several} {pages[-1]}")


# ---- a table of rows ----

def draw_differences(panels: dict[str, dict[str, tuple[Estimate, float | None]]],
                     rows: dict) -> Figure:
    """A row's difference from the base in each metric: ours with its 95 % interval, and another's.

    panels: {metric: {row: (estimate, the value reported by someone else or None)}}; rows: the
    records that they are made of.
    """
    names = list(next(iter(panels.values())))
    figure, axes = subplots(1, len(panels), sharey=True, squeeze=False,
                            figsize=(3 + 3.4 * len(panels), 1.6 + 0.27 * len(names)))
    for ax, (metric, found) in zip(axes[0], panels.items()):
        for y, (ours, reported) in enumerate(found.values()):
            if ours.values:
                ax.errorbar(ours.mean, y + 0.12, xerr=None if np.isnan(ours.half) else ours.half,
                            fmt="o", color=BLUE, capsize=3)
            if reported is not None:
                ax.plot(reported, y - 0.12, "D", color=ORANGE, mec="black", mew=0.6)
        ax.axvline(0, color="black", lw=0.8)
        ax.grid(axis="x", alpha=0.3)
        ax.set(xlabel=f"difference in {metric} (points)", yticks=range(len(names)),
               yticklabels=names)
    axes[0, 0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    handles = [Line2D([], [], marker="o", color=BLUE, ls="", label=f"ours, {seeds_of(rows)}")]
    if any(reported is not None for found in panels.values() for _, reported in found.values()):
        handles.append(Line2D([], [], marker="D", color=ORANGE, mec="black", ls="",
                              label="the report, one run"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return marked(figure, records.each_of(rows))


def draw_power(errors: dict[str, dict], rows: int, claims: int, title: str,
               made_of: Iterable[dict]) -> Figure:
    """How large an effect so many seeds decide, in a row's own spread and in points of each metric.

    errors: {metric: its `spread` over seeds and the error `test_set` of a difference, in points,
    the number of `units` and of `rows`}; for the hardest of so many claims, in tables of so many
    rows.
    """
    seeds = np.arange(3, 11)
    figure, (left, right) = subplots(1, 2, figsize=(9.6, 3.9))
    effects = [detectable(n, rows, claims) for n in seeds]
    left.plot(seeds, effects, "o-", color="black")
    left.set(ylabel="effect decided (spreads of a row over seeds)", ylim=(0, 1.12 * effects[0]),
             title="two rows alike, without a test set's error")
    curves = [(left, effects)]
    styles = zip(itertools.cycle(COLOURS[:3]), itertools.cycle("osD^vPX*"))
    for (name, part), (colour, marker) in zip(errors.items(), styles):
        found = [detectable(n, part["rows"], claims, part["spread"], part["test_set"],
                            part["units"]) for n in seeds]
        right.plot(seeds, found, marker=marker, color=colour,
                   label=f"{name}: spread {part['spread']:.2f}, test set ± {part['test_set']:.2f}")
        curves.append((right, found))
    for ax, found in curves:
        for n in (3, 4, 6, 10):
            ax.annotate(f"{found[n - 3]:.1f}", (n, found[n - 3]), xytext=(5, 5), ha="left",
                        textcoords="offset points", fontsize=8)
    right.set(ylabel="effect decided (points)", yscale="log", title=title)
    right.margins(y=0.12)
    right.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9, title="standard "
                  "deviation over seeds, and standard error by the choice of test images")
    for ax in (left, right):
        ax.set(xlabel="seeds of each row", xticks=seeds, xlim=(2.7, 10.8))
        ax.grid(alpha=0.3, which="both")
    figure.suptitle(f"Distance from the edge of a claim's range that is decided with 80 % "
                    f"probability, as the hardest of {claims} claims", fontsize=11)
    return marked(figure, made_of)


def seeds_of(rows: dict) -> str:
    counts = sorted({len(seeds) for seeds in rows.values()})
    span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"{span} seed{'s' * (counts[-1] > 1)}"


def draw_curves(rows: dict, base: str, loss: str) -> Figure:
    """Training loss by epoch: a small panel for each row over the base row's curves in grey.

    loss: the setting that says which loss was minimised. Rows of another one than the base's have
    a scale of their own and nothing in grey, and their titles say so: no two losses compare.
    """
    columns = 4
    lines = -(-len(rows) // columns)
    figure, axes = subplots(lines, columns, sharex=True, squeeze=False,
                            figsize=(2.6 * columns, 0.6 + 1.7 * lines))
    of_row = lambda row: next(iter(rows[row].values()))["config"].get(loss)
    alike = [ax for ax, row in zip(axes.flat, rows) if of_row(row) == of_row(base)]
    for ax in alike[1:]:
        ax.sharey(alike[0])
    for ax in alike:
        ax.tick_params(labelleft=ax in axes[:, 0])
    for ax in axes.flat[len(rows):]:
        ax.set_visible(False)
    # the lowest panel of its column, though not always in the last line
    for ax in axes.flat[max(0, len(rows) - columns):len(rows)]:
        ax.tick_params(labelbottom=True)
    for ax, (row, seeds) in zip(axes.flat, rows.items()):
        grey = rows[base] if ax in alike else {}
        for runs, style in ((grey, {"color": "0.7", "lw": 2.5}),
                            (seeds, {"color": BLUE, "marker": "."})):
            for record in runs.values():
                curve = records.need(record, "curve", "loss", kind=list)
                ax.plot(range(1, len(curve) + 1), curve, **style)
        ax.set_title(row if ax in alike else f"{row}: own scale", fontsize=9,
                     color="black" if ax in alike else RED)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.supxlabel("epoch (grey: the base row"
                     + (f"; own scale: another {loss})" if len(alike) < len(rows) else ")"))
    figure.supylabel("training loss")
    return marked(figure, records.each_of(rows))


def draw_shares(pixels: np.ndarray, names: tuple[str, ...], palette: np.ndarray,
                data: str) -> Figure:
    """Each class's share of the training pixels (classes,), in its colour, uint8 (classes, 3)."""
    figure, ax = subplots(figsize=(5, 0.9 + 0.3 * len(names)))
    bars = ax.barh([*map(literal, names)], 100 * pixels / pixels.sum(), color=palette / 255,
                   edgecolor="black", linewidth=0.6)
    ax.bar_label(bars, fmt="%.1f %%", padding=3)
    ax.invert_yaxis()
    ax.set_xlim(0, 118 * pixels.max() / pixels.sum())
    ax.set(xlabel=f"share of the training pixels (%), {literal(data)}")
    return figure


def draw_architecture(blocks: list[dict], title: str) -> Figure:
    """A network's blocks in the order they run, as high as their output is large.

    blocks: dicts of `name`, `kind`, `shape` (C, H, W) of the output, and `joins`, the index of the
    earlier block that is summed into this one's input, or None.
    """
    sizes = sorted({block["shape"][1] for block in blocks})
    top = {size: level for level, size in enumerate(sizes)}
    kinds = dict.fromkeys(block["kind"] for block in blocks)
    hue = dict(zip(kinds, ("0.35", BLUE, RED, GREEN, PURPLE)))
    figure, ax = subplots(figsize=(0.47 * len(blocks) + 1.2, 0.75 * len(sizes) + 1.6))
    arrow = {"arrowstyle": "->", "color": "0.4", "shrinkA": 0, "shrinkB": 0}
    skip = {"arrowstyle": "->", "color": "black", "ls": "--",
            "connectionstyle": "arc3,rad=-0.12"}
    for x, block in enumerate(blocks):
        channels, height, _ = block["shape"]
        y = top[height]
        if x:
            before = top[blocks[x - 1]["shape"][1]]
            ax.annotate("", (x - 0.32, y), (x - 0.68, before), arrowprops=arrow)
        ax.add_patch(Rectangle((x - 0.32, y - 0.28), 0.64, 0.56, facecolor=hue[block["kind"]],
                               edgecolor="black"))
        ax.text(x, y, channels, ha="center", va="center", fontsize=8, color="white",
                fontweight="bold")
        if block["joins"] is not None:
            ax.annotate("", (x, y + 0.3), (block["joins"], y + 0.3), arrowprops=skip)
    ax.set(xlim=(-0.7, len(blocks) - 0.3), ylim=(-0.6, len(sizes) - 0.1), xticks=[], title=title,
           yticks=range(len(sizes)), yticklabels=[f"{size} x {size}" for size in sizes],
           ylabel="output (pixels)")
    handles = [Patch(facecolor=colour, edgecolor="black", label=kind)
               for kind, colour in hue.items()]
    handles.append(Line2D([], [], color="black", ls="--", label="inter skip: added at the input"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def across_seeds(seeds: dict[int, dict], key: str) -> tuple[float, float]:
    """Mean of a test metric over a row's records, and half of its 95 % interval, in percent.

    Of one record, which tells no interval, NaN.
    """
    found = own_value(seeds, key)
    return found.mean, found.half


def draw_trends(rows: dict[tuple[str, float], dict], panels: dict[str, dict[str, str]],
                xlabel: str, chance: dict[str, float]) -> Figure:
    """Metrics of several kinds of row by a setting: a panel for each, a line for each kind.

    rows: {(kind, setting): seeds}; panels: {title: {metric: what its line is called besides its
    kind}}; chance: {title: the value that knowing nothing gives}, in percent.
    """
    settings = sorted({setting for _, setting in rows})
    kinds = dict.fromkeys(kind for kind, _ in rows)
    shifts = 0.12 * (np.arange(len(kinds)) - (len(kinds) - 1) / 2)  # so that bars lie side by side
    figure, axes = subplots(1, len(panels), figsize=(3 * len(panels), 3.2), squeeze=False)
    for ax, (title, keys) in zip(axes[0], panels.items()):
        for kind, colour, shift in zip(kinds, itertools.cycle(COLOURS), shifts):
            for (key, note), style in zip(keys.items(), ("-o", "--s")):
                found = [(x + shift, *across_seeds(rows[kind, setting], key))
                         for x, setting in enumerate(settings) if (kind, setting) in rows]
                x, mean, half = np.array(found).reshape(-1, 3).T
                ax.errorbar(x, mean, yerr=half, fmt=style, color=colour, capsize=3, ms=5,
                            label=kind + note)
        if title in chance:
            ax.axhline(chance[title], color="0.4", ls=":", label="chance")
        ax.set(xticks=range(len(settings)), xticklabels=[f"{setting:g}" for setting in settings],
               xlabel=xlabel, title=title)
        ax.title.set_fontsize(10)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper center",
                  bbox_to_anchor=(0.5, -0.2))  # below: bars may reach anywhere
    return figure


def draw_confusions(counts: dict[str, np.ndarray], names: tuple[str, ...]) -> Figure:
    """A confusion matrix (classes, classes) for each surrogate, in percent of the true class."""
    figure, axes = subplots(1, len(counts), squeeze=False,
                            figsize=(5.4 * len(counts), 4.9))
    for ax, (label, matrix) in zip(axes[0], counts.items()):
        share = 100 * matrix / matrix.sum(1, keepdims=True)
        ax.imshow(share, cmap="viridis", vmin=0, vmax=100)
        for i, j in zip(*np.nonzero(share > 0.5)):
            ax.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                    color="black" if share[i, j] > 60 else "white")
        ax.set(xticks=range(len(names)), yticks=range(len(names)), yticklabels=names,
               ylabel="true", xlabel="predicted (% of the true class; blank: below 0.5)",
               title=label)
        ax.set_xticklabels(names, rotation=45, ha="right")
    return figure
