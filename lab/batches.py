"""Data sets as bytes, on the training device or beside it, and their batches."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lab.devices import free_memory
from lab.files import BadInput

VOID = 255  # in a mask: a pixel that no one has labelled, out of losses, metrics and weights
RANKING = 80  # bytes a pixel, measured: one class is ranked by int64 and float64 of its pixels


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W); targets uint8 (N,) labels or (N, H, W) masks; photos int64 (N,).

    Images of one photo, or of any other group of the user's, share a number in `photos`: they are
    not independent, so intervals resample groups.
    """
    images: Tensor
    targets: Tensor
    photos: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Split":
        return Split(change(self.images), change(self.targets), change(self.photos))

    def class_counts(self, classes: int) -> Tensor:
        """int64 (classes,): how many images or pixels each class has; void pixels count nowhere."""
        return torch.bincount(self.targets.reshape(-1), minlength=classes)[:classes]


@dataclass(frozen=True)
class Dataset:
    """Two splits and what a run record says of them; `held_out` is "test", or "val" in --split dev.

    `device` is where batches go, if that is not where the splits lie.
    """
    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    digest: str
    synthetic: bool
    train: Split
    test: Split
    held_out: str = "test"
    palette: tuple[tuple[int, int, int], ...] | None = None  # the colour of each class in a mask
    own: bool = False  # a folder of the user's, not a set of the study
    device: torch.device | None = None

    @property
    def task(self) -> str:
        return "classification" if self.train.targets.ndim == 1 else "segmentation"

    def to(self, device: torch.device) -> "Dataset":
        """The set on a device. One that would fill it stays in host memory: `streamed` batches."""
        free = free_memory(device)
        needed = stored_memory(self) + logits_memory(self)
        if free is not None and needed > free // 2:  # the other half is the network's
            return replace(self, device=device)
        move = lambda tensor: tensor.to(device)
        return replace(self, train=self.train.map(move), test=self.test.map(move), device=device)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 channels_last, zero mean and unit variance in training."""
        return normalise(images, self.mean, self.std)


def describe(data: Dataset) -> str:
    """What a set holds: counts, class shares and digest, one line each."""
    kind = "drawn" if data.synthetic else "real"
    lines = [f"{data.name} ({kind})", f"  sha256 {data.digest}"]
    for name, split in (("train", data.train), (data.held_out, data.test)):
        counts = split.class_counts(len(data.classes)).double()
        shares = "  ".join(f"{label} {100 * share:.1f}%"
                           for label, share in zip(data.classes, counts / counts.sum()))
        size = "x".join(str(n) for n in split.images.shape[1:])
        photos = len(split.photos.unique())
        lines.append(f"  {name:<5} {len(split):>6} images {size}, {photos} photos: {shares}")
    return "\n".join(lines)


def stored_memory(data: Dataset) -> int:
    """Bytes of both splits."""
    return sum(tensor.nbytes for split in (data.train, data.test)
               for tensor in (split.images, split.targets))


def logits_memory(data: Dataset) -> int:
    """Bytes that the larger split's evaluation takes at most."""
    return scores_memory(len(data.classes),
                         max(split.targets.numel() for split in (data.train, data.test)))


def scores_memory(classes: int, targets: int) -> int:
    """Bytes that scoring takes at most: logits, probabilities, and the ranking of one class."""
    return (8 * classes + RANKING) * targets


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, C, H, W) -> float32 channels_last, (value / 255 - mean) / std per channel."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(per_channel(mean, images.device)).div_(per_channel(std, images.device))


@functools.cache  # made once: a copy to a GPU in each step would wait for it
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return 255 * torch.tensor(values, device=device).view(1, -1, 1, 1)


