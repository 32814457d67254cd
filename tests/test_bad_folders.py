"""Folders of one's own images that cannot be right: one clear line for each, before training."""

import shutil

import numpy as np
import pytest
from conftest import refused
from made_set import CLASSES
from PIL import Image
from test_bad_data import dangling_link, replace_by_folder

from lab import folders, labels
from lab.files import BadInput


def write(name, text):
    return lambda root: (root / name).write_text(text, encoding="utf-8")


def save(name, array):
    return lambda root: Image.fromarray(array).save(root / name)


def remove(*names):
    def damage(root):
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return damage


def painted(old, new, part="*"):
    """In the masks of a part, another class in the place of one."""
    def damage(root):
        for path in root.glob(f"{part}/masks/*"):
            mask = np.array(Image.open(path))
            mask[mask == old] = new
            Image.fromarray(mask).save(path)
    return damage


def keep(count, *parts):
    """Leaves so many images in the parts, and groups.csv out."""
    def damage(root):
        (root / "groups.csv").unlink(missing_ok=True)
        for part in parts:
            for path in sorted((root / part / "images").iterdir())[count:]:
                (root / part / "masks" / f"{path.stem}.png").unlink()
                path.unlink()
    return damage


def only_damage(path_of):
    return lambda change: lambda root: change(root / path_of)


def linked_nowhere(name):
    """A link that leads nowhere, where something lay or did not."""
    def damage(root):
        if (root / name).exists():
            remove(name)(root)
        (root / name).symlink_to("nowhere")
    return damage


def renamed(name, new):
    return lambda root: (root / name).rename(root / new)


