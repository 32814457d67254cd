"""What a study says that it will take, before it runs."""

import io
import re

import pytest
from conftest import refused, run
from made_set import make_shapes, make_streets

from lab import cost


@pytest.mark.parametrize("script", ["train_seg", "train_cls"])
def test_a_plan_counts_rows_and_seeds(tmp_path, monkeypatch, capsys, script):
    data = (make_streets if script == "train_seg" else make_shapes)(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "step_seconds", lambda run, loss: 3600 * len(run.data.train))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n--width 16\n"))
    assert run(script, "--protocol", "smoke", "--data", data, "--plan", 3) == 0
    said = capsys.readouterr().out
    images, held = (21, 9) if script == "train_seg" else (64, 16)
    assert f"set: {images} training and {held} test images; 2 rows of 3 runs, 2 epochs" in said
    # an hour an image: two epochs, and both splits read once, in a third of the time
    first = 2 * images + (images + held) / 3
    total, one, slowest = map(float, re.search(
        r"about ([\d.]+) hours.*\(([\d.]+) hours for a run.*, ([\d.]+) hours", said).groups())
    assert one == pytest.approx(first, abs=0.1) and 3 * one < slowest < 4.1 * one  # of width 8
    assert total == pytest.approx(3 * (one + slowest), rel=0.01)
    assert re.search(r"memory: about [\d.]+ GB a run, [\d.]+ GB for one of the largest; ", said)
    assert not (tmp_path / "runs").exists()


def test_a_step_is_timed(tmp_path, monkeypatch, capsys):
    data = make_shapes(tmp_path / "set")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert run("train_cls", "--protocol", "smoke", "--data", data, "--plan", 1) == 0
    assert re.search(r"time: about [\d.]+ seconds", capsys.readouterr().out)


def test_a_plan_of_a_wrong_row_is_refused(tmp_path, monkeypatch, capsys):
    data = make_streets(tmp_path / "set")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n--width none\n"))
    assert "argument --width: invalid int" in refused(capsys, "train_seg", "--data", data,
                                                      "--plan", 1)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "--plan reads rows from stdin" in refused(capsys, "train_seg", "--data", data,
                                                     "--plan", 1)
