"""Folders of one's own images: what is read of them. What is refused is in test_bad_folders.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from made_set import CLASSES, SHAPES, make_shapes, make_streets
from PIL import Image

import data
from lab import folders, labels, splits
from lab.batches import VOID
from lab.files import BadInput, mask_to, to_size


def segments(folder, size=32, split="full"):
    return folders.load(folder, "segmentation", size, split)


def photos_of(folder):
    """{image's path within the set: its own pixels} of a set of masks."""
    return {path.relative_to(folder).as_posix(): path
            for path in sorted(folder.glob("*/images/*"))}


# ---- segmentation ----

def test_every_size_suffix_and_void_is_read(streets):
    dataset = segments(streets, 48)
    assert dataset.task == "segmentation" and dataset.own and not dataset.synthetic
    assert dataset.name == "streets" and dataset.classes == tuple(CLASSES)
    assert dataset.palette[0] == (0x86, 0xb4, 0xe9) and dataset.held_out == "test"
    assert (len(dataset.train), len(dataset.test)) == (8, 4)
    assert dataset.train.images.shape == (8, 3, 48, 48)
    assert dataset.train.images.is_contiguous(memory_format=torch.channels_last)
    sizes = {Image.open(path).size for path in photos_of(streets).values()}
    assert len(sizes) > 2 and len({path.suffix for path in photos_of(streets).values()}) == 4
    for i, path in enumerate(sorted((streets / "train/masks").iterdir())):
        expected = mask_to(np.asarray(Image.open(path)), 48, 48)
        assert np.array_equal(dataset.train.targets[i].numpy(), expected) and VOID in expected
    counts = dataset.train.class_counts(7)
    assert len(counts) == 7 and counts.sum() == (dataset.train.targets != VOID).sum()


def test_mean_and_deviation_are_those_of_the_training_split(streets):
    dataset = segments(streets)
    pixels = dataset.train.images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(dataset.mean, abs=1e-4)
    assert pixels.std((0, 2, 3), unbiased=False).tolist() == pytest.approx(dataset.std, abs=1e-4)


def test_images_and_masks_stay_aligned(tmp_path):
    """A bright rectangle whose mask is itself: at every size and shape they cover each other."""
    folder = make_streets(tmp_path / "set", groups=6, each=2)
    (folder / "groups.csv").unlink()
    (folder / "classes.txt").write_text("dark\nbright\n")
    for i, path in enumerate(photos_of(folder).values()):
        height, width = 40 + 8 * (i % 5), 96 - 8 * (i % 4)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4:height // 2, width // 3:] = 1
        Image.fromarray(255 * np.stack([mask] * 3, 2)).save(path.with_suffix(".png"))
        if path.suffix != ".png":
            path.unlink()
        Image.fromarray(mask).save(path.parents[1] / "masks" / f"{path.stem}.png")
    dataset = segments(folder)
    bright = dataset.train.images[:, 0] > 127
    assert (bright == (dataset.train.targets == 1)).double().mean() > 0.97


def grey_png(depth):
    """A mask of classes 0 and 1 as a grey PNG of so many bits, made by hand: Pillow writes 1, 8."""
    import struct
    import zlib
    chunk = lambda kind, body: (struct.pack(">I", len(body)) + kind + body
                                + struct.pack(">I", zlib.crc32(kind + body)))
    bits = "".join(format(value, f"0{depth}b") for value in (0, 1, 1, 0, 1, 0, 0, 1))
    row = b"\0" + bytes(int(bits[i:i + 8], 2) for i in range(0, len(bits), 8))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(8 * row)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_grey_mask_of_few_bits_is_not_stretched(tmp_path, depth):
    legend = labels.Legend(("a", "b"), labels.default_palette(2), {})
    found = labels.read_mask(tmp_path / "mask.png", grey_png(depth), legend)
    assert found.tolist() == [[0, 1, 1, 0, 1, 0, 0, 1]] * 8


def test_masks_in_the_colours_of_classes_txt(streets):
    grey = segments(streets)
    colours = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in CLASSES.values()]
                       + [[1, 2, 3]], np.uint8)
    (streets / "classes.txt").write_text("".join(
        f"{name} {colour}\n" for name, colour in CLASSES.items()) + "void #010203\n")
    for path in streets.glob("*/masks/*"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(colours[np.where(mask == VOID, 7, mask)]).save(path)
    coloured = segments(streets)
    assert torch.equal(coloured.train.targets, grey.train.targets)
    assert coloured.classes == grey.classes and coloured.palette == grey.palette


def test_masks_with_a_palette(streets):
    """As predict.py writes them, in the colours of classes.txt, or in colours of their own."""
    grey = segments(streets)
    colours = bytes.fromhex("".join(colour[1:] for colour in CLASSES.values()))
    for palette in (colours + bytes(3 * 249), bytes(i % 251 for i in range(768))):
        for path in streets.glob("*/masks/*"):
            mask = Image.fromarray(np.asarray(Image.open(path)))
            mask.putpalette(palette)
            mask.save(path)
        assert Image.open(path).mode == "P"
        assert torch.equal(segments(streets).train.targets, grey.train.targets)


def test_the_palette_of_void_says_nothing(streets):
    """Past the colours that a palette has all are black, which may be a class's."""
    (streets / "classes.txt").write_text((streets / "classes.txt").read_text().replace(
        "#86b4e9", "#000000"))
    grey = segments(streets)
    for path in streets.glob("*/masks/*"):
        mask = Image.fromarray(np.asarray(Image.open(path)))
        mask.putpalette(bytes(3) + bytes([9]) * 18 + bytes(3 * 249))
        mask.save(path)
    assert torch.equal(segments(streets).train.targets, grey.train.targets)


def test_a_default_colour_is_none_that_is_given():
    """Neither to a class nor to void, or two classes would look alike, and RGB masks mislead."""
    default = ["".join(f"{part:02x}" for part in colour) for colour in labels.SAFE]
    lines = [f"a #{default[1]}", "b", "c", f"d #{default[0]}", "e", f"void #{default[2]}"]
    legend = labels.read_legend(labels.Path("classes.txt"), "\n".join(lines).encode())
    assert legend.palette[0] == labels.SAFE[1] and legend.palette[3] == labels.SAFE[0]
    assert len(set(legend.palette) | {labels.SAFE[2]}) == 6
    many = [f"{i} #{'%02x%02x%02x' % colour}" if i % 2 else f"{i}"
            for i, colour in enumerate(reversed(labels.default_palette(255)))]
    legend = labels.read_legend(labels.Path("classes.txt"), "\n".join(many).encode())
    assert len(set(legend.palette)) == 255


def test_a_last_line_void_makes_its_value_void(streets):
    (streets / "classes.txt").write_text("\n".join([*list(CLASSES)[:6], "void", ""]))
    dataset = segments(streets)
    assert dataset.classes == tuple(CLASSES)[:6] and 6 not in dataset.train.targets.unique()


@pytest.mark.parametrize("test_name", ["test", "test_dev"])
def test_the_flat_layout_reads_the_same(streets, test_name):
    nested = segments(streets)
    for part, name in (("train", "train"), ("test", test_name)):
        for path in (streets / part / "images").iterdir():
            Image.open(path).convert("RGB").save(streets / part / f"{path.stem}.bmp")
        for path in (streets / part / "masks").iterdir():
            path.rename(streets / part / path.name.replace(".png", ".PNG"))
        shutil.rmtree(streets / part / "images"), shutil.rmtree(streets / part / "masks")
        (streets / part).rename(streets / name)
    lines = (streets / "groups.csv").read_text().splitlines()
    (streets / "groups.csv").write_text("\n".join(
        [lines[0], *(f"{line.split('.')[0]},{line.split(',')[1]}" for line in lines[1:])]))
    flat = segments(streets)
    assert torch.equal(flat.train.targets, nested.train.targets)
    assert torch.equal(flat.test.images, nested.test.images)
    assert torch.equal(flat.test.photos, nested.test.photos)


def test_the_digest_is_of_names_and_bytes(streets):
    first = segments(streets)
    assert segments(streets, 16).digest == segments(streets, split="dev").digest == first.digest
    assert first.digest == segments(streets.rename(streets.parent / "moved")).digest
    moved = streets.parent / "moved"
    (moved / "classes.txt").write_text((moved / "classes.txt").read_text().replace("sky", "air"))
    assert segments(moved).digest != first.digest


def test_what_is_passed_over_is_said(streets, capsys):
    (streets / "val/images").mkdir(parents=True)
    (streets / "train/images/notes.txt").write_text("")
    (streets / "train/images/photo.heic").write_text("")
    (streets / "train/images/.DS_Store").write_text("")
    (streets / "train/images/Thumbs.db").write_text("")
    (streets / "__MACOSX").mkdir()
    segments(streets)
    notes = capsys.readouterr().err
    assert "val: passed over, only train/ and test/ are read" in notes
    assert "notes.txt and 1 more: no image by the name, passed over" in notes
    assert "Thumbs" not in notes and "DS_Store" not in notes and "MACOSX" not in notes


def test_images_beside_the_class_folders_are_passed_over_and_said(shapes, capsys):
    expected = folders.load(shapes, "classification", 8)
    image = next((shapes / "train").glob("*/*.png"))
    for name in ("loose.png", "other.png"):
        (shapes / "train" / name).write_bytes(image.read_bytes())
    assert len(folders.load(shapes, "classification", 8).train) == len(expected.train)
    said = "loose.png and 1 more: beside the class folders, so of no class: passed over"
    assert said in capsys.readouterr().err


def test_what_an_archive_leaves_behind_is_no_class(shapes):
    expected = folders.load(shapes, "classification", 8).classes
    (shapes / "train/__MACOSX/ring").mkdir(parents=True)
    (shapes / "train/__MACOSX/._ring.png").write_text("")
    (shapes / "train/.#lock").symlink_to("an editor's, leading nowhere")
    assert folders.load(shapes, "classification", 8).classes == expected


# ---- splits ----



@pytest.mark.parametrize("split", ["full", "dev"])
@pytest.mark.parametrize("test", [True, False])
def test_groups_never_part(tmp_path, split, test):
    folder = make_streets(tmp_path / "set", groups=15, each=2, test=test)
    dataset = segments(folder, split=split)
    train, held = (set(split.photos.tolist()) for split in (dataset.train, dataset.test))
    assert not train & held and dataset.held_out == ("val" if split == "dev" else "test")
    assert all((split.photos.unique(return_counts=True)[1] == 2).all()
               for split in (dataset.train, dataset.test))
    expected = {("full", True): (10, 5), ("full", False): (12, 3), ("dev", True): (8, 2),
                ("dev", False): (10, 2)}[split, test]
    assert (len(train), len(held)) == expected


def test_groups_as_a_spreadsheet_saves_them(streets):
    expected = segments(streets)
    lines = (streets / "groups.csv").read_text().splitlines()
    (streets / "groups.csv").write_text("\r\n".join([f"{line},," for line in lines] + [",", ",,,"]))
    assert torch.equal(segments(streets).test.photos, expected.test.photos)


def test_the_held_out_fifth_is_a_matter_of_names_alone(tmp_path):
    items = [splits.Item(tmp_path / f"{i}.png", tmp_path / f"{i}-mask.png", f"train/images/{i}.png",
                         f"group {i // 2}") for i in range(50)]
    legend = labels.Legend(("a", "b"), labels.default_palette(2), {})
    _, held = splits.hold_out(items, legend, "")
    # sha256 of "group 0" to "group 24": these five are the smallest, on every machine
    assert {item.group for item in held} == {f"group {i}" for i in (5, 8, 9, 11, 18)}
    _, again = splits.hold_out(items[::-1], legend, "")
    assert {item.group for item in again} == {item.group for item in held}


def test_a_fifth_of_each_class_is_held_out(shapes):
    dataset = folders.load(shapes, "classification", 16)
    assert dataset.test.class_counts(4).tolist() == [1] * 4
    assert dataset.train.class_counts(4).tolist() == [4] * 4
    # what is left, in the order of digests, not class after class
    names = sorted((path.relative_to(shapes).as_posix() for path in shapes.glob("train/*/*")),
                   key=splits.digest_order)
    held = {next(name for name in names if f"/{kind}/" in name) for kind in dataset.classes}
    kinds = [dataset.classes.index(name.split("/")[1]) for name in names if name not in held]
    assert dataset.train.targets.tolist() == kinds != sorted(kinds)


def of_classes(*patients):
    """An image of each class's patients, class after class."""
    return [splits.Item(Path(f"{kind}/{one}"), kind, f"{kind}/{one}", f"patient {one}")
            for kind, ones in enumerate(patients) for one in ones]


@pytest.mark.parametrize("sick, held", [(range(21), 4), (range(4), 1), (range(18, 22), 1),
                                        (range(2), 1)])
def test_a_group_counts_for_every_class_that_it_shows(sick, held):
    """As a patient does, of whom there are healthy and sick images."""
    items, legend = of_classes(range(20), sick), labels.Legend(("a", "b"), (), {})
    parts = splits.hold_out(items, legend, "")
    train, test = ([{item.group for item in part if item.target == kind} for kind in (0, 1)]
                   for part in parts)
    assert not (train[0] | train[1]) & (test[0] | test[1])
    assert 4 <= len(test[0]) <= 5 and held <= len(test[1]) <= held + 1 and train[0] and train[1]
    assert splits.hold_out(items, legend, "") == parts


def test_no_class_loses_the_last_group_that_it_trains_on():
    legend = labels.Legend(("a", "b", "c"), (), {})
    with pytest.raises(BadInput, match="of class b, but each of .* last to train on"):
        splits.hold_out(of_classes("xy", "yz", "zx"), legend, "this")


@pytest.mark.parametrize("count, held", [(4, 1), (7, 1), (8, 2), (12, 2), (13, 3)])
def test_a_fifth_is_rounded(count, held):
    items = [splits.Item(Path(f"{i}"), 0, f"{i}", f"{i}") for i in range(count)]
    legend = labels.Legend(("a",), labels.default_palette(1), {})
    assert len(splits.hold_out(items, legend, "")[1]) == held


def test_images_are_stretched_as_predict_does():
    image = data.synthetic_facade(1, 128)[0].copy()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    small, _ = folders.stretched(pixels, torch.zeros(1, dtype=torch.uint8), 32)
    difference = small[0].permute(1, 2, 0).numpy() - to_size(image, 32).astype(int)
    assert np.abs(difference).max() <= 1  # both round after each axis


# ---- classification ----

@pytest.mark.parametrize("grey", [True, False])
def test_class_folders(tmp_path, grey):
    dataset = folders.load(make_shapes(tmp_path / "set", 5, grey), "classification", 24)
    assert dataset.classes == tuple(sorted(SHAPES)) and dataset.task == "classification"
    assert dataset.train.images.shape == (16, 1 if grey else 3, 24, 24)
    assert len(dataset.mean) == (1 if grey else 3) and dataset.palette is None


def test_one_colour_image_makes_a_set_of_colours(tmp_path):
    folder = make_shapes(tmp_path / "set", 5, grey=True)
    Image.new("RGB", (9, 9), (255, 0, 0)).save(folder / "train/disc/000.png")
    assert len(folders.load(folder, "classification", 8).mean) == 3


def test_grey_of_16_bits_is_grey(tmp_path):
    folder = make_shapes(tmp_path / "set", 5, grey=True)
    for path in folder.rglob("*.png"):
        pixels = 257 * np.asarray(Image.open(path)).astype(">u2")
        header = f"P5 {pixels.shape[1]} {pixels.shape[0]} 65535\n".encode()
        path.with_suffix(".pgm").write_bytes(header + pixels.tobytes())
        path.unlink()
    assert len(folders.load(folder, "classification", 8).mean) == 1


@pytest.mark.parametrize("limit", [4, 9, 20, 60, 80])
def test_a_limit_keeps_images_of_every_class(tmp_path, limit):
    """In their shares, as far as so few can have them, and each in the order of the whole set."""
    folder = make_shapes(tmp_path / "set", 25)
    for path in sorted((folder / "train/ring").iterdir())[3:]:
        path.unlink()
    whole = folders.load(folder, "classification", 8)
    assert whole.train.class_counts(4).tolist() == [20, 20, 2, 20]
    few = folders.load(folder, "classification", 8, limit=limit)
    counts = few.train.class_counts(4).tolist()
    assert sum(counts) == min(limit, 62) and min(counts) > 0
    assert max(counts[0], counts[1], counts[3]) - min(counts[0], counts[1], counts[3]) <= 1
    assert few.digest == whole.digest
    find = {image.numpy().tobytes(): i for i, image in enumerate(whole.train.images)}
    places = [find[image.numpy().tobytes()] for image in few.train.images]
    assert places == sorted(places)


def test_a_limit_takes_no_class_away_where_there_are_many(tmp_path):
    for kind in range(40):
        (tmp_path / f"set/train/{kind:02d}").mkdir(parents=True)
        for i in range(6):
            Image.new("L", (8, 8), 6 * kind + i).save(tmp_path / f"set/train/{kind:02d}/{i}.png")
    few = folders.load(tmp_path / "set", "classification", 8, limit=40)
    assert few.train.class_counts(40).tolist() == [1] * 40


def test_a_link_to_another_place_is_the_users_own_affair(streets, tmp_path):
    expected = segments(streets)
    (streets / "train/images").rename(tmp_path / "elsewhere")
    (streets / "train/images").symlink_to(tmp_path / "elsewhere")
    assert segments(streets).digest == expected.digest


def test_a_default_palette_has_a_colour_for_each_class():
    for count in (2, 7, 60, 255):
        assert len(set(labels.default_palette(count))) == count
    with pytest.raises(BadInput, match="printable"):
        labels.check_names(["a\nb"], "here")


def test_other_groups_make_another_set(streets):
    """They decide what intervals resample, and what is held out."""
    before, path = segments(streets), streets / "groups.csv"
    path.write_text(path.read_text().replace("street 0", "street 1"))
    assert segments(streets).digest != before.digest


def test_a_palette_that_calls_a_class_void_is_refused(tmp_path):
    legend = labels.read_legend(Path("classes.txt"), b"a #ff0000\nb #00ff00\nvoid #010203")

    def read(palette):
        mask = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
        mask.putpalette(bytes.fromhex(palette))
        mask.save(tmp_path / "mask.png")
        return labels.read_mask(Path("mask.png"), (tmp_path / "mask.png").read_bytes(), legend)

    assert read("ff000000ff00010203").tolist() == [[0, 1, VOID]]
    with pytest.raises(BadInput, match="#010203 for the value 1, .* the colour of 255 void"):
        read("ff0000010203010203")


def test_images_of_one_value_can_be_normalised(tmp_path):
    for i in range(12):
        path = tmp_path / f"set/train/{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 51).save(path)
    dataset = folders.load(tmp_path / "set", "classification", 8)
    assert (dataset.mean, dataset.std) == ((0.2,), (0.01,))
    assert (dataset.normalise(dataset.train.images) == 0).all()
