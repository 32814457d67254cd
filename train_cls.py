"""Train and evaluate one VGG-ResNet on Fashion-MNIST: one row of Table 1, one seed.

    python train_cls.py                                  VGG-ResNet(2,32,maxpool), 20 epochs
    python train_cls.py --depth 4 --down stride --no-skip --act gelu
    python train_cls.py --block transformer --seed 1
    python train_cls.py --protocol smoke --device cpu    seconds
    python train_cls.py --data FOLDER --size 64          images of your own, by class
    python train_cls.py --composites --tie 0.9           on grids of one garment and three digits
    python train_cls.py --composites --frozen --base runs/.../seed0.pt --epochs 1

The same command goes on where a killed run stopped, and does nothing where it is complete.
"""

import sys
import time
import typing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import metrics
import models
from data import find_root, load_composites, load_fashion, load_own
from lab import cli, cost, engine, records
from lab.batches import Dataset, Split
from lab.cli import flag
from lab.distributed import join_group
from lab.files import BadInput
from lab.provenance import weights_digest
from lab.settings import Settings, settings_of


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    arch: typing.Literal[tuple(models.CLASSIFIERS)] = flag("vgg-resnet", "network")
    depth: int = flag(2, "residual blocks in each of the three stages")
    width: int = flag(32, "channels of the first stage; the next ones have 2x and 4x")
    down: typing.Literal[tuple(models.POOLS)] = flag(
        "maxpool", "how the second and third stage halve the image")
    skip: bool = flag(True, "residual add inside each block")
    norm: bool = flag(True, "BatchNorm after each convolution")
    act: typing.Literal["relu", "gelu", "none"] = flag("relu", "activation")
    block: typing.Literal["residual", "transformer"] = flag("residual", "blocks of the last stage")
    composites: bool = flag(
        False, "train on 2x2 grids of one Fashion-MNIST image and three MNIST digits")
    tie: float = flag(
        0.0, "composites: strength of the spurious tie of Trouser to the digit 3, 0 to 1")
    frozen: bool = flag(False, "keep the features of --base and train the classifier alone")
    base: str | None = flag(
        None, "frozen: seed<k>.pt of a finished run of the same network", local=True, named=True)
    size: int | None = flag(
        None, "--data: pixels a side that images are brought to, a multiple of 4 (64)")
    train_images: int = flag(60000, "use only the first so many training images; of --data, some "
                                    "of each class, and 60000 means all; of --composites a "
                                    "quarter as many are held out")
    epochs: int = flag(20, "passes over the training split")
    batch: int = flag(128, "images a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "width", "train_images"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at "
                               f"least 1")
        models.refuse_settings_of_others(asdict(self), cli.defaults(Config))
        if not 0 <= self.tie <= 1:
            raise BadInput(f"--tie {self.tie}: must be in [0, 1]")
        if self.tie and not self.composites:
            raise BadInput("--tie is of the digits in --composites: give both")
        if self.size is not None and self.data is None:
            raise BadInput(f"--size {self.size} is of images of your own: give --data too")
        if self.size is not None and (self.size < 4 or self.size % 4):
            raise BadInput(f"--size {self.size}: must be a multiple of 4, the network halves twice")
        if self.data is not None and self.composites:
            raise BadInput("--composites are made of Fashion-MNIST and MNIST, not of --data")
        if self.frozen != (self.base is not None):
            raise BadInput("--frozen takes its features from --base: give both")


OWN_SIZE = 64  # of --data: photographs say little in Fashion-MNIST's 28 pixels
# desk: the cheapest settings that reach the report's numbers, see docs/choices.md
PROTOCOLS = {
    "report": {},
    "desk": {"epochs": 3, "lr": 2e-3, "warmup": 0.2},
    "smoke": {"epochs": 2, "train_images": 512, "width": 8},
}


def trained_base(cfg: Config, dataset: Dataset) -> tuple[dict[str, torch.Tensor], Dataset]:
    """The weights that --frozen starts from, and the data normalised as they were trained on.

    BadInput if --base is another network, or was trained on another --split: on what is held out.
    """
    model, record = engine.load_trained(Path(cfg.base), torch.device("cpu"), models.build)
    same = [*models.arguments_of(asdict(cfg)), "split"]
    other = records.differing(record, settings_of(cfg), same)
    for name, (theirs, ours) in other.items():
        raise BadInput(f"--base {cfg.base} has {name} {theirs}, this run has {ours}: give the "
                       f"flags that it was trained with")
    about = record["about_data"]
    normalised = replace(dataset, mean=tuple(about["mean"]), std=tuple(about["std"]))
    return model.state_dict(), normalised


def per_image(logits: torch.Tensor, split: Split) -> dict[str, np.ndarray]:
    """What an interval over the held-out images needs: hits, and which images belong together."""
    found = {"prediction": logits.argmax(1).byte().cpu().numpy(),
             "target": split.targets.cpu().numpy()}
    if len(split.photos.unique()) < len(split):
        found["group"] = split.photos.cpu().numpy()
    return found


def main(argv: list[str] | None = None) -> None:
    cfg = cli.parse(Config, __doc__, argv, PROTOCOLS)
    join_group(cfg.device)
    start = time.monotonic()
    if cfg.data:
        dataset = load_own(cfg.data, "classification", cfg.size or OWN_SIZE, cfg.split,
                           cfg.train_images)
    elif cfg.composites:
        dataset = load_composites(find_root(cfg.data_root), cfg.split, cfg.train_images, cfg.tie)
    else:
        dataset = load_fashion(find_root(cfg.data_root), cfg.split, cfg.train_images)
    reading = time.monotonic() - start
    if cfg.plan:
        parse = lambda row: cli.parse(Config, __doc__, row, PROTOCOLS)
        return cost.plan(argv, parse, dataset, models.build, models.cross_entropy, cfg.plan,
                         reading)
    weights, dataset = trained_base(cfg, dataset) if cfg.frozen else (None, dataset)
    run = engine.Run(cfg, dataset, models.build, weights)
    if cfg.frozen:
        run.model.freeze()
    if run.record is None:
        engine.fit(run, models.cross_entropy)
        scores, arrays = run.evaluate(metrics.classification, per_image)
        run.finish(scores, arrays,
                   features_sha256=weights_digest(run.model.stages) if cfg.frozen else None)
    for name, scores in run.record["metrics"].items():
        print(f"{name} accuracy {100 * scores['accuracy']:.2f}% of {scores['images']} images "
              f"of {run.record['about_data']['name']}")
    print("dry run passed" if cfg.dry_run else f"record {run.files.record}")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
