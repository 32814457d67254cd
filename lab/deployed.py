"""A trained network as it is deployed: its BatchNorm folded, behind its normalisation."""

import copy

import torch
from torch import Tensor, nn


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode: in its Sequentials a BatchNorm after a convolution is part of it.

    It gives the same logits to 1e-5.
    """
    model = copy.deepcopy(model).eval()
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for i in reversed(range(1, len(layers))):
            if isinstance(layers[i], nn.BatchNorm2d) and isinstance(layers[i - 1], nn.Conv2d):
                layers[i - 1] = nn.utils.fuse_conv_bn_eval(layers[i - 1], layers[i])
                layers[i] = nn.Identity()
            if isinstance(layers[i], nn.Identity):
                del layers[i]
    return model


class Deployed(nn.Module):
    """A trained model behind its normalisation: uint8 (N, C, H, W) -> float32 logits.

    It is in evaluation mode. mean and std are of images in [0, 1], one value a channel.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        mean, std = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.eval().requires_grad_(False)

    def normalise(self, images: Tensor) -> Tensor:
        images = images.float() * self.scale + self.shift
        return images.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images))


class WithMaps(nn.Module):
    """A deployed classifier that says where it looks: uint8 (N, C, H, W) -> logits and maps.

    float32 (N, classes) and (N, classes, h, w), of a network that has `features`, `head` and
    `activation_maps`.
    """

    def __init__(self, deployed: Deployed):
        super().__init__()
        self.deployed = deployed

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        model = self.deployed.model
        features = model.features(self.deployed.normalise(images))
        return model.head(features), model.activation_maps(features)
