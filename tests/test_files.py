"""One way to read an image and to change its size: right pixels for every kind, or one line."""

import functools
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import data
from lab import folders
from lab.files import BadInput, colours, mask_to, read_image, shown, to_size

CASES = Path(__file__).parent / "cases"


@pytest.mark.parametrize("kinds", [pictures.every_kind, pictures.python_alone])
@pytest.mark.filterwarnings("error")
def test_every_kind_of_file_gives_its_pixels(tmp_path, kinds):
    for path, right in kinds(tmp_path / "kinds", 37, 50).items():
        for channels, pixels in ((3, right), (1, pictures.luma(right)[..., None])):
            found = colours(read_image(path), channels)
            assert found.dtype == np.uint8 and found.flags.writeable
            assert np.array_equal(found, pixels), (shown(path), channels)


@pytest.mark.parametrize("name, grey", [("px_grey16.png", 128), ("px_rgb16.png", 128),
                                        ("px_gama18.png", 128), ("px_red.png", 76),
                                        ("px_blue.png", 29)])
def test_values_of_one_pixel(name, grey):
    assert (colours(read_image(CASES / name), 1) == grey).all()


def test_an_upright_photo_and_the_same_one_turned_by_its_tag():
    turned, plain = (colours(read_image(CASES / f"{name}.jpg"), 3).astype(int)
                     for name in ("exif6", "exif_none"))
    assert turned.shape == plain.shape == (240, 160, 3)
    assert np.abs(turned - plain).mean() < 1  # each is a JPEG of its own


def test_training_turns_a_photo_and_fits_it_to_its_mask():
    image, mask = data.synthetic_facade(0, 64)
    image, mask = image[:48], mask[:48]

    def saved(array, kind, **how):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, kind, **how)
        return buffer.getvalue()

    lying = np.ascontiguousarray(pictures.TURNED[8](image))  # what a camera stores that was turned
    contents = [saved(lying, "PNG", exif=pictures.exif(6)), saved(mask, "PNG")]
    read_pair = functools.partial(folders.read_pair, channels=3, legend=data.LEGEND)
    found = read_pair(Path("a.png"), contents[0], Path("b.png"), contents[1])
    assert np.array_equal(found[0], image) and np.array_equal(found[1], mask)
    with pytest.raises(BadInput, match="a.png is 48x64 but its mask b.png is 64x48"):
        read_pair(Path("a.png"), saved(lying, "PNG"), Path("b.png"), contents[1])


def test_what_has_no_8_bits_is_refused_in_one_line(tmp_path):
    deep = np.full((4, 4), 70_000, np.int32)
    Image.fromarray(deep).save(tmp_path / "int32.tiff")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.new("LAB", (4, 4)).save(tmp_path / "lab.tiff")
    white_is_zero = io.BytesIO()
    Image.fromarray(deep.astype(np.uint16)).save(white_is_zero, "TIFF")
    content = white_is_zero.getvalue()
    at = content.index(b"\x06\x01\x03\x00\x01\x00\x00\x00") + 8  # the tag's value
    (tmp_path / "white-is-zero.tiff").write_bytes(content[:at] + b"\0" + content[at + 1:])
    (tmp_path / "text.pgm").write_text("P2 1 1 65535 300")
    for name, message in (("int32.tiff", "is a TIFF of mode I; save it"),
                          ("float.tiff", "is a TIFF of mode F"),
                          ("lab.tiff", "is a TIFF of mode LAB"),
                          ("white-is-zero.tiff", "is a TIFF of mode I;16"),
                          ("text.pgm", "more than 8 bits a channel, save it as a binary PGM"),
                          ("nothing.png", "cannot be read as an image (No such file or directory)"),
                          (".", "cannot be read as an image (Is a directory)")):
        with pytest.raises(BadInput) as refused:
            read_image(tmp_path / name)
        said = str(refused.value)
        assert said.startswith(f"{tmp_path / name} ") and message in said


@pytest.mark.parametrize("height, width, size", [
    (256, 256, 64), (256, 256, 96), (1024, 1024, 128), (77, 130, 48), (130, 77, 48), (20, 30, 64),
    (1, 300, 28), (28, 28, 28)])
def test_sizes_are_changed_as_in_training(height, width, size):
    """Within 1 of what torchvision makes of the training images: both round after each axis."""
    image = data.synthetic_facade(1, max(height, width))[0][:height, :width]
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
    trained = TF.resize(pixels[None], [size, size], antialias=True)[0].permute(1, 2, 0)
    difference = np.abs(to_size(image, size).astype(int) - trained.numpy())
    assert difference.max() <= 1
    assert to_size(image[..., :1], size).shape == (size, size, 1)


def test_masks_come_back_whole():
    mask = data.synthetic_facade(2, 96)[1]
    for height, width in ((256, 256), (1024, 768), (96, 96), (97, 192)):
        large = mask_to(mask, height, width)
        assert large.shape == (height, width) and np.array_equal(mask_to(large, 96, 96), mask)
    larger = mask_to(np.array([[1, 2], [3, 4]]), 3, 4)
    assert np.array_equal(larger, [[1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]])


def test_reading_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import lab.files"
    subprocess.run([sys.executable, "-c", code], cwd=CASES.parents[1], check=True)
