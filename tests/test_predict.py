"""predict.py and the C++ program: the same bytes of a file, at the training size; masks back."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pictures
import pytest
import torch
from conftest import make_tiny_root, run
from PIL import Image
from tools import REPO, masks, photos, seen_by  # noqa: F401 -- photos is a fixture

import data
import metrics
from lab import forms
from lab.files import colours, mask_to, read_image, to_size

CASES = Path(__file__).parent / "cases"

BLOCKED = """import runpy, sys
for name in ("torch", "torchvision", "onnx", "matplotlib", "scipy"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")"""


def predict(*argv, **how):
    """As on a machine without torch: importing it fails."""
    return subprocess.run([sys.executable, "-c", BLOCKED, "predict.py", *map(str, argv)], cwd=REPO,
                          capture_output=True, **{"text": True, **how})


def cpp(runner, *argv, **how):
    done = subprocess.run([runner, *map(str, argv)], capture_output=True, **{"text": True, **how})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# ---- predict.py ----

def test_predict_needs_no_torch(seg, tmp_path, photos):
    done = predict("--model", seg / "seed0/model.onnx", "--out", tmp_path / "out", *photos)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[0] == f"{photos[0]} -> {tmp_path}/out/0.png"
    form = forms.open_form(seg / "seed0/model.ts.pt")
    for path in photos:
        image, mask = np.array(Image.open(path)), Image.open(tmp_path / "out" / path.name)
        logits = form(torch.from_numpy(to_size(image, 32)).permute(2, 0, 1)[None])
        expected = mask_to(logits[0].argmax(0).numpy(), *image.shape[:2])
        assert np.array_equal(np.asarray(mask), expected)
        assert mask.mode == "P" and tuple(mask.getpalette()[3:6]) == data.FACADE_PALETTE[1]


def test_predict_through_export(seg, tmp_path, photos):
    done = subprocess.run([sys.executable, REPO / "export.py", "predict",
                           "--model", seg / "seed0/model.onnx", "--out", tmp_path / "out",
                           photos[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{photos[0]} -> {tmp_path}/out/0.png\n"


def test_classes_of_equal_file_names(cls, runner, tmp_path, fashion_root):
    """A class is printed and nothing written, so that two folders may hold the same names."""
    dataset, paths = data.load_fashion(fashion_root), []
    for i in range(20):
        paths.append(tmp_path / f"{i % 2}/{i // 2:02d}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        Image.fromarray(dataset.test.images[i, 0].numpy()).save(paths[-1])
    probabilities = forms.open_form(cls / "seed0/model.ts.pt")(dataset.test.images[:20]).softmax(1)
    expected = [f"{path}: {dataset.classes[p.argmax()]} {100 * p.max():.1f} %"
                for path, p in zip(paths, probabilities)]
    assert predict("--model", cls / "seed0/model.onnx", *paths).stdout.splitlines() == expected
    assert cpp(runner, cls / "seed0/model.ts.pt", *paths) == expected


def test_every_tool_sees_the_same_class(cls, runner, tmp_path, capsys):
    """A garment of 300 pixels is the garment of 28 that it was made of, in colours or not."""
    paths = [CASES / name for name in ("0_Boot_grey.png", "0_Boot_300px.png",
                                       "12_Sneaker_red.png", "12_Sneaker_green.jpg")]
    lines = predict("--model", cls / "seed0/model.onnx", *paths).stdout.splitlines()
    assert len(lines) == 4 and cpp(runner, cls / "seed0/model.ts.pt", *paths) == lines
    assert run("interpret", "--checkpoint", cls / "seed0.pt", "--image", *paths,
               "--figure", tmp_path / "own.png") == 0
    said = capsys.readouterr().out.splitlines()
    answers = [re.fullmatch(r"(.*: \w[\w-]+) ([\d.]+) %", line).groups() for line in lines]
    assert [name.split()[-1] for name, _ in answers[:2]] == ["Boot", "Boot"]
    for (name, percent), line in zip(answers, said):
        looked = re.match(r"(.*: \w[\w-]+) (\d+) %", line)
        assert looked[1] == name and abs(float(percent) - float(looked[2])) <= 0.6


def test_predict_refusals(seg, tmp_path, photos):
    (tmp_path / "text.png").write_text("no image")
    empty = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(empty), tmp_path / "other.onnx")
    model = seg / "seed0/model.onnx"
    for name, key, value in (("odd", "stride", "0"), ("early", "size", None),
                             ("uneven", "size", "40")):
        changed = onnx.load(model)
        entry = next(entry for entry in changed.metadata_props if entry.key == key)
        if value is None:
            changed.metadata_props.remove(entry)
        else:
            entry.value = value
        onnx.save(changed, tmp_path / f"{name}.onnx")
    no_model = "is no model that export.py made ("
    for argv, message in (
            ((), "required: --model, images"),
            (("nothing.onnx", "x"), f"nothing.onnx {no_model}"),
            ((tmp_path / "other.onnx", "x"), f"other.onnx {no_model}"),
            ((tmp_path / "odd.onnx", "x"), f"odd.onnx {no_model}its description is damaged)"),
            ((tmp_path / "uneven.onnx", "x"), f"{no_model}its size is damaged)"),
            ((tmp_path / "early.onnx", "x"), "does not say the size it was trained at: export"),
            ((model, tmp_path / "text.png"), "text.png cannot be read as an image"),
            ((model, "nothing.png"), "nothing.png cannot be read as an image"),
            ((model, "a/x.png", "b/x.jpg"), "would both write predictions/x.png")):
        done = predict(*(("--model", *argv) if argv else ()))
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


# ---- the same bytes out of a file, in Python and in C++ ----

@pytest.mark.parametrize("height, width, size", [(48, 48, 48), (37, 50, 64), (130, 77, 48)])
def test_cpp_and_python_see_the_same_bytes(runner, tmp_path, height, width, size):
    """Every kind of file, at its own size, made larger and smaller: each channel's bytes alone."""
    kinds = pictures.every_kind(tmp_path / "kinds", height, width)
    for channels, channel in ((3, 0), (3, 1), (3, 2), (1, 0)):
        script = seen_by(tmp_path, channels, channel, size, ".ts.pt")
        cpp(runner, script, "--out", tmp_path / "cpp", *kinds, text=False)
        for path, right in kinds.items():
            pixels = right if channels == 3 else pictures.luma(right)[..., None]
            expected = mask_to(to_size(pixels, size)[..., channel], *right.shape[:2])
            found = np.asarray(Image.open(tmp_path / "cpp" / f"{path.stem}.png"))
            assert np.array_equal(found, expected), (path, channels, channel)


def test_predict_sees_them_too(tmp_path):
    for name, kinds in (("both", pictures.every_kind), ("python", pictures.python_alone)):
        found, model = kinds(tmp_path / name, 48, 48), seen_by(tmp_path, 3, 1, 48, ".onnx")
        done = predict("--model", model, "--out", tmp_path / "out" / name, *found, text=False)
        assert done.returncode == 0 and len(done.stdout.splitlines()) == len(found), done.stderr
        for path, right in found.items():
            assert os.fsencode(path) + b" -> " in done.stdout  # whatever bytes its name has
            mask = Image.open(tmp_path / "out" / name / f"{path.stem}.png")
            assert np.array_equal(np.asarray(mask), right[..., 1]), path


def test_cpp_says_what_it_does_not_read(runner, tmp_path):
    script = seen_by(tmp_path, 3, 1, 48, ".ts.pt")
    for path in pictures.python_alone(tmp_path / "kinds", 48, 48):
        done = subprocess.run([runner, script, path], cwd=tmp_path, capture_output=True, text=True)
        said = {"text.ppm": "is no binary PGM or PPM (P5, P6); save it as one, or as PNG"}.get(
            path.name, "is no PNG, JPEG, PGM or PPM image; save it as one of these")
        assert done.returncode == 2 and done.stderr == f"error: {path}: {said}\n"


def test_the_pages_files_of_two_networks_are_refused():
    done = predict("--model", "web/models/maxpool-frozen.onnx", CASES / "0_Boot_grey.png")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "(it gives 20 classes and names 10)" in done.stderr


# ---- sizes, from the files to the score ----

def by_hand(path, size, form):
    """A photo brought to the size, its classes at that size and, brought back, at its own."""
    image = colours(read_image(path), 3)
    with torch.inference_mode():
        pixels = torch.from_numpy(to_size(image, size)).permute(2, 0, 1)
        labels = form(pixels[None])[0].argmax(0).byte().numpy()
    return labels, mask_to(labels, *image.shape[:2])


def test_masks_of_files_are_those_by_hand_and_score_as_the_record(sized, runner, tmp_path):
    """Photos of 256 pixels for a network of 64, of 1024 for one of 128, and the other way round."""
    folder, size, side = sized
    record = json.loads((folder / "seed0.json").read_text())
    other = make_tiny_root(tmp_path / "other", 0, 3, 1024 if side == 256 else 256)
    form = forms.open_form(folder / "seed0/model.ts.pt")
    for root in (folder / "root", other):
        photos = sorted((root / "mini_facade/test_dev").glob("*.jpg"))
        assert len(photos) == 3
        out = tmp_path / root.name
        done = predict("--model", folder / "seed0/model.onnx", "--out", out / "python", *photos)
        assert done.returncode == 0, done.stderr
        cpp(runner, folder / "seed0/model.ts.pt", "--out", out / "cpp", *photos)
        for tool in ("python", "cpp"):
            found, brought = masks(out / tool), []
            for photo in photos:
                labels, mask = by_hand(photo, size, form)
                assert found[f"{photo.stem}.png"].shape == mask.shape
                assert (found[f"{photo.stem}.png"] == mask).mean() >= 0.999
                brought.append(mask_to(found[f"{photo.stem}.png"], size, size))
            if root.name == "root":
                targets = data.load_facades(root, size=size).test.targets
                labels = torch.from_numpy(np.stack(brought)).long()
                logits = torch.nn.functional.one_hot(labels, 5).permute(0, 3, 1, 2).float()
                score = metrics.segmentation(logits, targets, data.FACADE_CLASSES)["miou"]
                assert score == pytest.approx(record["metrics"]["test"]["miou"], abs=0.01)


@pytest.mark.parametrize("name", ["model.ts.pt", "model.int8.ts.pt", "model.pt2"])
def test_cpp_masks_are_those_of_python_byte_for_byte(seg, runner, tmp_path, name):
    """Over the real held-out photos where the set is there, else over the tiny one's."""
    real = Path(os.environ.get("DATA_ROOT") or "data", "mini_facade")
    photos = sorted((real if real.is_dir() else seg / "root/mini_facade").glob("test_dev/*.jpg"))
    cpp(runner, seg / "seed0" / name, "--out", tmp_path / "out", *photos)
    found, form = masks(tmp_path / "out"), forms.open_form(seg / "seed0" / name)
    assert len(found) == len(photos) in (3, 114)
    for photo in photos:
        assert np.array_equal(found[f"{photo.stem}.png"], by_hand(photo, 32, form)[1]), photo.name


def test_cpp_refusals(seg, runner, tmp_path, photos):
    (tmp_path / "text.png").write_text("no image")
    Image.open(photos[0]).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-100])
    content = bytearray(photos[0].read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(content)
    (tmp_path / "huge.pgm").write_text("P5 9000 9000 255\n")
    (tmp_path / "odd.pgm").write_text("P5 9000 #\n255\n")
    model = seg / "seed0/model.ts.pt"
    odd = torch.jit.script(torch.nn.Identity())  # its two values of mean would overrun the pixels
    about = {"classes": "a,b", "palette": "", "stride": "16", "size": "32", "mean": "0,0"}
    odd.save(tmp_path / "odd.ts.pt", _extra_files=about)
    odd.save(tmp_path / "odder.ts.pt", _extra_files={**about, "stride": "many"})
    del about["size"]
    odd.save(tmp_path / "early.ts.pt", _extra_files=about)
    unread, no_model = "cannot be read as an image", "is no model that export.py made ("
    for argv, message in (
            ((), "usage: runner MODEL"),
            ((model, "text.png"), "text.png: is no PNG, JPEG, PGM or PPM"),
            (("odd.ts.pt", photos[0]), "has a damaged description"),
            (("odder.ts.pt", photos[0]), "has a damaged description"),
            (("early.ts.pt", photos[0]), "does not say the size it was trained at: export it anew"),
            ((model, "cut.jpg"), f"cut.jpg: {unread} (Premature end of JPEG file)"),
            ((model, "flipped.png"), f"flipped.png: {unread} ("),
            ((model, "huge.pgm"), "huge.pgm: has more than 64 million pixels"),
            ((model, "odd.pgm"), "odd.pgm: has a damaged PGM or PPM header"),
            ((model, "nothing.png"), "nothing.png: cannot be opened"),
            ((model, "a/0.png", photos[1]), "a/0.png: cannot be opened"),
            ((model, photos[0], photos[0]), "would both write predictions/0.png; predict them"),
            (("nothing.ts.pt", photos[0]), f"nothing.ts.pt {no_model}"),
            (("nothing.pt2", photos[0]), f"nothing.pt2 {no_model}"),
            (("whole.jpg", photos[0]), f"whole.jpg {no_model}"),
            ((model, photos[0], "--out", "elsewhere"), "usage: runner MODEL"),
            ((model, "--out", "elsewhere"), "usage: runner MODEL"),
            ((model, "--bench", "1"), "--bench wants"),
            ((model, "--bench", "x", "1", "1", "1"), "--bench wants"),
            ((model, "--bench", "32", "1", "1.5", "1"), "whole but for SECONDS"),
            ((model, "--bench", "24", "1", "1", "1"), "SIZE a multiple of 16")):
        done = subprocess.run([runner, *map(str, argv)], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


def test_a_model_of_synthetic_facades_says_so_wherever_it_is_used(seg, runner, tmp_path, photos):
    model = onnx.load(seg / "seed0/model.onnx")
    about = {prop.key: prop.value for prop in model.metadata_props} | {"data": "SYNTHETIC facades"}
    onnx.helper.set_model_props(model, about)
    onnx.save(model, tmp_path / "drawn.onnx")
    script = torch.jit.load(seg / "seed0/model.ts.pt")
    torch.jit.save(script, tmp_path / "drawn.ts.pt", _extra_files=about)
    done = subprocess.run([runner, tmp_path / "drawn.ts.pt", photos[0]], cwd=tmp_path,
                          check=True, capture_output=True, text=True)
    assert done.stderr == f"NOTE: {tmp_path}/drawn.ts.pt was trained on SYNTHETIC facades\n"
    done = predict("--model", tmp_path / "drawn.onnx", "--out", tmp_path / "out", photos[0])
    assert done.stderr == f"NOTE: {tmp_path}/drawn.onnx was trained on SYNTHETIC facades\n"
