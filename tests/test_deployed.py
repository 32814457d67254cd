"""Networks made ready for export: BatchNorm folded, 8 bits. Their files: test_export.py."""

import pytest
import torch
from torch import nn

from lab import forms
from lab.deployed import fold_batchnorm
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
