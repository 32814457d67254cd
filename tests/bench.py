"""Speed, as ratios measured side by side in one run: `make bench`.

1. One training step of the standard hourglass in this engine, against the loop most people write:
   the same model, optimiser and batch, but a DataLoader with workers, float32, NCHW and `.item()`
   at each step.
2. The same step with --deterministic, against the step without.
3. On a CPU, two rows of the study side by side, each on half of the cores, against one after the
   other on all of them: what `make table1 table2 PROTOCOL=desk` does.
4. Average precision of 7.5 million pixels, against scikit-learn.
5. Where a step's time goes, by operator, and the speed of its convolutions against that of a large
   matrix product in the same precision, which is what the processor can reach.

Times and ratios go to results/bench/speed-KERNELS.json, as in speed-avx2.json. Rounds of the two
sides alternate, so that a busy machine slows both; the median of the rounds' ratios counts.
"""

import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

import data
import metrics
import models
import train_cls
import train_seg
from lab import batches, devices, engine, provenance, records, settings
from lab.progress import progress

BATCH, SIZE, STEPS, ROUNDS = 8, 256, 2, 4  # the study's size; the batch that a CPU takes


def facades(size: int) -> data.Dataset:
    """Synthetic ones, the same everywhere: a round's, and what the plain loop fetches ahead."""
    drawn = [data.synthetic_facade(i, size) for i in range((STEPS + 1 + 4) * BATCH)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([mask for _, mask in drawn]))
    split = batches.Split(images, masks, torch.arange(len(images)))
    return batches.Dataset("synthetic facades", data.FACADE_CLASSES, (0.5,) * 3, (0.25,) * 3, "",
                           True, split, split)


def garments(steps: int) -> data.Dataset:
    """Noise of Fashion-MNIST's shape: what a step takes does not depend on what the images show."""
    generator = torch.Generator().manual_seed(0)
    count = steps * 128
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, 10, (count,), dtype=torch.uint8, generator=generator)
    split = batches.Split(images, targets, torch.arange(count))
    return batches.Dataset("noise", data.FASHION_CLASSES, (0.5,), (0.25,), "", True, split, split)


class Facades(Dataset):
    """The plain way: one image at a time, made float and normalised by a worker process."""

    def __init__(self, dataset: batches.Dataset):
        self.split = dataset.train
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1)
                               for values in (dataset.mean, dataset.std))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int):
        image, mask = self.split.images[i], self.split.targets[i]
        if torch.rand(()) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return (image / 255 - self.mean) / self.std, mask.long()


def plain_loop(dataset: batches.Dataset, device: torch.device) -> float:
    """Seconds a step, after a warm-up step."""
    model = models.HourGlass().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-4)
    loss_fn = torch.nn.CrossEntropyLoss()
    running = 0.0
    loader = DataLoader(Facades(dataset), BATCH, shuffle=True, num_workers=2, drop_last=True)
    for step, (x, y) in enumerate(loader):
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


def engine_loop(cfg: settings.Settings, dataset: batches.Dataset, steps: int = STEPS) -> float:
    """Seconds a step, after a warm-up step, by the engine's own clock."""
    seconds = []
    for count in (1, steps):
        train = dataset.train.map(lambda t: t[:count * cfg.batch])
        part = dataclasses.replace(dataset, train=train)
        with tempfile.TemporaryDirectory() as out:
            run = engine.Run(dataclasses.replace(cfg, out=out), part, models.build)
            with contextlib.redirect_stdout(None):
                engine.fit(run, models.cross_entropy, flip=isinstance(cfg, train_seg.Config))
            seconds.append(run.seconds)
    return seconds[1] / steps


def standard(size: int, **settings: object) -> train_seg.Config:
    return train_seg.Config(epochs=1, batch=BATCH, size=size, **settings)


LOOPS = {"engine": lambda: engine_loop(standard(SIZE), facades(SIZE)),
         "plain": lambda: plain_loop(facades(SIZE), devices.pick_device("auto")),
         "deterministic": lambda: engine_loop(standard(SIZE, deterministic=True), facades(SIZE)),
         "hourglass": lambda: engine_loop(standard(128), facades(128), 3 * STEPS),
          "vgg-resnet": lambda: engine_loop(train_cls.Config(epochs=1), garments(6 * STEPS),
                                            6 * STEPS)}


