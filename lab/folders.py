"""A folder of the user's images as a Dataset: checked, brought to one size, split by groups.

    FOLDER/classes.txt                    segmentation: see lab/labels.py
    FOLDER/{train,test}/images/NAME.jpg   any format of lab/files.py, any size, any case
    FOLDER/{train,test}/masks/NAME.png    or NAME.jpg and NAME.png together in train/ and test/

    FOLDER/{train,test}/CLASS/NAME.jpg    classification: one folder a class, no folders in it

    FOLDER/groups.csv                     image,group: a group never parts between two splits

Without test/ a fifth of the groups is held out, see lab/splits.py. Images and masks are stretched
to a square, as predict.py and the C++ program do.
"""

import hashlib
import itertools
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from lab.batches import Dataset, Split, scores_memory
from lab.devices import host_memory
from lab.files import IMAGE_FORMATS, ORIENTATION, TURNS, BadInput, colours, digest_of_digests
from lab.files import read_image, shown
from lab.labels import Legend, check_names, default_palette, read_legend, read_mask
from lab.progress import progress
from lab.splits import Item, digest_order, divide

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in IMAGE_FORMATS}
LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # what file managers and archives leave behind
READ = ("classes.txt", "groups.csv", "train", "test", "test_dev")
NAME_CLASSES = "name the classes there, one a line in the order of the masks' values"
READERS = min(4, os.cpu_count() or 1)  # images decoded at a time: more wait for the disk


# ---- what lies where ----

def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by stem; nothing where there is none, nothing hidden."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")
                   and path.name.lower() not in LITTER), key=lambda path: (path.stem, path.name))


def check_entries(folder: Path, read: tuple[str, ...]) -> None:
    """BadInput for what would be passed over though it was meant to be read.

    That is a link that leads nowhere, and one of these names in another case, where case counts.
    """
    for path in entries(folder):
        if not path.exists():
            raise BadInput(f"{shown(path)} is a link that leads nowhere; mend or remove it")
        name = path.name.lower()
        if name in read and name != path.name and not (
                (folder / name).exists() and path.samefile(folder / name)):
            raise BadInput(f"{path} is not read: its name must be {name}; rename or remove it")


def listing(folder: Path) -> dict[str, Path]:
    """What lies in a folder, by names in lower case; nothing where it cannot be read."""
    try:
        return {path.name.lower(): path for path in sorted(folder.iterdir())}
    except OSError:  # no folder, or one of another user's
        return {}


def has_pairs(folder: Path) -> bool:
    """Whether an image NAME.jpg has a NAME.png beside it."""
    inside = listing(folder)
    return any(name.endswith(".jpg") and f"{name[:-4]}.png" in inside for name in inside)


def note(paths: list[Path], what: str) -> None:
    """Say of some files, if there are any, what a user may want to know."""
    if paths:
        more = f" and {len(paths) - 1} more" * (len(paths) > 1)
        print(f"NOTE: {shown(paths[0])}{more}: {what}", file=sys.stderr)


def images_in(folder: Path) -> list[Path]:
    """The files that are images by their names; what else lies there is passed over with a NOTE."""
    found = entries(folder)
    images = [path for path in found if path.suffix.lower() in SUFFIXES]
    note([path for path in found if path.suffix.lower() not in SUFFIXES],
         "no image by the name, passed over")
    return images


def by_stem(paths: list[Path]) -> dict[str, Path]:
    stems = {}
    for path in paths:
        if path.stem in stems:
            raise BadInput(f"{stems[path.stem]} and {path.name} have one name, so that a mask "
                           f"would belong to both; rename one")
        stems[path.stem] = path
    return stems


