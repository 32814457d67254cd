"""The one training loop: device, precision, checkpoint and resume, run record.

A script declares its settings as a frozen dataclass on top of `Settings`, and then

    cfg = cli.parse(Config, __doc__, argv, PROTOCOLS)
    run = engine.Run(cfg, dataset, build)       # resumes, or refuses what it does not match
    engine.fit(run, loss)
    run.finish(*run.evaluate(score, detail))    # writes OUT/seed<k>.json

A step depends on nothing but the weights, the optimiser's state and (seed, epoch, step), so a
killed run goes on from its last epoch and ends, on the CPU, with the same bits. One that is told to
stop (Ctrl-C, SIGTERM, SIGUSR1) saves the step it is at. Under torchrun, once `join_group` was
called, its processes share each step's batch.
"""

import dataclasses
import math
import os
import sys
import tempfile
import time
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lab import batches, records
from lab.batches import Dataset, Split
from lab.devices import keep_freed_memory, pick_dtype
from lab.distributed import Replica, any_signal, from_first, leave_group, own_device
from lab.distributed import rank, ranks, share
from lab.files import BadInput, jsonable, read_checkpoint
from lab.guard import STOPPING, Stopped, handling
from lab.progress import Progress, progress
from lab.provenance import environment, multiply_adds, weights_digest
from lab.runfiles import RunFiles
from lab.settings import Settings, settings_of

Build = Callable[[dict, int, int], nn.Module]  # (settings, channels, classes) -> the network


def load_trained(path: Path, device: torch.device, build: Build) -> tuple[nn.Module, dict]:
    """A finished run's model, in evaluation mode on the device, and its record.

    BadInput if the run is unfinished, or the file anything else.
    """
    state = read_checkpoint(path)
    if "record" not in state:
        raise BadInput(f"{path} is of an unfinished run (epoch {state['epoch']}); run its training "
                       f"command again")
    records.check_trained(path, state["record"])
    config, about = state["record"]["config"], state["record"]["about_data"]
    try:
        with torch.device("meta"):  # takes no memory, whatever width the file names
            model = build(config, len(about["mean"]), len(about["classes"]))
        model.load_state_dict(state["model"], assign=True)
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{path}: its settings and its weights do not fit together "
                       f"({type(error).__name__}); train the model again") from error
    if about["size"] % getattr(model, "stride", 1):
        raise BadInput(f"{path}: its record is damaged (about_data.size); train the model again")
    if about.get("synthetic"):
        print(f"NOTE: {path} was trained on {about['name']}", file=sys.stderr)
    return model.to(device, memory_format=torch.channels_last).eval(), state["record"]


# ---- one run: its state, its resume, its record ----

