"""The pictures of the page, out of the test sets: web/images/. Run once, and committed.

    PYTHONPATH=. python web/pictures.py

garments.png: the first four test images of each class of Fashion-MNIST, a class a column.
digits.png: the first three test images of each digit of MNIST. facades/: six photos of the test
split of mini facade, as they are.
"""

import io
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import data
from lab import cli
from lab.batches import Split
from lab.files import write_atomic

OUT = Path("web/images")
PHOTOS = (57, 24, 35, 44, 31, 46)  # of six buildings, with every class among them
LICENCE = """garments.png: Fashion-MNIST, MIT licence (c) 2017 Zalando SE.
digits.png: MNIST (Y. LeCun and C. Cortes), CC BY-SA 3.0.
facades/*.jpg: mini facade, unchanged, CC BY-SA 4.0: crops out of the CMP Facade Database
(R. Tylecek and R. Sara, Spatial Pattern Templates for Recognition of Objects with Regular
Structure, GCPR 2013).
"""


def sprite(split: Split, rows: int) -> Image.Image:
    """The first so many images of each class: a class a column."""
    def column(label: int) -> Tensor:
        return split.images[split.targets == label][:rows, 0].reshape(-1, 28)
    return Image.fromarray(torch.cat([column(label) for label in range(10)], 1).numpy())


def main() -> None:
    root = data.find_root(None)
    (OUT / "facades").mkdir(parents=True, exist_ok=True)
    for name, rows in (("garments", 4), ("digits", 3)):
        split = data.load_idx(root, {"garments": "FashionMNIST", "digits": "MNIST"}[name])[1]
        content = io.BytesIO()
        sprite(split, rows).save(content, "PNG", optimize=True)
        write_atomic(OUT / f"{name}.png", content.getvalue())
    for number in PHOTOS:
        photo = root / f"mini_facade/test_dev/eecs442_{number:04d}.jpg"
        write_atomic(OUT / "facades" / photo.name, photo.read_bytes())
    write_atomic(OUT / "LICENCE.txt", LICENCE.encode())


if __name__ == "__main__":
    sys.exit(cli.guard(main))
