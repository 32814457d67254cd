"""The networks of the study and their losses, in plain PyTorch.

VGGResNet    classification, Table 1: VGG's max-pooling or ResNet's strides around residual blocks
HourGlass    segmentation, Table 2: stacked hourglasses joined by sums
UNet         segmentation, Table 2: the benchmark, joined by concatenation

Every switch of the two tables is a constructor argument. `forward(x)` is `head(features(x))` in all
three, so class activation maps need no hooks. All forms script and export.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.batches import VOID
from lab.files import BadInput

# in place: no one else reads a norm's output, and a step touches less memory
ACTIVATIONS = {"relu": lambda: nn.ReLU(inplace=True), "gelu": nn.GELU, "none": nn.Identity}


def conv_norm(cin: int, cout: int, kernel: int, stride: int = 1,
              norm: bool = True) -> nn.Sequential:
    """A padded convolution and its BatchNorm; without the norm the convolution has a bias."""
    conv = nn.Conv2d(cin, cout, kernel, stride, padding=(kernel - 1) // 2, bias=not norm)
    return nn.Sequential(conv, nn.BatchNorm2d(cout) if norm else nn.Identity())


@torch.fx.wrap  # a graph of a model calls it as it stands
def check_size(x: Tensor, stride: int) -> None:
    """Refuse an image whose height or width cannot be halved down to 1/stride: ValueError."""
    height, width = x.shape[-2], x.shape[-1]
    if height % stride != 0 or width % stride != 0 or height == 0 or width == 0:
        raise ValueError(f"input is {height}x{width}: height and width must be multiples of "
                         f"{stride}")


class ResidualBlock(nn.Module):
    """3x3 conv, norm, act, 3x3 conv, norm, add, act (He et al. 2016, section 3.3, basic block).

    The shortcut is a 1x1 projection where the width or the size changes, and absent without `skip`.
    (N, cin, H, W) -> (N, cout, H/stride, W/stride).
    """

    def __init__(self, cin: int, cout: int, stride: int = 1, skip: bool = True, norm: bool = True,
                 act: str = "relu"):
        super().__init__()
        self.conv1 = conv_norm(cin, cout, 3, stride, norm)
        self.conv2 = conv_norm(cout, cout, 3, 1, norm)
        self.act = ACTIVATIONS[act]()
        self.skip = skip
        same = cin == cout and stride == 1
        self.shortcut = nn.Identity() if same or not skip else conv_norm(cin, cout, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.act(self.conv1(x)))
        if self.skip:
            y = y + self.shortcut(x)
        return self.act(y)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention over all positions, then an MLP (Vaswani et al. 2017; Xiong et al.
    2020).

    Positions come from a depthwise 3x3 convolution (Chu et al. 2021, section 3.2), so any image
    size runs. It takes a ResidualBlock's arguments: `skip` switches the residual adds, `norm` the
    LayerNorms, `act` the MLP's activation. (N, cin, H, W) -> (N, cout, H/stride, W/stride).
    """

    HEAD = 32  # channels of one attention head

    def __init__(self, cin: int, cout: int, stride: int = 1, skip: bool = True, norm: bool = True,
                 act: str = "relu"):
        super().__init__()
        same = cin == cout and stride == 1
        self.entry = nn.Identity() if same else nn.Conv2d(cin, cout, stride, stride)
        self.position = nn.Conv2d(cout, cout, 3, padding=1, groups=cout)
        self.norm1 = nn.LayerNorm(cout) if norm else nn.Identity()
        self.norm2 = nn.LayerNorm(cout) if norm else nn.Identity()
        self.qkv = nn.Linear(cout, 3 * cout)
        self.project = nn.Linear(cout, cout)
        self.mlp = nn.Sequential(nn.Linear(cout, 4 * cout), ACTIVATIONS[act](),
                                 nn.Linear(4 * cout, cout))
        self.heads = max(1, cout // self.HEAD)
        if cout % self.heads:
            raise BadInput(f"a transformer block of {cout} channels cannot share them among "
                           f"{self.heads} heads; choose a --width that is a multiple of 8")
        self.skip = skip

    def attend(self, x: Tensor) -> Tensor:
        n, positions, width = x.shape
        qkv = self.qkv(x).view(n, positions, 3, self.heads, width // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.project(y.transpose(1, 2).reshape(n, positions, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        x = x + self.position(x)
        n, width, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        y = self.attend(self.norm1(x))
        x = x + y if self.skip else y
        y = self.mlp(self.norm2(x))
        x = x + y if self.skip else y
        return x.transpose(1, 2).reshape(n, width, h, w)


class BlurPool(nn.Module):
    """Anti-aliased 2x2 max-pool (Zhang 2019, section 3.2): a max everywhere, then a blur, stride 2.

    The blur is the 3x3 binomial filter, a 2x2 average twice. (N, C, H, W) -> (N, C, H/2, W/2).
    """

    def __init__(self) -> None:
        super().__init__()
        self.padding_mode = "replicate"

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), mode=self.padding_mode), 2, 1)
        return F.avg_pool2d(F.avg_pool2d(x, 2, 1), 2)


