"""Exported models predict what the trained one does, in Python and in C++; one that does not leaves no file."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bench_inference
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import make_tiny_root, real_root
from PIL import Image

import data
import engine
import export
import models
import train_cls
import train_seg

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def seg(tmp_path_factory):
    """A finished segmentation run, its data root, and the folder that it was exported into, every form."""
    folder = tmp_path_factory.mktemp("seg")
    root = make_tiny_root(folder / "root")
    argv = ["--protocol", "smoke", "--hourglasses", "1", "--device", "cpu", "--data-root", str(root)]
    argv += ["--epochs", "30", "--batch", "2", "--lr", "5e-3"]  # enough to have something to lose
    assert engine.guard(lambda: train_seg.main([*argv, "--out", str(folder)])) == 0
    assert run("--checkpoint", folder / "seed0.pt", "--data-root", root) == 0
    return folder


@pytest.fixture(scope="module")
def cls(tmp_path_factory):
    """The same for a classifier, without the AOTInductor package."""
    root, folder = real_root("FashionMNIST"), tmp_path_factory.mktemp("cls")
    argv = ["--protocol", "smoke", "--depth", "1", "--device", "cpu", "--data-root", str(root)]
    assert engine.guard(lambda: train_cls.main([*argv, "--out", str(folder)])) == 0
    assert run("--checkpoint", folder / "seed0.pt", "--data-root", root, "--no-aot") == 0
    return folder


@pytest.fixture(scope="module")
def runner():
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler (CXX, else g++): the C++ program cannot be built")
    subprocess.run(["make", "cpp/runner", f"PY={sys.executable}"], cwd=REPO, check=True)
    return REPO / "cpp/runner"


def run(*flags):
    return engine.guard(lambda: export.main([*map(str, flags), "--device", "cpu"]))


def parity(folder):
    return json.loads((folder / "seed0/parity.json").read_text())


def test_every_form_is_there_and_passed(seg):
    report = parity(seg)
    assert set(report["forms"]) == {"eager", *export.FILES}
    assert sorted(path.name for path in (seg / "seed0").iterdir()) == sorted([*export.FILES.values(), "parity.json"])
    exact = report["forms"].pop("eager")
    for name, form in report["forms"].items():
        if "int8" in name:
            assert form["map"] >= exact["map"] - 0.005 and form["max_difference"] > 1e-3
        else:
            assert form["max_difference"] <= 1e-4 and abs(form["map"] - exact["map"]) < 1e-4
    assert report["images"] == 3 and report["size"] == 32 and report["layers_in_float"] == []
    assert report["instructions"][0] == torch.backends.cpu.get_cpu_capability()


def test_a_classifier_too(cls):
    report = parity(cls)
    assert set(report["forms"]) == {"eager", *export.FILES} - {"AOTInductor"}
    assert report["images"] == 10000 and report["forms"]["ONNX"]["accuracy"] == report["forms"]["eager"]["accuracy"]


@pytest.mark.parametrize("name", [*export.FILES.values()])
def test_any_batch_size_and_layout(seg, name):
    """The export saw two square images; batch 1, other sizes and channels_last must give the same as eager."""
    model, record = engine.load_trained(seg / "seed0.pt", torch.device("cpu"))
    eager = models.Deployed(model, record["about_data"]["mean"], record["about_data"]["std"])
    form = export.open_form(seg / "seed0" / name)
    with torch.inference_mode():
        drawn = torch.from_numpy(np.stack([data.synthetic_facade(i, 96)[0] for i in range(3)])).permute(0, 3, 1, 2)
        for images in (drawn[:1, :, :32, :32], drawn[:, :, :64, :48], drawn[1:2, :, 20:36]):
            exact = eager(images)
            for layout in (torch.contiguous_format, torch.channels_last):
                found = form(images.contiguous(memory_format=layout))
                assert found.shape == exact.shape and found.dtype == torch.float32
                difference = (found - exact).abs()
                assert difference.mean() < 0.05 * exact.abs().mean() if "int8" in name else difference.max() < 1e-4


def test_metadata_in_every_form(seg):
    folder, record = seg / "seed0", json.loads((seg / "seed0.json").read_text())
    expected = {"input": "images", "classes": "others,facade,pillar,window,balcony", "stride": "16",
                "palette": "3c3c3c,f0e442,d55e00,56b4e9,009e73", "mean": "0.4957,0.4664,0.4245",
                "std": "0.2221,0.2129,0.2113", "data": "mini facade", "weights_sha256": record["weights_sha256"],
                "record_sha256": hashlib.sha256((seg / "seed0.json").read_bytes()).hexdigest()}
    for name in ("model.onnx", "model.int8.onnx", "model.int8-ort.onnx"):
        session = onnxruntime.InferenceSession(folder / name)
        found = session.get_modelmeta().custom_metadata_map
        assert {key: found[key] for key in expected} == expected
        (images,), (logits,) = session.get_inputs(), session.get_outputs()
        assert images.name == "images" and images.type == "tensor(uint8)"
        assert images.shape == ["batch", 3, "height", "width"] and logits.shape == ["batch", 5, "height", "width"]
    found = dict.fromkeys(expected, "")
    for name in ("model.ts.pt", "model.int8.ts.pt"):
        torch.jit.load(folder / name, _extra_files=found)
        assert {key: value.decode() for key, value in found.items()} == expected
    found = torch._C._aoti.AOTIModelPackageLoader(str(folder / "model.pt2"), "model", False, 1, -1).get_metadata()
    assert {key: found[key] for key in expected} == expected


def test_int8_is_int8_from_end_to_end(seg):
    """No layer runs in float, and the form for ONNX Runtime gives the same bits without a Resize."""
    plain, fast = (onnx.load(seg / "seed0" / name) for name in ("model.int8.onnx", "model.int8-ort.onnx"))
    makers = {output: node.op_type for node in plain.graph.node for output in node.output}
    convolutions = [node for node in plain.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 28
    assert all(makers[name] == "DequantizeLinear" for node in convolutions for name in node.input[:2])
    kinds = lambda model: {node.op_type for node in model.graph.node}
    assert "Resize" in kinds(plain) and "Resize" not in kinds(fast)
    images = torch.randint(256, (2, 3, 48, 32), dtype=torch.uint8)
    assert torch.equal(*(export.open_form(seg / "seed0" / name)(images)
                         for name in ("model.int8.onnx", "model.int8-ort.onnx")))
    script = torch.jit.load(seg / "seed0/model.int8.ts.pt").inlined_graph
    assert not script.findAllNodes("aten::conv2d") and len(script.findAllNodes("quantized::add_relu")) == 10
    assert sum(len(script.findAllNodes(f"quantized::{kind}")) for kind in ("conv2d", "conv2d_relu")) == 28


def weights_of(path):
    """The quantised weights of an 8-bit form, as integers, read from its file."""
    if path.suffix == ".onnx":
        tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
        return [values for values in tensors.values() if values.dtype == np.int8 and values.ndim > 1]
    graph = torch.jit.load(path).inlined_graph  # named, or its nodes would go with it
    constants = [node.output() for node in graph.findAllNodes("prim::Constant")]
    objects = [constant.toIValue() for constant in constants if constant.type().kind() == "ClassType"]
    return [packed.unpack()[0].int_repr().numpy() for packed in objects]


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.int8-ort.onnx", "model.int8.ts.pt"])
def test_weights_have_7_bits(seg, cls, name):
    """CPUs without VNNI add two products in 16 bits, which saturate with 8-bit weights: another result on each CPU."""
    for folder, layers in ((seg, 28), (cls, 9)):
        weights = weights_of(folder / "seed0" / name)
        assert len(weights) == layers and all(-64 <= values.min() and values.max() <= 63 for values in weights)
        assert all(np.abs(values).max() == 63 for values in weights)  # and use them


ON_ONE_ISA = """import sys, torch
form, images, out = sys.argv[1:]
with torch.inference_mode():
    torch.save(torch.jit.load(form)(torch.load(images)), out)"""


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_8_bits_are_the_same_without_vnni(seg, tmp_path, isa):
    """oneDNN held to an older instruction set gives the logits of the newest one; rounding of ties may differ."""
    images = torch.from_numpy(np.stack([data.synthetic_facade(i, 64)[0] for i in range(4)])).permute(0, 3, 1, 2)
    torch.save(images.contiguous(), tmp_path / "images")
    subprocess.run([sys.executable, "-c", ON_ONE_ISA, seg / "seed0/model.int8.ts.pt", tmp_path / "images",
                    tmp_path / "logits"], check=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa})
    exact, here = (export.open_form(seg / "seed0" / name)(images) for name in ("model.ts.pt", "model.int8.ts.pt"))
    moved, lost = (torch.load(tmp_path / "logits") - here).abs().mean(), (here - exact).abs().mean()
    assert moved < 0.25 * lost


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.int8-ort.onnx"])
def test_8_bits_are_what_the_file_says(seg, name):
    """ONNX Runtime's 8-bit kernels against the same file unoptimised, which goes through float32 at every layer."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(seg / "seed0" / name, options, providers=["CPUExecutionProvider"])
    images = torch.from_numpy(np.stack([data.synthetic_facade(i, 64)[0] for i in range(4)])).permute(0, 3, 1, 2)
    exact, here = (export.open_form(seg / "seed0" / form)(images) for form in ("model.ts.pt", name))
    said = torch.from_numpy(plain.run(None, {"images": images.numpy()})[0])
    assert (said - here).abs().mean() < 0.25 * (here - exact).abs().mean()


