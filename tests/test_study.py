"""What tables, claims and figures say where something is missing, and of more than one switch."""

import json
import math
import shutil

import numpy as np
import pytest
from made_records import runs, table, verdicts, wobble, write_record
from scipy import stats

import metrics
import study
from lab import figures, panels


@pytest.fixture
def saved(monkeypatch):
    """{path: figure} of what study.py draws, not written."""
    found = {}
    monkeypatch.setattr(figures, "write", lambda figure, path: found.update({path: figure}))
    return found


def draw(root):
    study.main(["figures", "--protocol", "desk", "--results", str(root)])


# ---- the test set's error of MAP and WGAP ----

def average_precision(hits, misses):
    """Of one class, bin by bin from the highest score."""
    found = above = below = 0
    for hit, miss in zip(hits[::-1].tolist(), misses[::-1].tolist()):
        middle = above + below + (hit + miss) / 2
        found += hit * (above + hit / 2) / middle if hit else 0
        above, below = above + hit, below + miss
    return found / hits.sum()


@pytest.mark.parametrize("key, over_classes", [("map", np.mean), ("wgap", np.min)])
def test_the_error_by_the_choice_of_photos_is_a_bootstraps(tmp_path, key, over_classes):
    """Two rows whose photos differ, and differ alike: what redrawing whole photos gives."""
    photos, classes, bins = 12, 3, 6
    pick = np.random.default_rng(0)
    hard = pick.random((photos, classes, 1))  # of a photo, for every row
    counts = {}
    for row, skill in (("standard", 1.0), ("ce", 0.6)):
        rise = np.linspace(-1, 1, bins) * (skill - hard)
        hits = pick.poisson(40 * np.exp(2 * rise) * (1 + hard))
        counts[row] = hits, pick.poisson(60 * np.exp(-2 * rise))
        folder = tmp_path / "desk/table2" / row
        folder.mkdir(parents=True)
        wide = np.zeros((2, photos, classes, metrics.BINS), np.int32)
        wide[..., 90:90 + bins] = counts[row]
        (folder / "seed0.json").write_text(json.dumps({
            "config": {"protocol": "desk", "seed": 0, "row": row}, "data": "d",
            "metrics": {"test": {key: skill}}}))
        np.savez(folder / "seed0.npz", hits=wide[0], misses=wide[1], groups=np.arange(photos))

    def value(row, drawn):
        hits, misses = (count[drawn].sum(0) for count in counts[row])
        return over_classes([average_precision(*one) for one in zip(hits, misses)])

    draws = np.random.default_rng(1).integers(photos, size=(2500, photos))
    both = np.array([[value(row, drawn) for row in counts] for drawn in draws])
    expected = np.var(both[:, 0] - both[:, 1]) * photos / (photos - 1)
    rows = study.load_records(tmp_path / "desk/table2", "desk")
    part = study.estimates.test_set_part(rows, "standard", "ce", key, study.REDRAWS)
    assert part.variance == pytest.approx(expected, rel=0.15) and part.dof == photos - 1
    assert both.var(0).sum() > 1.6 * expected  # drawn apart for each row it would be this


# ---- where the base row is missing ----

def test_without_its_base_row_a_table_compares_nothing(tmp_path, saved, capsys):
    for seed in (0, 1):
        write_record(tmp_path, "stride-2-32", seed, 0.8 + 0.01 * seed, down="stride")
        write_record(tmp_path, "blurpool-2-32", seed, 0.9, down="blurpool")
    rows = table(tmp_path)
    assert rows["stride-2-32"][0] == "no base row" and rows["stride-2-32"][4] == "2"
    assert rows["maxpool-2-32"][0] == "not run" and rows["stride-1-32"][0] == "not run"
    draw(tmp_path)
    told = capsys.readouterr().out.splitlines()
    assert not saved and sum("table1" in line and "maxpool-2-32" in line for line in told) == 1