def check_fit(data: Dataset, model: nn.Module, images: int) -> None:
    """BadInput where a set and a network do not fit together: before training, not in its midst.

    `images` are those of a step: some networks do not train on one, whose norm has no variance.
    """
    classes = len(data.classes)
    for name, split in (("train", data.train), (data.held_out, data.test)):
        if len(split) == 0:
            raise BadInput(f"{data.name}: its {name} split has no image")
        targets = split.targets
        if targets.ndim > 1:
            targets = targets.where(targets != VOID, 0)
        if (most := int(targets.max())) >= classes:
            raise BadInput(f"{data.name}: a target of the {name} split is {most}, but the "
                           f"{classes} classes are 0 to {classes - 1}; name that class, or mend "
                           f"the target")
    shape = tuple(data.train.images.shape[1:])
    form = copy.deepcopy(model).to("meta").train()
    try:
        with torch.no_grad():
            logits = form(torch.empty(images, *shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{data.name}: the network does not train on its images of {shape}, "
                       f"{images} a step ({reason})") from error
    expected = (images, classes, *data.train.targets.shape[1:])
    if tuple(logits.shape) != expected:
        raise BadInput(f"{data.name}: the network gives {tuple(logits.shape)} for {images} images, "
                       f"where their targets and {classes} classes want {expected}")


def taken(data: Dataset, split: Split,
          indexes: Iterable[slice | Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and targets on the device, uint8 as they are stored: a batch for each of `indexes`."""
    if data.device is not None and data.device.type != split.images.device.type:
        yield from streamed(split, indexes, data.device)
    else:
        for index in indexes:
            yield split.images[index], split.targets[index]


def streamed(split: Split, indexes: Iterable[slice | Tensor],
             device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a split in host memory: each is copied while the step before it runs.

    Through pinned memory, whose copies do not hold up the program, and on a stream of their own,
    whose copies do not queue behind the step. Pinned is a batch, not the set: what is pinned is
    lost to everyone else.
    """
    beside, waiting = torch.cuda.Stream(device), None
    for index in indexes:
        pinned = [tensor[index].pin_memory() for tensor in (split.images, split.targets)]
        with torch.cuda.stream(beside):
            batch = [tensor.to(device, non_blocking=True) for tensor in pinned]
            copied = torch.cuda.Event()
            copied.record(beside)
        if waiting is not None:
            yield arrived(*waiting, device)
        waiting = batch, copied
    if waiting is not None:
        yield arrived(*waiting, device)


def arrived(batch: list[Tensor], copied: torch.cuda.Event,
            device: torch.device) -> tuple[Tensor, ...]:
    """The batch, for use on the current stream, which waits for its copy; the program does not."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(current)  # else its memory could be reused before the step is over
    return tuple(batch)


def in_order(data: Dataset, split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The split in order: normalised images float32 (n, C, H, W), uint8 targets, n <= batch."""
    parts = (slice(i, i + batch) for i in range(0, len(split), batch))
    for images, targets in taken(data, split, parts):
        yield data.normalise(images), targets


def shuffled(data: Dataset, batch: int, seed: int, epoch: int, flip: bool,
             first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of the training split on the device, wholly determined by (seed, epoch).

    It begins with step `first`. Nothing else is random and nothing is carried over, so an epoch
    can be repeated exactly. `flip` mirrors each image and mask with probability 1/2. The last,
    incomplete batch is left out (each epoch another set of images): every step has one shape.
    """
    split = data.train
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    order = torch.randperm(len(split), generator=generator)
    mirrored = (torch.rand(len(split), generator=generator) < 0.5)[order]
    mirrored = mirrored.to(data.device or split.images.device)
    order = order.to(split.images.device)
    steps = [slice(step * batch, (step + 1) * batch)
             for step in range(first, steps_per_epoch(split, batch))]
    parts = taken(data, split, (order[step] for step in steps))
    for step, (images, targets) in zip(steps, parts):
        if flip:
            mirror = mirrored[step].view(-1, 1, 1)
            images = torch.where(mirror[:, None], images.flip(-1), images)
            targets = torch.where(mirror, targets.flip(-1), targets)
        yield data.normalise(images), targets


def steps_per_epoch(split: Split, batch: int) -> int:
    return max(1, len(split) // batch)


def mixed_seed(*parts: int) -> int:
    """32 mixed bits, all that torch's CPU generator heeds, of (seed, epoch) or (seed, epoch, step).

    A trailing 0 counts for nothing, so that steps are numbered from 1.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