def pairs(part: Path) -> list[tuple[Path, Path]]:
    """Each image of a part and its mask, sorted by name. BadInput where one lacks the other."""
    if (part / "images").is_dir() or (part / "masks").is_dir():
        images, masks = images_in(part / "images"), images_in(part / "masks")
        first, where = "image", "masks/"
        layout = f"{part} must hold images/NAME.jpg, .png, ..., each with a mask masks/NAME.png"
    else:
        found = images_in(part)
        masks = [path for path in found if path.suffix.lower() == ".png"]
        images = [path for path in found if path.suffix.lower() != ".png"]
        first, where = ".jpg image", ""
        layout = (f"{part} must hold NAME.jpg photos, each with a NAME.png mask, or both in "
                  f"images/ and masks/")
    images, masks = by_stem(images), by_stem(masks)
    if not images:
        raise BadInput(f"{part} has no {first}: {layout}")
    for stem in sorted(images.keys() ^ masks.keys()):
        path = images.get(stem) or masks[stem]
        lacks = f"{where}{stem}.png" if stem in images else f"{'images/' * bool(where)}{stem}.jpg"
        raise BadInput(f"{path} has no {lacks} beside it: {layout}")
    return [(images[stem], masks[stem]) for stem in sorted(images)]


def masked(folder: Path, part: str) -> list[Item]:
    """The items of one part of a set for segmentation, each a group of its own."""
    found = []
    for image, mask in pairs(folder / part):
        name = image.relative_to(folder).as_posix()
        found.append(Item(image, mask, name, name))
    return found


def sorted_by_class(folder: Path, part: str, names: tuple[str, ...]) -> list[Item]:
    """The items of one part of a set for classification. BadInput for a class without images."""
    found = []
    for label, kind in enumerate(names):
        images = images_in(folder / part / kind)
        if not images:
            raise BadInput(f"{folder / part / kind} has no image: give every class images in "
                           f"every part, or leave it out of all")
        found += [Item(path, label, path.relative_to(folder).as_posix(),
                       path.relative_to(folder).as_posix()) for path in images]
    return found


def class_names(folder: Path, parts: list[str]) -> tuple[str, ...]:
    """The classes of train/, in the order of their names. BadInput where test/ has others."""
    kinds = {part: sorted(path.name for path in entries(folder / part) if path.is_dir())
             for part in parts}
    note([path for part in parts for path in entries(folder / part)
          if path.suffix.lower() in SUFFIXES and not path.is_dir()],
         "beside the class folders, so of no class: passed over")
    names = kinds["train"]
    if names == ["images", "masks"]:
        raise BadInput(f"{folder} has images/ and masks/, but no classes.txt: {NAME_CLASSES}")
    check_names(names, str(folder / "train"))
    if len(names) < 2:
        raise BadInput(f"{folder / 'train'} has {len(names)} class folders: make it "
                       f"train/CLASS/IMAGE with two classes or more")
    if len(names) > 255:
        raise BadInput(f"{folder / 'train'} has {len(names)} classes; at most 255 can be told")
    for part in parts[1:]:
        if alone := sorted(set(kinds[part]) - set(names)):
            raise BadInput(f"{folder / part / alone[0]} is a class that {folder / 'train'} does "
                           f"not have; give it training images, or remove it")
    return tuple(names)


def find_items(folder: Path, task: str) -> tuple[list[Item], list[Item], Legend]:
    """The items of train/ and of test/, none where there is none, and what the classes are."""
    check_entries(folder, READ)
    there = [part for part in ("test", "test_dev") if (folder / part).exists()]
    for part in ("", "train", *there):
        if not (folder / part).is_dir():
            raise BadInput(f"{folder / part} is no folder; --data wants FOLDER/train, and "
                           f"FOLDER/test if it has a test set: see docs/own-data.md")
    legend_file = folder / "classes.txt"
    parts = ["train", *there[:1]]
    for part in parts:
        check_entries(folder / part, ("images", "masks") if task == "segmentation" else ())
    known = {"classes.txt", "groups.csv", *parts}
    note([path for path in entries(folder) if path.name not in known and path.is_dir()],
         "passed over, only train/ and test/ are read")
    if task == "segmentation":
        if not legend_file.is_file():
            raise BadInput(f"{legend_file} is missing: {NAME_CLASSES} (a set of class folders is "
                           f"for classification)")
        legend = read_legend(legend_file, legend_file.read_bytes())
        found = [masked(folder, part) for part in parts]
    else:
        if legend_file.exists():
            raise BadInput(f"{folder} has a classes.txt, so it is a set for segmentation; this "
                           f"is a classifier, whose classes are folders")
        names = class_names(folder, parts)
        legend = Legend(names, default_palette(len(names)), {})
        found = [sorted_by_class(folder, part, names) for part in parts]
    return found[0], found[1] if len(found) > 1 else [], legend