def reordered(root):
    """The same pictures, but indexes in another order than classes.txt: what editors save."""
    for path in root.glob("*/masks/*"):
        mask, order = np.array(Image.open(path)), np.roll(np.arange(7), 1)
        mask[mask == 255] = 0
        moved = Image.fromarray(order[mask].astype(np.uint8))
        palette = np.zeros((7, 3), np.uint8)
        palette[order] = [[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in CLASSES.values()]
        moved.putpalette(palette.tobytes())
        moved.save(path)


first_image, first_mask = "train/images/00-0.jpg", "train/masks/00-0.png"
on_image, on_mask = only_damage(first_image), only_damage(first_mask)
NAMES = "\n".join(CLASSES)
SEGMENTATION = {
    "no folder": (remove(""), "streets is no folder; --data wants FOLDER/train"),
    "no train": (remove("train"), "train is no folder"),
    "no classes.txt": (remove("classes.txt"), "classes.txt is missing: name the classes there"),
    "no images folder": (remove("train/images"), "train has no image: "),
    "no masks folder": (remove("train/masks"), "00-0.jpg has no masks/00-0.png beside it"),
    "image without a mask": (remove(first_mask), "00-0.jpg has no masks/00-0.png beside it"),
    "mask without an image": (remove(first_image), "00-0.png has no images/00-0.jpg beside it"),
    "image in another case without a mask": (
        lambda root: (root / first_image).rename(root / "train/images/00-0x.JPG"),
        "masks/00-0.png has no images/00-0.jpg"),
    "two images of one stem": (
        lambda root: shutil.copy(root / first_image, root / "train/images/00-0.PNG"),
        "00-0.PNG and 00-0.jpg have one name"),
    "two masks of one stem": (
        lambda root: shutil.copy(root / first_mask, root / "train/masks/00-0.bmp"),
        "00-0.bmp and 00-0.png have one name"),
    "image that is text": (on_image(lambda path: path.write_text("no image")),
                           "00-0.jpg cannot be read as an image"),
    "image that is cut": (on_image(lambda path: path.write_bytes(path.read_bytes()[:600])),
                          "00-0.jpg cannot be read as an image"),
    "image that is a folder": (on_image(replace_by_folder), "00-0.jpg: Is a directory"),
    "image that is a dangling link": (on_image(dangling_link), "00-0.jpg: No such file"),
    "mask that is text": (on_mask(lambda path: path.write_text("no")), "cannot be read as an"),
    "mask of another size": (save(first_mask, np.ones((5, 6), np.uint8)),
                             "but its mask 00-0.png is 6x5; they must be equal"),
    "mask with a value that has no class": (painted(0, 9), "has the value 9 in"),
    "mask of 16 bits": (save(first_mask, np.ones((9, 9), np.uint16)), "is a PNG of mode I;16"),
    "mask that is a JPEG": (on_mask(lambda path: Image.new("L", (9, 9)).save(path, "JPEG")),
                            "is a JPEG of mode L; a mask must be"),
    "mask in a colour that no class has": (
        save(first_mask, np.full((9, 9, 3), 7, np.uint8)),
        "has the colour #070707 in 81 pixels, which classes.txt gives to no class"),
    "mask in colours without any in classes.txt": (
        lambda root: (write("classes.txt", NAMES)(root),
                      save(first_mask, np.full((9, 9, 3), 7, np.uint8))(root)),
        "is a PNG of mode RGB; a mask must be"),
    "masks whose palette has another order": (
        reordered, "has the colour #c8a078 for the value 0, but in classes.txt that is the colour "
        "of 1 wall, and 0 is sky; save"),
    "class without a pixel in training": (painted(5, 0, "train"),
                                          "class 5 tree has no pixel in the training split"),
    "class without a pixel in test": (painted(3, 255, "test"),
                                      "class 3 door has no pixel in the test split"),
    "class only in test": (painted(6, 1, "train"), "class 6 road has no pixel in the training"),
    "one image": (keep(1, "train"), "has one image, or one group of images in its training part"),
    "one test image": (keep(1, "test"), "one group of images in its held-out part"),
    "one image and no test": (lambda root: (keep(1, "train")(root), remove("test")(root)),
                              "is a fifth of the images, but there is one"),
    "classes.txt of nothing": (write("classes.txt", ""), "names 0 classes; name 2 to 255"),
    "classes.txt of one class": (write("classes.txt", "a\n"), "names 1 classes; name 2 to 255"),
    "classes.txt of 256": (write("classes.txt", "\n".join(map(str, range(256)))),
                           "names 256 classes; name 2 to 255"),
    "classes.txt with a name twice": (write("classes.txt", "a\nb\na\n"),
                                      "names a in line 1 and in line 3"),
    "classes.txt with an empty line": (write("classes.txt", "a\n\nb\n"), "no name in line 2"),
    "classes.txt with a colour alone": (write("classes.txt", "a\n#ff0000\n"), "no name in line 2"),
    "classes.txt with a bad colour": (write("classes.txt", "a #ff00\nb\n"),
                                      "the colour #ff00 in line 1; a colour is #rrggbb"),
    "classes.txt with a colour twice": (write("classes.txt", "a #ff0000\nb #FF0000\n"),
                                        "the colour #FF0000 twice, again in line 2"),
    "classes.txt with void in its midst": (write("classes.txt", "a\nvoid\nb\n"),
                                           "has void in line 2; it is no class and must be the"),
    "classes.txt with a comma": (write("classes.txt", "a,b\nc\n"), "a class 'a,b': a name must be"),
    "classes.txt with what no one can print": (write("classes.txt", "a\u0007\nb\n"),
                                               "a name must be printable"),
    "classes.txt that is no text": (
        lambda root: (root / "classes.txt").write_bytes(b"\xff\xfe\xfd"),
        "classes.txt is no text in UTF-8"),
    "test that is a dangling link": (
        linked_nowhere("test"), "streets/test is a link that leads nowhere; mend or remove it"),
    "groups.csv that is a dangling link": (linked_nowhere("groups.csv"),
                                           "streets/groups.csv is a link that leads nowhere"),
    "masks folder that is a dangling link": (linked_nowhere("test/masks"),
                                             "test/masks is a link that leads nowhere"),
    "test that is a file": (lambda root: (remove("test")(root), write("test", "")(root)),
                            "streets/test is no folder"),
    "groups.csv in another case": (
        renamed("groups.csv", "Groups.csv"),
        "streets/Groups.csv is not read: its name must be groups.csv; rename or remove it"),
    "test in another case": (renamed("test", "Test"),
                             "streets/Test is not read: its name must be test; rename"),
    "train in another case": (renamed("train", "TRAIN"),
                              "streets/TRAIN is not read: its name must be train; rename"),
    "classes.txt in another case": (renamed("classes.txt", "CLASSES.TXT"),
                                    "streets/CLASSES.TXT is not read: its name must be classes"),
    "masks in another case": (renamed("test/masks", "test/Masks"),
                              "test/Masks is not read: its name must be masks"),
    "groups.csv without its head": (write("groups.csv", "00-0.jpg,a\n"),
                                    "must begin with the line image,group"),
    "groups.csv of an unknown image": (
        lambda root: (root / "groups.csv").open("a").write("nowhere.jpg,a\n"),
        "names nowhere.jpg in line 14, which is no image of this set"),
    "groups.csv that lacks images": (write("groups.csv", "image,group\n00-0.jpg,a\n"),
                                     "has no line for train/images/00-1.JPG and 10 more images"),
    "groups.csv with one column": (write("groups.csv", "image,group\n00-0.jpg\n"),
                                   "has no image,group in line 2"),
    "groups.csv with two groups for an image": (
        lambda root: (root / "groups.csv").open("a").write("00-0,another\n"),
        "gives 00-0 a second group in line 14"),
    "groups.csv of a name that two images have": (
        lambda root: [shutil.copy(root / part / kind / f"00-0.{suffix}",
                                  root / "test" / kind / f"00-0.{suffix}")
                      for part in ("train",) for kind, suffix in (("images", "jpg"),
                                                                  ("masks", "png"))],
        "names 00-0.jpg in line 2, which is 2 images: write the path, such as train/images/00-0"),
    "groups.csv with a group in both parts": (
        lambda root: write("groups.csv", (root / "groups.csv").read_text().replace(
            "street 2", "street 0"))(root),
        "the group street 0 has images in train and in test"),
}


@pytest.mark.parametrize("case", SEGMENTATION)
def test_a_set_for_segmentation_is_refused(streets, tmp_path, capsys, case):
    damage, message = SEGMENTATION[case]
    damage(streets)
    said = refused(capsys, "train_seg", "--protocol", "smoke", "--data", streets, "--out",
                   tmp_path / "out", "--device", "cpu")
    assert message in said and not (tmp_path / "out").exists()


CLASSIFICATION = {
    "no train": (remove("train"), "train is no folder"),
    "one class": (remove("train/ring", "train/cross", "train/stripes"), "has 1 class folders"),
    "class folder that is empty": (
        lambda root: [path.unlink() for path in (root / "train/ring").iterdir()],
        "train/ring has no image: give every class images in every part"),
    "class of two folders deep": (
        lambda root: (root / "train/ring").rename(root / "train/disc/ring") and
        (root / "train/ring").mkdir(), "train/ring has no image"),
    "class that is a dangling link": (linked_nowhere("train/ring"),
                                      "train/ring is a link that leads nowhere"),
    "classes.txt in another case": (
        write("Classes.txt", "a\nb\n"), "shapes/Classes.txt is not read: its name must be"),
    "class only in test": (lambda root: shutil.copytree(root / "train/ring", root / "test/square"),
                           "test/square is a class that"),
    "class without a test image": (
        lambda root: shutil.copytree(root / "train/ring", root / "test/ring"),
        "test/cross has no image"),
    "class of one image": (
        lambda root: [path.unlink() for path in sorted((root / "train/ring").iterdir())[1:]],
        "is a fifth of the images of class ring, but there is one"),
    "image that is text": (write("train/ring/002.png", "no image"),
                           "train/ring/002.png cannot be read as an image"),
    "class with a comma": (lambda root: (root / "train/ring").rename(root / "train/a,b"),
                           "a class 'a,b': a name must be printable"),
    "class with a line break": (lambda root: (root / "train/ring").rename(root / "train/a\nb"),
                                "a name must be printable"),
    "a set for segmentation": (write("classes.txt", "a\nb\n"),
                               "has a classes.txt, so it is a set for segmentation"),
}


@pytest.mark.parametrize("case", CLASSIFICATION)
def test_a_set_for_classification_is_refused(shapes, tmp_path, capsys, case):
    damage, message = CLASSIFICATION[case]
    damage(shapes)
    said = refused(capsys, "train_cls", "--protocol", "smoke", "--data", shapes, "--out",
                   tmp_path / "out", "--device", "cpu")
    assert message in said and not (tmp_path / "out").exists()


def test_images_and_masks_are_no_two_classes(streets, tmp_path, capsys):
    (streets / "classes.txt").unlink()
    said = refused(capsys, "train_cls", "--data", streets, "--out", tmp_path / "run")
    assert "has images/ and masks/, but no classes.txt" in said


def test_class_folders_are_no_set_for_segmentation(shapes, tmp_path, capsys):
    said = refused(capsys, "train_seg", "--data", shapes, "--out", tmp_path / "out")
    assert "classes.txt is missing" in said and "class folders is for classification" in said


@pytest.mark.parametrize("script", ["train_seg", "train_cls"])
def test_a_set_that_memory_cannot_hold_is_refused_before_it_is_read(
        streets, shapes, tmp_path, capsys, monkeypatch, script):
    monkeypatch.setattr(folders, "host_memory", lambda: 10_000)
    monkeypatch.setattr(folders, "read", lambda *args: pytest.fail("was read"))
    said = refused(capsys, script, "--data", streets if script == "train_seg" else shapes,
                   "--out", tmp_path / "out")
    assert "0.0 GB of memory are free: lower --size, or give fewer images" in said


def test_a_large_image_is_refused_in_one_line(shapes, tmp_path, capsys, recwarn):
    Image.new("1", (12000, 12000)).save(shapes / "train/ring/huge.png")
    said = refused(capsys, "train_cls", "--data", shapes, "--out", tmp_path / "out")
    assert "12000x12000 pixels, more than 64 million" in said
    assert not [one for one in recwarn if "DecompressionBomb" in one.category.__name__]


def test_fewer_training_images_than_classes_are_refused_by_the_flags_name(shapes, tmp_path, capsys):
    said = refused(capsys, "train_cls", "--data", shapes, "--train-images", 3, "--out",
                   tmp_path / "out", "--device", "cpu")
    assert "--train-images 3: " in said and "has 4 classes" in said


def test_256_classes_are_refused_as_the_last_would_be_void(shapes, tmp_path, capsys):
    for i in range(252):
        (shapes / f"train/{i:03d}").mkdir()
    said = refused(capsys, "train_cls", "--data", shapes, "--out", tmp_path / "out")
    assert "has 256 classes; at most 255 can be told" in said


@pytest.mark.parametrize("train, test", [(90, 10), (10, 90)])
def test_both_splits_count_for_memory(tmp_path, monkeypatch, train, test):
    legend = labels.Legend(("a", "b"), labels.default_palette(2), {})
    check = lambda: folders.check_memory(tmp_path, train, test, 100, 3, legend, False)
    monkeypatch.setattr(folders, "host_memory", lambda: 3_000_000)
    check()
    monkeypatch.setattr(folders, "host_memory", lambda: 2_999_999)
    with pytest.raises(BadInput, match="has 100 images, which at 100x100 take"):
        check()


def test_a_folder_whose_name_cannot_be_printed_is_refused(shapes, tmp_path, capsys):
    odd = shapes.rename(tmp_path / "a\x1b[2Jb")
    said = refused(capsys, "train_cls", "--data", odd, "--out", tmp_path / "out")
    assert "the folder's name is the set's; make it printable" in said


def test_an_image_that_trains_and_is_held_out_is_noted(streets, capsys):
    folders.load(streets, "segmentation", 32)
    assert "NOTE" not in capsys.readouterr().err
    theirs = min((streets / "test/images").iterdir())
    mine = min((streets / "train/images").glob(f"*{theirs.suffix}"))
    for kind, suffix in (("images", mine.suffix), ("masks", ".png")):
        shutil.copy(streets / "train" / kind / f"{mine.stem}{suffix}",
                    streets / "test" / kind / f"{theirs.stem}{suffix}")
    folders.load(streets, "segmentation", 32)
    assert f"NOTE: {theirs}: held out, and the same image is" in capsys.readouterr().err


def test_a_photo_that_its_tag_turns_is_noted_where_a_mask_may_not_be(streets, capsys):
    for path in (turned := sorted((streets / "train/images").glob("*.jpg"))[:2]):
        image = Image.open(path)
        image.getexif()[0x0112] = 3
        image.save(path, exif=image.getexif())
    folders.load(streets, "segmentation", 32)
    said = capsys.readouterr().err
    assert f"NOTE: {turned[0]} and 1 more: turned as the orientation tag says" in said
