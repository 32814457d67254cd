"""Should photos that are not square be stretched to a square, or padded to one?

    PYTHONPATH=. python tests/stretch_or_pad.py [--seeds 3] [--record FILE.json]

Trains the same network on the streets of made_set.py both ways and scores its masks at the photos'
own sizes. Padded, a photo keeps its shape and the rest of the square is void; it loses pixels. The
record is what docs/own-data.md says.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from made_set import CLASSES, VOID, make_streets
from PIL import Image

import metrics
import models
import train_seg
from lab import batches, cli, engine, records
from lab.files import colours, mask_to, read_image, to_size
from lab.provenance import environment

SIZE = 64
FLAGS = ["--protocol", "smoke", "--size", str(SIZE), "--epochs", "40", "--batch", "6",
         "--lr", "4e-3", "--warmup", "0.1", "--device", "cpu"]
STREETS = {"groups": 45, "each": 2}


def square(pixels: np.ndarray, fill: int) -> np.ndarray:
    """The photo or mask in the upper left corner of the smallest square."""
    height, width = pixels.shape[:2]
    side = max(height, width)
    padding = [(0, side - height), (0, side - width)] + [(0, 0)] * (pixels.ndim - 2)
    return np.pad(pixels, padding, constant_values=fill)


def pad_all(source: Path, target: Path) -> Path:
    """A copy of a set whose photos are padded to squares, with void masks around them."""
    for path in source.rglob("*"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name in ("images", "masks"):
            fill = VOID if path.parent.name == "masks" else 0
            image = Image.fromarray(square(np.asarray(Image.open(path)), fill))
            image.save(copy.with_suffix(".png"))
        elif path.name == "classes.txt":
            copy.write_bytes(path.read_bytes())
        elif path.name == "groups.csv":
            lines = [line.split(",") for line in path.read_text().splitlines()]
            copy.write_text("".join(f"{name.split('.')[0]},{group}\n" for name, group in lines))
    return target


@torch.inference_mode()
def score(checkpoint: Path, photos: Path, padded: bool) -> tuple[float, float]:
    """Mean IoU and pixel accuracy over the test photos, each at its own size."""
    model, record = engine.load_trained(checkpoint, torch.device("cpu"), models.build)
    about, counts = record["about_data"], 0
    for path in sorted((photos / "test/images").iterdir()):
        truth = np.array(Image.open(photos / "test/masks" / f"{path.stem}.png"))
        image = colours(read_image(path), 3)
        pixels = to_size(square(image, 0) if padded else image, SIZE)
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        logits = model(batches.normalise(batch, tuple(about["mean"]), tuple(about["std"])))
        side = max(truth.shape)
        shape = (side, side) if padded else truth.shape
        found = mask_to(logits[0].argmax(0).numpy(), *shape)[:truth.shape[0], :truth.shape[1]]
        counts = counts + metrics.confusion(torch.from_numpy(found.copy()),
                                            torch.from_numpy(truth), len(CLASSES))
    accuracy = (counts.diag().sum() / counts.sum()).item()
    return metrics.mean_present(metrics.ious(counts)), accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", type=Path, default="results/bench/stretch_or_pad.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        streets = make_streets(Path(folder, "streets"), **STREETS)
        sets = {"stretched": streets, "padded": pad_all(streets, Path(folder, "padded"))}
        found = {how: [] for how in sets}
        for seed in range(args.seeds):
            for how, data in sets.items():
                out = Path(folder, "runs", how, str(seed))
                train_seg.main([*FLAGS, "--data", str(data), "--seed", str(seed),
                                "--out", str(out)])
                found[how].append(score(out / f"seed{seed}.pt", streets, how == "padded"))
    args.record.parent.mkdir(parents=True, exist_ok=True)
    records.write(args.record, {
        "flags": FLAGS, "streets": STREETS,
        "environment": environment(torch.device("cpu"), torch.float32),
        "results": {how: dict(zip(("mean_iou", "pixel_accuracy"), zip(*scores)))
                    for how, scores in found.items()}})
    for how, scores in found.items():
        ious, accuracies = (100 * np.array(values) for values in zip(*scores))
        print(f"{how:<10} mean IoU {ious.mean():.1f} ({', '.join(f'{v:.1f}' for v in ious)})  "
              f"pixel accuracy {accuracies.mean():.1f}")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
