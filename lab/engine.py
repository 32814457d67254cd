"""The one training loop of the study: settings, device, precision, checkpoint and resume, run record.

A script declares its settings as a frozen dataclass on top of `Settings`, and then

    cfg = cli.parse(Config, __doc__, argv, PROTOCOLS)
    run = engine.Run(cfg, dataset, build)       # resumes, or refuses what it does not match
    engine.fit(run, loss)
    run.finish(*run.evaluate(score, detail))    # writes OUT/seed<k>.json

A step depends on nothing but the weights, the optimiser's state and (seed, epoch, step), so a killed
run goes on from its last epoch and ends, on the CPU, with the same bits. One that is told to stop (Ctrl-C,
SIGTERM, SIGUSR1) saves the step it is at. Under torchrun, its processes share each step's batch.
"""

import copy
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import typing
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from lab import batches
from lab.batches import Dataset, Split
from lab.cli import STOPPING, Stopped, flag, handling, local
from lab.devices import cpu_lines, instruction_sets, keep_freed_memory, pick_dtype
from lab.distributed import Replica, any_signal, from_first, join_group, leave_group, rank, ranks, share
from lab.files import BadInput, jsonable, read_checkpoint, read_record, tree_digest, write_atomic
from lab.progress import Progress, progress

SOURCE = Path(__file__).parents[1]
Build = Callable[[dict, int, int], nn.Module]  # (settings, channels, classes) -> the network


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every training script can be told. A script's own Config adds its model and its data."""
    protocol: str = flag("report", "set of defaults, see below")
    split: typing.Literal["full", "dev"] = flag("full", "full: test once at the end; dev: hold out training data")
    seed: int = flag(0, "initial weights, order and augmentation")
    epochs: int = flag(1, "passes over the training split")
    batch: int = flag(1, "images a step")
    lr: float = flag(1e-3, "peak learning rate of Adam")
    weight_decay: float = flag(1e-4, "L2 penalty of Adam")
    warmup: float = flag(0.0, "share of the steps that climb linearly to --lr; the rest falls to 0 as a cosine")
    precision: typing.Literal["auto", "bf16", "fp16", "fp32"] = flag("auto", "auto: bf16 where the device has it")
    deterministic: bool = flag(False, "CUDA: the same bits from every run, at some cost; a CPU does so anyway")
    compile: bool = flag(False, "torch.compile the network: for GPUs, on a CPU it may slow the steps")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...", local=True)
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, else ./data)", local=True)
    out: str | None = flag(None, "folder of seed<k>.json, seed<k>.pt (default: runs/ and what was changed)", local=True)
    dry_run: bool = flag(False, "one step of everything on one batch; leaves no file", local=True)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise BadInput(f"--lr {self.lr}: must be above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise BadInput(f"--weight-decay {self.weight_decay}: must be at least 0")
        if not 0 <= self.warmup < 1:
            raise BadInput(f"--warmup {self.warmup}: must be in [0, 1)")
        if not 0 <= self.seed < 2**31:
            raise BadInput(f"--seed {self.seed}: must be in [0, 2^31)")


# ---- what made a run, and what it made ----

def load_trained(path: Path, device: torch.device, build: Build) -> tuple[nn.Module, dict]:
    """A finished run's model, in evaluation mode on the device, and its record. BadInput if unfinished."""
    state = read_checkpoint(path)
    if "record" not in state:
        raise BadInput(f"{path} is of an unfinished run (epoch {state['epoch']}); run its training command again")
    try:
        config, about = state["record"]["config"], state["record"]["about_data"]
        if type(config["seed"]) is not int or config["seed"] < 0:  # it becomes part of file names
            raise ValueError("seed")
        with torch.device("meta"):  # takes no memory, whatever width the file names
            model = build(config, len(about["mean"]), len(about["classes"]))
        model.load_state_dict(state["model"], assign=True)
        if about.get("synthetic"):
            print(f"NOTE: {path} was trained on {about['name']}", file=sys.stderr)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: its settings and its weights do not fit together ({type(error).__name__}); train the "
                       f"model again") from error
    return model.to(device, memory_format=torch.channels_last).eval(), state["record"]


