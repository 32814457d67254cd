"""A run that stops, breaks off or is killed goes on and ends with the same bits."""

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import one_error, result, run_seg

import metrics
import models
from lab import engine, files, records

REPO = Path(__file__).parents[1]


def stop_at_step(monkeypatch, step, number=signal.SIGTERM):
    """From now on this training step, counted over all epochs, sends the process a signal."""
    calls, real = [], models.cross_entropy

    def stopping(*args, **more):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args, **more)

    monkeypatch.setattr(models, "cross_entropy", stopping)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("step, where", [(1, "step 1 of 3 of epoch 1"),
                                         (5, "step 2 of 3 of epoch 2"), (6, "the end of epoch 2")])
def test_a_stopped_run_saves_its_step_and_ends_with_the_same_bits(
        tiny_root, tmp_path, monkeypatch, capsys, precision, step, where):
    flags = ["--epochs", "3", "--precision", precision]
    assert run_seg(tiny_root, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, step)
        assert run_seg(tiny_root, tmp_path / "stopped", *flags) == 143
    assert f"stopped by SIGTERM; the same command goes on from {where}" in one_error(capsys)
    assert run_seg(tiny_root, tmp_path / "stopped", *flags) == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
    left = {path.name for path in (tmp_path / "stopped").iterdir()}
    assert left == {"seed0.json", "seed0.npz", "seed0.pt"}


def test_dropout_depends_on_seed_epoch_and_step_alone(tiny_root, tmp_path, monkeypatch):
    assert run_seg(tiny_root, tmp_path / "whole") == 0
    real, masks = models.cross_entropy, []

    def before_each_loss(act):
        monkeypatch.setattr(models, "cross_entropy",
                            lambda *args, **more: (act(), real(*args, **more))[1])

    before_each_loss(lambda: torch.rand(3))
    assert run_seg(tiny_root, tmp_path / "others-draw-too") == 0
    assert result(tmp_path / "others-draw-too") == result(tmp_path / "whole")
    before_each_loss(lambda: masks.append(torch.nn.functional.dropout(torch.ones(64))))
    assert run_seg(tiny_root, tmp_path / "masks") == 0
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 6  # 2 epochs of 3 steps


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[:len(content) // 2]
    else:  # a bit in the middle of the largest tensor
        content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "bit-flipped", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
        tiny_root, tmp_path, monkeypatch, capsys, how):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_seg(tiny_root, whole, "--epochs", "3") == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, 6)
        assert run_seg(tiny_root, broken, "--epochs", "3") == 143
    if how == "missing":
        (broken / "seed0.pt").unlink()
    else:
        damage(broken / "seed0.pt", how)
    capsys.readouterr()
    assert run_seg(tiny_root, broken, "--epochs", "3") == 0
    said = capsys.readouterr().err
    assert "seed0.pt" in said and "using " in said and "goes on after epoch 1/3" in said
    assert result(broken) == result(whole)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_before(
        tiny_root, tmp_path, monkeypatch):
    """A kill between the two renames of the next save would else leave the damaged one alone."""
    with monkeypatch.context() as patch:
        stop_at_step(patch, 6)
        assert run_seg(tiny_root, tmp_path, "--epochs", "3") == 143
    damage(tmp_path / "seed0.pt", "truncated")
    real = os.replace

    def killed(source, target):
        if str(target).endswith("seed0.pt"):
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run_seg(tiny_root, tmp_path, "--epochs", "3")
    assert files.read_checkpoint(tmp_path / "seed0.prev.pt")["epoch"] == 1


def test_a_run_that_goes_on_elsewhere_says_where_it_was(
        tiny_root, tmp_path, monkeypatch, capsys):
    """Here on a CPU of which torch says that it has no bfloat16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with monkeypatch.context() as patch:
        stop_at_step(patch, 3)
        assert run_seg(tiny_root, tmp_path) == 143
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert run_seg(tiny_root, tmp_path) == 0
    said = capsys.readouterr().err
    assert "NOTE: it was bfloat16 until here, and is float32 from here on" in said
    record = json.loads((tmp_path / "seed0.json").read_text())
    assert record["environment"]["precision"] == "float32"
    assert [one["precision"] for one in record["earlier_environments"]] == ["bfloat16"]


def test_a_damaged_checkpoint_without_one_before_is_refused(
        tiny_root, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at_step(patch, 6)
        assert run_seg(tiny_root, tmp_path, "--epochs", "3") == 143
    for path in tmp_path.glob("seed0*.pt"):
        damage(path, "bit-flipped")
    capsys.readouterr()
    assert run_seg(tiny_root, tmp_path, "--epochs", "3") == 2
    assert "prev.pt is no checkpoint of this project, or damaged" in one_error(capsys)


def test_a_second_process_on_the_same_run_is_refused(tiny_root, tmp_path, capsys):
    with open(tmp_path / ".seed0.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run_seg(tiny_root, tmp_path) == 2
        assert "seed0.pt is being written by another process" in one_error(capsys)
        assert run_seg(tiny_root, tmp_path, "--seed", "1") == 0  # another seed is another run
    assert run_seg(tiny_root, tmp_path) == 0


def test_a_short_campaign_of_kills(fashion_root, tmp_path):
    """Both scripts in float32 and bfloat16; float16, slow here, has its turn in `make faults`."""
    done = subprocess.run([sys.executable, "tests/faults.py", "--rounds", "4",
                           "--out", str(tmp_path / "faults.json")], cwd=REPO, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(REPO)}, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = json.loads((tmp_path / "faults.json").read_text())["rounds"]
    assert len(rounds) == 4 and all(one["same_bits"] and not one["stray"] for one in rounds)


def test_a_complete_run_is_not_run_again(tiny_root, tmp_path, monkeypatch, capsys):
    assert run_seg(tiny_root, tmp_path) == 0
    first = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert run_seg(tiny_root, tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first


def test_a_run_killed_between_model_and_record_only_evaluates(tiny_root, tmp_path):
    run_seg(tiny_root, tmp_path)
    expected = result(tmp_path)
    (tmp_path / "seed0.json").unlink()
    assert run_seg(tiny_root, tmp_path) == 0 and result(tmp_path) == expected


@pytest.mark.parametrize("module, name", [(metrics, "segmentation"), (records, "write")])
def test_a_stop_after_training_says_that_the_same_command_goes_on(
        tiny_root, tmp_path, monkeypatch, capsys, module, name):
    assert run_seg(tiny_root, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        assert run_seg(tiny_root, tmp_path / "stopped") == 143
    assert "the same command goes on from the last checkpoint" in one_error(capsys)
    assert run_seg(tiny_root, tmp_path / "stopped") == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")


def test_a_clock_that_jumps_changes_nothing(tiny_root, tmp_path, monkeypatch):
    assert run_seg(tiny_root, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)
        assert run_seg(tiny_root, tmp_path / "stopped") == 143
    for name, when in (("seed0.pt", 0), ("seed0.prev.pt", 2**32)):  # the newer seems the older now
        os.utime(tmp_path / "stopped" / name, (when, when))
    years = itertools.cycle((0, 2e9, 1e9))
    monkeypatch.setattr(time, "time", lambda: next(years))
    assert run_seg(tiny_root, tmp_path / "stopped") == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
    assert 0 < json.loads((tmp_path / "stopped/seed0.json").read_text())["train_seconds"] < 600
