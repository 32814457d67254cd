"""The one training loop of the study: settings, device, precision, checkpoint and resume, run record.

A script declares its settings as a frozen dataclass on top of `Settings`, and then

    cfg = engine.parse(Config, PROTOCOLS, __doc__)
    run = engine.Run(cfg, dataset, model)       # resumes, or refuses what it does not match
    engine.fit(run, loss)
    run.finish({"train": ..., "test": ...})     # writes OUT/seed<k>.json

An epoch depends on nothing but the weights, the optimiser's state and (seed, epoch), so a killed run
goes on from its last epoch and ends, on the CPU, with the same bits.
"""

import argparse
import copy
import dataclasses
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from data import BadInput, Dataset, Split

SOURCE = Path(__file__).parent


# ---- settings and the command line ----

def flag(default: object, help: str) -> typing.Any:
    """A setting: its default and what `-h` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every training script can be told. A script's own Config adds its model and its data."""
    protocol: typing.Literal["report", "small", "smoke"] = flag("report", "set of defaults, see below")
    split: typing.Literal["full", "dev"] = flag("full", "full: test once at the end; dev: hold out training data")
    seed: int = flag(0, "initial weights, order and augmentation")
    epochs: int = flag(1, "passes over the training split")
    batch: int = flag(1, "images a step")
    lr: float = flag(1e-3, "peak learning rate of Adam")
    weight_decay: float = flag(1e-4, "L2 penalty of Adam")
    warmup: float = flag(0.0, "share of the steps that climb linearly to --lr; the rest falls to 0 as a cosine")
    precision: typing.Literal["auto", "bf16", "fp16", "fp32"] = flag("auto", "auto: bf16 where the device has it")
    compile: bool = flag(False, "torch.compile the network: pays in long runs")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, else ./data)")
    out: str | None = flag(None, "folder of seed<k>.json and seed<k>.pt (default: runs/ and what was changed)")
    dry_run: bool = flag(False, "one step of everything on one batch; leaves no file")

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


# where and how a run is made, but not what it computes: may differ between two halves of one run
PLACE = ("device", "data_root", "out", "dry_run")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise BadInput(f"{message}; see {self.prog} -h")


def parse(config: type, protocols: dict[str, dict], doc: str, argv: list[str] | None = None) -> typing.Any:
    """Command line -> config: its defaults, over them the protocol's, over them the flags given."""
    lines = [f"  {name:<8}" + ("  ".join(f"--{k.replace('_', '-')} {v}" for k, v in values.items()) or "the defaults")
             for name, values in protocols.items()]
    parser = Parser(description=doc, epilog="protocols:\n" + "\n".join(lines), allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = {setting.name for setting in dataclasses.fields(Settings)}
    for setting in sorted(dataclasses.fields(config), key=lambda setting: setting.name in shared):
        options = {"help": setting.metadata["help"] + ("" if setting.default is None else f" ({setting.default})")}
        if setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(setting.type) is typing.Literal:
            options["choices"] = typing.get_args(setting.type)
        else:
            options["type"] = setting.type if setting.type in (int, float) else str
            options["metavar"] = options["type"].__name__.upper()
        parser.add_argument(f"--{setting.name.replace('_', '-')}", **options)
    given = vars(parser.parse_args(argv))
    values = {**protocols[given.get("protocol", "report")], **given}
    if values.get("out") is None and not values.get("dry_run"):
        base = config(**{**protocols[given.get("protocol", "report")], "protocol": given.get("protocol", "report")})
        changed = [f"{name}={value}" for name, value in given.items()
                   if name not in PLACE + ("seed",) and value != getattr(base, name)]
        values["out"] = str(Path("runs", parser.prog.removesuffix(".py"), base.protocol, ",".join(changed) or "base"))
    return config(**values)


def guard(main: Callable[[], None]) -> int:
    """Run a script's main; what is the user's to mend becomes one line and an exit code, 2 for bad input."""
    try:
        main()
        return 0
    except BadInput as error:
        message, code = str(error), 2
    except OSError as error:
        message, code = f"{error.filename or 'file'}: {error.strerror or error}", 2
    except FloatingPointError as error:
        message, code = str(error), 1
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        message, code = "out of memory: lower --batch first, then --size or --width", 2
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on after the last finished epoch", 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


# ---- device and precision ----

def pick_device(name: str) -> torch.device:
    """"auto" is CUDA where it works, else the CPU. BadInput for a device that this machine lacks."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from error


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that convolutions run in under autocast; "auto" is bfloat16 where it is native."""
    if precision == "auto":
        # without native bfloat16 a CPU emulates it, slower than float32
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        precision = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


# ---- one run: its files, its resume, its record ----

def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or none: a reader, or a run killed at any moment, never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}; nothing was lost, free or change the place and run again",
                      str(path)) from error


