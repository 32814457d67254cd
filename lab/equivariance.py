"""How far a network's features move with its image, and where its attention lies.

A network here is anything with `features(images)`; `stride` is the number of input pixels per
feature cell.
"""

import copy
import itertools

import torch
from torch import Tensor, nn

from lab.progress import progress


def attention_in_cell(maps: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """How much of class activation maps (N, h, w) lies in cell (N,), 0 to 3, of a 2x2 grid.

    The share of their positive mass that lies there, and whether their highest point does (Zhang
    et al. 2018, the pointing game); both (N,). A map that is positive nowhere has share 0. Chance
    is 1/4 for both.
    """
    n, height, width = maps.shape
    quarters = maps.view(n, 2, height // 2, 2, width // 2).transpose(2, 3).reshape(n, 4, -1)
    mass = quarters.clamp_min(0).sum(2)
    share = mass.gather(1, cells[:, None])[:, 0] / mass.sum(1).clamp_min(1e-12)
    return share, quarters.amax(2).argmax(1) == cells


def fourier_shift(x: Tensor, down: float, right: float) -> Tensor:
    """Roll (N, C, h, w) by fractions of a pixel: exact for what lies below the sampling limit."""
    height, width = x.shape[-2:]
    turn = -2j * torch.pi * (torch.fft.fftfreq(height, device=x.device)[:, None] * down
                             + torch.fft.rfftfreq(width, device=x.device) * right)
    return torch.fft.irfft2(torch.fft.rfft2(x) * turn.exp(), s=(height, width))


def with_circular_padding(model: nn.Module) -> nn.Module:
    """A copy without borders: what a filter would see beyond one side it sees from the other."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "padding_mode"):
            module.padding_mode = "circular"
    return model


@torch.inference_mode()
def equivariance_error(model: nn.Module, images: Tensor, shifts: int = 8) -> list[list[float]]:
    """Mean over images of ||f(shift x) - shift f(x)|| / ||f(x)||, by shift down and right.

    images float32 (N, C, H, W); shifts of 0 to `shifts` - 1 pixels. Images are rolled; features,
    which are coarser by the model's stride, are rolled by the fraction in Fourier space, so what
    remains is aliasing (Zhang 2019) and the borders.
    """
    features = model.features(images)
    norm = features.flatten(1).norm(dim=1)

    def error(down: int, right: int) -> Tensor:
        moved = fourier_shift(features, down / model.stride, right / model.stride)
        difference = model.features(images.roll((down, right), (2, 3))) - moved
        return difference.flatten(1).norm(dim=1) / norm

    moves = list(itertools.product(range(shifts), repeat=2))
    errors = [error(*move).mean() for move in progress(moves, "equivariance", unit="shifts")]
    return torch.stack(errors).view(shifts, shifts).tolist()