def test_rows_without_a_seed_in_common_say_so(tmp_path):
    write_record(tmp_path, "maxpool-2-32", 0, 0.9)
    write_record(tmp_path, "stride-2-32", 1, 0.8, down="stride")
    assert table(tmp_path)["stride-2-32"][0] == "no seed in common"


def test_the_base_is_the_reports_and_not_the_first_that_was_run(tmp_path, saved):
    for row, accuracy in (("a-mine", 0.5), ("stride-2-32", 0.8), ("maxpool-2-32", 0.9)):
        write_record(tmp_path, row, 0, accuracy, act=row)
    draw(tmp_path)
    labels = [label.get_text() for label in
              saved[tmp_path / "desk/table1.png"].axes[0].get_yticklabels()]
    assert labels == ["stride-2-32", "a-mine"]


def test_base_rows_alone_give_figures(tmp_path, saved):
    for seed in (0, 1):
        write_record(tmp_path, "maxpool-2-32", seed, 0.9 + 0.01 * seed)
    shutil.copytree(tmp_path / "desk/table1/maxpool-2-32", tmp_path / "desk/table2/standard")
    draw(tmp_path)
    assert {path.name for path in saved} == {"table1.png", "table1-curves.png", "table2.png",
                                             "table2-curves.png"}


def test_each_protocol_has_its_own_picture_of_power(tmp_path, saved):
    for name, rows in (("table1", study.REPORT["table1"]), ("table2", study.REPORT["table2"])):
        for i, row in enumerate([*rows][:3]):
            runs(tmp_path, name, row, [{"accuracy": x, "map": x, "wgap": x - 0.3}
                                       for x in wobble(0.7 + 0.01 * i)])
    for path in tmp_path.glob("desk/table*/*/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "curve": {"loss": [1.0]}}))
    draw(tmp_path)
    assert tmp_path / "desk/power.png" in saved


def test_every_metric_has_a_curve_of_power_and_a_marker_of_its_own():
    error = {"spread": 0.1, "test_set": 0.1, "units": 67, "rows": 12}
    figure = figures.draw_power({f"metric {i}": error for i in range(7)}, 12, 13, "x", [])
    lines = [line for line in figure.axes[1].lines if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 7


def test_more_seeds_than_asked_for_are_no_part_of_them(tmp_path):
    for seed in range(3):
        write_record(tmp_path, "maxpool-2-32", seed, 0.9)
    assert table(tmp_path, "--seeds", "1")["maxpool-2-32"][4] == "3"


# ---- rows of more than one switch ----

def test_one_switch_at_a_time(tmp_path):
    rows = {"maxpool-2-32": (0.90, {}), "stride-2-32": (0.88, dict(down="stride")),
            "stride-2-32-gelu": (0.89, dict(down="stride", act="gelu")),
            "stride-1-32": (0.85, dict(down="stride", depth=1)),
            "maxpool-1-32": (0.86, dict(depth=1)),
            "a-mine": (0.7, dict(down="stride", act="gelu", depth=1)),
            "alone": (0.6, dict(width=8, epochs_more=1))}
    for row, (accuracy, settings) in rows.items():
        settings = {"act": "relu", "epochs_more": 0, **settings}
        for seed in (0, 1):
            write_record(tmp_path, row, seed, accuracy, **settings)
    table(tmp_path)
    text = (tmp_path / "desk/table1.md").read_text()
    lines = [[cell.strip(" `") for cell in line.split("|")[1:-1]]
             for line in text.split("One switch at a time")[1].splitlines() if "`" in line]
    assert [line[:4] for line in lines] == [
        ["stride-2-32-gelu", "stride-2-32", "act: gelu, not relu", "+1.00 ± 0.00"],
        ["stride-1-32", "stride-2-32", "depth: 1, not 2", "-3.00 ± 0.00"],
        ["stride-1-32", "maxpool-1-32", "down: stride, not maxpool", "-1.00 ± 0.00"],
        ["a-mine", "stride-2-32-gelu", "depth: 1, not 2", "-19.00 ± 0.00"],
        ["a-mine", "stride-1-32", "act: gelu, not relu", "-15.00 ± 0.00"]]


def test_where_every_row_has_one_switch_nothing_is_added(tmp_path):
    for row, down in (("maxpool-2-32", "maxpool"), ("stride-2-32", "stride")):
        write_record(tmp_path, row, 0, 0.9, down=down)
    table(tmp_path)
    assert "One switch" not in (tmp_path / "desk/table1.md").read_text()


# ---- claims ----

def test_claims_show_their_range_and_every_condition(tmp_path):
    for row, (map_, wgap) in {"standard": (0.7, 0.4), "no-inter-skip": (0.5, 0.395),
                              "ce": (0.69, 0.3)}.items():
        runs(tmp_path, "table2", row, [{"map": a, "wgap": b}
                                       for a, b in zip(wobble(map_), wobble(wgap, 0.002))])
    lines = study.render_claims(verdicts(tmp_path)).splitlines()
    cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
    at = next(i for i, line in enumerate(lines) if line.startswith("| C8 "))
    first, second = cells(lines[at]), cells(lines[at + 1])
    assert first[1].startswith("-0.50 wgap") and second[1].startswith("-20.00 map")
    assert first[3] == second[3] == "< -1" and second[0] == ""
    ranges = {line.split()[1]: cells(line)[3] for line in lines if line.startswith("| C")}
    assert [ranges[name] for name in ("C1", "C2", "C6", "C10", "C11", "C5")] == [
        "-2 to 2", "> -0.5", "4 to 12", "< -20", "> 0", "> 50"]


def test_many_conditions_are_counted_and_the_one_that_decides_is_shown(tmp_path):
    for i, row in enumerate(study.REPORT["table1"]):
        runs(tmp_path, "table1", row, [{"accuracy": x} for x in wobble(0.9 - 0.01 * i)])
    text = study.render_claims(verdicts(tmp_path))
    line = next(line for line in text.splitlines() if line.startswith("| C1 "))
    assert "-16.00 accuracy, `blurpool-2-32` - `maxpool-2-32` (one of 16)" in line
    assert text.count("\n| ") == 13


# ---- attention ----

def write_surrogates(root, images=400):
    """One surrogate of three seeds: its values, and one metric of which it keeps none per image."""
    pick = np.random.default_rng(0)
    right = pick.random((3, images)) < 0.8
    for seed in range(3):
        folder = root / "desk/attention/frozen-tie0"
        folder.mkdir(parents=True, exist_ok=True)
        cells = {f"accuracy_cell{c}": right[seed].astype(np.float32) for c in range(4)}
        arrays = {"accuracy": right[seed], "prediction": right[seed].astype(np.uint8),
                  "target": np.ones(images, np.uint8), **cells}
        scores = {key: float(arrays[key].mean(dtype=float)) for key in ("accuracy", *cells)}
        scores["trouser_without_three"] = 0.002
        (folder / f"seed{seed}.json").write_text(json.dumps({
            "config": {"protocol": "desk", "seed": seed, "frozen": True, "tie": 0.0,
                       "images": images, "sweep_images": 2}, "data": "d",
            "metrics": {"test": {**scores, "trouser_with_three": 0.01 * seed}}}))
        np.savez(folder / f"seed{seed}.npz", **arrays)
    return right


def test_the_surrogates_intervals_count_the_test_images(tmp_path):
    right = write_surrogates(tmp_path)
    study.main(["attention", "--protocol", "desk", "--results", str(tmp_path)])
    text = (tmp_path / "desk/attention.md").read_text()
    values = 100 * right.mean(1)
    of_seeds = stats.t.ppf(0.975, 2) * values.std(ddof=1) / math.sqrt(3)
    of_images = stats.t.ppf(0.975, 399) * 100 * right.mean(0).std(ddof=1) / math.sqrt(400)
    cells = next(line for line in text.splitlines() if "`frozen-tie0` |" in line).split(" | ")
    assert cells[1] == f"{values.mean():.2f} ± {math.hypot(of_seeds, of_images):.2f}"
    assert of_images > 0.3 and cells[6:8] == ["1.00 ± 2.48", "0.20"]
    assert "over seeds alone" in text
    mean, half = figures.across_seeds(study.load_records(tmp_path / "desk/attention", "desk")
                                      ["frozen-tie0"], "accuracy")
    assert half == pytest.approx(math.hypot(of_seeds, of_images))


# ---- pictures ----

def test_losses_of_another_kind_have_an_axis_of_their_own():
    def row(loss, curve):
        return {0: {"config": {"loss": loss}, "path": "x", "curve": {"loss": curve}}}
    rows = {"standard": row("wce", [2.0, 1.0]), "dice": row("dice", [0.1, 0.05]),
            "wide": row("wce", [1.9, 0.9])}
    figure = figures.draw_curves(rows, "standard", "loss")
    axes = {ax.get_title(): ax for ax in figure.axes if ax.get_visible()}
    one, dice = axes["wide"], next(ax for title, ax in axes.items() if "dice" in title)
    assert one.get_ylim() == axes["standard"].get_ylim() != dice.get_ylim()
    assert dice.get_ylim()[1] < 0.2 and len(dice.lines) == 1 and len(one.lines) == 2
    assert "own scale" in dice.get_title()


def test_no_title_of_the_shifts_touches_a_colour_bar(tmp_path):
    write_surrogates(tmp_path)
    seeds = study.load_records(tmp_path / "desk/attention", "desk")["frozen-tie0"]
    sweep = {key: np.random.default_rng(0).random((29, 29))
             for key in ("sweep_accuracy", "sweep_consistency")}
    figure = panels.draw_shifts("frozen", seeds, sweep, (8, 2))
    figure.draw_without_rendering()
    bars = [ax.get_tightbbox() for ax in figure.axes if ax.get_ylabel() == "%"]
    titles = [ax.title.get_window_extent() for ax in figure.axes if ax.get_title()]
    assert len(bars) == 2 and len(titles) == 3
    assert not any(title.overlaps(bar) for title in titles for bar in bars)


def test_one_seed_is_drawn_without_an_interval(tmp_path):
    write_surrogates(tmp_path)
    rows = study.load_records(tmp_path / "desk/attention", "desk")
    sweep = dict.fromkeys(("sweep_accuracy", "sweep_consistency"), np.zeros((29, 29)))
    for count in (1, 3):
        seeds = dict([*rows["frozen-tie0"].items()][:count])
        cells = panels.draw_shifts("frozen", seeds, sweep, (8, 2)).axes[0].texts
        assert ["±" in text.get_text() for text in cells] == [count > 1] * 4
        lines = figures.draw_trends({("frozen", 0.0): seeds}, {"x": {"accuracy": ""}}, "tie", {})
        (bars,), = lines.axes[0].containers[0].lines[2:]
        assert (bars.get_segments()[0].size > 0) == (count > 1)



def test_one_switch_at_a_time_counts_the_seeds_that_both_rows_have(tmp_path):
    for row, seeds, settings in (
            ("maxpool-2-32", 3, {"act": "relu"}),
            ("stride-2-32", 2, {"act": "relu", "down": "stride"}),
            ("stride-2-32-gelu", 3, {"act": "gelu", "down": "stride"})):
        for seed in range(seeds):
            write_record(tmp_path, row, seed, 0.9, **settings)
    table(tmp_path)
    lines = (tmp_path / "desk/table1.md").read_text().split("One switch at a time")[1].splitlines()
    assert [line.split("|")[-2].strip() for line in lines if "stride-2-32-gelu" in line] == ["2"]
