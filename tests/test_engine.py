"""The training loop: it resumes bit for bit, loses nothing, and refuses what does not match, in one line."""

import errno
import fcntl
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import data
import models
import train_seg
from lab import batches, cli, engine, files, provenance

REPO = Path(__file__).parents[1]
TINY = ["--protocol", "smoke", "--size", "32", "--width", "4", "--batch", "2", "--device", "cpu"]


def run_seg(root, out, *flags):
    """Train in this process; the script's exit code."""
    return cli.guard(lambda: train_seg.main([*TINY, "--data-root", str(root), "--out", str(out), *flags]))


def result(out):
    """What a run computed, without when and where: weights, losses, metrics."""
    record = json.loads((Path(out) / "seed0.json").read_text())
    return {key: record[key] for key in ("weights_sha256", "curve", "metrics", "config", "data")}


def one_error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


# ---- resume ----

def stop_at_step(monkeypatch, step, number=signal.SIGTERM):
    """From now on the training step with this number, counted over all epochs, sends the process a signal."""
    calls, real = [], models.cross_entropy

    def stopping(*args, **more):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(*args, **more)

    monkeypatch.setattr(models, "cross_entropy", stopping)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("step, where", [(1, "step 1 of 3 of epoch 1"), (5, "step 2 of 3 of epoch 2"),
                                         (6, "the end of epoch 2")])
def test_a_stopped_run_saves_its_step_and_ends_with_the_same_bits(tiny_root, tmp_path, monkeypatch, capsys, precision,
                                                                  step, where):
    flags = ["--epochs", "3", "--precision", precision]
    assert run_seg(tiny_root, tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, step)
        assert run_seg(tiny_root, tmp_path / "stopped", *flags) == 143
    assert f"stopped by SIGTERM; the same command goes on from {where}" in one_error(capsys)
    assert run_seg(tiny_root, tmp_path / "stopped", *flags) == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir()) == ["seed0.json", "seed0.npz", "seed0.pt"]


def test_dropout_depends_on_seed_epoch_and_step_alone(tiny_root, tmp_path, monkeypatch):
    assert run_seg(tiny_root, tmp_path / "whole") == 0
    real = models.cross_entropy
    monkeypatch.setattr(models, "cross_entropy", lambda *args, **more: (torch.rand(3), real(*args, **more))[1])
    assert run_seg(tiny_root, tmp_path / "others-draw-too") == 0
    assert result(tmp_path / "others-draw-too") == result(tmp_path / "whole")
    masks = []
    monkeypatch.setattr(models, "cross_entropy", lambda logits, *args, **more: (
        masks.append(torch.nn.functional.dropout(torch.ones(64))), real(logits, *args, **more))[1])
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
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny_root, tmp_path, monkeypatch, capsys, how):
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


def test_a_damaged_checkpoint_without_one_before_is_refused(tiny_root, tmp_path, monkeypatch, capsys):
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
    """Both scripts in float32 and bfloat16; float16, which is slow on a CPU, has its turn in `make faults`."""
    done = subprocess.run([sys.executable, "tests/faults.py", "--rounds", "4", "--out", str(tmp_path / "faults.json")],
                          cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True)
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