# ---- the gate ----

def left(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


def test_a_tampered_float_form_is_refused_and_leaves_nothing(seg, tmp_path, monkeypatch, capsys):
    def tampered(program, about, path, honest=export.write_onnx):
        honest(program, about, path)
        model = onnx.load(path)
        weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        changed = onnx.numpy_helper.to_array(weights).copy()
        changed.flat[0] += 0.1
        weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
        onnx.save(model, path)

    (tmp_path / "model.onnx").write_text("of an earlier export")
    monkeypatch.setattr(export, "write_onnx", tampered)
    assert run("--checkpoint", seg / "seed0.pt", "--data-root", seg / "root", "--out", tmp_path, "--no-aot") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: ONNX: logits differ by up to [\d.e-]+, allowed 0.0001; nothing was exported", said)
    assert left(tmp_path) == []


def spoil(checkpoint, target):
    """The same function in float, but in 8 bits one channel is so large that it swallows the others' range."""
    state = torch.load(checkpoint, weights_only=True)
    weights = state["model"]
    weights["stem.conv1.1.weight"][0] *= 1e4
    weights["stem.conv1.1.bias"][0] = weights["stem.conv1.1.bias"][0].abs() * 1e4
    weights["stem.conv2.0.weight"][:, 0] /= 1e4
    torch.save(state, target)


def test_mixed_precision_saves_what_8_bits_would_spoil(seg, tmp_path, monkeypatch, capsys):
    spoil(seg / "seed0.pt", tmp_path / "seed0.pt")
    flags = ("--checkpoint", tmp_path / "seed0.pt", "--data-root", seg / "root", "--no-aot")
    assert run(*flags) == 0
    assert "tries again with 1 of 28 layers in float" in capsys.readouterr().out
    report = parity(tmp_path)
    assert 1 <= len(report["layers_in_float"]) <= 14
    monkeypatch.setattr(export, "INT8_LOSS", -1)  # no form can pass
    assert run(*flags) == 1
    assert "error: ONNX int8: loses" in capsys.readouterr().err and left(tmp_path / "seed0") == []


def test_refusals(seg, tmp_path, capsys, monkeypatch):
    def message(*flags):
        assert run(*flags) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--checkpoint is missing" in message()
    assert "--calibration 0: must be at least 1" in message("--checkpoint", "x.pt", "--calibration", "0")
    assert "nothing.pt: No such file" in message("--checkpoint", tmp_path / "nothing.pt")
    assert "is no checkpoint of this project" in message("--checkpoint", seg / "seed0.json")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in message("--checkpoint", seg / "seed0.pt", "--data-root", seg / "root")


# ---- predict ----

BLOCKED = """import runpy, sys
for name in ("torch", "torchvision", "onnx", "matplotlib"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


def predict(*argv):
    """As on a machine without torch: importing it fails."""
    return subprocess.run([sys.executable, "-c", BLOCKED, "export.py", "predict", *map(str, argv)], cwd=REPO,
                          capture_output=True, text=True)


@pytest.fixture
def pictures(tmp_path):
    """One image in the forms that programs write; none of a size that the network takes."""
    image = Image.fromarray(data.synthetic_facade(3, 64)[0]).crop((0, 0, 50, 37))
    folder = tmp_path / "pictures"
    folder.mkdir()
    image.save(folder / "rgb.png")
    image.save(folder / "colour.jpg", quality=90)
    image.save(folder / "plain.ppm")
    image.convert("L").save(folder / "grey.png")
    image.convert("L").save(folder / "grey-jpeg.jpg")
    image.quantize(16).save(folder / "palette.png")
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(image.size))
    rgba.save(folder / "alpha.png")
    return sorted(folder.iterdir())


def masks(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_predict_needs_no_torch(seg, tmp_path, pictures):
    done = predict("--model", seg / "seed0/model.onnx", "--out", tmp_path / "out", *pictures)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[0] == f"{pictures[0]} -> {tmp_path}/out/alpha.png"
    mask = Image.open(tmp_path / "out/rgb.png")
    assert mask.mode == "P" and mask.size == (50, 37)
    assert tuple(mask.getpalette()[3:6]) == data.FACADE_PALETTE[1]
    image = np.pad(np.asarray(Image.open(pictures[-1])), ((0, 11), (0, 14), (0, 0)), mode="edge")
    logits = export.open_form(seg / "seed0/model.ts.pt")(torch.from_numpy(image).permute(2, 0, 1)[None])
    assert np.array_equal(np.asarray(mask), logits[0].argmax(0)[:37, :50].numpy())


def test_predict_classes(cls, tmp_path, fashion_root):
    dataset = data.load_fashion(fashion_root)
    Image.fromarray(dataset.test.images[7, 0].numpy()).save(tmp_path / "seven.png")
    done = predict("--model", cls / "seed0/model.int8.onnx", tmp_path / "seven.png")
    assert re.fullmatch(rf"{tmp_path}/seven.png: [A-Z][\w-]+ \d+\.\d %\n", done.stdout), done.stderr
    assert done.stdout.split()[1] in data.FASHION_CLASSES


def test_predict_refusals(seg, tmp_path, pictures):
    (tmp_path / "text.png").write_text("no image")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "other.onnx")
    model = seg / "seed0/model.onnx"
    odd = onnx.load(model)
    next(entry for entry in odd.metadata_props if entry.key == "stride").value = "0"
    onnx.save(odd, tmp_path / "odd.onnx")
    for argv, message in (((), "required: --model, images"), (("--model", "nothing.onnx", "x"), "nothing.onnx is no"),
                          (("--model", tmp_path / "other.onnx", "x"), "other.onnx is no model that export.py made"),
                          (("--model", tmp_path / "odd.onnx", "x"), "odd.onnx is no model that export.py made"),
                          (("--model", model, tmp_path / "text.png"), "text.png cannot be read as an image"),
                          (("--model", model, "nothing.png"), "nothing.png cannot be read as an image"),
                          (("--model", model, "a/x.png", "b/x.jpg"), "would both write predictions/x.png")):
        done = predict(*argv)
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


# ---- C++ ----

def cpp(runner, *argv):
    done = subprocess.run([runner, *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", ["model.ts.pt", "model.int8.ts.pt", "model.pt2"])
def test_cpp_masks_are_those_of_python_byte_for_byte(seg, runner, tmp_path, name):
    """Over the real held-out photos where the set is there, else over the tiny one's."""
    real = Path(os.environ.get("DATA_ROOT") or "data", "mini_facade")
    photos = sorted((real if real.is_dir() else seg / "root/mini_facade").glob("test_dev/*.jpg"))
    cpp(runner, seg / "seed0" / name, "--out", tmp_path / "out", *photos)
    found, form = masks(tmp_path / "out"), export.open_form(seg / "seed0" / name)
    assert len(found) == len(photos) in (3, 114)
    with torch.inference_mode():
        for photo in photos:
            image = torch.from_numpy(np.asarray(Image.open(photo).convert("RGB")).copy())
            expected = form(image.permute(2, 0, 1)[None])[0].argmax(0).byte().numpy()
            assert np.array_equal(found[f"{photo.stem}.png"], expected), photo.name


def test_cpp_reads_what_pillow_reads(seg, runner, tmp_path, pictures):
    """Every file format and colour mode, and sizes that need padding: the masks of predict, and its palette."""
    lines = cpp(runner, seg / "seed0/model.ts.pt", "--out", tmp_path / "cpp", *pictures)
    done = predict("--model", seg / "seed0/model.onnx", "--out", tmp_path / "python", *pictures)
    assert [line.replace("/cpp/", "/python/") for line in lines] == done.stdout.splitlines()
    ours, theirs = masks(tmp_path / "cpp"), masks(tmp_path / "python")
    for name in theirs:
        assert np.array_equal(ours[name], theirs[name]), name
    palette = Image.open(tmp_path / "cpp/rgb.png").getpalette()
    assert palette == Image.open(tmp_path / "python/rgb.png").getpalette()


def test_cpp_classes(cls, runner, tmp_path, fashion_root):
    dataset = data.load_fashion(fashion_root)
    for i in range(20):
        Image.fromarray(dataset.test.images[i, 0].numpy()).save(tmp_path / f"{i:02d}.png")
    images = sorted(tmp_path.glob("*.png"))
    lines = cpp(runner, cls / "seed0/model.ts.pt", *images)
    probabilities = export.open_form(cls / "seed0/model.ts.pt")(dataset.test.images[:20]).softmax(1)
    for line, path, p in zip(lines, images, probabilities):
        assert line == f"{path}: {dataset.classes[p.argmax()]} {100 * p.max():.1f} %"


def test_cpp_refusals(seg, runner, tmp_path, pictures):
    (tmp_path / "text.png").write_text("no image")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(pictures[1].read_bytes()[:-100])
    model = seg / "seed0/model.ts.pt"
    odd = torch.jit.script(torch.nn.Identity())  # its two values of mean would overrun the pixels' memory
    odd.save(tmp_path / "odd.ts.pt", _extra_files={"classes": "a,b", "palette": "", "stride": "16", "mean": "0,0"})
    for argv, message in (((), "usage: runner MODEL"), ((model, tmp_path / "text.png"), "is no PNG, JPEG or PPM"),
                          ((tmp_path / "odd.ts.pt", pictures[0]), "has a damaged description"),
                          ((model, cut), "cut.jpg: Premature end of JPEG file"),
                          ((model, "nothing.png"), "nothing.png: cannot be opened"),
                          (("nothing.ts.pt", pictures[0]), "nothing.ts.pt"),
                          ((model, "--bench", "1"), "--bench wants")):
        done = subprocess.run([runner, *map(str, argv)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr, done.stderr


# ---- the benchmark ----

def test_bench_end_to_end(seg, runner, tmp_path, monkeypatch):
    """One short round: a record that holds what the table shows, the table in the page, the plot."""
    rows = ("eager", "eager bfloat16", "TorchScript", "AOTInductor", "ONNX Runtime int8", "C++ TorchScript",
            "C++ AOTInductor")
    monkeypatch.setattr(bench_inference, "BACKENDS", {name: bench_inference.BACKENDS[name] for name in rows})

    def measure(cfg, name, batch, apart=bench_inference.measure_apart):
        if name.startswith("C++") or (name, batch) == ("TorchScript", 1):  # one process shows that processes work
            return apart(cfg, name, batch)
        return bench_inference.measure(dataclasses.replace(cfg, only=name, batch=batch))

    monkeypatch.setattr(bench_inference, "measure_apart", measure)
    (tmp_path / "page.md").write_text("before\n<!-- inference -->\n<!-- /inference -->\nafter\n")
    argv = ["--checkpoint", seg / "seed0.pt", "--data-root", seg / "root", "--size", "32", "--rounds", "1", "--seconds",
            "0.01", "--threads", "1", "--device", "cpu", "--record", tmp_path / "bench/inference.json", "--page",
            tmp_path / "page.md"]
    assert engine.guard(lambda: bench_inference.main([*map(str, argv)])) == 0
    record = json.loads((tmp_path / "bench/inference.json").read_text())
    assert [row["name"] for row in record["results"]] == [*rows]
    for row in record["results"]:
        assert row["batch1"]["median_ms"] <= row["batch1"]["p95_ms"] and row["batch8"]["passes"] >= 5
        assert row["quality"]["map"] == pytest.approx(record["parity"]["forms"]["eager"]["map"], abs=0.05)
    assert record["results"][0]["batch1"]["ratio"] == 1 and record["model"] == "HourGlass(1,8)"
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n<!-- inference -->\n| form |") and page.endswith("<!-- /inference -->\nafter\n")
    assert f"| AOTInductor | {record['results'][3]['batch1']['median_ms']:.1f} |" in page
    assert (tmp_path / "bench/inference.png").stat().st_size > 10_000


def test_bench_refusals(seg, tmp_path, capsys):
    for flags, message in ((["--checkpoint", seg / "seed0.pt", "--models", tmp_path], "parity.json is missing: run"),
                           ([], "--checkpoint is missing"), (["--checkpoint", "x", "--size", "0"], "--size 0: must be"),
                           (["--checkpoint", "x", "--only", "caffe"], "--only caffe: must be one of eager,")):
        assert engine.guard(lambda: bench_inference.main([*map(str, flags)])) == 2
        assert message in capsys.readouterr().err
