"""The settings that all training scripts share, and what a record keeps of a run's settings."""

import dataclasses
import math
import typing
from dataclasses import dataclass

from lab.cli import defaults, flag, local
from lab.files import BadInput


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every training script can be told. A script's own Config adds its model and its data."""
    protocol: str = flag("report", "set of defaults, see below")
    split: typing.Literal["full", "dev"] = flag(
        "full", "full: test once at the end; dev: hold out training data")
    seed: int = flag(0, "initial weights, order and augmentation")
    epochs: int = flag(1, "passes over the training split")
    batch: int = flag(1, "images a step")
    lr: float = flag(1e-3, "peak learning rate of Adam")  # Adam's own default
    weight_decay: float = flag(1e-4, "L2 penalty of Adam")
    warmup: float = flag(0.0, "share of the steps that climb linearly to --lr; the rest falls to 0 "
                              "as a cosine")
    precision: typing.Literal["auto", "bf16", "fp16", "fp32"] = flag(
        "auto", "auto: bf16 where the device has it")
    deterministic: bool = flag(
        False, "CUDA: the same bits from every run, at some cost; a CPU does so anyway")
    compile: bool = flag(
        False, "torch.compile the network: for GPUs, on a CPU it may slow the steps")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...", local=True)
    data: str | None = flag(
        None, "a folder of your own images, see docs/own-data.md (default: the study's)",
        local=True, named=True)
    data_root: str | None = flag(
        None, "folder of the data sets (default: $DATA_ROOT, else ./data)", local=True)
    out: str | None = flag(None, "folder of seed<k>.json, seed<k>.pt (default: runs/ and what was "
                                 "changed)", local=True)
    dry_run: bool = flag(False, "one step of everything on one batch; leaves no file", local=True)
    plan: int = flag(0, "say what the rows on stdin, the flags of one a line, would take with so "
                        "many seeds, and stop", local=True)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise BadInput(f"--lr {self.lr}: must be above 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise BadInput(f"--weight-decay {self.weight_decay}: must be at least 0")
        if not 0 <= self.warmup < 1:
            raise BadInput(f"--warmup {self.warmup}: must be in [0, 1)")
        if self.plan < 0:
            raise BadInput(f"--plan {self.plan}: must be at least 1 seed")
        if not 0 <= self.seed < 2**31:
            raise BadInput(f"--seed {self.seed}: must be in [0, 2^31)")


def settings_of(cfg: Settings) -> dict[str, dict]:
    """What a record says of a run's settings: their values, and their defaults at the time."""
    known = {name: value for name, value in dataclasses.asdict(cfg).items()
             if name not in local(cfg)}
    return {"config": known, "defaults": defaults(type(cfg))}