def apart(loop: str, beside: int = 1) -> float:
    """Seconds a step of one loop in its own process, as it is used: none inherits an allocator.

    With `beside` processes at a time, each on its share of the cores: seconds until each has done a
    step, divided by their number.
    """
    threads = str(max(1, torch.get_num_threads() // beside))
    running = [subprocess.Popen([sys.executable, __file__, loop], stdout=subprocess.PIPE, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": threads})
               for _ in range(beside)]
    seconds = [float(process.communicate()[0]) for process in running]
    return statistics.mean(seconds) / beside


def profiled(name: str, cfg: settings.Settings, dataset: batches.Dataset) -> dict:
    """Shares of a step's time by operator; its convolutions' rate against a matrix product's."""
    dataset = dataclasses.replace(dataset, train=dataset.train.map(lambda t: t[:cfg.batch]))
    with tempfile.TemporaryDirectory() as out:
        run = engine.Run(dataclasses.replace(cfg, epochs=3, out=out), dataset, models.build)
    images, targets = next(batches.in_order(dataset, dataset.train, cfg.batch))
    run.model.train()

    def step() -> None:
        models.cross_entropy(engine.forward(run.model, images, run.dtype), targets).backward()
        run.optimizer.step()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            step()
    milliseconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 3000
                    for event in profiler.key_averages()}
    total = sum(milliseconds.values())
    groups = {"convolution forward": ("mkldnn_convolution",),
              "convolution backward": ("convolution_backward",),
              "norm": ("native_batch_norm", "native_batch_norm_backward")}
    shares = {group: sum(milliseconds.get(key, 0) for key in keys) / total
              for group, keys in groups.items()}
    # forward, gradients of data and of weights: three times the multiply-adds, two operations each
    convolutions = 6 * cfg.batch * provenance.multiply_adds(run.model, images.shape[1:])
    in_convolutions = shares["convolution forward"] + shares["convolution backward"]
    rate = convolutions / 1e6 / total / in_convolutions
    a = torch.randn(2048, 2048).to(run.dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    peak = 2 * 2048**3 / 1e9 / statistics.median(seconds)
    by_group = ", ".join(f"{group} {100 * share:.0f} %" for group, share in shares.items())
    print(f"{name}: {total:.0f} ms a step, {by_group}"
          f"; convolutions at {rate:.0f} GFLOP/s, a matrix product at {peak:.0f}")
    return {"name": name, "milliseconds": total, "shares": shares, "convolutions_gflops": rate,
            "matmul_gflops": peak}


def compare(name: str, other: str, pairs: list[tuple[float, float]]) -> dict:
    """Print and return one comparison of (our seconds, their seconds), a pair a round."""
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    ours, theirs = (statistics.median(side) for side in zip(*pairs))
    print(f"{name}: {1000 * ours:.0f} ms, {other} {1000 * theirs:.0f} ms, "
          f"ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)")
    return {"name": name, "against": other, "ratio": statistics.median(ratios), "seconds": pairs}


def main() -> None:
    if len(sys.argv) > 1:
        print(LOOPS[sys.argv[1]]())
        return
    device = devices.pick_device("auto")
    environment = provenance.environment(device, devices.pick_dtype("auto", device))
    print(f"{environment['device']}, torch {environment['torch']}")
    rounds = progress(range(ROUNDS), "training steps", unit="rounds")
    engines, plains, fixed = zip(*[[apart(loop) for loop in ("engine", "plain", "deterministic")]
                                   for _ in rounds])
    results = [compare(f"training step, HourGlass(2*32), batch {BATCH}, {SIZE} pixels",
                       "plain loop",
                       list(zip(engines, plains))),
               compare("the same step with --deterministic", "without", list(zip(fixed, engines)))]
    if device.type == "cpu" and torch.get_num_threads() > 1:
        for loop, name in (("hourglass", "HourGlass(2*32), batch 8, 128 pixels"),
                           ("vgg-resnet", "VGG-ResNet(2,32,maxpool), batch 128, 28 pixels")):
            pairs = [(apart(loop, 2), apart(loop))
                     for _ in progress(range(ROUNDS), "rows side by side", unit="rounds")]
            results.append(compare(f"training step, {name}, two side by side, a row's share",
                                   "one after the other", pairs))
    torch.manual_seed(0)
    scores = torch.rand(7_500_000)
    for share in (0.024, 0.4):  # a rare class and a frequent one
        positive = torch.rand(len(scores)) < 2 * share * scores
        pairs = []
        for _ in progress(range(3), "average precision", unit="rounds"):
            start = time.perf_counter()
            ours = metrics.average_precision(scores, positive)
            middle = time.perf_counter()
            theirs = average_precision_score(positive.numpy(), scores.numpy())
            pairs.append((middle - start, time.perf_counter() - middle))
            assert np.isclose(ours, theirs, rtol=0, atol=1e-12)
        results.append(compare(f"average precision, 7.5M pixels, {100 * share:.0f} % positive",
                               "scikit-learn", pairs))
    profiles = []
    if device.type == "cpu":
        devices.keep_freed_memory()
        profiles = [profiled("HourGlass(2*32), batch 8, 128 pixels", standard(128), facades(128)),
                    profiled("VGG-ResNet(2,32,maxpool), batch 128, 28 pixels",
                             train_cls.Config(epochs=1), garments(1))]
    record = Path(f"results/bench/speed-{devices.kernels(device)}.json")
    record.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "results": results, "profiles": profiles}
    records.write(record, content)


if __name__ == "__main__":
    main()