def environment(device: torch.device, dtype: torch.dtype) -> dict:
    """What made a run: the code (commit, and a digest that needs no git), versions, device."""
    def git(*args: str) -> str | None:
        done = subprocess.run(["git", "-C", SOURCE, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "*.py")
    except OSError:  # no git on this machine
        commit, changes = None, None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = cpu_lines()
        models_named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{(models_named or [platform.machine()])[0]}, {torch.get_num_threads()} threads"
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes),
            "source_sha256": tree_digest([(path.relative_to(SOURCE).as_posix(), path.read_bytes())
                                               for path in (*SOURCE.glob("*.py"), *SOURCE.glob("lab/*.py"))]),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": torchvision.__version__, "platform": platform.platform(), "device": name,
            "instructions": instruction_sets(), "processes": ranks(),
            "precision": str(dtype).removeprefix("torch.")}


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def multiply_adds(model: nn.Module, shape: torch.Size) -> int:
    """Multiply-adds of one forward pass of one image (C, H, W), counted without computing it."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta")(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2


# ---- one run: its files, its resume, its record ----

class Run:
    """One row, one seed: the model and the data on their device, and the run's files.

    OUT/seed<k>.pt is the checkpoint, rewritten every epoch, and in the end the trained model with its
    record; seed<k>.prev.pt is the one before, in case the newest is damaged; seed<k>.npz holds results
    per image; seed<k>.json is the record, written last: where it exists, the run is complete, and
    `record` holds it. BadInput if a file belongs to other settings, data or another model. `build`
    makes the network, see `Build`; `start` holds weights to start from, instead of random ones.
    """

    def __init__(self, cfg: Settings, dataset: Dataset, build: Build,
                 start: dict[str, Tensor] | None = None):
        self.device = join_group(cfg.device)
        if cfg.dry_run:
            self.scratch = tempfile.TemporaryDirectory()
            cfg = dataclasses.replace(cfg, epochs=1, out=self.scratch.name)
            one = lambda tensor: tensor[:cfg.batch]
            dataset = dataclasses.replace(dataset, train=dataset.train.map(one), test=dataset.test.map(one))
        if self.device.type == "cpu":
            keep_freed_memory()
        if min(cfg.batch, len(dataset.train)) % ranks():
            raise BadInput(f"--batch {cfg.batch}: {ranks()} processes cannot share {min(cfg.batch, len(dataset.train))}"
                           f" images evenly; choose a multiple of {ranks()}")
        if cfg.deterministic:  # read when cuBLAS starts; without the flag cuBLAS keeps its own workspace
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
        self.cfg = cfg
        self.dtype = pick_dtype(cfg.precision, self.device)
        self.environment = environment(self.device, self.dtype)  # now: the source may change while it runs
        self.data = dataset.to(self.device)
        torch.manual_seed(cfg.seed)
        self.model = build(dataclasses.asdict(cfg), len(dataset.mean), len(dataset.classes))
        self.model.to(self.device, memory_format=torch.channels_last)
        if start is not None:
            self.model.load_state_dict(start)
        self.optimizer = torch.optim.Adam(self.model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        config = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in local(cfg)}
        self.identity = {"script": Path(sys.argv[0]).name, "config": config, "data": dataset.digest}
        self.checkpoint = Path(cfg.out, f"seed{cfg.seed}.pt")
        self.previous = self.checkpoint.with_suffix(".prev.pt")
        self.record_file = self.checkpoint.with_suffix(".json")
        self.record: dict | None = None
        self.epoch, self.curve, self.seconds = 0, [], 0.0
        self.within: dict | None = None  # how far into the epoch, if it was stopped there
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.lock = self.checkpoint.with_name(f".{self.checkpoint.stem}.lock")
        if rank() == 0:
            self.claim()
        self.resume()

    def claim(self) -> None:
        """Hold the run's lock for as long as this object lives. BadInput if another process has it."""
        file = os.open(self.lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{self.checkpoint} is being written by another process; wait for it, or choose another "
                           f"--out") from error
        for half_written in self.lock.parent.glob(f".{self.checkpoint.stem}.*.tmp"):  # by a process that was killed
            half_written.unlink()

    def release(self) -> None:
        """Leave the three files of a complete run and nothing else: whoever comes from now on finds the record."""
        self.previous.unlink(missing_ok=True)
        self.lock.unlink(missing_ok=True)

    def newest(self) -> dict | None:
        """The newest checkpoint that can be read, or None where there is none. BadInput if all are damaged."""
        if not self.checkpoint.exists() and not self.previous.exists():
            return None
        try:
            return read_checkpoint(self.checkpoint)
        except (BadInput, FileNotFoundError) as error:
            if not self.previous.exists():
                raise
            print(f"NOTE: {error}; using {self.previous}", file=sys.stderr)
            return read_checkpoint(self.previous)

    def found(self) -> dict | None:
        """What the run's files hold, as its first process sees them: its record, a checkpoint or nothing."""
        if self.record_file.exists():
            self.record = read_record(self.record_file)
            self.refuse_other(self.record_file, self.record)
            self.release()
            return {"record": self.record}
        state = self.newest()
        if state is not None:
            self.refuse_other(self.checkpoint, state["identity"])
        return state

    def resume(self) -> None:
        state = self.found() if rank() == 0 else None
        if dist.is_initialized():
            state = from_first(state)
        if state is not None and "model" not in state:  # complete
            leave_group()
        elif state is not None:
            try:
                self.model.load_state_dict(state["model"])
            except RuntimeError as error:
                raise BadInput(f"{self.checkpoint} holds the weights of another version of this model; delete it, or "
                               f"choose another --out") from error
            if "optimizer" in state:  # a finished run has none
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.curve, self.seconds = state["epoch"], state["curve"], state["seconds"]
            self.within = state.get("within")
            step = f", step {self.within['step']}" if self.within else ""
            if rank() == 0:
                print(f"{self.checkpoint}: goes on after epoch {self.epoch}/{self.cfg.epochs}{step}", file=sys.stderr)
        else:
            self.save()  # a place that cannot be written shows now, not after the first epoch

    def refuse_other(self, path: Path, found: dict) -> None:
        # a file from before a setting was added was made with what is its default
        defaults = {setting.name: setting.default for setting in dataclasses.fields(self.cfg)
                    if setting.name in self.identity["config"]}
        theirs, ours = ({**defaults, **identity["config"], "data": identity["data"]}
                        for identity in (found, self.identity))
        differing = [f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in {**theirs, **ours}
                     if theirs.get(key) != ours.get(key)]
        if differing:
            raise BadInput(f"{path} was made with other settings ({'; '.join(differing)}); choose another --out, or "
                           f"delete it")

    def save(self, **more: typing.Any) -> None:
        if rank() > 0:
            return
        state = {"identity": self.identity, "epoch": self.epoch, "model": self.model.state_dict(),
                 "curve": self.curve, "seconds": self.seconds, "within": self.within,
                 **(more or {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()})}
        buffer = io.BytesIO()  # through memory, so that a full disk is an OSError that names the file
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getbuffer(), self.previous)

    def begin_epoch(self) -> tuple[int, Tensor]:
        """The steps of the epoch that are done, and the sum of their losses."""
        if self.within is None:
            return 0, torch.zeros((), device=self.device)
        within, self.within = self.within, None
        return within["step"], within["total"].to(self.device)

    def evaluate(self, score: Callable[[Tensor, Tensor, tuple], dict],
                 detail: Callable[[Tensor, Split], dict]) -> tuple[dict[str, dict], dict]:
        """Read both splits, once, at the end.

        {split: score(logits, targets, class names)} for the record, and detail(logits, held-out
        split), arrays per image or photo that an interval over the held-out images needs.
        """
        scores = {}
        with handling(STOPPING, self.stop):
            for name, split in (("train", self.data.train), (self.data.held_out, self.data.test)):
                logits = predict(self.model, self.data, split, self.cfg.batch, self.dtype)
                scores[name] = score(logits, split.targets, self.data.classes)
            return scores, detail(logits, split)

    def stop(self, number: int, frame: object = None,
             where: str = "the last checkpoint") -> typing.NoReturn:
        """End a run that a signal told to stop; a dry run leaves nothing to go on from."""
        raise Stopped(number, None if self.cfg.dry_run else where)

    def finish(self, metrics: dict[str, dict], arrays: dict, **more: typing.Any) -> None:
        """Write the trained model, the arrays and, last, the record: where it exists, all is there."""
        described = {name: getattr(self.data, name)
                     for name in ("name", "task", "synthetic", "own", "classes", "palette", "mean", "std")}
        images = self.data.train.images
        self.record = jsonable({
            **self.identity, "about_data": {**described, "train_images": len(images), "size": images.shape[-1]},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "multiply_adds": multiply_adds(self.model, images.shape[1:]),
            "environment": self.environment, "train_seconds": round(self.seconds, 2),
            "curve": {"loss": self.curve}, "metrics": metrics, **more,
            "weights_sha256": weights_digest(self.model)})
        self.save(record=self.record)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(self.record_file.with_suffix(".npz"), buffer.getbuffer())
        write_atomic(self.record_file, (json.dumps(self.record, indent=1) + "\n").encode())
        self.release()
        if self.cfg.dry_run:
            self.scratch.cleanup()


