"""What the values of masks mean: classes.txt, masks as PNGs, and colours for classes.

classes.txt has a class a line, in the order of the masks' values: NAME, or NAME #rrggbb. A mask is
a grey or palette PNG whose value is the class, or an RGB one in the colours of classes.txt. The
value 255 is void. A last line `void`, or `void #rrggbb`, makes its value and its colour void too.
"""

import colorsys
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lab.batches import VOID
from lab.files import BadInput, read_image, shown

Colour = tuple[int, int, int]

# Okabe and Ito's colours, which every kind of colour vision tells apart; grey for black
SAFE = ((60, 60, 60), (240, 228, 66), (213, 94, 0), (86, 180, 233), (0, 158, 115), (0, 114, 178),
        (230, 159, 0))


@dataclass(frozen=True)
class Legend:
    """The classes of masks: their names, their colours in pictures, and how masks write them.

    colours: what an RGB mask means, {0xrrggbb: class or VOID}. void: a value that is void as well
    as 255.
    """
    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    colours: dict[int, int]
    void: int | None = None


def default_palette(count: int) -> tuple[Colour, ...]:
    """A colour for each class; past seven, where no set is safe for every eye, of many kinds."""
    more = ((i * 0.618034 % 1, (0.45, 0.95, 0.7)[i % 3]) for i in range(count - len(SAFE)))
    return SAFE[:count] + tuple(
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, value))
        for hue, value in more)


def check_names(names: Iterable[str], where: str) -> None:
    """BadInput for a name that no description can carry: exported forms part names by commas."""
    for name in names:
        if not name.isprintable() or "," in name:
            raise BadInput(f"{where} has a class {shown(name)!r}: a name must be printable and "
                           f"without a comma; rename it")


def read_legend(path: Path, content: bytes) -> Legend:
    """The classes that a classes.txt names. BadInput says which line is wrong."""
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8; save it as one, a class a line") from error
    while lines and not lines[-1]:
        lines.pop()
    names, colours = [], []
    for number, line in enumerate(lines, 1):
        name, colour = re.fullmatch(r"(.*?)(?:\s+#(\S*))?", line).groups()
        if not name or name.startswith("#"):
            raise BadInput(f"{path} has no name in line {number}; a line is NAME or NAME #rrggbb")
        if colour is not None and not re.fullmatch("[0-9a-fA-F]{6}", colour):
            raise BadInput(f"{path} has the colour #{colour} in line {number}; a colour is "
                           f"#rrggbb, six hexadecimal digits")
        if name in names:
            raise BadInput(f"{path} names {name} in line {names.index(name) + 1} and in line "
                           f"{number}; each class has one line")
        if colour is not None and int(colour, 16) in colours:
            raise BadInput(f"{path} has the colour #{colour} twice, again in line {number}; give "
                           f"each class its own")
        names.append(name)
        colours.append(None if colour is None else int(colour, 16))
    check_names(names, str(path))
    void = len(names) - 1 if names and names[-1] == "void" else None
    if "void" in names[:-1]:
        raise BadInput(f"{path} has void in line {names.index('void') + 1}; it is no class and "
                       f"must be the last line")
    count = len(names) if void is None else void
    if not 2 <= count <= VOID:
        raise BadInput(f"{path} names {count} classes; name 2 to {VOID}, one a line")
    given = {colour: (colour >> 16, colour >> 8 & 255, colour & 255)
             for colour in colours if colour is not None}
    taken = set(given.values())
    others = (colour for colour in default_palette(count + 1) if colour not in taken)
    palette = [given[colour] if colour is not None else next(others) for colour in colours[:count]]
    meaning = {colour: VOID if i == void else i
               for i, colour in enumerate(colours) if colour is not None}
    return Legend(tuple(names[:count]), tuple(palette), meaning, void)


def read_mask(path: Path, content: bytes, legend: Legend) -> np.ndarray:
    """A mask's classes, uint8 (H, W), VOID where it is void. BadInput for any other value."""
    mask = read_image(path, content)
    if mask.format == "PNG" and mask.mode == "RGB" and legend.colours:
        return by_colour(path, np.asarray(mask), legend)
    if mask.format != "PNG" or mask.mode not in ("P", "L", "1"):
        raise BadInput(f"{path} is a {mask.format} of mode {mask.mode}; a mask must be a palette "
                       f"or grey PNG of up to 8 bits whose pixel value is the class, or an RGB "
                       f"one in the colours of classes.txt (JPEG changes the values)")
    values = np.array(mask, np.uint8)
    depth, kind = content[24], content[25]
    if mask.mode == "L" and kind == 0 and depth < 8:  # grey of 2 or 4 bits, which Pillow stretches
        values = values // (255 // (2**depth - 1))
    if mask.mode == "P" and legend.colours:
        check_palette(path, mask, values, legend)
    if legend.void is not None:
        values = np.where(values == legend.void, VOID, values).astype(np.uint8)
    wrong = values[(values >= len(legend.names)) & (values != VOID)]
    if len(wrong):
        meaning = ", ".join(f"{i} {name}" for i, name in enumerate(legend.names))
        raise BadInput(f"{path} has the value {wrong.max()} in {(wrong == wrong.max()).sum()} "
                       f"pixels; the classes are {meaning}, and {VOID} is void")
    return values


def check_palette(path: Path, mask: Image.Image, values: np.ndarray, legend: Legend) -> None:
    """BadInput where a mask's values and its colours, by classes.txt, mean different classes.

    An editor that saves an RGB mask as a palette PNG numbers the colours as it likes. VOID alone
    may have any colour: past the end of its colours a palette is black.
    """
    names = dict(enumerate(legend.names)) | {VOID: "void", legend.void: "void"}
    colours = np.array(mask.getpalette("RGB")).reshape(-1, 3).tolist()
    used = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256)).tolist()
    for value in (value for value in used if value < len(colours) and value != VOID):
        colour = colours[value][0] << 16 | colours[value][1] << 8 | colours[value][2]
        label = legend.colours.get(colour, value)
        if label not in (value, VOID if value == legend.void else value):
            raise BadInput(f"{path} has the colour #{colour:06x} for the value {value}, but in "
                           f"classes.txt that is the colour of {label} {names[label]}, and "
                           f"{value} is {names.get(value, 'no class')}; save the mask as an RGB "
                           f"PNG, or as a grey one of the values")


def by_colour(path: Path, pixels: np.ndarray, legend: Legend) -> np.ndarray:
    """The classes of an RGB mask, uint8 (H, W, 3) -> (H, W)."""
    packed = pixels.astype(np.int32) @ np.array((1 << 16, 1 << 8, 1), np.int32)
    known = np.array(sorted(legend.colours), np.int32)
    nearest = np.searchsorted(known, packed).clip(max=len(known) - 1)
    wrong = packed[known[nearest] != packed]
    if len(wrong):
        raise BadInput(f"{path} has the colour #{wrong[0]:06x} in {(wrong == wrong[0]).sum()} "
                       f"pixels, which classes.txt gives to no class (a last line "
                       f"`void #{wrong[0]:06x}` would make it void)")
    return np.array([legend.colours[colour] for colour in known.tolist()], np.uint8)[nearest]
