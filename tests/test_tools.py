"""What predict.py and the C++ program have in common: refusals, and that nothing is lost."""

import os
import struct
import threading
import zlib

import numpy as np
import onnx
import pictures
import pytest
from PIL import Image
from tools import masks, photos, seen_by, tool  # noqa: F401 -- fixtures

import data
import predict
from lab.files import BadInput


def test_a_mask_never_replaces_what_is_read(tool, photos, tmp_path):
    """Not by the same name, by a link to the folder, nor by another name of the same file."""
    (tmp_path / "here").symlink_to(tmp_path / "photos")
    (tmp_path / "other").mkdir()
    Image.open(photos[0]).save(tmp_path / "photos/b.jpg")
    os.link(photos[1], tmp_path / "other/b.png")
    before = {path: path.read_bytes() for path in photos}
    first = photos[0].relative_to(tmp_path)
    for out, images, target in (("photos", [first], "photos/0.png"),
                                ("here", ["photos/2.png", first], "here/2.png"),
                                ("other", ["photos/b.jpg", "photos/1.png"], "other/b.png")):
        done = tool(["--out", out, *images])
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == (f"error: {target} is a file that is read, and would be overwritten; "
                               f"choose another --out\n")
    assert {path: path.read_bytes() for path in photos} == before
    done = tool(["--out", "new", first])
    assert done.returncode == 0 and (tmp_path / "new/0.png").exists(), done.stderr
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/0.png.tmp").write_text("a user's own")
    for _ in range(2):  # what an earlier run wrote is replaced
        assert tool(["--out", "kept", first]).returncode == 0
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0.png", "0.png.tmp"]


def test_two_masks_of_one_name_are_refused_before_one_is_written(tool, photos, tmp_path):
    done = tool(["photos/0.png", "photos/1.png", "elsewhere/0.jpg"])
    assert done.returncode == 2 and not (tmp_path / "predictions").exists()
    assert done.stderr == ("error: elsewhere/0.jpg and photos/0.png would both write "
                           "predictions/0.png; predict them into two --out\n")


def test_a_model_that_names_fewer_classes_than_it_gives(tool, photos, tmp_path):
    """As the page's files of two networks do, whose classes lie side by side."""
    done = tool(["photos/0.png"], named=10)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith(
        " is no model that export.py made (it gives 256 classes and names 10)\n")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "predictions").exists()


def test_a_thin_image_takes_no_memory_and_a_short_one_is_not_filled_up(tool, tmp_path):
    """A few bytes may name millions of pixels a side; and a PNG may end, whole, before its end."""
    rgb = data.synthetic_facade(0, 48)[0]
    Image.new("L", (1, 60_000_000)).save(tmp_path / "thin.pgm")
    for name, interlaced in (("short", False), ("passes", True)):
        content = bytearray(pictures.png(rgb, interlaced=interlaced))
        content[23] += 9  # rows, in the header
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (tmp_path / f"{name}.png").write_bytes(content)
    for name, message in (("thin.pgm", "more than 65,535"), ("short.png", "image ("),
                          ("passes.png", "image (")):
        done = tool([name])
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert name in done.stderr and message in done.stderr


def test_output_that_cannot_be_written_or_names_that_cannot_be_said(tool, photos, tmp_path):
    (tmp_path / "photos/0.png").rename(tmp_path / "photos/Bött.png")
    done = tool(["photos/Bött.png"], env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and (tmp_path / "predictions/Bött.png").exists(), done.stderr
    with open("/dev/full", "w") as full:
        done = tool(["photos/1.png"], stdout=full)
    assert done.returncode == 2
    (tmp_path / "out/2.png").mkdir(parents=True)
    assert tool(["--out", "out", "photos/2.png"]).returncode == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["2.png"]  # and nothing half


def test_an_image_comes_through_a_pipe(tool, photos, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    Image.open(photos[0]).save(tmp_path / "file.jpg")
    content = (tmp_path / "file.jpg").read_bytes()
    writer = threading.Thread(target=lambda: (tmp_path / "pipe.jpg").write_bytes(content))
    writer.start()
    assert tool(["pipe.jpg"]).returncode == tool(["file.jpg"]).returncode == 0
    writer.join()
    found = masks(tmp_path / "predictions")
    assert np.array_equal(found["pipe.png"], found["file.png"])


@pytest.mark.parametrize("key, value", [
    ("palette", "010203"), ("palette", ""), ("size", "48"), ("size", "8193"), ("size", "0"),
    ("classes", "a\x1b[2J," + "b," * 254 + "c"), ("input", "pixels"), ("mean", "0,0"),
    ("stride", "65")])
def test_a_model_whose_description_is_damaged_is_refused(tmp_path, key, value):
    """A palette of too few colours would show other classes; a terminal would obey a name."""
    path = seen_by(tmp_path, 3, 1, 48, ".onnx")
    model = onnx.load(path)
    next(prop for prop in model.metadata_props if prop.key == key).value = value
    onnx.save(model, path)
    if (key, value) in (("palette", ""), ("size", "48")):  # a classifier's, and as it was
        assert predict.open_model(str(path))[1][key] == value
    else:
        with pytest.raises(BadInput, match="is no model that export.py made"):
            predict.open_model(str(path))