# ---- training and evaluation ----

def forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits in float32. The head runs outside autocast: bfloat16 logits would tie in the ranking of AP."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        features = model.features(images)
    return model.head(features.float())


def learning_rate(peak: float, warmup: float, step: int, steps: int) -> float:
    """Linear climb over the first `warmup` share of all steps, then half a cosine down to zero."""
    climb = warmup * steps
    if step < climb:
        return peak * (step + 1) / climb if climb >= 1 else peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - climb) / (steps - climb)))


def fit(run: Run, loss_fn: Callable[[Tensor, Tensor], Tensor], flip: bool = False) -> None:
    """Train the run's model to its last epoch, with a checkpoint after each.

    loss_fn(logits float32, targets uint8) -> scalar. The step never waits for the device: the loss
    is read once a second for whoever watches and once an epoch for the record. FloatingPointError
    if it is not finite; the last checkpoint then holds the weights of the epoch before. Of several
    processes, only the first returns.
    """
    stops: list[int] = []
    step_forward = torch.compile(forward) if run.cfg.compile else forward
    if dist.is_initialized():
        replica = DistributedDataParallel(Replica(run.model, step_forward))
        step_forward = lambda model, images, dtype: replica(share(images), dtype)
    with handling(STOPPING, lambda number, frame: stops.append(number)):
        while run.epoch < run.cfg.epochs:
            fit_epoch(run, step_forward, loss_fn, flip, stops)
    leave_group()


