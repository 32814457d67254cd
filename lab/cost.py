"""What a study will take, in time and in memory, before it is run.

Two steps of its first row are timed; the other rows take as much more or less as their
multiply-adds say.
"""

import resource
import shlex
import sys
import time
from collections.abc import Callable

import torch

from lab import batches, engine
from lab.batches import Dataset, needed_memory
from lab.devices import host_memory
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
             loss: Callable, seeds: int) -> str:
    """Lines that say what rows of `seeds` runs each take; `run` is a dry run of the first."""
    shape, classes = dataset.train.images.shape[1:], len(dataset.classes)
    work = []
    for row in rows:
        with torch.device("meta"):
            work.append(multiply_adds(build(vars(row), shape[0], classes), shape))
    images, base = len(dataset.train), rows[0]
    each = step_seconds(run, loss) / len(run.data.train)
    # an evaluation has the forward pass alone, a third of a step
    first = each * (base.epochs * images + (images + len(dataset.test)) / 3)
    hours = first * seeds * sum(work) / work[0] / 3600
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(run.device) + needed_memory(dataset)
    widest = max(row.width / base.width for row in rows)  # memory of a step grows as it does
    free = (torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else host_memory())
    return (f"{dataset.name}: {images} training and {len(dataset.test)} {dataset.held_out} images; "
            f"{len(rows)} rows of {seeds} runs, {base.epochs} epochs each\n"
            f"time: about {hours:.1f} hours, one run after another ({first / 60:.1f} minutes for "
            f"the first row, {max(work) / work[0]:.1f} times as long for the longest)\n"
            f"memory: about {peak / 1e9:.1f} GB a run, up to {widest * peak / 1e9:.1f} GB for the "
            f"widest; {free / 1e9:.1f} GB are free")
