"""What is measured of surrogates, of networks whose answers are known; and on which grids."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_data import garments_and_digits

import data
import interpret
import models
from lab import equivariance
from lab.batches import Dataset


@pytest.mark.parametrize("split", ["full", "dev"])
def test_grids_are_of_their_own_split(fashion_root, split):
    """Training grids are tied and have training digits, held-out ones neither; nor other places."""
    train, test = data.load_idx(fashion_root, "MNIST")
    if split == "dev":
        train, test = train.map(lambda t: t[:50_000]), train.map(lambda t: t[50_000:])
    fashion = data.load_fashion(fashion_root, split, 200)
    grids = data.load_composites(fashion_root, split, 200, tie=0.9)
    tied = data.composites(fashion.train, train, data.TRAIN_GRIDS, 0.9).split
    untied = data.composites(fashion.test.map(lambda t: t[:50]), test, data.TEST_GRIDS).split
    assert data.TRAIN_GRIDS != data.TEST_GRIDS
    assert torch.equal(grids.train.images, tied.images)
    assert torch.equal(grids.test.images, untied.images)
    record = {"config": {"split": split, "batch": 8}, "environment": {"precision": "float32"}}
    surrogate = interpret.Surrogate(None, record, fashion_root, torch.device("cpu"), 50)
    assert torch.equal(surrogate.grids().split.images, untied.images)


def toy_surrogate(count):
    """Of random garments and digits of 4 pixels a side."""
    garments, digits = garments_and_digits(count)
    found = object.__new__(interpret.Surrogate)
    found.model, found.digits = models.VGGResNet(width=4).eval(), digits
    found.batch, found.dtype = 64, torch.float32
    found.dataset = Dataset("toy", tuple("0123456789"), (0.5,), (0.25,), "", False, garments,
                            garments)
    return found


def test_attention_of_the_true_class_tied_and_untied():
    """Of a network that says Trouser beside a 3, and sees the true class in the garment's cell."""
    surrogate = toy_surrogate(600)
    targets = surrogate.dataset.test.targets.long()

    def predict_with_maps(grids):
        with_three = (grids.digits == data.TIED_DIGIT).any(1)
        said = torch.where(with_three, data.TIED_CLASS, (targets + 1) % 10)
        maps = torch.zeros(len(targets), 10, 2, 2)
        maps.view(-1, 10, 4)[torch.arange(len(targets)), targets, grids.cells] = 1
        return F.one_hot(said, 10).float(), maps

    surrogate.predict_with_maps = predict_with_maps
    found = interpret.measure_attention(surrogate)
    for key in ("mass", "mass_tied", "pointing", "trouser_with_three"):
        assert found[key].double().mean() == 1, key
    trousers = targets == data.TIED_CLASS
    assert found["accuracy_tied"][trousers].all() and not found["accuracy"][trousers].all()
    with_three = (surrogate.grids().digits == data.TIED_DIGIT).any(1)
    assert len(found["trouser_with_three"]) == (with_three & ~trousers).sum()


def test_a_sweep_goes_down_and_to_the_right():
    """Of a network that is right where the garment covers the pixel in line 0, column 1."""
    surrogate = toy_surrogate(40)
    targets = surrogate.dataset.test.targets
    surrogate.predict = lambda split: torch.where(split.images[:, 0, 0, 1] < 100, targets, 10)
    found = interpret.sweep_shifts(surrogate, 40)
    expected = torch.zeros(5, 5)
    expected[0, :2] = 1
    assert torch.equal(found["sweep_accuracy"], expected)
    # of all 25 shifts two are right, of the four by whole cells one
    assert found["shifted_minus_whole"].tolist() == pytest.approx([2 / 25 - 1 / 4] * 40)


def test_the_equivariance_error_is_relative_and_has_its_paddings_name():
    torch.manual_seed(0)
    surrogate = toy_surrogate(4)
    loud = SimpleNamespace(stride=4, features=lambda x: 10 * surrogate.model.features(x))
    images = torch.randn(2, 1, 28, 28)
    errors = [equivariance.equivariance_error(net, images, 2)[1]
              for net in (surrogate.model, loud)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
    bytes_ = lambda count: torch.randint(0, 255, (count, 1, 28, 28), dtype=torch.uint8)
    surrogate.grids = lambda count: SimpleNamespace(split=SimpleNamespace(images=bytes_(count)))
    found = interpret.measure_equivariance(surrogate, 2)
    assert found["circular"][4][4] < 1e-5 and found["zeros"][4][4] > 1e-2