# ---- reading ----

def decoded(item: Item, channels: int, legend: Legend) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """An image (H, W, channels), its mask or class, and each file's sha256. BadInput names one."""
    content = item.image.read_bytes()
    digests = [hashlib.sha256(content).hexdigest()]
    if isinstance(item.target, int):
        return (colours(read_image(item.image, content), channels), np.uint8(item.target), digests)
    mask_content = item.target.read_bytes()
    digests.append(hashlib.sha256(mask_content).hexdigest())
    return *read_pair(item.image, content, item.target, mask_content, channels, legend), digests


def read_pair(path: Path, content: bytes, mask_path: Path, mask_content: bytes, channels: int,
              legend: Legend) -> tuple[np.ndarray, np.ndarray]:
    """One checked pair: image uint8 (H, W, channels), mask uint8 (H, W) of classes and VOID."""
    pixels = colours(read_image(path, content), channels)
    mask = read_mask(mask_path, mask_content, legend)
    if mask.shape != pixels.shape[:2]:
        (height, width), (rows, columns) = pixels.shape[:2], mask.shape
        raise BadInput(f"{path} is {width}x{height} but its mask {mask_path.name} is "
                       f"{columns}x{rows}; they must be equal")
    return pixels, mask


def in_threads(function: Callable, items: list, what: str) -> Iterable:
    """function(item) of each, in order, a few at a time: decoded images are large."""
    # what ignores warnings in a thread may leave them ignored in all
    with warnings.catch_warnings(), ThreadPoolExecutor(READERS) as pool:
        # what is too large is refused in a line of its own
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        parts = (pool.map(function, items[i:i + READERS]) for i in range(0, len(items), READERS))
        yield from progress(itertools.chain.from_iterable(parts), what, len(items), "images")