def test_seeds_and_repeats(tiny_root, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_seg(tiny_root, tmp_path / name, "--seed", str(seed)) == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")
    other = json.loads((tmp_path / "c/seed1.json").read_text())
    assert other["weights_sha256"] != result(tmp_path / "a")["weights_sha256"]


def test_a_clock_that_jumps_changes_nothing(tiny_root, tmp_path, monkeypatch):
    assert run_seg(tiny_root, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)
        assert run_seg(tiny_root, tmp_path / "stopped") == 143
    for name, when in (("seed0.pt", 0), ("seed0.prev.pt", 2**32)):  # the newer one now seems the older by far
        os.utime(tmp_path / "stopped" / name, (when, when))
    years = itertools.cycle((0, 2e9, 1e9))
    monkeypatch.setattr(time, "time", lambda: next(years))
    assert run_seg(tiny_root, tmp_path / "stopped") == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")
    assert 0 < json.loads((tmp_path / "stopped/seed0.json").read_text())["train_seconds"] < 600


def test_deterministic_algorithms_give_the_same_bits_on_the_cpu(tiny_root, tmp_path):
    assert run_seg(tiny_root, tmp_path / "free") == 0 and not torch.are_deterministic_algorithms_enabled()
    assert run_seg(tiny_root, tmp_path / "fixed", "--deterministic") == 0
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert result(tmp_path / "fixed")["weights_sha256"] == result(tmp_path / "free")["weights_sha256"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", [[], ["--arch", "unet"], ["--loss", "dice"]])
def test_deterministic_runs_have_the_same_bits_on_cuda(tiny_root, tmp_path, flags):
    for name in ("a", "b"):  # of two flags of one name the last counts
        assert run_seg(tiny_root, tmp_path / name, *flags, "--device", "cuda", "--deterministic") == 0
    torch.use_deterministic_algorithms(False)
    assert result(tmp_path / "a") == result(tmp_path / "b")


# ---- refusals: the file, the difference, the remedy, exit code 2 ----

@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_in_the_same_place_is_refused(tiny_root, tmp_path, capsys, finished):
    run_seg(tiny_root, tmp_path)
    if not finished:
        (tmp_path / "seed0.json").unlink()
    assert run_seg(tiny_root, tmp_path, "--dropout", "0") == 2
    assert "dropout 0.2 there, 0.0 here" in one_error(capsys)


def test_other_data_in_the_same_place_are_refused(tiny_root, tmp_path, capsys):
    run_seg(tiny_root, tmp_path)
    mask = tiny_root / "mini_facade/train/eecs442_0000.png"
    mask.write_bytes((tiny_root / "mini_facade/train/eecs442_0001.png").read_bytes())
    assert run_seg(tiny_root, tmp_path) == 2
    assert "made with other settings (data" in one_error(capsys)


def hostile(path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch pwned",)
    torch.save(Evil(), path)


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-2000]),
                                    lambda p: torch.save({"weights": torch.zeros(3)}, p), hostile,
                                    lambda p: p.write_bytes(b""), lambda p: p.write_text("not a checkpoint"),
                                    lambda p: zipfile.ZipFile(p, "w").close()],
                         ids=["truncated", "foreign", "hostile", "empty", "text", "empty zip"])
def test_a_damaged_or_foreign_checkpoint_is_refused(tiny_root, tmp_path, capsys, damage):
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").unlink()
    damage(tmp_path / "seed0.pt")
    assert run_seg(tiny_root, tmp_path) == 2
    assert "seed0.pt is no checkpoint of this project, or damaged" in one_error(capsys)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}'])
def test_a_damaged_record_is_refused(tiny_root, tmp_path, capsys, content):
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").write_text(content)
    assert run_seg(tiny_root, tmp_path) == 2
    assert "seed0.json is no run record, or damaged" in one_error(capsys)


def test_weights_of_another_version_of_the_model_are_refused(tiny_root, tmp_path, capsys, monkeypatch):
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").unlink()
    monkeypatch.setattr(models, "build", lambda *_: models.HourGlass(1, 4))
    assert run_seg(tiny_root, tmp_path) == 2
    assert "another version of this model" in one_error(capsys)


# ---- places that cannot be written ----

