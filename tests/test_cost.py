"""What a study says that it will take, before it runs."""

import io
import mmap
import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import refused, run
from made_set import make_shapes, make_streets
from PIL import Image

from lab import cost, devices


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


@pytest.mark.parametrize("group", ["", "memory"])
def test_memory_is_what_the_tightest_limit_leaves(tmp_path, monkeypatch, group):
    """Of the machine, or of the container, whose cached files can go."""
    monkeypatch.setattr(devices, "Path", lambda path: tmp_path / path.lstrip("/"))
    folder = tmp_path / "sys/fs/cgroup" / group
    folder.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 1000 kB\n")
    limit, used, cached = (("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
                           if group else ("memory.max", "memory.current", "file"))
    for most, left in (("500000", 150_000), ("2000000", 1_024_000), ("max", 1_024_000)):
        (folder / limit).write_text(most)
        (folder / used).write_text("400000")
        (folder / "memory.stat").write_text(f"{cached} 50000\n")
        assert devices.host_memory() == left


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells peaks")
def test_the_largest_row_takes_as_much_more_memory_as_it_is_larger(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "step_seconds", lambda run, loss: hold(400) or 1.0)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n--width 32\n"))  # the first has width 8
    cost.forget_peak(torch.device("cpu"))  # of other tests
    data = make_shapes(tmp_path / "set")
    assert run("train_cls", "--protocol", "smoke", "--data", data, "--plan", 1) == 0
    memory = re.search(r"about ([\d.]+) GB a run, ([\d.]+) GB for one", capsys.readouterr().out)
    assert float(memory[2]) - float(memory[1]) == pytest.approx(3 * 0.42, abs=0.2)


def test_the_first_step_is_not_timed(tmp_path, monkeypatch):
    found, real = [], cost.step_seconds
    clock = iter((0, 100, 100, 101, 101, 104))  # a step of 100 seconds, of 1, of 3
    monkeypatch.setattr(cost, "step_seconds", lambda *args: found.append(real(*args)) or 1.0)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    data = make_shapes(tmp_path / "set")
    assert run("train_cls", "--protocol", "smoke", "--data", data, "--plan", 1) == 0
    assert found == [2]


def test_a_plan_refuses_runs_of_other_images_and_settings(tmp_path, monkeypatch, capsys):
    """As make does before a table: where the records are it runs no training script."""
    data, out = make_streets(tmp_path / "set"), tmp_path / "smoke-set/table2/narrow"
    flags = ("--protocol", "smoke", "--data", data, "--batch", 2)

    def planned(*more, runs=1):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"--width 4 --out {out}\n"))
        return ("train_seg", *flags, *more, "--plan", runs)

    assert run("train_seg", *flags, "--width", 4, "--seed", 1, "--out", out) == 0
    capsys.readouterr()
    assert run(*planned()) == 0 and "all 1 runs are there" in capsys.readouterr().out
    assert run(*planned(runs=2)) == 0 and "1 rows of 2 runs" in capsys.readouterr().out
    said = refused(capsys, *planned("--epochs", 3))
    assert "seed1.json was made with other settings (epochs 2 there, 3 here)" in said
    assert said.endswith(f"delete or move away what lies in {tmp_path}/smoke-set, and begin anew")
    image = min(data.rglob("*.jpg"))
    Image.open(image).save(image, quality=50)
    assert "other settings (data " in refused(capsys, *planned())
