"""Draws small sets of one's own, for docs/own-data.md and the tests: python tests/made_set.py OUT.

    OUT/streets     segmentation: seven classes, photos of several sizes, void pixels, groups
    OUT/shapes      classification: four classes of colour images, no test folder

Images of one street share its light and its colours, and lie in groups.csv: they would be no
independent test of each other. Equal arguments give equal bytes.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"sky": "#86b4e9", "wall": "#c8a078", "window": "#2850a0", "door": "#803c1e",
           "roof": "#b43c3c", "tree": "#288c3c", "road": "#606060"}
SKY, WALL, WINDOW, DOOR, ROOF, TREE, ROAD = range(7)
VOID = 255
SIZES = ((96, 64), (64, 96), (120, 64), (80, 80), (64, 64))  # (width, height)
SHAPES = ("disc", "ring", "cross", "stripes")


def street(group: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A house in street `group`: RGB uint8 (H, W, 3) and its classes, uint8 (H, W), VOID around."""
    light = np.random.default_rng([1, group])
    pick = np.random.default_rng([2, group, index])
    width, height = SIZES[pick.integers(len(SIZES))]
    colours = np.array([[int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in
                        CLASSES.values()]) + light.integers(-35, 36, (7, 3))
    mask = np.full((height, width), SKY, np.uint8)

    def paint(label, x0, y0, x1, y1):  # in hundredths of the sides
        mask[round(y0 * height / 100):round(y1 * height / 100),
             round(x0 * width / 100):round(x1 * width / 100)] = label

    left, right, top = pick.integers(5, 25), pick.integers(70, 95), pick.integers(25, 40)
    paint(ROAD, 0, 86, 100, 100)
    paint(WALL, left, top, right, 88)
    paint(ROOF, left - 3, top - pick.integers(8, 16), right + 3, top)
    columns = pick.integers(2, 4)
    for i in range(columns):
        x = left + (right - left) * (i + 0.25) / columns
        paint(WINDOW, x, top + 8, x + (right - left) * 0.5 / columns, top + 24)
    x = pick.integers(left + 4, right - 18)
    paint(DOOR, x, 62, x + 13, 88)
    down, across = np.ogrid[:height, :width]
    x, y = (0, right)[pick.integers(2)] + pick.integers(0, 8), pick.integers(55, 70)
    tree = (across * 100 / width - x)**2 + (down * 100 / height - y)**2 < pick.integers(12, 18)**2
    mask[tree] = TREE
    image = colours[mask] + pick.normal(0, 12, (height, width, 1)) + light.integers(-25, 26)
    border = mask != np.roll(mask, 1, 1)  # where two classes meet no one can tell
    mask[border] = VOID
    return image.clip(0, 255).astype(np.uint8), mask


def make_streets(root: Path, groups: int = 10, each: int = 3, test: bool = True) -> Path:
    """A set for segmentation: a third of the streets in test/, or, without it, all in train/."""
    (root / "train/images").mkdir(parents=True)
    (root / "train/masks").mkdir()
    (root / "classes.txt").write_text("".join(f"{name} {colour}\n"
                                              for name, colour in CLASSES.items()))
    lines = ["image,group"]
    for group in range(groups):
        part = "test" if test and group % 3 == 2 else "train"
        for index in range(each):
            image, mask = street(group, index)
            suffix = (".jpg", ".JPG", ".png", ".bmp")[(group + index) % 4]
            name = f"{group:02d}-{index}"
            for kind in ("images", "masks"):
                (root / part / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / part / "images" / f"{name}{suffix}")
            Image.fromarray(mask).save(root / part / "masks" / f"{name}.png")
            lines.append(f"{name}{suffix},street {group}")
    (root / "groups.csv").write_text("\n".join(lines) + "\n")
    return root


def shape(kind: int, index: int) -> np.ndarray:
    """A coloured figure on noise, RGB uint8 (H, W, 3), of one of several sizes."""
    pick = np.random.default_rng([3, kind, index])
    width, height = SIZES[pick.integers(len(SIZES))]
    down, across = np.mgrid[:height, :width]
    x, y = across / width - pick.uniform(0.4, 0.6), down / height - pick.uniform(0.4, 0.6)
    radius, size = np.hypot(x, y), pick.uniform(0.2, 0.35)
    inside = [radius < size, abs(radius - size) < 0.06,
              ((abs(x) < 0.07) | (abs(y) < 0.07)) & (radius < 1.2 * size),
              (np.sin(40 * x) > 0) & (radius < size)][kind]
    image = pick.normal(110, 20, (height, width, 3))
    image[inside] += pick.uniform(-90, 90, 3) + 40 * np.sign(pick.normal(0, 1, 3))
    return image.clip(0, 255).astype(np.uint8)


def make_shapes(root: Path, each: int = 20, grey: bool = False) -> Path:
    """A set for classification of so many images of each class, without a test folder."""
    for kind, name in enumerate(SHAPES):
        (root / "train" / name).mkdir(parents=True)
        for index in range(each):
            image = Image.fromarray(shape(kind, index)).convert("L" if grey else "RGB")
            image.save(root / "train" / name / f"{index:03d}.png")
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the sets")
    args = parser.parse_args()
    for made in (make_streets(args.out / "streets"), make_shapes(args.out / "shapes")):
        print(made)


if __name__ == "__main__":
    main()
