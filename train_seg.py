"""Train and evaluate one segmentation network on the facades: one row of Table 2, one seed.

    python train_seg.py                                  HourGlass(2*32), weighted cross entropy
    python train_seg.py --width 64 --loss wce
    python train_seg.py --hourglasses 4 --no-inter-skip
    python train_seg.py --arch unet --loss dice --seed 1
    python train_seg.py --protocol smoke --device cpu    seconds
    python train_seg.py --data FOLDER                    images and masks of your own

The same command goes on where a killed run stopped, and does nothing where it is complete.
"""

import functools
import sys
import time
import typing
from dataclasses import asdict, dataclass

import metrics
import models
from data import find_root, load_facades, load_own
from lab import cli, cost, engine
from lab.cli import flag
from lab.distributed import join_group
from lab.files import BadInput
from lab.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    arch: typing.Literal[tuple(models.SEGMENTERS)] = flag(
        "hourglass", "network; unet takes --width alone")
    hourglasses: int = flag(2, "hourglasses in a row")
    width: int = flag(32, "channels at full resolution; they double at each halving")
    down: typing.Literal[tuple(models.POOLS)] = flag(
        "maxpool", "how an encoder level halves the image")
    intra_skip: bool = flag(True, "residual add inside each block")
    inter_skip: bool = flag(True, "sum of each encoder level into the decoder level of its size")
    norm: bool = flag(True, "BatchNorm after each convolution")
    act: typing.Literal["relu", "gelu", "none"] = flag("relu", "activation")
    dropout: float = flag(0.2, "share of the bottleneck's values that are dropped")
    loss: typing.Literal[tuple(models.LOSSES)] = flag(
        "wce", "weighted cross entropy, cross entropy, or Dice")
    weight_power: float = flag(
        0.5, "wce: a class weighs its share of the training pixels to the -power")
    size: int = flag(256, "pixels a side that images and masks are resized to")
    flip: bool = flag(True, "mirror half of the training images; not where left and right differ")
    epochs: int = flag(40, "passes over the training split")
    batch: int = flag(16, "images a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hourglasses", "width"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.size < 16 or self.size % 16:
            raise BadInput(f"--size {self.size}: must be a multiple of 16, the networks halve four "
                           f"times")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"--dropout {self.dropout}: must be in [0, 1)")
        if not 0 <= self.weight_power <= 2:
            raise BadInput(f"--weight-power {self.weight_power}: must be in [0, 2]")
        if self.loss != "wce" and self.weight_power != cli.defaults(Config)["weight_power"]:
            raise BadInput(f"--weight-power is of --loss wce; --loss {self.loss} weighs no class")
        models.refuse_settings_of_others(asdict(self), cli.defaults(Config))


# desk: the cheapest settings that reach the report's numbers, see docs/choices.md; few steps want a
# high rate, and a high rate a long climb
PROTOCOLS = {
    "report": {},
    "desk": {"size": 128, "epochs": 10, "batch": 8, "lr": 2e-3, "warmup": 0.3},
    "smoke": {"epochs": 2, "size": 32, "width": 8},
}


def main(argv: list[str] | None = None) -> None:
    cfg = cli.parse(Config, __doc__, argv, PROTOCOLS)
    join_group(cfg.device)
    start = time.monotonic()
    if cfg.data:
        dataset = load_own(cfg.data, "segmentation", cfg.size, cfg.split)
    else:
        dataset = load_facades(find_root(cfg.data_root), cfg.split, cfg.size)
    reading = time.monotonic() - start
    if cfg.plan:
        parse = lambda row: cli.parse(Config, __doc__, row, PROTOCOLS)
        return cost.plan(argv, parse, dataset, models.build, models.cross_entropy, cfg.plan,
                         reading)
    run = engine.Run(cfg, dataset, models.build)
    if run.record is None:
        counts = run.data.train.class_counts(len(dataset.classes))
        weights = models.class_weights(counts, cfg.weight_power).to(run.device)
        if cfg.loss == "wce":
            print("class weights " + "  ".join(
                f"{name} {weight:.2f}" for name, weight in zip(dataset.classes, weights.tolist())))
        loss = functools.partial(models.LOSSES[cfg.loss], weight=weights)
        engine.fit(run, loss, flip=cfg.flip)
        scores, arrays = run.evaluate(
            metrics.segmentation, lambda logits, split: metrics.score_histograms(
                logits.softmax(1), split.targets, split.photos))
        run.finish(scores, arrays, class_pixels=counts.tolist(),
                   class_weights=weights.tolist() if cfg.loss == "wce" else None)
    for name, scores in run.record["metrics"].items():
        print(f"{name}: MAP {100 * scores['map']:.1f}  WGAP {100 * scores['wgap']:.1f}  "
              f"mIoU {100 * scores['miou']:.1f}  "
              f"pixel accuracy {100 * scores['pixel_accuracy']:.1f}  "
              f"({scores['images']} images of {run.record['about_data']['name']})")
    print(metrics.class_table({
        f"{split} {key.upper()}": scores[key]
        for split, scores in run.record["metrics"].items() for key in ("ap", "iou")}))
    print("dry run passed" if cfg.dry_run else f"record {run.files.record}")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