def test_a_full_disk_is_said_before_training_starts(tiny_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("trained"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # no file can grow past 20 kB: a write fails midway
    try:
        code = run_seg(tiny_root, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "seed0.pt" in one_error(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".seed0.lock"]


@pytest.mark.parametrize("write", [2, 4, 5, 6],
                         ids=["a checkpoint", "the trained model", "the arrays", "the record"])
def test_a_disk_that_fills_up_later_loses_nothing(tiny_root, tmp_path, capsys, monkeypatch, write):
    run_seg(tiny_root, tmp_path / "whole")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run_seg(tiny_root, tmp_path / "broken") == 2
    message = one_error(capsys)
    assert "No space left on device" in message and "seed0" in message
    left = {path.name for path in (tmp_path / "broken").iterdir()} - {"seed0.prev.pt", ".seed0.lock"}
    assert left == ({"seed0.pt", "seed0.npz"} if write == 6 else {"seed0.pt"})
    assert run_seg(tiny_root, tmp_path / "broken") == 0 and result(tmp_path / "broken") == result(tmp_path / "whole")


def test_a_read_only_folder_is_said_before_training_starts(tiny_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("trained"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    out = locked / "out" if os.geteuid() else Path("/sys/out")  # root may write anywhere but there
    assert run_seg(tiny_root, out) == 2
    assert one_error(capsys).startswith(f"error: {out}: ")


def test_links_in_the_run_folder_are_not_followed(tiny_root, tmp_path, capsys):
    victim, record = tmp_path / "victim", tmp_path / "seed0.json"
    victim.write_text("precious")
    (tmp_path / f".seed0.json.{os.getpid()}.tmp").symlink_to(victim)
    files.write_atomic(record, b"{}")
    assert record.read_bytes() == b"{}" and not record.is_symlink() and victim.read_text() == "precious"
    record.unlink()
    (tmp_path / ".seed0.lock").symlink_to(tmp_path / "new")
    assert run_seg(tiny_root, tmp_path) == 2 and ".seed0.lock: " in one_error(capsys)
    assert not (tmp_path / "new").exists()


def test_a_file_where_the_folder_should_be(tiny_root, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run_seg(tiny_root, tmp_path / "out") == 2
    assert "out" in one_error(capsys)


# ---- the loop ----

def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(tiny_root, tmp_path, capsys, monkeypatch):
    real, calls = models.cross_entropy, []

    def diverging(logits, target, weight=None):
        calls.append(1)
        return real(logits, target, weight) * (math.nan if len(calls) > 3 else 1)  # from the second epoch on

    monkeypatch.setattr(models, "cross_entropy", diverging)
    assert run_seg(tiny_root, tmp_path) == 1
    assert "the loss is nan in epoch 2: training diverged; lower --lr" in one_error(capsys)
    state = files.read_checkpoint(tmp_path / "seed0.pt")
    assert state["epoch"] == 1 and all(tensor.isfinite().all() for tensor in state["model"].values())


def test_out_of_memory_names_the_flags_to_lower(capsys):
    def hungry():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert cli.guard(hungry) == 2 and "lower --batch first, then --size or --width" in one_error(capsys)
    assert cli.guard(lambda: torch.empty(2**60)) == 2
    with pytest.raises(RuntimeError, match="a bug"):  # what is not the user's to mend keeps its traceback
        cli.guard(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_the_learning_rate():
    rate = lambda warmup, step: engine.learning_rate(2.0, warmup, step, 100)
    assert rate(0, 0) == 2 and rate(0, 50) == pytest.approx(1) and 0 < rate(0, 99) < 0.001
    assert [rate(0.2, step) for step in (0, 19, 60)] == pytest.approx([0.1, 2, 1])
    climb = [rate(0.2, step) for step in range(100)]
    assert max(climb) == climb[19] and climb[20:] == sorted(climb[20:], reverse=True)


def test_it_learns_and_adam_equals_the_plain_loop(tiny_root, tmp_path):
    """Two epochs of the engine, against the loop as a textbook has it, in fp32: the same losses.

    Not to the last digit: channels_last sums in another order, and Adam's first steps magnify that.
    """
    assert run_seg(tiny_root, tmp_path, "--precision", "fp32", "--loss", "ce", "--dropout", "0") == 0
    cfg = train_seg.Config(protocol="smoke", size=32, width=4, dropout=0.0)
    torch.manual_seed(0)
    model = models.HourGlass(2, 4, dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    dataset = data.load_facades(tiny_root, size=32)
    losses = []
    for epoch in range(2):
        for step, (x, y) in enumerate(batches.shuffled(dataset, 2, 0, epoch, True)):
            optimizer.param_groups[0]["lr"] = cfg.lr * (1 + math.cos(math.pi * (3 * epoch + step) / 6)) / 2
            loss = torch.nn.functional.cross_entropy(model(x), y.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    first, second = result(tmp_path)["curve"]["loss"]
    assert first == pytest.approx(sum(losses[:3]) / 3, rel=1e-3)
    assert second == pytest.approx(sum(losses[3:]) / 3, rel=3e-3)  # 1.3e-3 on torch 2.11


def test_the_head_gives_float32_logits_whatever_the_precision():
    model = models.HourGlass(1, 8).eval()
    for dtype in (torch.float32, torch.bfloat16):
        assert engine.forward(model, torch.randn(1, 3, 32, 32), dtype).dtype == torch.float32
    logits = engine.forward(model, torch.randn(1, 3, 64, 64), torch.bfloat16)
    assert len(logits[0, 0].unique()) > 3000  # of 4096: bfloat16 logits would tie in most


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU: install g++")
def test_compile_trains_to_the_same_loss(tiny_root, tmp_path):
    flags = ["--precision", "fp32", "--epochs", "1", "--dropout", "0", "--hourglasses", "1"]
    assert run_seg(tiny_root, tmp_path / "plain", *flags) == 0
    assert run_seg(tiny_root, tmp_path / "compiled", *flags, "--compile") == 0
    losses = [result(tmp_path / name)["curve"]["loss"][0] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_record_traces_the_run(tiny_root, tmp_path):
    run_seg(tiny_root, tmp_path)
    record = json.loads((tmp_path / "seed0.json").read_text())
    assert record["config"]["width"] == 4 and record["about_data"]["train_images"] == 6
    assert record["environment"]["torch"] == str(torch.__version__) and record["environment"]["source_sha256"]
    assert set(record["metrics"]) == {"train", "test"} and record["class_pixels"] and len(record["class_weights"]) == 5
    assert record["parameters"] == sum(p.numel() for p in models.HourGlass(2, 4).parameters())
    model, same = engine.load_trained(tmp_path / "seed0.pt", torch.device("cpu"), models.build)
    assert same == record and provenance.weights_digest(model) == record["weights_sha256"]
