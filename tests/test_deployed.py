"""Networks made ready for export: BatchNorm folded, 8 bits. Their files: test_export.py."""

import pytest
import torch
from torch import nn

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
