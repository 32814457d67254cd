"""What a study will take, in time and in memory, before it is run.

Two steps of its first row are timed; the other rows take as much more or less as their
multiply-adds say.
"""

import contextlib
import dataclasses
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lab import batches, engine, records
from lab.batches import Dataset, logits_memory, stored_memory
from lab.devices import free_memory, host_memory
from lab.distributed import from_first, rank
from lab.files import BadInput
from lab.provenance import multiply_adds
from lab.settings import Settings, settings_of

Parse = Callable[[list[str]], Settings]


def read_rows(argv: list[str] | None, parse: Parse) -> list[Settings]:
    """The settings of each row on stdin: a row is a line of flags, which are added to argv.

    Under torchrun the first process reads them, for all.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = from_first(sys.stdin.read() if rank() == 0 else "")
    rows = []
    for number, line in enumerate(given.splitlines(), 1):
        try:
            flags = shlex.split(line)
        except ValueError as error:
            raise BadInput(f"--plan: line {number} on stdin, {line!r}: {error}; mend its "
                           f"quotes") from error
        rows.append(parse([*argv, *flags]))
    if not rows:
        raise BadInput("--plan reads rows from stdin, the flags of one a line; give at least one")
    return rows


def plan(argv: list[str] | None, parse: Parse, dataset: Dataset, build: engine.Build,
         loss: Callable, seeds: int, reading: float) -> None:
    """Print what the rows on stdin take, by a dry run of the first: `read_rows`, `describe`.

    BadInput where what lies in a row's --out was made with other settings or data.
    """
    rows = read_rows(argv, parse)
    there = sum(finished_runs(row, dataset.digest) for row in rows)
    if there >= seeds * len(rows):
        return print(f"{dataset.name}: all {there} runs are there")
    run = engine.Run(dataclasses.replace(rows[0], dry_run=True), dataset, build)
    sys.stdout.write(describe(rows, run, dataset, build, loss, seeds, reading))


def finished_runs(row: Settings, digest: str) -> int:
    """How many runs in a row's --out are there. BadInput where one is of other settings or data."""
    found = records.seed_files(Path(row.out))
    for path in found:
        record = records.read(path)
        ours = settings_of(dataclasses.replace(row, seed=record["config"]["seed"]))
        records.refuse_other(path, record, {**ours, "data": digest}, "delete or move away what "
                             f"lies in {path.parents[2]}, and begin anew")
    return len(found)


def step_seconds(run: engine.Run, loss: Callable) -> float:
    """Seconds of a training step: the second and the third of a run, whose first warms up."""
    device, seconds = run.device, []
    run.model.train()
    for images, targets in list(batches.shuffled(run.data, run.cfg.batch, 0, 0, False)) * 3:
        start = time.perf_counter()
        loss(engine.forward(run.model, images, run.dtype), targets).backward()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return sum(seconds[1:]) / len(seconds[1:])


def describe(rows: list[Settings], run: engine.Run, dataset: Dataset, build: engine.Build,
             loss: Callable, seeds: int, reading: float) -> str:
    """Lines that say what rows of `seeds` runs each take.

    `run` is a dry run of the first; reading, the seconds that it took to read the data, which every
    run does.
    """
    shape, classes = dataset.train.images.shape[1:], len(dataset.classes)
    work, values = [], []
    for row in rows:
        with torch.device("meta"):
            model = build(vars(row), shape[0], classes)
        work.append(multiply_adds(model, shape))
        values.append(activations(model, shape))
    images, base = len(dataset.train), rows[0]
    most = memory(run.device)  # reading the data may have taken more than a step does
    forget_peak(run.device)
    before = memory(run.device)
    each = step_seconds(run, loss) / len(run.data.train)
    # an evaluation has the forward pass alone, a third of a step
    first = each * (base.epochs * images + (images + len(dataset.test)) / 3)
    runs = [reading + first * one / work[0] for one in work]
    step = memory(run.device) - before
    largest = max(values) / values[0]  # a step keeps them for its backward pass
    held = before + logits_memory(dataset)
    if run.device.type == "cuda":  # on a CPU what is held has the data in it
        held += stored_memory(dataset)
    free = host_memory() if (found := free_memory(run.device)) is None else found
    return (f"{dataset.name}: {images} training and {len(dataset.test)} {dataset.held_out} images; "
            f"{len(rows)} rows of {seeds} runs, {base.epochs} epochs each\n"
            f"time: about {span(seeds * sum(runs))}, one run after another ({span(runs[0])} for a "
            f"run of the first row, {span(max(runs))} for one of the slowest, {span(reading)} of "
            f"each to read the data)\n"
            f"memory: about {max(most, held + step) / 1e9:.1f} GB a run, "
            f"{max(most, held + largest * step) / 1e9:.1f} GB for one of the largest; "
            f"{free / 1e9:.1f} GB are free\n")


def activations(model: nn.Module, shape: torch.Size) -> int:
    """Values that the layers of a network on the meta device give for one image (C, H, W)."""
    counts: list[int] = []
    for module in model.modules():
        if not any(module.children()):
            module.register_forward_hook(lambda _, __, value: counts.append(value.numel()))
    with torch.no_grad():
        model.eval()(torch.empty(1, *shape, device="meta"))
    return sum(counts)


def memory(device: torch.device) -> int:
    """The most bytes that this process has held since `forget_peak`, on a GPU or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
    except (OSError, TypeError):  # no Linux, or one that does not say
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes


def forget_peak(device: torch.device) -> None:
    """Let `memory` begin at what is held now; where the system cannot, it goes on from the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def span(seconds: float) -> str:
    return (f"{seconds / 3600:.1f} hours" if seconds > 5400 else
            f"{seconds / 60:.1f} minutes" if seconds > 90 else f"{seconds:.1f} seconds")
