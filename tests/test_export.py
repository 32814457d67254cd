"""Exported models predict what the trained one does; one that does not is named."""

import hashlib
import json
import os
import re
import subprocess
import sys

import conftest
import numpy as np
import onnx
import onnxruntime
import pytest
import tools
import torch

import data
import models
from lab import engine, forms
from lab.deployed import Deployed, WithMaps
from lab.forms import FORMS

FILES = {name: form.file for name, form in FORMS.items()}


def run(*flags):
    return conftest.run("export", *flags)


def facades(count, size):
    """uint8 (N, 3, size, size) as a reader of files gives them, channels last in memory."""
    drawn = [data.synthetic_facade(i, size)[0] for i in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def parity(folder):
    return json.loads((folder / "seed0/parity.json").read_text())


def test_every_form_is_there_and_passed(seg):
    report = parity(seg)
    assert set(report["forms"]) == {"eager", *FILES}
    left = {path.name for path in (seg / "seed0").iterdir()}
    assert left == {*FILES.values(), "parity.json"}
    exact = report["forms"].pop("eager")
    for name, form in report["forms"].items():
        if FORMS[name].lossy:
            assert form["map"] >= exact["map"] - 0.005 and form["max_difference"] > 1e-3
        else:
            assert form["max_difference"] <= 1e-4 and abs(form["map"] - exact["map"]) < 1e-4
    assert report["images"] == 3 and report["size"] == 32 and report["failed"] == {}
    for name in ("ONNX int8", "TorchScript int8"):
        assert report["forms"][name]["layers_in_float"] == []
    assert report["environment"]["instructions"][0] == torch.backends.cpu.get_cpu_capability()


def test_a_classifier_too(cls):
    report = parity(cls)
    assert set(report["forms"]) == {"eager", *FILES} - {"AOTInductor"}
    assert report["images"] == 10000
    assert report["forms"]["ONNX"]["accuracy"] == report["forms"]["eager"]["accuracy"]


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx", "model.int8-ort.onnx"])
def test_a_classifier_says_where_it_looks(cls, name):
    """Maps of any batch and size sum to the logits; in 8 bits to rounding, and near to it."""
    model, record = engine.load_trained(cls / "seed0.pt", torch.device("cpu"), models.build)
    about = record["about_data"]
    eager = WithMaps(Deployed(model, about["mean"], about["std"]))
    session = onnxruntime.InferenceSession(cls / "seed0" / name)
    logits, maps = session.get_outputs()
    assert (logits.name, logits.shape) == ("logits", ["batch", 10])
    assert (maps.name, maps.shape) == ("maps", ["batch", 10, "map_height", "map_width"])
    images = data.load_fashion(conftest.real_root("FashionMNIST")).test.images[:6]
    for drawn in (images[:1], images, images[:4].reshape(1, 1, 56, 56), images[:2, :, :20]):
        with torch.inference_mode():
            exact = [value.numpy() for value in eager(drawn)]
        logits, maps = session.run(None, {"images": drawn.numpy()})
        assert maps.shape == exact[1].shape and maps.dtype == np.float32
        summed = maps.sum((2, 3)) + model.classifier.bias.detach().numpy()
        if "int8" in name:
            assert np.abs(maps - exact[1]).mean() < 0.1 * np.abs(exact[1]).mean()
            assert np.abs(summed - logits).mean() < 0.05 * np.abs(logits).mean()
        else:
            assert np.abs(maps - exact[1]).max() < 1e-4 and np.abs(summed - logits).max() < 1e-4


def test_maps_that_differ_are_no_parity(cls, tmp_path, monkeypatch, capsys):
    """The same logits beside maps of another scale: the gate sees it."""
    honest = models.VGGResNet.activation_maps
    maps = lambda self, features: honest(self, features) * (1.01 if self.norms_folded else 1)
    monkeypatch.setattr(models.VGGResNet, "norms_folded", property(
        lambda self: not any(isinstance(m, torch.nn.BatchNorm2d) for m in self.modules())),
        raising=False)
    monkeypatch.setattr(models.VGGResNet, "activation_maps", maps)
    root = conftest.real_root("FashionMNIST")
    assert run("--checkpoint", cls / "seed0.pt", "--data-root", root, "--out", tmp_path, "--no-aot",
               "--no-int8") == 1
    assert "ONNX: maps differ by up to" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*FILES.values()])
