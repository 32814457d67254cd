"""Files: written whole or not at all, and read with suspicion. Only a checkpoint needs torch.

There is one way to read an image, for training, prediction and interpretation, and cpp/runner.cpp
has the same rules: turned as its orientation tag says; of 16 bits a channel the highest 8; gamma
chunks, colour profiles and transparency ignored; grey made of colours by ITU-R 601. And there is
one way to bring it to the size that a network was trained at, and a mask back.
"""

import hashlib
import io
import math
import os
import struct
import typing
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_LIMIT = 1 << 26  # pixels of an image
SIDE_LIMIT = (1 << 16) - 1  # JPEG's; more would take much memory on the way to another size
# Pillow knows more, and starts programs for some
IMAGE_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP")
# modes that have a meaning here; LAB, say, or float has none
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr",
         "I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112  # the tag's number, in EXIF and TIFF
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
# the first row and column, and the steps, of each of the seven passes of an interlaced PNG
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
         (1, 0, 2, 1))


class BadInput(ValueError):
    """Something the user gave is wrong: the message says what, where and what to do."""


def write_atomic(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a whole file or none: a reader, or a run killed at any moment, never sees half of it.

    What the file held so far is kept as `previous`, if that is given.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link that someone put there would be followed
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            keep(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; nothing was lost, free or change the place "
                                   f"and run again", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def keep(path: Path, previous: Path) -> None:
    """Let `previous` be what the file is, which stays where it is as long as links are known."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, previous)
    except OSError:  # a file system without hard links
        os.replace(path, previous)
    finally:
        link.unlink(missing_ok=True)  # where both were the same file, replace does nothing


def refuse_overwriting(targets: Iterable[Path], read: Iterable[str | Path], flag: str) -> None:
    """BadInput if one of the files to write is, by whatever name, one of those that are read."""
    def identity(path: str | Path) -> tuple[int, int] | None:
        try:
            found = os.stat(path)
        except OSError:  # whoever reads it will say so
            return None
        return found.st_dev, found.st_ino

    known = {identity(path) for path in read} - {None}
    for target in targets:
        if identity(target) in known:
            raise BadInput(f"{target} is a file that is read, and would be overwritten; choose "
                           f"another {flag}")


def shown(path: str | Path) -> str:
    """A file's name as text that every screen and figure takes: it may be no UTF-8."""
    return os.fsencode(path).decode(errors="replace")


# ---- images ----

def read_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """The image in a file, or in its `content`, upright, in the mode that it is stored in.

    For pixel values see `colours`. BadInput names the path for what is no image, is damaged or cut
    short, has too many pixels, or has more than 16 bits a channel.
    """
    try:
        content = Path(path).read_bytes() if content is None else content
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd tags, and of sizes that are refused below
            # a PNG's checksums, which load skips
            Image.open(io.BytesIO(content), formats=IMAGE_FORMATS).verify()
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > IMAGE_LIMIT:
                raise ValueError(f"{image.width}x{image.height} pixels, "
                                 f"more than {IMAGE_LIMIT >> 20} million")
            if max(image.size) > SIDE_LIMIT:
                raise ValueError(f"{image.width}x{image.height} pixels, "
                                 f"more than {SIDE_LIMIT:,} a side")
            if image.format == "PNG":
                check_rows(content)
            kind, known = image.format, known_range(image)
            image = read_pnm(image, content) if kind == "PPM" else upright(image)
    except Exception as error:  # Pillow raises many kinds for a damaged file
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # its words name the memory that it lay in
            reason = "of no known kind"
        raise BadInput(f"{path} cannot be read as an image ({reason}); replace it") from error
    if image.mode not in MODES or not known:
        raise BadInput(f"{path} is a {kind} of mode {image.mode}; save it in RGB or grey, "
                       f"with 8 or 16 bits a channel")
    image.format = kind  # which a turn forgets
    return image


def check_rows(content: bytes) -> None:
    """ValueError for a PNG whose data end before its last row: Pillow would fill up with black."""
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    missing = 0
    for top, left, down, right in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        rows, columns = len(range(top, height, down)), len(range(left, width, right))
        missing += rows * (1 + (bits * columns + 7) // 8) if columns else 0
    at, inflate = 8, zlib.decompressobj()
    while at < len(content) and missing > 0:
        length, name = struct.unpack(">I4s", content[at:at + 8])
        rest = content[at + 8:at + 8 + length] if name == b"IDAT" else b""
        while rest:  # in pieces, of which one may unpack to any size
            missing -= len(inflate.decompress(rest, 1 << 20))
            rest = inflate.unconsumed_tail
        at += 12 + length
    if missing - len(inflate.flush()) > 0:
        raise ValueError("its data end before its last row")


def known_range(image: Image.Image) -> bool:
    """Whether 0 is black and the highest value of the type white, as in all but some TIFFs."""
    tags = getattr(image, "tag_v2", None)
    return tags is None or "I;16" not in image.mode or (tags.get(258), tags.get(262)) == ((16,), 1)


def upright(image: Image.Image) -> Image.Image:
    """Loaded, and turned as its EXIF or XMP says; a TIFF turns itself."""
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # a damaged tag is no reason to refuse a photo
        turn = None
    return image if turn is None else image.transpose(turn)


def read_pnm(image: Image.Image, content: bytes) -> Image.Image:
    """An opened PGM or PPM, its values scaled to 255, or of 16 bits the highest 8.

    Pillow rounds colours of 16 bits, and scales pixel by pixel in Python.
    """
    codec, _, offset, how = image.tile[0]
    largest = how[1] if codec != "raw" and image.mode != "1" else 65535 if "I;16B" in how else 255
    if image.mode == "F" or largest == 255 or codec == "ppm_plain" and largest < 256:
        image.load()
        return image
    if codec == "ppm_plain":
        raise ValueError("text of more than 8 bits a channel, save it as a binary PGM or PPM")
    top, shift, kind = (255, 0, "u1") if largest < 256 else (65535, 8, ">u2")
    table = np.minimum(np.rint(np.arange(top + 1) / largest * top), top).astype(np.uint16) >> shift
    shape = (image.height, image.width, 3)[:3 if image.mode == "RGB" else 2]
    values = np.frombuffer(content, kind, int(np.prod(shape)), offset)
    return Image.fromarray(table.astype(np.uint8)[values].reshape(shape))


def colours(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels of a `read_image`, uint8 (H, W, channels): RGB for 3 channels, grey for 1.

    Of 16 bits the highest 8; grey of colours by ITU-R 601, as Pillow rounds it; no transparency.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # it may change nothing, and Pillow would warn of it
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(image.height, image.width, channels)


def to_size(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, C) -> (size, size, C), C 1 or 3: stretched like the training images.

    Pillow's antialiased bilinear filter, in two steps, since which axis it takes first depends on
    its version. It is at most 1 from torchvision's, which training uses.
    """
    if pixels.shape[:2] == (size, size):
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    for shape in ((size, image.height), (size, size)):
        image = image.resize(shape, Image.Resampling.BILINEAR)
    return np.array(image).reshape(size, size, -1)


def mask_to(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Classes (h, w) -> (height, width): a pixel takes that of the one where its centre lies."""
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new)
                     for new, old in zip((height, width), mask.shape))
    return mask[rows[:, None], columns]


def tree_digest(entries: Iterable[tuple[str, bytes]]) -> str:
    """sha256 over the lines "sha256  relative/path" of a set's files, sorted by path."""
    return digest_of_digests((path, hashlib.sha256(content).hexdigest())
                             for path, content in entries)


def digest_of_digests(entries: Iterable[tuple[str, str]]) -> str:
    """The same of files whose own digests are known already: (relative path, sha256 in hex)."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(entries))
    # a name may be no UTF-8
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


# ---- checkpoints ----

def read_checkpoint(path: Path) -> dict:
    """A checkpoint of this project, unpickled without running code. BadInput for anything else."""
    import torch
    content = io.BytesIO(path.read_bytes())  # what cannot be read is not damaged
    try:
        # torch.load does not look at the checksums that torch.save wrote
        with zipfile.ZipFile(content) as archive:
            for entry in archive.infolist():
                # torch.save never compresses, and a small file could unpack to any size; a file
                # with the attribute of a folder is empty to torch.load: its tensor would be
                # whatever lay in memory
                if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 16:
                    raise zipfile.BadZipFile("compressed, or a folder")
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum")
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        state["identity"]["config"], state["identity"]["data"]
        return {name: state[name] for name in ("identity", "epoch", "model", *state)}
    except Exception as error:  # torch, zipfile and pickle each raise their own for a damaged file
        raise BadInput(f"{path} is no checkpoint of this project, or damaged "
                       f"({type(error).__name__}); delete or replace it") from error


def jsonable(value: typing.Any) -> typing.Any:
    """NaN has no place in JSON: it becomes null, at any depth."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
