"""What a study's pictures draw: each number at its place, with its interval, under its name."""

import numpy as np
import pytest

from lab import figures
from lab.estimates import Estimate
from lab.statistics import Part, detectable, half_width


def bars_of(ax):
    """[(x, y, half of the bar)] of each point with an interval, line by line."""
    found = []
    for container in ax.containers:
        line, _, (bars,) = container.lines
        for x, y, segment in zip(*line.get_data(), bars.get_segments()):
            found.append((float(x), float(y), float(np.ptp(segment, 0).max()) / 2))
    return found


def test_differences_lie_on_the_line_of_their_row_with_their_intervals():
    errors = {"a": (Part(0.01, 4),), "b": (Part(0.04, 4),)}
    rows = {"a": (Estimate([1.0, 2.0], errors["a"]), 5.0),
            "b": (Estimate([-3.0], errors["b"]), -6.0)}
    ax = figures.draw_differences({"accuracy": rows}, {"a": {0: {}}, "b": {0: {}}}).axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert [(x, names[round(y)]) for x, y, _ in bars_of(ax)] == [(1.5, "a"), (-3.0, "b")]
    halves = [float(half_width(errors[name])) for name in "ab"]
    assert [half for *_, half in bars_of(ax)] == pytest.approx(halves)
    reported = [line.get_data() for line in ax.lines if line.get_marker() == "D"]
    assert [(x[0], names[round(y[0])]) for x, y in reported] == [(5.0, "a"), (-6.0, "b")]


def test_trends_show_each_kind_at_its_setting(monkeypatch):
    monkeypatch.setattr(figures, "across_seeds", lambda seeds, key: seeds[key])
    rows = {("frozen", 0.9): {"x": (1.0, 0.1)}, ("frozen", 0.0): {"x": (2.0, 0.2)},
            ("scratch", 0.9): {"x": (3.0, 0.3)}}
    ax = figures.draw_trends(rows, {"accuracy": {"x": ""}}, "tie", {"accuracy": 10.0}).axes[0]
    settings = [label.get_text() for label in ax.get_xticklabels()]
    found = [(settings[round(x)], y, half) for x, y, half in bars_of(ax)]
    assert [one[:2] for one in found] == [("0", 2.0), ("0.9", 1.0), ("0.9", 3.0)]
    assert [half for *_, half in found] == pytest.approx([0.2, 0.1, 0.3])
    assert [container.get_label() for container in ax.containers] == ["frozen", "scratch"]


def test_every_kind_of_row_has_its_line(monkeypatch):
    monkeypatch.setattr(figures, "across_seeds", lambda seeds, key: (1.0, 0.1))
    rows = {(kind, 0.0): {} for kind in ("frozen", "scratch", "tuned")}
    ax = figures.draw_trends(rows, {"x": {"accuracy": ""}}, "tie", {}).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["frozen", "scratch",
                                                                         "tuned"]
    assert len({bars.lines[0].get_color() for bars in ax.containers}) == 3


def test_a_curve_begins_at_epoch_1_over_the_base_rows_in_grey():
    row = lambda *loss: {0: {"config": {}, "path": "x", "curve": {"loss": [*loss]}}}
    figure = figures.draw_curves({"base": row(3.0, 2.0), "other": row(2.5, 1.5)}, "base", "loss")
    grey, own = figure.axes[1].lines
    assert (*grey.get_xdata(), *grey.get_ydata()) == (1, 2, 3.0, 2.0)
    assert (*own.get_xdata(), *own.get_ydata()) == (1, 2, 2.5, 1.5) and own.get_color() != "0.7"


def test_shares_of_pixels_stand_beside_their_classes():
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    ax = figures.draw_shares(np.array([10, 30, 60]), ("a", "b", "c"), palette, "x").axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    drawn = {names[round(bar.get_y() + bar.get_height() / 2)]:
             (round(bar.get_width()), bar.get_facecolor()[:3]) for bar in ax.patches}
    assert drawn == {"a": (10, (0, 0, 0)), "b": (30, (1, 0, 0)), "c": (60, (0, 0, 1))}


def test_power_is_of_so_many_claims_and_has_the_test_sets_error():
    part = {"spread": 0.5, "test_set": 0.4, "units": 67, "rows": 12}
    left, right = figures.draw_power({"x": part}, 9, 13, "", []).axes
    alike = [detectable(n, 9, 13) for n in range(3, 11)]
    points = [detectable(n, 12, 13, 0.5, 0.4, 67) for n in range(3, 11)]
    for ax, expected in ((left, alike), (right, points)):
        assert ax.lines[0].get_ydata().tolist() == pytest.approx(expected)
        said = [text.get_text() for text in ax.texts]
        assert said == [f"{expected[i]:.1f}" for i in (0, 1, 3, 7)]
