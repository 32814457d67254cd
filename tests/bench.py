"""Speed, as ratios measured side by side in one run: `make bench`.

1. One training step of the standard hourglass in this engine, against the loop most people write:
   the same model, optimiser and batch, but a DataLoader with workers, float32, NCHW and `.item()`
   at each step.
2. The same step with --deterministic, against the step without.
3. Average precision of 7.5 million pixels, against scikit-learn.

Times and ratios go to results/bench/speed.json. Rounds of the two sides alternate, so that a busy
machine slows both; the median of the rounds' ratios counts.
"""

import contextlib
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader, Dataset

import data
import engine
import metrics
import models
import train_seg

BATCH, SIZE, STEPS, ROUNDS = 8, 256, 2, 4  # the study's size; the batch that a CPU takes


def facades() -> data.Dataset:
    """Synthetic ones, the same on every machine: what a round takes and the plain loop's workers fetch ahead."""
    drawn = [data.synthetic_facade(i, SIZE) for i in range((STEPS + 1 + 4) * BATCH)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
    split = data.Split(images, masks, torch.arange(len(images)))
    return data.Dataset("synthetic facades", data.FACADE_CLASSES, (0.5,) * 3, (0.25,) * 3, "", True, split, split)


class Facades(Dataset):
    """The plain way: one image at a time, made float and normalised by a worker process."""

    def __init__(self, dataset: data.Dataset):
        self.split = dataset.train
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int):
        image, mask = self.split.images[i], self.split.targets[i]
        if torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return (image / 255 - self.mean) / self.std, mask.long()


def plain_loop(dataset: data.Dataset, device: torch.device) -> float:
    """Seconds a step, after a warm-up step."""
    model = models.HourGlass().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    loss_fn = torch.nn.CrossEntropyLoss()
    running = 0.0
    for step, (x, y) in enumerate(DataLoader(Facades(dataset), BATCH, shuffle=True, num_workers=2, drop_last=True)):
        if step == 1:
            start = time.perf_counter()
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        running += loss.item()
        if step == STEPS:
            return (time.perf_counter() - start) / STEPS
    raise AssertionError("the data set is smaller than a round")


def engine_loop(dataset: data.Dataset, device: torch.device, deterministic: bool = False) -> float:
    """Seconds a step, after a warm-up step, by the engine's own clock."""
    seconds = []
    for steps in (1, STEPS):
        part = dataclasses.replace(dataset, train=dataset.train.map(lambda t: t[:steps * BATCH]))
        with tempfile.TemporaryDirectory() as out:
            run = engine.Run(train_seg.Config(epochs=1, batch=BATCH, size=SIZE, device=str(device), out=out,
                                              deterministic=deterministic), part)
            with contextlib.redirect_stdout(None):
                engine.fit(run, models.cross_entropy, flip=True)
            seconds.append(run.seconds)
    return seconds[1] / STEPS


def apart(loop: str) -> float:
    """Seconds a step of one loop in a process of its own, as it is used: neither inherits the other's allocator."""
    done = subprocess.run([sys.executable, __file__, loop], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def compare(name: str, other: str, pairs: list[tuple[float, float]]) -> dict:
    """Print and return one comparison of (our seconds, their seconds), a pair a round."""
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs))
    print(f"{name}: {1000 * ours:.0f} ms, {other} {1000 * theirs:.0f} ms, ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)")
    return {"name": name, "against": other, "ratio": statistics.median(ratios), "seconds": pairs}


def main() -> None:
    device = engine.pick_device("auto")
    if len(sys.argv) > 1:
        loops = {"engine": engine_loop, "plain": plain_loop,
                 "deterministic": functools.partial(engine_loop, deterministic=True)}
        print(loops[sys.argv[1]](facades(), device))
        return
    environment = engine.environment(device, engine.pick_dtype("auto", device))
    print(f"{environment['device']}, torch {environment['torch']}")
    engines, plains, fixed = zip(*[[apart(loop) for loop in ("engine", "plain", "deterministic")]
                                   for _ in range(ROUNDS)])
    results = [compare(f"training step, HourGlass(2*32), batch {BATCH}, {SIZE} pixels", "plain loop",
                       list(zip(engines, plains))),
               compare("the same step with --deterministic", "without", list(zip(fixed, engines)))]
    torch.manual_seed(0)
    scores = torch.rand(7_500_000)
    for share in (0.024, 0.4):  # a rare class and a frequent one
        positive = torch.rand(len(scores)) < 2 * share * scores
        pairs = []
        for _ in range(3):
            start = time.perf_counter()
            ours = metrics.average_precision(scores, positive)
            middle = time.perf_counter()
            theirs = average_precision_score(positive.numpy(), scores.numpy())
            pairs.append((middle - start, time.perf_counter() - middle))
            assert np.isclose(ours, theirs, rtol=0, atol=1e-12)
        results.append(compare(f"average precision, 7.5M pixels, {100 * share:.0f} % positive", "scikit-learn", pairs))
    record = Path("results/bench/speed.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
