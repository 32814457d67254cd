"""Long work says how far it is, in a log file too: training, evaluation, measurements, export."""

import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest
import torch

import train_seg
from lab import cli, forms, progress, provenance

LINE = re.compile(r"(.*): (\d+) % of (\d+) (\w+), \d\d:\d\d gone, \d\d:\d\d to go(, loss [\d.]+)?")


@pytest.fixture
def every(monkeypatch):
    """Sets the seconds between two lines; 0 is a line an update."""
    return lambda seconds: monkeypatch.setattr(progress, "EVERY", seconds)


def lines(capsys):
    found = [LINE.fullmatch(line) for line in capsys.readouterr().err.splitlines()]
    return [match.groups() for match in found if match]


def test_nothing_done_yet_tells_no_time_left(every, capsys):
    every(0)
    progress.Progress("download", 1000, "KiB").update(0)
    assert not capsys.readouterr().err


def test_a_log_gets_a_line_every_30_seconds_and_no_more(monkeypatch, every, capsys):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress.Progress, "spoken", 1000.0)
    every(30)
    for name in ("first", "second"):  # each 40 seconds by itself
        for _ in progress.progress(range(10), name, unit="parts"):
            clock[0] += 4
    assert capsys.readouterr().err.splitlines() == [
        "first: 80 % of 10 parts, 00:32 gone, 00:08 to go",
        "second: 60 % of 10 parts, 00:24 gone, 00:16 to go"]


def test_the_inner_one_is_silent_until_the_outer_one_ended_or_broke(every, capsys):
    every(0)
    for _ in progress.progress(range(2), "outer"):
        assert list(progress.progress("ab", "inner")) == ["a", "b"]
    assert [line[0] for line in lines(capsys)] == ["outer"]
    with pytest.raises(ZeroDivisionError):
        for _ in progress.progress(range(2), "broken"):
            1 / 0
    list(progress.progress("ab", "next"))
    assert [line[0] for line in lines(capsys)] == ["next"]


def test_a_terminal_gets_a_bar_instead():
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (24, 80))
    code = ("import time; from lab import progress; progress.EVERY = 0; "
            "bar = progress.Progress('work', 4); bar.say('loss 1'); "
            "time.sleep(0.2); bar.update(4); bar.close()")
    subprocess.run([sys.executable, "-c", code], stderr=other, check=True, cwd=provenance.SOURCE)
    told = os.read(main, 10_000).decode()
    os.close(main)
    os.close(other)
    assert "\rwork: 100%|" in told and "loss 1" in told and "gone" not in told


def test_training_and_evaluation(tiny_root, tmp_path, every, capsys):
    every(0)
    argv = ["--protocol", "smoke", "--batch", "2", "--device", "cpu"]
    argv += ["--data-root", str(tiny_root), "--out", str(tmp_path)]
    assert cli.guard(lambda: train_seg.main(argv)) == 0
    found = {what: (int(total), unit) for what, _, total, unit, _ in lines(capsys)}
    assert found == {"reading images": (3, "images"), "epoch 1/2": (6, "images"),
                     "epoch 2/2": (6, "images"), "evaluation": (2, "batches"),
                     "average precision": (5, "classes")}


def test_the_export(every, capsys):
    every(0)
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    calibration = forms.Calibration(images)
    assert len(list(iter(calibration.get_next, None))) == 3
    assert len(forms.logits_of(lambda part: part, images, 2)) == 3
    assert [line[:4] for line in lines(capsys)[1:]] == [
        ("calibration", "67", "3", "images"), ("evaluation", "50", "2", "batches")]


def test_work_of_unknown_length_says_what_is_done(every, capsys):
    every(0)
    bar = progress.Progress("download", None, "KiB")
    bar.update(64)
    bar.update(64)
    bar.close()
    assert capsys.readouterr().err.splitlines() == ["download: 64 KiB, 00:00 gone",
                                                    "download: 128 KiB, 00:00 gone"]
