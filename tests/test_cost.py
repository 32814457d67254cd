"""What a study says that it will take, before it runs."""

import io
import mmap
import os
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


def hold(megabytes):
    """Memory that is taken and given back to the system, which the heap would keep."""
    with mmap.mmap(-1, megabytes << 20) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells peaks")
def test_what_reading_the_data_took_hides_no_step(tmp_path, monkeypatch, capsys):
    data, largest = make_shapes(tmp_path / "set"), []
    monkeypatch.setattr(cost, "step_seconds", lambda run, loss: hold(400) or 1.0)
    for spike in (0, 300, 2000):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n--width 16\n"))
        hold(spike or 1)
        assert run("train_cls", "--protocol", "smoke", "--data", data, "--plan", 1) == 0
        largest.append(float(re.search(r"([\d.]+) GB for one", capsys.readouterr().out)[1]))
    assert largest[1] == pytest.approx(largest[0], abs=0.11)
    assert largest[2] > 2.1  # a run reads the data too


def test_a_plan_of_a_wrong_row_is_refused(tmp_path, monkeypatch, capsys):
    data = make_streets(tmp_path / "set")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n--width none\n"))
    assert "argument --width: invalid int" in refused(capsys, "train_seg", "--data", data,
                                                      "--plan", 1)
    monkeypatch.setattr("sys.stdin", io.StringIO("--width 8\n--width '16\n"))
    said = refused(capsys, "train_seg", "--data", data, "--plan", 1)
    assert """line 2 on stdin, "--width '16": No closing quotation""" in said
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "--plan reads rows from stdin" in refused(capsys, "train_seg", "--data", data,
                                                     "--plan", 1)
