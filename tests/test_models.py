"""Every row's network: size, shapes, what its switch removes, gradients, scripting, export."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from lab import provenance
from lab.files import BadInput
from models import HourGlass, UNet, VGGResNet

# every network of the two tables: its class, its arguments, and its number of parameters where no
# formula below gives it
ROWS = {
    "maxpool-2-32": (VGGResNet, dict(), 686_858),
    "stride-2-32": (VGGResNet, dict(down="stride"), None),
    "stride-2-32-noskip": (VGGResNet, dict(down="stride", skip=False), None),
    "stride-2-32-nobn": (VGGResNet, dict(down="stride", norm=False), None),
    "stride-2-32-noact": (VGGResNet, dict(down="stride", act="none"), None),
    "stride-2-32-gelu": (VGGResNet, dict(down="stride", act="gelu"), None),
    "stride-1-32": (VGGResNet, dict(depth=1, down="stride"), None),
    "stride-4-32": (VGGResNet, dict(depth=4, down="stride"), None),
    "stride-2-16": (VGGResNet, dict(width=16, down="stride"), None),
    "stride-2-64": (VGGResNet, dict(width=64, down="stride"), None),
    "maxpool-2-32-noact": (VGGResNet, dict(act="none"), 686_858),
    "blurpool-2-32": (VGGResNet, dict(down="blurpool"), 686_858),
    "maxpool-2-32-transformer": (VGGResNet, dict(block="transformer"), 568_714),
    "standard": (HourGlass, dict(), 6_109_861),
    "unet": (UNet, dict(), 7_763_173),
    "no-intra-skip": (HourGlass, dict(intra_skip=False), None),
    "no-inter-skip": (HourGlass, dict(inter_skip=False), None),
    "no-bn": (HourGlass, dict(norm=False), None),
    "no-act": (HourGlass, dict(act="none"), None),
    "hourglass-1-32": (HourGlass, dict(hourglasses=1), None),
    "hourglass-4-32": (HourGlass, dict(hourglasses=4), None),
    "hourglass-2-16": (HourGlass, dict(width=16), None),
    "hourglass-2-64": (HourGlass, dict(width=64), None),
    "no-dropout": (HourGlass, dict(dropout=0.0), None),
    "stride": (HourGlass, dict(down="stride"), None),
    "stride-no-act": (HourGlass, dict(down="stride", act="none"), None),
}


def block_parameters(cin, cout, stride, skip, norm):
    """By hand: two 3x3 convolutions, the 1x1 projection, two values a channel per BatchNorm."""
    each = 2 * cout if norm else cout  # or a bias
    total = 9 * cin * cout + 9 * cout * cout + 2 * each
    return total + (cin * cout + each if skip and (cin != cout or stride != 1) else 0)


def vgg_parameters(depth=2, width=32, down="maxpool", skip=True, norm=True, **_):
    total, cin = 0, 1
    for stage in range(3):
        for i in range(depth):
            stride = 2 if down == "stride" and stage > 0 and i == 0 else 1
            total += block_parameters(cin, width * 2**stage, stride, skip, norm)
            cin = width * 2**stage
    return total + 10 * cin + 10


def hourglass_parameters(hourglasses=2, width=32, down="maxpool", intra_skip=True, norm=True,
                         **_):
    block = lambda cin, cout, stride=1: block_parameters(cin, cout, stride, intra_skip, norm)
    ladder = [width] + [width * 2**level for level in range(4)]  # b, b, 2b, 4b, 8b
    one = sum(block(a, b) + block(b, a) for a, b in zip(ladder, ladder[1:]))
    one += block(ladder[-1], ladder[-1], 2 if down == "stride" else 1)
    return block(3, width) + hourglasses * one + 5 * width + 5


def count(model):
    return sum(p.numel() for p in model.parameters())


def make(row, **small):
    kind, arguments, _ = ROWS[row]
    torch.manual_seed(0)
    model = kind(**{**arguments, **small})
    x = torch.randn(2, 1, 28, 28) if kind is VGGResNet else torch.randn(2, 3, 32, 32)
    return model, x


@pytest.mark.parametrize("row", ROWS)
def test_parameter_count(row):
    kind, arguments, expected = ROWS[row]
    found = count(kind(**arguments))
    if expected is not None:
        assert found == expected
    if kind is HourGlass:
        assert found == hourglass_parameters(**arguments)
    elif kind is VGGResNet and arguments.get("block") != "transformer":
        assert found == vgg_parameters(**arguments)


@pytest.mark.parametrize("row", ROWS)
def test_shapes_gradients_and_finite_loss(row):
    model, x = make(row, width=32 if "transformer" in row else 8)
    features = model.features(x)
    logits = model.head(features)
    model.eval()
    assert torch.equal(model(x), model.head(model.features(x)))
    if isinstance(model, VGGResNet):
        assert features.shape[-2:] == (7, 7) and logits.shape == (2, 10)
        target = torch.tensor([3, 9])
    else:
        assert features.shape == (2, 8, 32, 32) and logits.shape == (2, 5, 32, 32)
        target = torch.randint(0, 5, (2, 32, 32))
    models.cross_entropy(logits, target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, f"{name} has no gradient"


# rows that differ from another in width or dropout alone have its graph
@pytest.mark.parametrize("row", sorted(set(ROWS) - {
    "stride-2-16", "stride-2-64", "hourglass-2-16", "hourglass-2-64", "no-dropout"}))
def test_scripts_and_exports(row):
    model, x = make(row, width=32 if "transformer" in row else 8)
    model.eval()
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, atol=1e-5, rtol=1e-5)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    three = torch.cat([x, x[:1]])
    torch.testing.assert_close(program.module()(three), model(three), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model, good, bad", [
    (VGGResNet(width=8), (56, 28), (30, 28)),
    (VGGResNet(width=32, depth=1, block="transformer"), (32, 56), (28, 27)),
    (HourGlass(1, 8), (16, 48), (40, 48)), (UNet(8), (32, 16), (32, 0))])
def test_sizes(model, good, bad):
    channels = 1 if isinstance(model, VGGResNet) else 3
    out = model.eval()(torch.randn(1, channels, *good))
    assert isinstance(model, VGGResNet) or out.shape[-2:] == good
    said = f"{bad[0]}x{bad[1]}: height and width must be multiples of {model.stride}"
    with pytest.raises(ValueError, match=said):
        model(torch.randn(1, channels, *bad))


def kinds(model):
    return [type(module) for module in model.modules()]


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("row", ["stride-2-32-nobn", "no-bn"])
def test_no_bn_removes_every_norm_and_gives_biases(row):
    model, _ = make(row)
    assert not {nn.BatchNorm2d, nn.LayerNorm} & set(kinds(model))
    assert all(conv.bias is not None for conv in convolutions(model))
    base, _ = make("stride-2-32" if isinstance(model, VGGResNet) else "standard")
    assert nn.BatchNorm2d in kinds(base)
    assert sum(conv.bias is not None for conv in convolutions(base)) <= 1  # the head's


def test_no_activation_leaves_an_affine_network_only_without_max_pooling():
    def bend(model, x):  # f(a) + f(b) - f(0) - f(a + b) is 0 for an affine f, whatever f is
        model = model.double().eval()
        a, b = x[:1].double(), x[1:].double()
        zero = model(torch.zeros_like(a))
        bent = model(a) + model(b) - zero - model(a + b)
        return (bent.norm() / (model(a) - zero).norm()).item()

    for row in ("stride-2-32-noact", "stride-no-act"):
        assert bend(*make(row, width=8)) < 1e-9
    for row in ("stride-2-32", "stride", "maxpool-2-32-noact", "no-act"):
        assert bend(*make(row, width=8)) > 1e-4
    model, _ = make("no-act")
    assert not {nn.ReLU, nn.GELU} & set(kinds(model))


def test_gelu_replaces_every_relu():
    model, _ = make("stride-2-32-gelu")
    assert nn.GELU in kinds(model) and nn.ReLU not in kinds(model)


def test_down_switch():
    # two stages, or four levels of two hourglasses; a strided block has a first convolution and a
    # projection
    for family, halvings in ((VGGResNet, 2), (HourGlass, 8)):
        for down, pool in (("maxpool", nn.MaxPool2d), ("blurpool", models.BlurPool)):
            model = family(width=8, down=down)
            assert kinds(model).count(pool) == halvings
            assert all(conv.stride == (1, 1) for conv in convolutions(model))
        model = family(width=8, down="stride")
        assert not {nn.MaxPool2d, models.BlurPool} & set(kinds(model))
        assert sum(conv.stride == (2, 2) for conv in convolutions(model)) == 2 * halvings


def test_blurpool_is_a_max_and_a_binomial_filter():
    x = torch.randn(2, 3, 8, 12)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    dense = torch.nn.functional.max_pool2d(padded, 2, 1)
    binomial = torch.outer(torch.tensor([1.0, 2, 1]), torch.tensor([1.0, 2, 1])) / 16
    blurred = torch.nn.functional.conv2d(dense, binomial.expand(3, 1, 3, 3), stride=2, groups=3)
    assert blurred.shape == (2, 3, 4, 6)
    assert torch.allclose(models.BlurPool()(x), blurred, atol=1e-6)


def test_frozen_features_stay_as_they_are_while_the_classifier_learns():
    model = VGGResNet(width=4)
    model.freeze()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.1)
    for _ in range(2):
        model.train()
        models.cross_entropy(model(torch.randn(8, 1, 28, 28)), torch.arange(8)).backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items()
               if not torch.equal(tensor, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def silence(module):
    """Make every convolution of a block put out zero."""
    for conv in convolutions(module):
        nn.init.zeros_(conv.weight)


@pytest.mark.parametrize("skip", [True, False])
def test_skip_is_what_carries_x_past_silent_convolutions(skip):
    block = models.ResidualBlock(4, 4, skip=skip).eval()
    silence(block)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(block(x), x.relu() if skip else torch.zeros_like(x))


@pytest.mark.parametrize("inter_skip", [True, False])
def test_inter_skip_is_what_carries_the_encoder_past_a_silent_bottleneck(inter_skip):
    level = models.Level(4, [4], "maxpool", inter_skip, 0.0, skip=False, norm=True, act="relu")
    level.eval()
    silence(level.inner)
    a, b = torch.randn(2, 1, 4, 16, 16)
    assert torch.equal(level(a), level(b)) is not inter_skip


def test_intra_skip_switch_reaches_every_block():
    for skip in (True, False):
        found = {block.skip for block in HourGlass(intra_skip=skip).modules()
                 if isinstance(block, models.ResidualBlock)}
        assert found == {skip}


def test_dropout_sits_at_each_bottleneck():
    model = HourGlass(3, 8, dropout=0.3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.3] * 3


def test_unet_concatenates():
    model = UNet(8)
    for up, expand in zip(model.up, model.expand):
        assert up[0][0].in_channels == 2 * expand.out_channels


def test_build_makes_what_the_settings_say():
    settings = dict(arch="hourglass", hourglasses=1, width=8, down="stride", intra_skip=False,
                    inter_skip=False, norm=False, act="gelu", dropout=0.1)
    assert count(models.build(settings, 3, 5)) == hourglass_parameters(
        1, 8, "stride", intra_skip=False, norm=False)
    assert isinstance(models.build({**settings, "arch": "unet"}, 3, 5), UNet)
    settings = dict(depth=1, width=8, down="stride", skip=False, norm=True, act="none",
                    block="residual")
    assert count(models.build(settings, 1, 10)) == vgg_parameters(1, 8, "stride", False)


def test_build_takes_channels_and_classes_from_the_data_and_defaults_for_what_is_missing():
    for settings in (dict(arch="hourglass"), dict(arch="unet", width=8, dropout=0.5),
                     dict(width=8, epochs=3)):
        model = models.build(settings, 2, 7)
        assert model(torch.zeros(1, 2, 32, 32)).shape[1] == 7
    assert count(models.build({}, 1, 10)) == count(VGGResNet())


def test_multiply_adds_by_hand():
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert provenance.multiply_adds(conv, torch.Size([3, 10, 10])) == 9 * 3 * 8 * 100
    assert provenance.multiply_adds(models.VGGResNet(), torch.Size([1, 28, 28])) == 73_308_416


def test_a_network_takes_its_own_switches_alone(monkeypatch):
    """A family is added by its class and its name: flags of others are refused without more."""
    class Linear(torch.nn.Linear):
        def __init__(self, channels: int, classes: int):
            super().__init__(channels, classes)

    monkeypatch.setitem(models.FAMILIES, "linear", Linear)
    defaults = {"arch": "vgg-resnet", "depth": 2, "lr": 0.1}
    assert isinstance(models.build({"arch": "linear", "depth": 2}, 1, 10), Linear)
    models.refuse_settings_of_others({"arch": "linear", "depth": 2, "lr": 0.5}, defaults)
    said = "--depth switches another network; --arch linear takes no switch"
    with pytest.raises(BadInput, match=said):
        models.refuse_settings_of_others({"arch": "linear", "depth": 3, "lr": 0.1}, defaults)


# ---- what a block computes ----

def test_blocks_by_hand():
    torch.manual_seed(0)
    block, x = models.ResidualBlock(3, 3, norm=False), torch.randn(1, 3, 8, 8)
    conv = lambda layer, x: F.conv2d(x, layer[0].weight, layer[0].bias, padding=1)
    expected = (conv(block.conv2, conv(block.conv1, x).relu()) + x).relu()
    assert torch.allclose(block(x), expected, atol=1e-6)
    assert (UNet.double(3, 4)(x) >= 0).all()


def test_the_image_is_halved_by_its_largest_and_doubled_by_its_nearest():
    unet, level = UNet(4).eval(), models.Level(4, [4], "maxpool", False, 0.0, True, True, "relu")
    seen = {}
    unet.down[0].register_forward_hook(lambda module, given, out: seen.update(above=out))
    unet.down[1].register_forward_pre_hook(lambda module, given: seen.update(below=given[0]))
    unet(torch.randn(1, 3, 16, 16))
    assert torch.equal(F.max_pool2d(seen["above"], 2), seen["below"])
    level.inner.register_forward_hook(lambda module, given, out: seen.update(low=out))
    level.up.register_forward_pre_hook(lambda module, given: seen.update(high=given[0]))
    level.eval()(torch.randn(1, 4, 8, 8))
    assert torch.equal(seen["high"], seen["low"].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_attention_is_among_positions_as_torchs_own():
    torch.manual_seed(0)
    block = models.TransformerBlock(64, 64, norm=False, act="none").eval()
    own = nn.MultiheadAttention(64, 2, batch_first=True)
    own.load_state_dict({"in_proj_weight": block.qkv.weight, "in_proj_bias": block.qkv.bias,
                         "out_proj.weight": block.project.weight,
                         "out_proj.bias": block.project.bias})
    x = torch.randn(2, 15, 64)
    assert torch.allclose(block.attend(x), own(x, x, x)[0], atol=1e-5)
    for silent in (block.position, block.project, block.mlp[2]):
        nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
    image = torch.randn(2, 64, 3, 5)
    assert torch.equal(block(image), image)  # each position stays where it is
