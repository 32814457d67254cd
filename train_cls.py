"""Train and evaluate one VGG-ResNet on Fashion-MNIST: one row of Table 1, one seed.

    python train_cls.py                                  VGG-ResNet(2,32,maxpool), 20 epochs
    python train_cls.py --depth 4 --down stride --no-skip --act gelu
    python train_cls.py --block transformer --seed 1
    python train_cls.py --protocol smoke --device cpu    seconds

The same command goes on where a killed run stopped, and does nothing where it is complete.
"""

import sys
import typing
from dataclasses import dataclass

import engine
import metrics
import models
from data import BadInput, find_root, load_fashion
from engine import flag


@dataclass(frozen=True, kw_only=True)
class Config(engine.Settings):
    depth: int = flag(2, "residual blocks in each of the three stages")
    width: int = flag(32, "channels of the first stage; the next ones have 2x and 4x")
    down: typing.Literal["maxpool", "stride"] = flag("maxpool", "how the second and third stage halve the image")
    skip: bool = flag(True, "residual add inside each block")
    norm: bool = flag(True, "BatchNorm after each convolution")
    act: typing.Literal["relu", "gelu", "none"] = flag("relu", "activation")
    block: typing.Literal["residual", "transformer"] = flag("residual", "blocks of the last stage")
    train_images: int = flag(60000, "use only the first so many training images")
    epochs: int = flag(20, "passes over the training split")
    batch: int = flag(128, "images a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "width", "train_images"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


PROTOCOLS = {
    "report": {},
    "small": {"epochs": 2, "train_images": 20000},
    "smoke": {"epochs": 2, "train_images": 512, "width": 8},
}


def main(argv: list[str] | None = None) -> None:
    cfg = engine.parse(Config, __doc__, argv, PROTOCOLS)
    dataset = load_fashion(find_root(cfg.data_root), cfg.split, cfg.train_images)
    run = engine.Run(cfg, dataset)
    if run.record is None:
        engine.fit(run, models.cross_entropy)
        run.finish(*run.evaluate(metrics.classification, lambda logits, split: {
            "prediction": logits.argmax(1).byte().cpu().numpy(), "target": split.targets.cpu().numpy()}))
    for name, scores in run.record["metrics"].items():
        print(f"{name} accuracy {100 * scores['accuracy']:.2f}% of {scores['images']} images")
    print("dry run passed" if cfg.dry_run else f"record {run.record_file}")


if __name__ == "__main__":
    sys.exit(engine.guard(main))