def read_checkpoint(path: Path) -> dict:
    """A checkpoint of this project, unpickled without running code. BadInput if it is anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("identity", "epoch", "model", *state)}
    except FileNotFoundError:
        raise
    except Exception as error:  # torch, zipfile and pickle each raise their own for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path} is no checkpoint of this project, or damaged ({reason}); delete or replace it") from error


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
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        name = f"{model}, {torch.get_num_threads()} threads"
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes),
            "source_sha256": data.tree_digest([(path.name, path.read_bytes()) for path in SOURCE.glob("*.py")]),
            "python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "platform": platform.platform(), "device": name, "precision": str(dtype).removeprefix("torch.")}


def jsonable(value: typing.Any) -> typing.Any:
    """NaN has no place in JSON: it becomes null, at any depth."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Run:
    """One row, one seed: the model and the data on their device, and the run's two files.

    OUT/seed<k>.pt is the checkpoint, rewritten every epoch, and in the end the trained model with its
    record; OUT/seed<k>.json is the record, written last: where it exists, the run is complete, and
    `record` holds it. BadInput if either file belongs to other settings, data or another model.
    """

    def __init__(self, cfg: Settings, dataset: Dataset, model: nn.Module):
        if cfg.dry_run:
            self.scratch = tempfile.TemporaryDirectory()
            cfg = dataclasses.replace(cfg, epochs=1, out=self.scratch.name)
            one = lambda tensor: tensor[:cfg.batch]
            dataset = dataclasses.replace(dataset, train=dataset.train.map(one), test=dataset.test.map(one))
        self.cfg = cfg
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.precision, self.device)
        self.data = dataset.to(self.device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        config = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in PLACE}
        self.identity = {"script": Path(sys.argv[0]).name, "config": config, "data": dataset.digest}
        self.checkpoint = Path(cfg.out, f"seed{cfg.seed}.pt")
        self.record_file = self.checkpoint.with_suffix(".json")
        self.record: dict | None = None
        self.epoch, self.curve, self.seconds = 0, [], 0.0
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        self.resume()

    def resume(self) -> None:
        if self.record_file.exists():
            record = json.loads(self.record_file.read_text())
            self.refuse_other(self.record_file, record)
            self.record = record
        elif self.checkpoint.exists():
            state = read_checkpoint(self.checkpoint)
            self.refuse_other(self.checkpoint, state["identity"])
            try:
                self.model.load_state_dict(state["model"])
            except RuntimeError as error:
                raise BadInput(f"{self.checkpoint} holds the weights of another version of this model; delete it, or "
                               f"choose another --out") from error
            if "optimizer" in state:  # a finished run has none
                self.optimizer.load_state_dict(state["optimizer"])
                self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.curve, self.seconds = state["epoch"], state["curve"], state["seconds"]
            print(f"{self.checkpoint}: goes on after epoch {self.epoch}/{self.cfg.epochs}", file=sys.stderr)
        else:
            self.save()  # a place that cannot be written shows now, not after the first epoch

    def refuse_other(self, path: Path, found: dict) -> None:
        theirs, ours = ({**identity["config"], "data": identity["data"]} for identity in (found, self.identity))
        differing = [f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in {**theirs, **ours}
                     if theirs.get(key) != ours.get(key)]
        if differing:
            raise BadInput(f"{path} was made with other settings ({'; '.join(differing)}); choose another --out, or "
                           f"delete it")

    def save(self, **more: typing.Any) -> None:
        state = {"identity": self.identity, "epoch": self.epoch, "model": self.model.state_dict(),
                 "curve": self.curve, "seconds": self.seconds,
                 **(more or {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()})}
        buffer = io.BytesIO()  # through memory, so that a full disk is an OSError that names the file
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getbuffer())

    def finish(self, metrics: dict[str, dict], **more: typing.Any) -> dict:
        """Write the run record and the trained model; `metrics` is {split: what the model reached}."""
        described = {name: getattr(self.data, name) for name in ("name", "synthetic", "classes", "mean", "std")}
        images = self.data.train.images
        self.record = jsonable({
            **self.identity, "about_data": {**described, "train_images": len(images), "size": images.shape[-1]},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "multiply_adds": multiply_adds(self.model, images.shape[1:]),
            "environment": environment(self.device, self.dtype), "train_seconds": round(self.seconds, 2),
            "curve": {"loss": self.curve}, "metrics": metrics, "weights_sha256": weights_digest(self.model), **more})
        self.save(record=self.record)
        write_atomic(self.record_file, (json.dumps(self.record, indent=1) + "\n").encode())
        return self.record


