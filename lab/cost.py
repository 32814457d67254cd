"""What a study will take, in time and in memory, before it is run.

Two steps of its first row are timed; the other rows take as much more or less as their
multiply-adds say.
"""

import dataclasses
import resource
import shlex
import sys
import time
from collections.abc import Callable

import torch

from lab import batches, engine
from lab.batches import Dataset, needed_memory
from lab.devices import free_memory, host_memory
from lab.files import BadInput
from lab.provenance import multiply_adds

Parse = Callable[[list[str]], engine.Settings]


def read_rows(argv: list[str] | None, parse: Parse) -> list[engine.Settings]:
    """The settings of each row on stdin: a row is a line of flags, which are added to argv."""
    argv = sys.argv[1:] if argv is None else argv
    rows = [parse([*argv, *shlex.split(line)]) for line in sys.stdin.read().splitlines()]
    if not rows:
        raise BadInput("--plan reads rows from stdin, the flags of one a line; give at least one")
    return rows


def plan(argv: list[str] | None, parse: Parse, dataset: Dataset, build: engine.Build,
         loss: Callable, seeds: int, reading: float) -> None:
    """Print what the rows on stdin take, by a dry run of the first: `read_rows`, `describe`."""
    rows = read_rows(argv, parse)
    run = engine.Run(dataclasses.replace(rows[0], dry_run=True), dataset, build)
    sys.stdout.write(describe(rows, run, dataset, build, loss, seeds, reading))


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


def describe(rows: list[engine.Settings], run: engine.Run, dataset: Dataset, build: engine.Build,
             loss: Callable, seeds: int, reading: float) -> str:
    """Lines that say what rows of `seeds` runs each take.

    `run` is a dry run of the first; reading, the seconds that it took to read the data, which every
    run does.
    """
    shape, classes = dataset.train.images.shape[1:], len(dataset.classes)
    work = []
    for row in rows:
        with torch.device("meta"):
            work.append(multiply_adds(build(vars(row), shape[0], classes), shape))
    images, base = len(dataset.train), rows[0]
    before = memory(run.device)
    each = step_seconds(run, loss) / len(run.data.train)
    # an evaluation has the forward pass alone, a third of a step
    first = each * (base.epochs * images + (images + len(dataset.test)) / 3)
    runs = [reading + first * one / work[0] for one in work]
    step = memory(run.device) - before
    widest = max(row.width / base.width for row in rows)  # a step's memory grows as it does
    stored = needed_memory(dataset)
    free = host_memory() if (found := free_memory(run.device)) is None else found
    return (f"{dataset.name}: {images} training and {len(dataset.test)} {dataset.held_out} images; "
            f"{len(rows)} rows of {seeds} runs, {base.epochs} epochs each\n"
            f"time: about {span(seeds * sum(runs))}, one run after another ({span(runs[0])} for a "
            f"run of the first row, {span(max(runs))} for one of the slowest, {span(reading)} of "
            f"each to read the data)\n"
            f"memory: about {(before + step + stored) / 1e9:.1f} GB a run, "
            f"{(before + widest * step + stored) / 1e9:.1f} GB for one of the widest; "
            f"{free / 1e9:.1f} GB are free\n")


def memory(device: torch.device) -> int:
    """The most bytes that this process has held so far, on a GPU or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def span(seconds: float) -> str:
    return (f"{seconds / 3600:.1f} hours" if seconds > 5400 else
            f"{seconds / 60:.1f} minutes" if seconds > 90 else f"{seconds:.1f} seconds")