def read(items: list[Item], size: int, channels: int, legend: Legend, root: Path,
         digests: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 (N, channels, size, size), and masks (N, size, size) or classes (N,).

    Stretched, see `stretched`. `digests` gets each file's, by its path within the set.
    """
    flat = isinstance(items[0].target, int)
    images = torch.empty((len(items), size, size, channels), dtype=torch.uint8)
    images = images.permute(0, 3, 1, 2)  # channels_last, as a step wants them
    targets = torch.empty((len(items),) if flat else (len(items), size, size), dtype=torch.uint8)
    whole = in_threads(lambda item: decoded(item, channels, legend), items, "reading images")
    for i, (item, (pixels, target, found)) in enumerate(zip(items, whole)):
        pixels, target = torch.from_numpy(pixels).permute(2, 0, 1)[None], torch.as_tensor(target)
        image, mask = stretched(pixels, target[None], size)
        images[i], targets[i] = image[0], mask[0]
        paths = [item.image] if flat else [item.image, item.target]
        digests.update((path.relative_to(root).as_posix(), digest)
                       for path, digest in zip(paths, found))
    return images, targets


def stretched(images: torch.Tensor, targets: torch.Tensor,
              size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) and their masks (N, H, W), brought to size x size; classes stay.

    Images by torchvision's antialiased bilinear filter; of masks, the pixel where a centre lies.
    """
    if images.shape[2:] == (size, size):
        return images, targets
    if targets.ndim > 1:
        targets = TF.resize(targets, [size, size], InterpolationMode.NEAREST_EXACT)
    return TF.resize(images, [size, size], antialias=True), targets


def look(path: Path) -> tuple[bool, bool]:
    """Whether an image is grey, and whether it is a JPEG that its orientation tag turns."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            # Pillow calls a PGM of 16 bits "I", which other formats are refused in
            grey = image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16")
            # others would be decoded for it
            return grey, image.format == "JPEG" and image.getexif().get(ORIENTATION, 1) in TURNS
    except Exception:  # whoever reads it will say what is wrong
        return False, False


def some_of_each(items: list[Item], limit: int) -> list[Item]:
    """So many of the items, in their order: the first of each class, then each class's share."""
    sizes, seen, order = Counter(item.target for item in items), Counter(), []
    for i, item in enumerate(items):
        order.append((seen[item.target] / sizes[item.target], i))
        seen[item.target] += 1
    return [items[i] for i in sorted(i for _, i in sorted(order)[:limit])]


def check_memory(folder: Path, train: int, test: int, size: int, channels: int,
                 legend: Legend, masks: bool) -> None:
    """BadInput, before anything is read, for a set that the host's memory cannot hold."""
    pixels = size * size
    need = (train + test) * pixels * (channels + masks)
    if masks:
        need += scores_memory(len(legend.names), max(train, test) * pixels)
    if need > (free := host_memory()):
        raise BadInput(f"{folder} has {train + test} images, which at {size}x{size} take "
                       f"{need / 1e9:.1f} GB with their scores, and {free / 1e9:.1f} GB of memory "
                       f"are free: lower --size, or give fewer images")


def channel_statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, of values in [0, 1]: from counts, the same everywhere."""
    means, deviations = [], []
    values = torch.arange(256).double() / 255
    for channel in images.unbind(1):
        counts = sum(torch.bincount(image.reshape(-1), minlength=256) for image in channel)
        share = counts.double() / counts.sum()
        mean = (share * values).sum().item()
        means.append(round(mean, 4))
        deviation = (share * (values - mean).square()).sum().sqrt().item()
        deviations.append(max(round(deviation, 4), 0.01))  # images of one value have none
    return tuple(means), tuple(deviations)


def load(folder: Path, task: str, size: int, split: str = "full",
         limit: int | None = None) -> Dataset:
    """The folder's set for "classification" or "segmentation", its images size x size.

    "full" holds out test/, or a fifth of the groups; "dev" a fifth of what is left, as "val".
    `limit` keeps so many training images, some of each class. BadInput, in one line, for whatever
    is wrong with it.
    """
    train, test, legend = find_items(folder, task)
    train, test, left = divide(folder, train, test, legend, split)
    if task == "classification":  # the first so many shall be of all classes
        train = sorted(train, key=lambda item: digest_order(item.name))
    if limit is not None:
        if limit < len(legend.names):
            raise BadInput(f"--train-images {limit}: {folder} has {len(legend.names)} classes, and "
                           f"each needs an image or more")
        kept = some_of_each(train, limit)
        names = {item.name for item in kept}
        train, left = kept, left + [item for item in train if item.name not in names]
    name = folder.resolve().name
    if not name.isprintable() or not name:
        raise BadInput(f"{shown(folder)}: the folder's name is the set's; make it printable")
    everything = train + test + left
    grey, turned = zip(*in_threads(lambda item: look(item.image), everything, "looking"))
    if task == "segmentation":
        note([item.image for item, one in zip(everything, turned) if one], "turned as the "
             "orientation tag says; masks must be drawn on upright images")
    channels = 1 if all(grey) else 3
    check_memory(folder, len(train), len(test), size, channels, legend, task == "segmentation")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
               for path in (folder / "classes.txt", folder / "groups.csv") if path.exists()}
    arrays = [read(items, size, channels, legend, folder, digests) for items in (train, test)]
    trained = {digests[item.name] for item in train}
    note([item.image for item in test if digests[item.name] in trained], "held out, and the same "
         "image is in the training part, so that the score is better than on new ones")
    for item in left:
        for path in (item.image, item.target)[:1 + isinstance(item.target, Path)]:
            digests[path.relative_to(folder).as_posix()] = hashlib.sha256(
                path.read_bytes()).hexdigest()
    numbers = {group: i for i, group in enumerate(sorted({item.group for item in train + test}))}
    splits = [Split(*pair, torch.tensor([numbers[item.group] for item in items]))
              for pair, items in zip(arrays, (train, test))]
    held_out = "val" if split == "dev" else "test"
    for part, one in (("training", splits[0]), (held_out, splits[1])):
        counts = one.class_counts(len(legend.names)).tolist()
        if 0 in counts:
            raise BadInput(f"{folder}: class {counts.index(0)} {legend.names[counts.index(0)]} has "
                           f"no {'pixel' if task == 'segmentation' else 'image'} in the {part} "
                           f"split, at {size}x{size}; give it some there, or leave it out of the "
                           f"classes" + " (255 is void)" * (task == "segmentation"))
    return Dataset(name, legend.names, *channel_statistics(splits[0].images), digest_of_digests(
        digests.items()), False, *splits, held_out,
        legend.palette if task == "segmentation" else None, own=True)