# What halves an image before a block; with "stride" nothing does, and the block has stride 2.
POOLS = {"maxpool": lambda: nn.MaxPool2d(2), "blurpool": BlurPool, "stride": nn.Identity}


class VGGResNet(nn.Module):
    """VGG-ResNet(depth, width, down) of the report's Table 1.

    Three stages of widths b, 2b, 4b, `depth` blocks each. `down` is how the second and third stage
    halve the image: "maxpool", a 2x2 max-pool before the stage, "blurpool", the same without
    aliasing, or "stride", stride 2 in its first block. Then global average pooling and one linear
    layer, which makes class activation maps exact (Zhou et al. 2016, section 2).
    `block="transformer"` makes the last stage's blocks attention.

    Input (N, channels, H, W) with H and W multiples of 4, else ValueError; logits (N, classes).
    """

    stride = 4  # input pixels per feature cell

    def __init__(self, depth: int = 2, width: int = 32, down: str = "maxpool", skip: bool = True,
                 norm: bool = True, act: str = "relu", block: str = "residual", channels: int = 1,
                 classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(3):
            cout = width * 2**stage
            kind = TransformerBlock if block == "transformer" and stage == 2 else ResidualBlock
            if stage > 0 and down != "stride":
                layers.append(POOLS[down]())
            for i in range(depth):
                stride = 2 if down == "stride" and stage > 0 and i == 0 else 1
                layers.append(kind(channels, cout, stride, skip, norm, act))
                channels = cout
        self.stages = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)
        self.frozen = False

    def freeze(self) -> None:
        """From now on train the classifier alone: the stages keep weights and statistics."""
        self.frozen = True
        self.stages.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "VGGResNet":
        super().train(mode)
        self.stages.train(mode and not self.frozen)
        return self

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, 4*width, H/4, W/4), what the head averages."""
        check_size(x, 4)
        return self.stages(x)

    def head(self, features: Tensor) -> Tensor:
        # mean, not adaptive pooling: its backward is deterministic on CUDA
        return self.classifier(features.mean((2, 3)))

    def activation_maps(self, features: Tensor) -> Tensor:
        """Exact class activation maps (Zhou et al. 2016, section 2): float32 (N, classes, h, w).

        What each position of the features, float32 (N, C, h, w), gives to each class's logit:
        summed over positions, plus the classifier's bias, they are the logits.
        """
        positions = features.shape[2] * features.shape[3]
        return torch.einsum("nchw,kc->nkhw", features, self.classifier.weight) / positions

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Level(nn.Module):
    """One level of an hourglass around the levels below it (Newell et al. 2016, section 3.1).

    Block, a halving, the levels below (or the bottleneck block and its dropout), x2 nearest
    upsampling, the sum with this level's own output (`inter_skip`), block. The halving is a pool,
    or, where `down` is "stride", the stride of the first block below.
    (N, cin, H, W) -> (N, cin, H/stride, W/stride).
    """

    def __init__(self, cin: int, widths: list[int], down: str, inter_skip: bool, dropout: float,
                 skip: bool, norm: bool, act: str, stride: int = 1):
        super().__init__()
        width, below = widths[0], 2 if down == "stride" else 1
        self.down = ResidualBlock(cin, width, stride, skip, norm, act)
        self.pool = POOLS[down]()
        if len(widths) > 1:
            self.inner = Level(width, widths[1:], down, inter_skip, dropout, skip, norm, act, below)
        else:
            self.inner = nn.Sequential(ResidualBlock(width, width, below, skip, norm, act),
                                       nn.Dropout(dropout))
        self.up = ResidualBlock(width, cin, 1, skip, norm, act)
        self.inter_skip = inter_skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        y = F.interpolate(self.inner(self.pool(x)), scale_factor=2.0, mode="nearest")
        return self.up(y + x if self.inter_skip else y)


class HourGlass(nn.Module):
    """HourGlass(hourglasses, width) of the report's Table 2.

    A stem, so many hourglasses in a row, a 1x1 head. Each hourglass has four levels of widths b,
    2b, 4b, 8b. `down` is how a level halves the image, as in VGGResNet, `intra_skip` the residual
    add inside every block, `inter_skip` the sum of an encoder level into the decoder level of its
    size. With "stride" and without activations the whole network is linear.

    Input (N, channels, H, W) with H and W multiples of 16, else ValueError; logits
    (N, classes, H, W).
    """

    stride = 16

    def __init__(self, hourglasses: int = 2, width: int = 32, down: str = "maxpool",
                 intra_skip: bool = True, inter_skip: bool = True, norm: bool = True,
                 act: str = "relu", dropout: float = 0.2, channels: int = 3, classes: int = 5):
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.stem = ResidualBlock(channels, width, 1, intra_skip, norm, act)
        self.hourglasses = nn.Sequential(
            *[Level(width, widths, down, inter_skip, dropout, intra_skip, norm, act)
              for _ in range(hourglasses)])
        self.head = nn.Conv2d(width, classes, 1)

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, width, H, W), what the 1x1 head reads."""
        check_size(x, 16)
        return self.hourglasses(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, figure 1), padded, with BatchNorm; widths b to 16b.

    Input (N, channels, H, W) with H and W multiples of 16, else ValueError; logits
    (N, classes, H, W).
    """

    stride = 16

    def __init__(self, width: int = 32, channels: int = 3, classes: int = 5):
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        self.down = nn.ModuleList([self.double(cin, cout)
                                   for cin, cout in zip([channels] + widths, widths)])
        pairs = list(zip(widths[:0:-1], widths[-2::-1]))  # (16b, 8b) down to (2b, b)
        self.expand = nn.ModuleList([nn.ConvTranspose2d(cin, cout, 2, 2) for cin, cout in pairs])
        self.up = nn.ModuleList([self.double(2 * cout, cout) for _, cout in pairs])
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def double(cin: int, cout: int) -> nn.Sequential:
        return nn.Sequential(conv_norm(cin, cout, 3), nn.ReLU(inplace=True),
                             conv_norm(cout, cout, 3), nn.ReLU(inplace=True))

    def features(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, width, H, W), what the 1x1 head reads."""
        check_size(x, 16)
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for i, (expand, block) in enumerate(zip(self.expand, self.up)):
            x = block(torch.cat([skips[-2 - i], expand(x)], 1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


CLASSIFIERS = {"vgg-resnet": VGGResNet}
SEGMENTERS = {"hourglass": HourGlass, "unet": UNet}
FAMILIES = {**CLASSIFIERS, **SEGMENTERS}


def arguments_of(config: dict) -> dict:
    """Those of a run's settings that its network is made of: its constructor's arguments.

    config is that of a record, or a training script's Config as a dict. It names a family (`arch`;
    without one a VGG-ResNet).
    """
    parameters = inspect.signature(FAMILIES[config.get("arch", "vgg-resnet")]).parameters
    return {name: config[name] for name in parameters if name in config}


def refuse_settings_of_others(config: dict, defaults: dict) -> None:
    """BadInput for a setting that is changed, but that another family's network takes alone."""
    known = {name for family in FAMILIES.values() for name in inspect.signature(family).parameters}
    taken = arguments_of(config)
    for name in config:
        if name in known - taken.keys() and config[name] != defaults[name]:
            raise BadInput(f"--{name.replace('_', '-')} switches another network; --arch "
                           f"{config['arch']} takes {', '.join(taken) or 'no switch'}")


def build(config: dict, channels: int, classes: int) -> nn.Module:
    """The network that a run's settings name, for a data set's channels and classes.

    config as in `arguments_of`. A parameter that it lacks takes its default, so that a run from
    before a setting was added can be opened.
    """
    family = FAMILIES[config.get("arch", "vgg-resnet")]
    return family(**{**arguments_of(config), "channels": channels, "classes": classes})


# ---- losses ----

def pixels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One row a pixel (or image): logits (N, C, ...) -> float32 (M, C), target -> int64 (M,).

    Losses are taken in float32 whatever the network ran in, and on the flat form, because the 2-D
    cross entropy of CUDA is not deterministic.
    """
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]).float(), target.reshape(-1).long()


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean cross entropy over pixels or images; with `weight` (C,) the weighted mean.

    logits (N, C, ...) of any float type, target (N, ...) integer in [0, C), or VOID, which counts
    for nothing. A batch of void alone has loss 0.
    """
    loss = F.cross_entropy(*pixels(logits, target), weight=weight, ignore_index=VOID)
    return torch.where((target != VOID).any(), loss, 0)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - the mean over classes of soft Dice on softmax (Milletari et al. 2016, with plain sums).

    Overlap and mass are summed per class over the whole batch, without void pixels. Classes that no
    pixel of the batch shows are left out of the mean: they have no overlap to gain, and scoring
    them 1 would reward predicting nothing. Shapes as in `cross_entropy`; the result is in [0, 1].
    """
    logits, target = pixels(logits, target)
    labelled = (target != VOID).unsqueeze(1)
    truth = (target.unsqueeze(1) == torch.arange(logits.shape[1], device=target.device)).float()
    probs = logits.softmax(1) * labelled
    mass = truth.sum(0)
    dice = 2 * (probs * truth).sum(0) / (probs.sum(0) + mass).clamp_min(1e-12)
    present = (mass > 0).float()
    return 1 - (dice * present).sum() / present.sum().clamp_min(1)


# {name: loss(logits, target, weight (C,) of each class)}
LOSSES = {"wce": lambda logits, target, weight: cross_entropy(logits, target, weight),
          "ce": lambda logits, target, weight: cross_entropy(logits, target),
          "dice": lambda logits, target, weight: dice_loss(logits, target)}


def class_weights(counts: Tensor, power: float) -> Tensor:
    """float32 (C,): each class's share of the training pixels to the -power, scaled to mean 1.

    counts int64 (C,) of the training split alone; power 1 is the inverse share, 0.5 its square
    root. A class without a pixel gets weight 0.
    """
    share = counts.double() / counts.sum()
    weight = torch.where(counts > 0, share.clamp_min(1e-12).pow(-power), 0)
    return (weight / weight.mean()).float()