def test_any_batch_size_and_layout(seg, name):
    """The export saw two square images; other batches, sizes and layouts give the same as eager."""
    model, record = engine.load_trained(seg / "seed0.pt", torch.device("cpu"), models.build)
    eager = Deployed(model, record["about_data"]["mean"], record["about_data"]["std"])
    form = forms.open_form(seg / "seed0" / name)
    with torch.inference_mode():
        drawn = facades(3, 96)
        for images in (drawn[:1, :, :32, :32], drawn[:, :, :64, :48], drawn[1:2, :, 20:36]):
            exact = eager(images)
            for layout in (torch.contiguous_format, torch.channels_last):
                found = form(images.contiguous(memory_format=layout))
                assert found.shape == exact.shape and found.dtype == torch.float32
                difference = (found - exact).abs()
                if "int8" in name:
                    assert difference.mean() < 0.05 * exact.abs().mean()
                else:
                    assert difference.max() < 1e-4


def test_metadata_in_every_form(seg):
    folder, record = seg / "seed0", json.loads((seg / "seed0.json").read_text())
    expected = {"input": "images", "classes": "others,facade,pillar,window,balcony", "stride": "16",
                "size": "32", "palette": "3c3c3c,f0e442,d55e00,56b4e9,009e73",
                "mean": "0.4957,0.4664,0.4245", "std": "0.2221,0.2129,0.2113",
                "data": "mini facade", "weights_sha256": record["weights_sha256"],
                "record_sha256": hashlib.sha256((seg / "seed0.json").read_bytes()).hexdigest()}
    for name in ("model.onnx", "model.int8.onnx", "model.int8-ort.onnx"):
        session = onnxruntime.InferenceSession(folder / name)
        found = session.get_modelmeta().custom_metadata_map
        assert {key: found[key] for key in expected} == expected
        (images,), (logits,) = session.get_inputs(), session.get_outputs()
        assert images.name == "images" and images.type == "tensor(uint8)"
        assert images.shape == ["batch", 3, "height", "width"]
        assert logits.shape == ["batch", 5, "height", "width"]
    found = dict.fromkeys(expected, "")
    for name in ("model.ts.pt", "model.int8.ts.pt"):
        torch.jit.load(folder / name, _extra_files=found)
        assert {key: value.decode() for key, value in found.items()} == expected
    load = torch._C._aoti.AOTIModelPackageLoader
    found = load(str(folder / "model.pt2"), "model", False, 1, -1).get_metadata()
    assert {key: found[key] for key in expected} == expected


