"""Which images train and which are held out: groups never part, and names alone decide.

FOLDER/groups.csv says which images belong together, as those of one street or one patient do. A
held-out fifth is that of the groups whose names have the smallest sha256, the same on every
machine. For classification it is a fifth of each class, for segmentation of all.
"""

import csv
import hashlib
import io
from dataclasses import dataclass, replace
from pathlib import Path

from lab.files import BadInput, shown
from lab.labels import Legend


@dataclass(frozen=True)
class Item:
    """An image, its mask or its class, its path within the set, and the group that it is of."""
    image: Path
    target: Path | int
    name: str
    group: str

    @property
    def stratum(self) -> int:
        """Of what a fifth is held out: of each class, or of all images that have masks."""
        return self.target if isinstance(self.target, int) else -1


def with_groups(folder: Path, items: list[Item]) -> list[Item]:
    """The items with the groups that groups.csv gives them. BadInput where it lacks an image."""
    path = folder / "groups.csv"
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig")), strict=True))
    except FileNotFoundError:  # a link that leads nowhere was refused before, by check_entries
        return items
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is no table in UTF-8 ({error}); a line is image,group") from error
    rows = [[cell.strip() for cell in row] for row in rows]
    for row in rows:  # a spreadsheet pads rows, and writes empty ones, with commas alone
        while row and not row[-1]:
            row.pop()
    if not rows or rows[0] != ["image", "group"]:
        raise BadInput(f"{path} must begin with the line image,group")
    called = {}  # an image by its path in the set, its file's name, or that without its suffix
    for i, item in enumerate(items):
        for name in {item.name, item.image.name, item.image.stem}:
            called.setdefault(name, []).append(i)
    groups = {}
    for number, row in enumerate(rows[1:], 2):
        if not row:
            continue
        if len(row) != 2 or not all(row):
            raise BadInput(f"{path} has no image,group in line {number}")
        matches = called.get(row[0], [])
        if len(matches) != 1:
            raise BadInput(f"{path} names {shown(row[0])} in line {number}, which is "
                           + (f"{len(matches)} images: write the path, such as "
                              f"{items[matches[0]].name}" if matches else
                              "no image of this set; correct or remove the line"))
        if groups.setdefault(matches[0], row[1]) != row[1]:
            raise BadInput(f"{path} gives {row[0]} a second group in line {number}")
    if lacking := [item.name for i, item in enumerate(items) if i not in groups]:
        raise BadInput(f"{path} has no line for {lacking[0]}"
                       f"{f' and {len(lacking) - 1} more images' * (len(lacking) > 1)}; give "
                       f"every image a group")
    return [replace(item, group=groups[i]) for i, item in enumerate(items)]


def digest_order(name: str) -> str:
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()


def hold_out(items: list[Item], legend: Legend, what: str) -> tuple[list[Item], list[Item]]:
    """What trains, and a fifth of the groups: of each class, or at least two of a set of masks.

    A group counts for every class that it shows. Rare classes choose first, and none takes the last
    group that another has to train on.
    """
    strata: dict[int, set[str]] = {}
    shows: dict[str, set[int]] = {}
    for item in items:
        strata.setdefault(item.stratum, set()).add(item.group)
        shows.setdefault(item.group, set()).add(item.stratum)
    held: set[str] = set()
    for stratum, groups in sorted(strata.items(), key=lambda one: (len(one[1]), one[0])):
        least = 2 if stratum < 0 else 1
        of = "" if stratum < 0 else f" of class {legend.names[stratum]}"
        if len(groups) < 2 * least:
            raise BadInput(f"{what} is a fifth of the images{of}, but there "
                           f"{'is one' if len(groups) == 1 else f'are {len(groups)}'}, or so "
                           f"many groups: add images, or give a test folder")
        for group in sorted(groups - held, key=digest_order):
            if (len(groups & held) < max(least, (len(groups) + 2) // 5)
                    and all(len(strata[other] - held) > 1 for other in shows[group])):
                held.add(group)
        if len(groups & held) < least:
            raise BadInput(f"{what} is a fifth of the images{of}, but each of their groups is the "
                           f"last to train on for some class: add images, or give a test folder")
    return ([item for item in items if item.group not in held],
            [item for item in items if item.group in held])


def divide(folder: Path, train: list[Item], test: list[Item], legend: Legend,
           split: str) -> tuple[list[Item], list[Item], list[Item]]:
    """The items that train, that are held out, and that are left alone (the test set, in dev)."""
    whole = with_groups(folder, train + test)
    train, test = whole[:len(train)], whole[len(train):]
    if both := sorted({item.group for item in train} & {item.group for item in test}):
        raise BadInput(f"{folder / 'groups.csv'}: the group {shown(both[0])} has images in train "
                       f"and in test; a group must lie in one of them")
    if not test:
        train, test = hold_out(train, legend, f"the test set of {folder} (there is no test folder)")
    left = []
    if split == "dev":
        left = test
        train, test = hold_out(train, legend, f"--split dev of {folder}")
    for name, items in (("training", train), ("held-out", test)):
        if len({item.group for item in items}) < 2:
            raise BadInput(f"{folder} has {'one image, or' * (len(items) == 1)} one group of "
                           f"images in its {name} part; it needs two or more")
    return train, test, left