# ---- training and evaluation ----

def forward(run: Run, images: Tensor) -> Tensor:
    """Logits in float32. The head runs outside autocast: bfloat16 logits would tie in the ranking of AP."""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        features = run.model.features(images)
    return run.model.head(features.float())


def learning_rate(peak: float, warmup: float, step: int, steps: int) -> float:
    """Linear climb over the first `warmup` share of all steps, then half a cosine down to zero."""
    climb = warmup * steps
    if step < climb:
        return peak * (step + 1) / climb if climb >= 1 else peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - climb) / (steps - climb)))


def fit(run: Run, loss_fn: Callable[[Tensor, Tensor], Tensor], flip: bool = False) -> None:
    """Train the run's model to its last epoch, with a checkpoint after each.

    loss_fn(logits float32, targets uint8) -> scalar. The step never waits for the device: the loss
    is read once a second for the progress bar and once an epoch for the record. FloatingPointError
    if it is not finite; the last checkpoint then holds the weights of the epoch before.
    """
    cfg, train = run.cfg, run.data.train
    steps = data.steps_per_epoch(train, cfg.batch)
    torch.backends.cudnn.benchmark = True  # every step has one shape
    step_forward = torch.compile(forward) if cfg.compile else forward
    for epoch in range(run.epoch, cfg.epochs):
        start = shown = time.perf_counter()
        torch.manual_seed(data.epoch_seed(cfg.seed, epoch))  # dropout
        run.model.train()
        total = torch.zeros((), device=run.device)
        bar = tqdm(total=steps * min(cfg.batch, len(train)), unit="img", leave=False, disable=None,
                   desc=f"epoch {epoch + 1}/{cfg.epochs}")
        for step, (images, targets) in enumerate(data.shuffled_batches(run.data, cfg.batch, cfg.seed, epoch, flip)):
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(cfg.lr, cfg.warmup, epoch * steps + step, cfg.epochs * steps)
            loss = loss_fn(step_forward(run, images), targets)
            run.optimizer.zero_grad(set_to_none=True)
            run.scaler.scale(loss).backward()
            run.scaler.step(run.optimizer)
            run.scaler.update()
            total += loss.detach()
            bar.update(len(images))
            if time.perf_counter() - shown > 1:
                shown = time.perf_counter()
                bar.set_postfix(loss=f"{checked(total / (step + 1), epoch):.4f}")
        bar.close()
        run.curve.append(checked(total / steps, epoch))
        seconds = time.perf_counter() - start
        run.seconds += seconds
        run.epoch = epoch + 1
        run.save()
        print(f"epoch {run.epoch}/{cfg.epochs}  loss {run.curve[-1]:.4f}  {bar.total / seconds:.0f} images/s")


def checked(loss: Tensor, epoch: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} in epoch {epoch + 1}: training diverged; lower --lr, or use "
                                 f"--precision fp32. The checkpoint holds the epoch before")
    return value


@torch.inference_mode()
def predict(run: Run, split: Split) -> Tensor:
    """Logits of a whole split in order, in evaluation mode: float32 (N, classes, ...) on the run's device."""
    run.model.eval()
    return torch.cat([forward(run, images) for images, _ in data.batches(run.data, split, run.cfg.batch)])