def test_int8_is_int8_from_end_to_end(seg):
    """No layer runs in float; the form for ONNX Runtime gives the same bits without a Resize."""
    plain, fast = (onnx.load(seg / "seed0" / name)
                   for name in ("model.int8.onnx", "model.int8-ort.onnx"))
    makers = {output: node.op_type for node in plain.graph.node for output in node.output}
    convolutions = [node for node in plain.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 28
    assert all(makers[name] == "DequantizeLinear"
               for node in convolutions for name in node.input[:2])
    kinds = lambda model: {node.op_type for node in model.graph.node}
    assert "Resize" in kinds(plain) and "Resize" not in kinds(fast)
    images = torch.randint(256, (2, 3, 48, 32), dtype=torch.uint8)
    assert torch.equal(*(forms.open_form(seg / "seed0" / name)(images)
                         for name in ("model.int8.onnx", "model.int8-ort.onnx")))
    script = torch.jit.load(seg / "seed0/model.int8.ts.pt").inlined_graph
    count = lambda kind: len(script.findAllNodes(kind))
    assert count("aten::conv2d") == 0 and count("quantized::add_relu") == 10
    assert count("quantized::conv2d") + count("quantized::conv2d_relu") == 28


def weights_of(path):
    """The quantised weights of an 8-bit form, as integers, read from its file."""
    if path.suffix == ".onnx":
        tensors = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
        return [values for values in tensors if values.dtype == np.int8 and values.ndim > 1]
    graph = torch.jit.load(path).inlined_graph  # named, or its nodes would go with it
    constants = [node.output() for node in graph.findAllNodes("prim::Constant")]
    objects = [constant.toIValue() for constant in constants
               if constant.type().kind() == "ClassType"]
    return [packed.unpack()[0].int_repr().numpy() for packed in objects]


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.int8-ort.onnx", "model.int8.ts.pt"])
def test_weights_have_7_bits(seg, cls, name):
    """CPUs without VNNI add two products in 16 bits, which saturate with 8-bit weights."""
    for folder, layers in ((seg, 28), (cls, 9)):
        weights = weights_of(folder / "seed0" / name)
        assert len(weights) == layers
        assert all(-64 <= values.min() and values.max() <= 63 for values in weights)
        assert all(np.abs(values).max() == 63 for values in weights)  # and use them


PREDICT = """import pathlib, sys, torch
from lab import forms
form, images, out = map(pathlib.Path, sys.argv[1:])
torch.save(forms.open_form(form)(torch.load(images)), out)"""


def moved_by(environment, form, tmp_path):
    """How far an 8-bit form's logits are, on average, from those that it gives in this process, as
    a share of what its 8 bits move them."""
    images = facades(4, 64)
    torch.save(images.contiguous(), tmp_path / "images")
    subprocess.run([sys.executable, "-c", PREDICT, form, tmp_path / "images", tmp_path / "logits"],
                   check=True, env={**environment, "PYTHONPATH": str(tools.REPO)})
    exact, here = (forms.open_form(path)(images)
                   for path in (form.with_name("model.ts.pt"), form))
    moved = (torch.load(tmp_path / "logits") - here).abs().mean()
    return moved / (here - exact).abs().mean()


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_8_bits_are_the_same_without_vnni(seg, tmp_path, isa):
    """oneDNN held to an older instruction set gives the newest one's logits, but for ties."""
    held = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    assert moved_by(held, seg / "seed0/model.int8.ts.pt", tmp_path) < 0.25


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.int8-ort.onnx", "model.int8.ts.pt"])
def test_8_bits_are_the_same_on_an_older_cpu(seg, tmp_path, older_cpu, name):
    """So does every runtime with the kernels that it takes where there is AVX2 alone."""
    assert moved_by(older_cpu, seg / "seed0" / name, tmp_path) < 0.25


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.int8-ort.onnx"])
def test_8_bits_are_what_the_file_says(seg, name):
    """ONNX Runtime's 8-bit kernels against the same file unoptimised: float32 at every layer."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = onnxruntime.InferenceSession(seg / "seed0" / name, options,
                                         providers=["CPUExecutionProvider"])
    images = facades(4, 64)
    exact, here = (forms.open_form(seg / "seed0" / form)(images) for form in ("model.ts.pt", name))
    said = torch.from_numpy(plain.run(None, {"images": images.numpy()})[0])
    assert (said - here).abs().mean() < 0.25 * (here - exact).abs().mean()


# ---- the gate ----

def left(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


def tampered(program, about, path, honest=forms.write_onnx):
    honest(program, about, path)
    model = onnx.load(path)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = onnx.numpy_helper.to_array(weights).copy()
    changed.flat[0] += 0.1
    weights.CopyFrom(onnx.numpy_helper.from_array(changed, weights.name))
    onnx.save(model, path)


def broken(*args):
    raise RuntimeError("an exporter's own fault\nat great length")


def test_a_form_that_fails_takes_no_other_with_it(seg, tmp_path, monkeypatch, capsys):
    """One predicts something else, one cannot be made: the rest and an earlier export are there."""
    for name in ("model.onnx", "model.ts.pt", "model.int8.onnx"):
        (tmp_path / name).write_text("of an earlier export")
    monkeypatch.setattr(forms, "write_onnx", tampered)
    monkeypatch.setattr(forms, "write_torchscript", broken)
    flags = ("--checkpoint", seg / "seed0.pt", "--data-root", seg / "root", "--out", tmp_path)
    assert run(*flags, "--no-aot") == 1
    said = capsys.readouterr()
    assert re.fullmatch(
        r"error: TorchScript: RuntimeError: an exporter's own fault; ONNX: logits differ by up to "
        r"[\d.e-]+, allowed 0.0001; TorchScript int8: RuntimeError: an exporter's own fault; "
        r"exported: ONNX int8, ONNX int8 for ONNX Runtime", said.err.splitlines()[-1]), said.err
    for name in ("model.onnx", "model.ts.pt"):
        assert (tmp_path / name).read_text() == "of an earlier export"
        assert f"{name} was left as it is, from an earlier export" in said.out
    report = json.loads((tmp_path / "parity.json").read_text())
    assert set(report["forms"]) == {"eager", "ONNX int8", "ONNX int8 for ONNX Runtime"}
    assert set(report["failed"]) == {"TorchScript", "ONNX", "TorchScript int8"}
    onnx.checker.check_model(onnx.load(tmp_path / "model.int8.onnx"))
    assert set(left(tmp_path)) == {"model.onnx", "model.ts.pt", "model.int8.onnx",
                                   "model.int8-ort.onnx", "parity.json"}


def test_where_nothing_passes_the_earlier_export_stays(seg, tmp_path, monkeypatch, capsys):
    flags = ("--checkpoint", seg / "seed0.pt", "--data-root", seg / "root", "--out", tmp_path,
             "--no-aot", "--no-int8")
    assert run(*flags) == 0
    before = left(tmp_path)
    assert set(before) == {"model.onnx", "model.ts.pt", "parity.json"}
    monkeypatch.setattr(forms, "FLOAT_TOLERANCE", -1.0)
    assert run(*flags) == 1 and left(tmp_path) == before
    assert capsys.readouterr().err.endswith("allowed -1; exported: nothing\n")


def spoil(checkpoint, target):
    """The same function in float; in 8 bits one channel is so large that it swallows the others."""
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
    said, report = capsys.readouterr().out, parity(tmp_path)["forms"]
    for name in ("ONNX int8", "TorchScript int8"):  # each has its own way to find the layer
        assert f"{name}: loses" in said and "tries again with 1 of 28 layers in float" in said
        assert 1 <= len(report[name]["layers_in_float"]) <= 14
    assert report["TorchScript int8"]["layers_in_float"][0] in ("stem.conv1.0", "stem.conv2.0")
    monkeypatch.setattr(forms, "LOSS", -1)  # none can pass
    monkeypatch.setattr(forms, "worst_layers", lambda *_: ["a"])
    monkeypatch.setattr(forms, "worst_convolutions", lambda *_: ["stem.conv1.0"])
    assert run(*flags) == 1
    said = capsys.readouterr().err
    assert all(f"{name}: loses" in said for name in FORMS if FORMS[name].lossy)
    assert said.endswith("exported: TorchScript, ONNX\n")


def test_refusals(seg, tmp_path, capsys, monkeypatch):
    def message(*flags):
        assert run(*flags) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--checkpoint is missing" in message()
    assert "--calibration 0: must be at least 1" in message("--checkpoint", "x.pt",
                                                            "--calibration", "0")
    assert "nothing.pt: No such file" in message("--checkpoint", tmp_path / "nothing.pt")
    assert "is no checkpoint of this project" in message("--checkpoint", seg / "seed0.json")
    monkeypatch.setenv("CXX", "no-such-compiler")
    flags = ("--checkpoint", seg / "seed0.pt", "--data-root", seg / "root")
    assert "no C++ compiler" in message(*flags)
