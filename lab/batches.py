"""Data sets that lie on the training device as bytes, and their batches."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lab.files import BadInput


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, C, H, W); targets uint8, labels (N,) or masks (N, H, W); photos int64."""
    images: Tensor
    targets: Tensor
    photos: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Split":
        return Split(change(self.images), change(self.targets), change(self.photos))

    def class_counts(self, classes: int) -> Tensor:
        """int64 (classes,): how many images or pixels each class has."""
        return torch.bincount(self.targets.reshape(-1), minlength=classes)


@dataclass(frozen=True)
class Dataset:
    """Two splits and what a record says of them; `held_out` is "test", or "val" in --split dev."""
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

    @property
    def task(self) -> str:
        return "classification" if self.train.targets.ndim == 1 else "segmentation"

    def to(self, device: torch.device) -> "Dataset":
        move = lambda tensor: tensor.to(device)
        return replace(self, train=self.train.map(move), test=self.test.map(move))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 channels_last, mean 0, variance 1 over the train split."""
        return normalise(images, self.mean, self.std)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, C, H, W) -> float32 channels_last, (value / 255 - mean) / std per channel."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(per_channel(mean, images.device)).div_(per_channel(std, images.device))


@functools.cache  # made once: a copy to a GPU in each step would wait for it
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return 255 * torch.tensor(values, device=device).view(1, -1, 1, 1)


def check_fit(data: Dataset, model: nn.Module) -> None:
    """BadInput where a set and a network do not fit together: before training, not in its midst."""
    classes = len(data.classes)
    for name, split in (("train", data.train), (data.held_out, data.test)):
        if len(split) == 0:
            raise BadInput(f"{data.name}: its {name} split has no image")
        if (most := int(split.targets.max())) >= classes:
            raise BadInput(f"{data.name}: a target of the {name} split is {most}, but the "
                           f"{classes} classes are 0 to {classes - 1}; name that class, or mend "
                           f"the target")
    shape = tuple(data.train.images.shape[1:])
    form = copy.deepcopy(model).to("meta").eval()
    try:
        with torch.no_grad():
            logits = form(torch.empty(1, *shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{data.name}: the network does not take its images of {shape} "
                       f"({reason})") from error
    expected = (1, classes, *data.train.targets.shape[1:])
    if tuple(logits.shape) != expected:
        raise BadInput(f"{data.name}: the network gives {tuple(logits.shape)} for an image, where "
                       f"its targets and {classes} classes want {expected}")


def in_order(data: Dataset, split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The split in order: normalised images float32 (n, C, H, W) and uint8 targets, n <= batch."""
    for i in range(0, len(split), batch):
        yield data.normalise(split.images[i:i + batch]), split.targets[i:i + batch]


def shuffled(data: Dataset, batch: int, seed: int, epoch: int, flip: bool,
             first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of the training split, all on its device, from step `first` on.

    It is wholly determined by (seed, epoch), so that an epoch can be repeated exactly. `flip`
    mirrors each image and mask with probability 1/2. The last, incomplete batch is left out (each
    epoch another set of images): every step has one shape.
    """
    split = data.train
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    order = torch.randperm(len(split), generator=generator).to(split.images.device)
    mirrored = (torch.rand(len(split), generator=generator) < 0.5).to(split.images.device)
    for step in range(first, steps_per_epoch(split, batch)):
        index = order[step * batch:(step + 1) * batch]
        images, targets = split.images[index], split.targets[index]
        if flip:
            mirror = mirrored[index].view(-1, 1, 1)
            images = torch.where(mirror[:, None], images.flip(-1), images)
            targets = torch.where(mirror, targets.flip(-1), targets)
        yield data.normalise(images), targets


def steps_per_epoch(split: Split, batch: int) -> int:
    return max(1, len(split) // batch)


def mixed_seed(*parts: int) -> int:
    """32 bits mixed of (seed, epoch) or (seed, epoch, step): torch's CPU generator takes no more.

    A trailing 0 counts for nothing, so that steps are numbered from 1.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
