"""Networks made ready for export: BatchNorm folded, 8 bits. Their files: test_export.py."""

import contextlib
import math

import pytest
import torch
from conftest import run, run_seg
from torch import nn

import data
import export
from lab import forms
from lab.deployed import Deployed, fold_batchnorm
from models import HourGlass, UNet, VGGResNet


def randomise(model):
    """Statistics and affine weights as after training: fresh ones would make any folding right."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2),
                                      (module.weight.data, 0.5, 1.5), (module.bias.data, -1, 1)):
                tensor.uniform_(low, high)
    return model.eval()


@pytest.mark.parametrize("model, shape", [
    (HourGlass(1, 8), (2, 3, 32, 48)), (UNet(8), (2, 3, 32, 32)),
    (HourGlass(1, 8, norm=False), (1, 3, 16, 16)), (VGGResNet(2, 8, "stride"), (3, 1, 28, 28)),
    (VGGResNet(1, 8, block="transformer"), (3, 1, 28, 28))])
def test_folded_batchnorm_equals_batchnorm(model, shape):
    x = torch.randn(shape)
    with torch.inference_mode():
        exact, folded = randomise(model)(x), fold_batchnorm(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
        near = 1e-5 * exact.abs().max().item()
        torch.testing.assert_close(folded(x), exact, rtol=1e-5, atol=near)
        assert torch.equal(model(x), exact)  # the model itself is as it was


def test_only_a_batchnorm_after_a_convolution_is_folded():
    """Of networks of any other kind: lab knows none."""
    conv = lambda: nn.Conv2d(3, 3, 3, padding=1)
    model = randomise(nn.Sequential(
        nn.Sequential(), nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(conv(), nn.BatchNorm2d(3), nn.ReLU(), conv(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.BatchNorm2d(3)), nn.Identity()))
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        folded = fold_batchnorm(model)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert [sum(isinstance(module, nn.BatchNorm2d) for module in one.modules())
            for one in (model, folded)] == [4, 2]


@pytest.mark.parametrize("model, shape", [
    (HourGlass(1, 8), (4, 3, 32, 48)), (UNet(8), (4, 3, 32, 32)),
    (HourGlass(1, 8, intra_skip=False, norm=False, act="gelu"), (4, 3, 16, 16)),
    (VGGResNet(2, 8, "blurpool"), (4, 1, 28, 28)),
    (VGGResNet(1, 8, block="transformer"), (4, 1, 28, 28))])
def test_8_bits_are_near_the_model_and_the_layers_named_stay_in_float(model, shape):
    x = torch.randn(shape)
    folded = fold_batchnorm(randomise(model))
    weights = lambda model: [module.weight.tolist() for module in model.modules()
                             if type(module) is nn.Conv2d]
    with torch.inference_mode():
        for in_float, kept in ([], []), (forms.convolutions(folded)[:1], weights(folded)[:1]):
            found = forms.to_int8(folded, x, in_float)
            assert weights(found) == kept
            assert 0 < (found(x) - folded(x)).norm() / folded(x).norm() < 0.2


@pytest.mark.parametrize("size", [16, 32])
def test_a_graph_takes_any_size_whatever_the_network_was_trained_at(size):
    """At its stride too, where the deepest features have one position."""
    model = Deployed(fold_batchnorm(HourGlass(1, 4)), (0.5,) * 3, (0.2,) * 3)
    images = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    program = export.Maker(model, images, {}, {}, torch.device("cpu")).graph("cpu")
    x = torch.randint(256, (3, 3, 48, 64), dtype=torch.uint8)
    with torch.inference_mode():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form, found, enough", [
    ("ONNX", {"max_difference": 9e-5, "maps_max_difference": 9e-5}, True),
    ("ONNX", {"max_difference": 2e-4}, False), ("ONNX", {"max_difference": math.nan}, False),
    ("ONNX", {"max_difference": 0.0, "maps_max_difference": math.nan}, False),
    ("ONNX int8", {"map": 0.6955, "max_difference": 9.0}, True),
    ("ONNX int8", {"map": 0.6945}, False), ("ONNX int8", {"map": math.nan}, False)])
def test_the_gate_lets_nothing_through_that_is_too_far_off_or_no_number(form, found, enough):
    with contextlib.nullcontext() if enough else pytest.raises(forms.ParityError):
        forms.gate(form, {"map": 0.7, **found}, {"map": 0.7}, "map")


def test_an_export_is_calibrated_on_training_images_and_held_to_map(tiny_root, tmp_path,
                                                                    monkeypatch):
    assert run_seg(tiny_root, tmp_path) == 0
    makers, held_to, prove = [], [], export.prove
    monkeypatch.setattr(export, "prove", lambda cfg, maker, *rest: makers.append(maker)
                        or prove(cfg, maker, *rest))
    monkeypatch.setattr(forms, "gate", lambda name, found, exact, key: held_to.append(key))
    monkeypatch.setattr(export, "FORMS", {"TorchScript": forms.FORMS["TorchScript"]})
    assert run("export", "--checkpoint", tmp_path / "seed0.pt", "--data-root", tiny_root,
               "--calibration", 3, "--no-aot") == 0
    train = data.load_facades(tiny_root, size=32).train.images
    assert torch.equal(makers[0].images, train[[0, 2, 5]]) and held_to == ["map"]


def test_ranges_of_8_bits_are_of_all_calibration_images():
    torch.manual_seed(0)
    folded = fold_batchnorm(randomise(HourGlass(1, 8)))
    x = torch.randn(3, 3, 16, 16) * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1)
    with torch.inference_mode():
        exact, found = folded(x[2:]), forms.to_int8(folded, x, [])(x[2:])
    assert (found - exact).norm() / exact.norm() < 0.2
