"""What a first run on a GPU would meet, met on a CPU that poses as one (`posing.py`).

Every kind of row, three precisions, stopping and going on, and the measurements are held to this:
no operation mixes host and device, no step waits for the device, nothing that CUDA's deterministic
mode refuses. Planted faults show that it sees them. Where there is a GPU, all but these run on it.
"""

import functools
import importlib
import inspect
import json
import re
import signal
import textwrap

import posing
import pytest
import torch
import torch.distributed as dist
from conftest import make_tiny_root

import data
import interpret
import models
import train_cls
import train_seg
from lab import batches, engine, guard, provenance

SCRIPTS = {"table1": train_cls, "table2": train_seg}
TINY = {"table1": ["--depth", "1", "--width", "4", "--batch", "4"],
        "table2": ["--hourglasses", "1", "--width", "2", "--size", "16", "--batch", "2"]}
NCCL = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no one to pose as it")


def rows() -> list[str]:
    """Each row of the Makefile as "table flags", once where rows differ by their size alone."""
    makefile = (provenance.SOURCE / "Makefile").read_text()
    size = r"--(depth|width|hourglasses) \d+"
    return list(dict.fromkeys(
        f"{table} {re.sub(size, '', flags)}".strip()
        for table, flags in re.findall(r"^(table[12])/[^\s:=]+\s*:?= ?(.*)$", makefile, re.M)))