def fit_epoch(run: Run, step_forward: Callable, loss_fn: Callable, flip: bool, stops: list[int]) -> None:
    """One epoch, or what is left of one. Stopped, after saving, once there is a signal in `stops`."""
    cfg, epoch = run.cfg, run.epoch
    steps = batches.steps_per_epoch(run.data.train, cfg.batch)
    torch.backends.cudnn.benchmark = not cfg.deterministic  # every step has one shape; what is fastest may vary
    start = shown = time.perf_counter()
    run.model.train()
    first, total = run.begin_epoch()
    bar = Progress(f"epoch {epoch + 1}/{cfg.epochs}",
                   (steps - first) * min(cfg.batch, len(run.data.train)), silent=rank() > 0)
    for step, (images, targets) in enumerate(
            batches.shuffled(run.data, cfg.batch, cfg.seed, epoch, flip, first), first + 1):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(cfg.lr, cfg.warmup, epoch * steps + step - 1, cfg.epochs * steps)
        torch.manual_seed(batches.mixed_seed(cfg.seed, epoch, step))  # for dropout
        loss = loss_fn(step_forward(run.model, images, run.dtype), targets)
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        total += loss.detach()
        bar.update(len(images))
        if time.perf_counter() - shown > 1:
            shown = time.perf_counter()
            bar.say(f"loss {checked(total / step, epoch):.4f}")
        if step < steps and (stop := any_signal(stops)):
            checked(total, epoch)
            run.seconds += time.perf_counter() - start
            run.within = {"step": step, "total": total}
            run.save()
            run.stop(stop, where=f"step {step} of {steps} of epoch {epoch + 1}")
    bar.close()
    run.curve.append(checked(total / steps, epoch))
    seconds = time.perf_counter() - start
    run.seconds += seconds
    run.epoch = epoch + 1
    run.save()
    print(f"epoch {run.epoch}/{cfg.epochs}  loss {run.curve[-1]:.4f}  {bar.total / seconds:.0f} images/s", flush=True)
    if stop := any_signal(stops):
        run.stop(stop, where=f"the end of epoch {run.epoch}")


def checked(loss: Tensor, epoch: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} in epoch {epoch + 1}: training diverged; lower --lr, or use "
                                 f"--precision fp32. The checkpoint holds the epoch before")
    return value


@torch.inference_mode()
def predict(model: nn.Module, dataset: Dataset, split: Split, batch: int, dtype: torch.dtype) -> Tensor:
    """Logits of a whole split in order, in evaluation mode: float32 (N, classes, ...) on its device."""
    model.eval()
    parts = progress(batches.in_order(dataset, split, batch), "evaluation", -(-len(split) // batch))
    where = split.images.device  # a set too large for the device has logits that are, too
    return torch.cat([forward(model, images, dtype).to(where) for images, _ in parts])
