"""The training loop: it learns, the same from the same seed; what it cannot go on with it says."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import one_error, result, run_seg

import data
import metrics
import models
import train_seg
from lab import batches, cli, cost, devices, engine, files, provenance


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(
        tiny_root, tmp_path, capsys, monkeypatch):
    real, calls = models.cross_entropy, []

    def diverging(logits, target, weight=None):
        calls.append(1)  # from the second epoch on
        return real(logits, target, weight) * (math.nan if len(calls) > 3 else 1)

    monkeypatch.setattr(models, "cross_entropy", diverging)
    assert run_seg(tiny_root, tmp_path) == 1
    assert "the loss is nan in epoch 2: training diverged; lower --lr" in one_error(capsys)
    state = files.read_checkpoint(tmp_path / "seed0.pt")
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_outputs_that_are_not_finite_are_not_scored(tiny_root, tmp_path, capsys, monkeypatch):
    """The loss of the last step may be the last finite thing."""
    real = engine.forward
    monkeypatch.setattr(engine, "forward", lambda model, *more: (
        real(model, *more) if model.training else real(model, *more) * math.nan))
    assert run_seg(tiny_root, tmp_path) == 1
    assert "outputs for the train split are not finite: training diverged" in one_error(capsys)
    assert not (tmp_path / "seed0.json").exists()


def test_a_machine_without_a_compiler_says_so(tiny_root, tmp_path):
    script = provenance.SOURCE / "train_seg.py"
    done = subprocess.run([sys.executable, script, "--protocol", "smoke", "--compile",
                           "--device", "cpu", "--data-root", tiny_root],
                          cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "CXX": "no-such-compiler",
                               "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --compile does not work here (")
    assert "Traceback" not in done.stderr


def test_out_of_memory_names_the_flags_to_lower(capsys):
    def hungry():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert cli.guard(hungry) == 2
    assert "lower --batch first, then --size or --width" in one_error(capsys)
    for want in (lambda: torch.empty(2**60), lambda: np.empty(2**56, np.uint8)):
        assert cli.guard(want) == 2
        assert "lower --batch first" in one_error(capsys)
    with pytest.raises(RuntimeError, match="a bug"):  # what no user can mend keeps its traceback
        cli.guard(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_a_gpu_that_emulates_bfloat16_takes_float32(monkeypatch):
    """A T4 or a V100, of which torch says that it supports bfloat16."""
    capability = lambda device: ((9, 0), (7, 5))[device.index]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **more: True)
    assert [devices.pick_dtype("auto", torch.device("cuda", index)) for index in (0, 1)] == [
        torch.bfloat16, torch.float32]


def test_the_learning_rate():
    rate = lambda warmup, step: engine.learning_rate(2.0, warmup, step, 100)
    assert rate(0, 0) == 2 and rate(0, 50) == pytest.approx(1) and 0 < rate(0, 99) < 0.001
    assert [rate(0.2, step) for step in (0, 19, 60)] == pytest.approx([0.1, 2, 1])
    for steps in range(1, 12):  # a climb may end within a step, and never climbs past the peak
        assert all(engine.learning_rate(2, 0.3, step, steps) <= 2 for step in range(steps))
    climb = [rate(0.2, step) for step in range(100)]
    assert max(climb) == climb[19] and climb[20:] == sorted(climb[20:], reverse=True)


def test_it_learns_and_adam_equals_the_plain_loop(tiny_root, tmp_path):
    """Two epochs of the engine, against the loop as a textbook has it, in fp32: the same losses.

    Not to the last digit: channels_last sums in another order, and Adam's first steps magnify that.
    """
    flags = ["--precision", "fp32", "--loss", "ce", "--dropout", "0"]
    assert run_seg(tiny_root, tmp_path, *flags) == 0
    cfg = train_seg.Config(protocol="smoke", size=32, width=4, dropout=0.0)
    torch.manual_seed(0)
    model = models.HourGlass(2, 4, dropout=0.0).train()
    optimizer = torch.optim.Adam(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay)
    dataset = data.load_facades(tiny_root, size=32)
    losses = []
    for epoch in range(2):
        for step, (x, y) in enumerate(batches.shuffled(dataset, 2, 0, epoch, True)):
            cosine = math.cos(math.pi * (3 * epoch + step) / 6)
            optimizer.param_groups[0]["lr"] = cfg.lr * (1 + cosine) / 2
            loss = torch.nn.functional.cross_entropy(model(x), y.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    first, second = result(tmp_path)["curve"]["loss"]
    assert first == pytest.approx(sum(losses[:3]) / 3, rel=1e-3)
    assert second == pytest.approx(sum(losses[3:]) / 3, rel=3e-3)  # 1.3e-3 on torch 2.11


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells peaks")
def test_an_evaluation_takes_no_more_memory_than_is_planned(tmp_path):
    """Else a run would end without memory, after its training, that --plan said is enough."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 128, 128), dtype=torch.uint8)
    masks = torch.randint(0, 5, (32, 128, 128), dtype=torch.uint8)
    split = batches.Split(images, masks, torch.arange(32) // 2)
    drawn = batches.Dataset("drawn", tuple("abcde"), (0.5,) * 3, (0.2,) * 3, "", True, split, split)
    cfg = train_seg.Config(width=4, hourglasses=1, batch=2, device="cpu", out=str(tmp_path))
    run = engine.Run(cfg, drawn, models.build)
    evaluate = lambda: run.evaluate(
        metrics.segmentation, lambda logits, split: metrics.score_histograms(
            logits.softmax(1), split.targets, split.photos))
    few = split.map(lambda tensor: tensor[:2])
    run.data = dataclasses.replace(drawn, train=few, test=few)
    evaluate()  # what libraries take at first
    run.data = drawn
    cost.forget_peak(run.device)
    before = cost.memory(run.device)
    evaluate()
    assert cost.memory(run.device) - before < batches.logits_memory(drawn)


def test_logits_are_those_of_the_batches(tiny_root):
    dataset, model = data.load_facades(tiny_root, size=32), models.HourGlass(1, 4)
    whole = engine.predict(model, dataset, dataset.train, 4, torch.float32)  # of 6 images
    parts = [engine.forward(model.eval(), images, torch.float32)
             for images, _ in batches.in_order(dataset, dataset.train, 4)]
    assert whole.is_contiguous() and torch.equal(whole, torch.cat(parts))


def test_the_head_gives_float32_logits_whatever_the_precision():
    model = models.HourGlass(1, 8).eval()
    for dtype in (torch.float32, torch.bfloat16):
        assert engine.forward(model, torch.randn(1, 3, 32, 32), dtype).dtype == torch.float32
    logits = engine.forward(model, torch.randn(1, 3, 64, 64), torch.bfloat16)
    assert len(logits[0, 0].unique()) > 3000  # of 4096: bfloat16 logits would tie in most


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++ on a CPU: install it")
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
    assert record["environment"]["torch"] == str(torch.__version__)
    assert record["environment"]["source_sha256"]
    assert set(record["metrics"]) == {"train", "test"}
    assert record["parameters"] == sum(p.numel() for p in models.HourGlass(2, 4).parameters())
    model, same = engine.load_trained(tmp_path / "seed0.pt", torch.device("cpu"), models.build)
    assert same == record and provenance.weights_digest(model) == record["weights_sha256"]


def test_seeds_and_repeats(tiny_root, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_seg(tiny_root, tmp_path / name, "--seed", str(seed)) == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")
    other = json.loads((tmp_path / "c/seed1.json").read_text())
    assert other["weights_sha256"] != result(tmp_path / "a")["weights_sha256"]


def test_deterministic_algorithms_give_the_same_bits_on_the_cpu(tiny_root, tmp_path):
    assert run_seg(tiny_root, tmp_path / "free") == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert run_seg(tiny_root, tmp_path / "fixed", "--deterministic") == 0
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    free, fixed = (result(tmp_path / name)["weights_sha256"] for name in ("free", "fixed"))
    assert free == fixed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", [[], ["--arch", "unet"], ["--loss", "dice"]])
def test_deterministic_runs_have_the_same_bits_on_cuda(tiny_root, tmp_path, flags):
    for name in ("a", "b"):  # of two flags of one name the last counts
        flags = [*flags, "--device", "cuda", "--deterministic"]
        assert run_seg(tiny_root, tmp_path / name, *flags) == 0
    torch.use_deterministic_algorithms(False)
    assert result(tmp_path / "a") == result(tmp_path / "b")