class Run:
    """One row, one seed: the model and the data on their device, and the run's files.

    `files` are those of `RunFiles`; where the run is complete `record` holds its record. BadInput
    if a file belongs to other settings, data or another model, and if data and network do not fit
    together. `build` makes the network, see `Build`; `start` holds weights to start from, instead
    of random ones.
    """

    def __init__(self, cfg: Settings, dataset: Dataset, build: Build,
                 start: dict[str, Tensor] | None = None):
        self.device = own_device(cfg.device)
        if cfg.dry_run:
            self.scratch = tempfile.TemporaryDirectory()
            cfg = dataclasses.replace(cfg, epochs=1, out=self.scratch.name)
            one = lambda tensor: tensor[:cfg.batch]
            dataset = dataclasses.replace(dataset, train=dataset.train.map(one),
                                          test=dataset.test.map(one))
        if self.device.type == "cpu":
            keep_freed_memory()
        images = min(cfg.batch, len(dataset.train))
        if images % ranks():
            raise BadInput(f"--batch {cfg.batch}: {ranks()} processes cannot share {images} images "
                           f"evenly; choose a multiple of {ranks()}")
        if cfg.deterministic:  # read when cuBLAS starts; else cuBLAS keeps its own workspace
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(cfg.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
        self.cfg = cfg
        self.dtype = pick_dtype(cfg.precision, self.device)
        # now: the source may change while it runs
        self.environment = environment(self.device, self.dtype)
        self.earlier: list[dict] = []  # environments, of a run that was begun in others
        self.data = dataset.to(self.device)
        torch.manual_seed(cfg.seed)
        self.model = build(dataclasses.asdict(cfg), len(dataset.mean), len(dataset.classes))
        self.model.to(self.device, memory_format=torch.channels_last)
        if start is not None:
            self.start_from(start)
        batches.check_fit(self.data, self.model, images)
        self.optimizer = torch.optim.Adam(self.model.parameters(), cfg.lr,
                                          weight_decay=cfg.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.identity = {"script": Path(sys.argv[0]).name, **settings_of(cfg),
                         "data": dataset.digest}
        if start is not None:
            self.identity["start_sha256"] = weights_digest(self.model)
        self.record: dict | None = None
        self.epoch, self.curve, self.seconds = 0, [], 0.0
        self.partial_epoch: dict | None = None  # how far into the epoch, if it was stopped there
        self.files = RunFiles(cfg.out, cfg.seed)
        self.resume()

    def start_from(self, weights: dict[str, Tensor]) -> None:
        try:
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise BadInput("the weights to start from are of another network; name a run of the "
                           "same one") from error

    def stored(self) -> dict | None:
        """What the run's files hold, its record or a checkpoint. BadInput if of another run."""
        if not self.files.record.exists():
            self.files.claim()
            path, state = self.files.newest()
            if state is not None:
                records.refuse_other(path, state["identity"], self.identity)
                state["path"] = str(path)  # which is sent to the other processes
            return state
        record = records.read(self.files.record)
        records.refuse_other(self.files.record, record, self.identity)
        self.files.release()
        return {"record": record}

    def resume(self) -> None:
        """Go on from what the first process finds in the run's files."""
        state = self.stored() if rank() == 0 else None
        state, first = from_first((state, self.identity))
        if first != self.identity:
            raise BadInput("this process has other data or settings than the first; start all "
                           "of them with one command, on the same files")
        if state is None:
            self.save()  # a place that cannot be written shows now, not after the first epoch
        elif "model" not in state:
            self.record = state["record"]
        else:
            self.restore(state)

    def restore(self, state: dict) -> None:
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise BadInput(f"{state['path']} holds the weights of another version of this model; "
                           f"delete it, or choose another --out") from error
        if "optimizer" in state:  # a finished run has none
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.curve, self.seconds = state["epoch"], state["curve"], state["seconds"]
        self.partial_epoch = state.get("within")
        self.earlier = [one for one in state.get("environments", []) if one != self.environment]
        step = f", step {self.partial_epoch['step']}" if self.partial_epoch else ""
        if rank() == 0:
            print(f"{self.files.checkpoint}: goes on after epoch {self.epoch}/{self.cfg.epochs}"
                  f"{step}", file=sys.stderr)
            for other in {one["precision"] for one in self.earlier}:
                if other != self.environment["precision"]:
                    print(f"NOTE: it was {other} until here, and is {self.environment['precision']}"
                          " from here on, as this device has it", file=sys.stderr)

    def save(self, **more: typing.Any) -> None:
        """Write the checkpoint; with `more`, a finished run's, that instead of the optimiser."""
        if rank() > 0:
            return
        more = more or {"optimizer": self.optimizer.state_dict(),
                        "scaler": self.scaler.state_dict()}
        self.files.save({"identity": self.identity, "epoch": self.epoch,
                         "model": self.model.state_dict(), "curve": self.curve,
                         "seconds": self.seconds, "within": self.partial_epoch,
                         "environments": [*self.earlier, self.environment], **more})

    def begin_epoch(self) -> tuple[int, Tensor]:
        """The steps of the epoch that are done, and the sum of their losses."""
        if self.partial_epoch is None:
            return 0, torch.zeros((), device=self.device)
        partial, self.partial_epoch = self.partial_epoch, None
        return partial["step"], partial["total"].to(self.device)

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
                # isfinite() of all of them would take as much memory again, and more
                if not torch.stack(logits.aminmax()).isfinite().all():
                    raise FloatingPointError(f"the network's outputs for the {name} split are not "
                                             "finite: training diverged at its end; delete the "
                                             "run, and lower --lr or use --precision fp32")
                scores[name] = score(logits, split.targets, self.data.classes)
            return scores, detail(logits, split)

    def stop(self, number: int, frame: object = None,
             where: str = "the last checkpoint") -> typing.NoReturn:
        """End a run that a signal told to stop; a dry run leaves nothing to go on from."""
        raise Stopped(number, None if self.cfg.dry_run else where)

    def finish(self, metrics: dict[str, dict], arrays: dict, **more: typing.Any) -> None:
        """Write the trained model, the arrays and, last, the record."""
        described = {name: getattr(self.data, name) for name in
                     ("name", "task", "synthetic", "own", "classes", "palette", "mean", "std")}
        images = self.data.train.images
        about = {**described, "train_images": len(images), "size": images.shape[-1]}
        self.record = jsonable({
            **self.identity, "about_data": about,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "multiply_adds": multiply_adds(self.model, images.shape[1:]),
            "environment": self.environment,
            **({"earlier_environments": self.earlier} if self.earlier else {}),
            "train_seconds": round(self.seconds, 2),
            "curve": {"loss": self.curve}, "metrics": metrics, **more,
            "weights_sha256": weights_digest(self.model)})
        with handling(STOPPING, self.stop):
            self.save(record=self.record)
            records.write(self.files.record, self.record, arrays)
        self.files.release()
        if self.cfg.dry_run:
            self.scratch.cleanup()


# ---- training and evaluation ----

def features_of(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """What the model's head reads: float32, computed under autocast to dtype."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return model.features(images).float()


def forward(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits in float32. The head runs outside autocast: bfloat16 logits would tie in a ranking."""
    return model.head(features_of(model, images, dtype))


def learning_rate(peak: float, warmup: float, step: int, steps: int) -> float:
    """Linear climb over the first `warmup` share of all steps, then half a cosine down to zero."""
    climb = warmup * steps
    if step < climb:
        return peak * min(1, (step + 1) / climb)  # its last step may be a part of one
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


def fit_epoch(run: Run, step_forward: Callable, loss_fn: Callable, flip: bool,
              stops: list[int]) -> None:
    """One epoch, or what is left of one. Stopped, after saving, once a signal is in `stops`."""
    cfg, epoch = run.cfg, run.epoch
    steps = batches.steps_per_epoch(run.data.train, cfg.batch)
    # every step has one shape; which algorithm is fastest may vary
    torch.backends.cudnn.benchmark = not cfg.deterministic
    start = shown = time.perf_counter()
    run.model.train()
    first, total = run.begin_epoch()
    bar = Progress(f"epoch {epoch + 1}/{cfg.epochs}",
                   (steps - first) * min(cfg.batch, len(run.data.train)), silent=rank() > 0)
    for step, (images, targets) in enumerate(
            batches.shuffled(run.data, cfg.batch, cfg.seed, epoch, flip, first), first + 1):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(cfg.lr, cfg.warmup, epoch * steps + step - 1,
                                        cfg.epochs * steps)
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
            run.partial_epoch = {"step": step, "total": total}
            run.save()
            run.stop(stop, where=f"step {step} of {steps} of epoch {epoch + 1}")
    bar.close()
    run.curve.append(checked(total / steps, epoch))
    seconds = time.perf_counter() - start
    run.seconds += seconds
    run.epoch = epoch + 1
    run.save()
    print(f"epoch {run.epoch}/{cfg.epochs}  loss {run.curve[-1]:.4f}  "
          f"{bar.total / seconds:.0f} images/s", flush=True)
    if stop := any_signal(stops):
        run.stop(stop, where=f"the end of epoch {run.epoch}")


def checked(loss: Tensor, epoch: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} in epoch {epoch + 1}: training diverged; "
                                 f"lower --lr, or use --precision fp32. The checkpoint holds the "
                                 f"epoch before")
    return value


@torch.inference_mode()
def predict(model: nn.Module, dataset: Dataset, split: Split, batch: int,
            dtype: torch.dtype) -> Tensor:
    """Logits of a split in order, in evaluation mode: float32 (N, classes, ...) on its device."""
    model.eval()
    parts = progress(batches.in_order(dataset, split, batch), "evaluation",
                     -(-len(split) // batch))
    where = split.images.device  # a set too large for the device has logits that are, too
    logits = None
    for i, (images, _) in enumerate(parts):
        part = forward(model, images, dtype)
        if logits is None:  # in one piece: parts to be joined would hold all of them twice
            logits = torch.empty((len(split), *part.shape[1:]), device=where)
        logits[i * batch:(i + 1) * batch] = part
    return logits