def drawn_split(images: int, generator: torch.Generator) -> data.Split:
    pixels = torch.randint(256, (images, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return batches.Split(pixels, torch.arange(images, dtype=torch.uint8) % 10, torch.arange(images))


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    """Garments and digits are noise of 8x8 pixels."""
    monkeypatch.setattr(data, "load_idx", lambda root, name: tuple(
        drawn_split(images, torch.Generator().manual_seed(images)) for images in (20, 12)))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def facades(tmp_path_factory):
    return make_tiny_root(tmp_path_factory.mktemp("facades"))


@pytest.fixture
def train(facades, tmp_path):
    """Trains one row on the device, into a folder of tmp_path, and returns the folder."""
    def run(row, *flags, out="run"):
        table, *more = [*row.split(), *map(str, flags)]
        tiny = TINY[table][2:] if "unet" in more else TINY[table]  # which has no --hourglasses
        with posing.device() as gpu:
            SCRIPTS[table].main(["--protocol", "smoke", "--epochs", "1", "--device", "cuda", *tiny,
                                 *more, "--data-root", str(facades), "--out", str(tmp_path / out)])
        waits = gpu.steps_wait()
        assert not waits
        return tmp_path / out
    return run


@pytest.mark.parametrize("row", rows())
def test_a_row_under_deterministic(train, row):
    record = json.loads((train(row, "--deterministic") / "seed0.json").read_text())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else posing.NAME
    assert record["environment"]["device"] == name


@pytest.mark.parametrize("row", ["table1", "table1 --down blurpool", "table2"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_precision(train, row, precision):
    folder = train(row, "--precision", precision)
    record = json.loads((folder / "seed0.json").read_text())
    assert record["environment"]["precision"] == {"fp32": "float32", "fp16": "float16",
                                                  "bf16": "bfloat16"}[precision]


@pytest.mark.parametrize("row", ["table1", "table2", "table2 --loss dice"])
def test_a_set_too_large_for_the_device_is_streamed_to_it_with_the_same_bits(
        train, monkeypatch, row):
    flags = [row, "--precision fp32 --deterministic --epochs 2"]
    digests = []
    for free, out in ((80 << 30, "there"), (1000, "here")):
        monkeypatch.setattr(batches, "free_memory", lambda device: free)
        record = json.loads((train(" ".join(flags), out=out) / "seed0.json").read_text())
        digests.append((record["weights_sha256"], record["curve"], record["metrics"]))
    if torch.cuda.is_available():  # metrics are taken on the host, whose exp() is another
        digests = [digest[:2] for digest in digests]
    assert digests[0] == digests[1]


@no_gpu
def test_streaming_waits_for_nothing_and_is_one_batch_ahead(monkeypatch):
    monkeypatch.setattr(batches, "free_memory", lambda device: 1000)
    split = drawn_split(20, torch.Generator().manual_seed(0))
    dataset = batches.Dataset("", ("a",) * 10, (0.5,), (0.25,), "", False, split, split)
    with posing.posing() as gpu:
        there = dataset.to(torch.device("cuda"))
        assert not there.train.images.is_cuda
        steps = batches.shuffled(there, 4, 0, 0, True)
        images, targets = next(steps)
        assert images.is_cuda and targets.is_cuda and gpu.ahead == 4  # images and targets, twice
        del steps
    expected, _ = next(batches.shuffled(dataset, 4, 0, 0, True))
    assert torch.equal(images, expected)


def stopping_after(steps):
    """In place of `distributed.any_signal`: SIGTERM arrives in the step with this number."""
    signals = iter([0] * (steps - 1) + [signal.SIGTERM])
    return lambda stops: next(signals)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_stopped_run_goes_on_on_the_device(train, monkeypatch, precision):
    flags = ["table2 --epochs 2 --dropout 0.2 --precision", precision]
    with monkeypatch.context() as patch, pytest.raises(guard.Stopped):
        patch.setattr(engine, "any_signal", stopping_after(2))
        train(*flags)
    record = json.loads((train(*flags) / "seed0.json").read_text())
    assert len(record["curve"]["loss"]) == 2


@pytest.mark.parametrize("row", ["table1", "table2"])
def test_a_process_of_a_group(train, tmp_path, monkeypatch, row):
    """What torchrun starts, up to NCCL: DistributedDataParallel, and norms over all processes."""
    join = functools.partial(dist.init_process_group, NCCL or "gloo", rank=0, world_size=1,
                             init_method=f"file://{tmp_path}/group")
    refuse = lambda model: pytest.fail("each of its layers waits, in a larger group")
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "convert_sync_batchnorm", refuse)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: join())
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (train(row) / "seed0.json").exists() and not dist.is_initialized()


def test_float32_is_float32_and_fresh_memory_is_not_filled(train):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.utils.deterministic.fill_uninitialized_memory = True
    train("table1 --precision fp32 --deterministic")
    assert not (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_measurements_and_pictures(train, facades, tmp_path):
    base = train("table1", out="base") / "seed0.pt"
    frozen = train("table1 --composites --frozen --base", base, out="frozen") / "seed0.pt"
    scratch = train("table1 --composites --tie 0.9", out="scratch") / "seed0.pt"
    segments = train("table2", out="segments") / "seed0.pt"
    measured = [["measure", "--checkpoint", run, "--images", 12, "--sweep-images", 2,
                 "--out", run.parent / "measured"] for run in (base, frozen)]
    drawn = {"figure1": ["attention", "--frozen", frozen, "--scratch", scratch],
             "predictions": ["--checkpoint", segments], "garments": ["--checkpoint", base]}
    drawn = [[*flags, "--figure", tmp_path / f"{name}.png"] for name, flags in drawn.items()]
    for flags in (*measured, *drawn):
        with posing.device():
            interpret.main([*map(str, flags), "--device", "cuda", "--data-root", str(facades)])
    base, frozen = (json.loads((tmp_path / name / "measured/seed0.json").read_text())
                    for name in ("base", "frozen"))
    assert set(base["metrics"]["test"]) == {"equivariance_error_zeros",
                                            "equivariance_error_circular"}
    assert {"mass", "accuracy_cell3", "shifted_minus_whole"} < set(frozen["metrics"]["test"])
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"figure1.png", "predictions.png", "garments.png"}


# ---- what it must see ----

# where: what is written there, what is put in its place, the row that runs, and what is said of it
FAULTS = {
    "the order stays on the host": (
        "lab.batches.shuffled", "order.to(split.images.device)\n", "order\n",
        "table1", "an index on the host in batches.py"),
    "the flips stay on the host": (
        "lab.batches.shuffled", "mirrored.to(data.device or split.images.device)", "mirrored",
        "table2", "at least two devices"),
    "mean and deviation copied in each step": (
        "lab.batches.per_channel", "@functools.cache", "@functools.lru_cache(0)",
        "table1", "copy to the device in batches.py"),
    "a batch is copied without being pinned": (
        "lab.batches.streamed", ".pin_memory()", "",
        "table1", "copy to the device in batches.py"),
    "the data stay on the host": (
        "lab.engine.Run.__init__", "self.data = dataset.to(self.device)", "self.data = dataset",
        "table2", "at least two devices"),
    "the loss is read in each step": (
        "lab.engine.fit_epoch", "total += loss.detach()", "total += loss.item()",
        "table1", "_local_scalar_dense in engine.py"),
    "the loss is summed on the host": (
        "lab.engine.fit_epoch", "total += loss.detach()", "total += loss.detach().cpu()",
        "table2", "copy from the device in engine.py"),
    "a sum goes on on the host": (
        "lab.engine.Run.begin_epoch", 'partial["total"].to(self.device)', 'partial["total"]',
        "table2", "at least two devices"),
    "class weights on the host": (
        "train_seg.main", ".to(run.device)", ".cpu()",
        "table2", "at least two devices"),
    "classes picked by truth values": (
        "models.dice_loss", "1 - (dice * present).sum()", "1 - dice[mass > 0].sum()",
        "table2 --loss dice", "an index by truth values in models.py"),
    "the 2-D cross entropy": (
        "models.cross_entropy", "*pixels(logits, target)", "logits, target.long()",
        "table2 --loss ce --deterministic", "nll_loss2d_forward does not have a deterministic"),
    "upsampling whose backward is not deterministic": (
        "models.Level.forward", '"nearest"', '"bicubic"',
        "table2 --deterministic", "upsample_bicubic2d_backward does not have a deterministic"),
    "histograms read from the device": (
        "metrics.score_histograms", ".to(torch.int32).cpu()", ".to(torch.int32)",
        "table2", "can't convert cuda:0"),
}


def plant(monkeypatch, where, old, new):
    """Replace text in the source of a function, such as "engine.Run.save", for this test."""
    module, *path, name = where.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    function = inspect.unwrap(getattr(owner, name))
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    assert source.count(old) == 1, f"{where} has no {old!r} any more: plant this fault elsewhere"
    source = "\n" * (first - 1) + source.replace(old, new)  # every line keeps its number
    scope = {}
    exec(compile(source, inspect.getfile(function), "exec"), function.__globals__, scope)
    monkeypatch.setattr(owner, name, scope[name])


@no_gpu
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(train, monkeypatch, fault):
    where, old, new, row, said = FAULTS[fault]
    if "begin_epoch" in where:
        with monkeypatch.context() as patch, pytest.raises(guard.Stopped):
            patch.setattr(engine, "any_signal", stopping_after(1))
            train(row)
    plant(monkeypatch, where, old, new)
    if where == "lab.batches.streamed":
        monkeypatch.setattr(batches, "free_memory", lambda device: 1000)
    with pytest.raises((RuntimeError, TypeError, AssertionError), match=said):
        train(row)


@no_gpu
def test_a_planted_fault_in_a_measurement_is_seen(train, facades, tmp_path, monkeypatch):
    base = train("table1")
    plant(monkeypatch, "lab.equivariance.fourier_shift", "(height, device=x.device)", "(height)")
    with posing.posing(), pytest.raises(RuntimeError, match="at least two devices"):
        interpret.main(["measure", "--checkpoint", str(base / "seed0.pt"), "--device", "cuda",
                        "--sweep-images", "2", "--data-root", str(facades),
                        "--out", str(tmp_path / "measured")])


def test_a_real_gpu_is_watched_in_its_steps_alone(facades, tmp_path, monkeypatch):
    modes, seen = ["default"], {"loss": set(), "checked": set(), "save": set()}
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    for owner, function in ((models, "cross_entropy"), (engine, "checked"), (engine.Run, "save")):
        real = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *args, at=function, real=real, **more: (
            seen[at.replace("cross_entropy", "loss")].add(modes[-1]), real(*args, **more))[1])
    with posing.waits_refused():
        train_seg.main(["--protocol", "smoke", "--device", "cpu", *TINY["table2"],
                        "--data-root", str(facades), "--out", str(tmp_path)])
    assert seen == {"loss": {"error"}, "checked": {"default"}, "save": {"default"}}
    assert modes[-1] == "default"


@no_gpu
def test_the_pose():
    with posing.posing() as gpu:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert there.is_cuda and there.device == torch.device("cuda", 0) and (there + 1).is_cuda
        assert not there.cpu().is_cuda and here.to(there.device).is_cuda and not here.is_cuda
        assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a single number may be here
        for mixed in (lambda: there + here, lambda: here[there.long()],
                      lambda: torch.cat([there, here]), lambda: torch.nn.Linear(3, 3)(there),
                      lambda: torch.where(there > 0, here, there),
                      lambda: torch.zeros(()).add_(there.sum())):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        here.copy_(there)
        assert not here.is_cuda
    assert not gpu.waits and not there.is_cuda  # no epoch ran; outside it is a CPU's tensor again
