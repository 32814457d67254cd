"""The losses against values worked out by hand, and what they make of pixels without a label."""

import math

import pytest
import torch

import models


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # probabilities 1/4 3/4, 1/2 1/2
    target = torch.tensor([0, 1], dtype=torch.uint8)
    found = models.cross_entropy(logits, target).item()
    assert found == pytest.approx((math.log(4) + math.log(2)) / 2)
    weight = torch.tensor([1.0, 3.0])  # the weighted mean divides by the weights' sum
    found = models.cross_entropy(logits, target, weight).item()
    assert found == pytest.approx((math.log(4) + 3 * math.log(2)) / 4)


def test_losses_on_images_equal_losses_on_their_pixels():
    logits, target = torch.randn(2, 5, 4, 6), torch.randint(0, 5, (2, 4, 6))
    rows, flat = logits.permute(0, 2, 3, 1).reshape(-1, 5), target.reshape(-1)
    weight = torch.rand(5)
    torch.testing.assert_close(models.cross_entropy(logits, target, weight),
                               models.cross_entropy(rows, flat, weight))
    torch.testing.assert_close(models.dice_loss(logits, target), models.dice_loss(rows, flat))


def test_dice_by_hand():
    big = 50.0  # softmax of (50, 0) is (1, 0) in float32
    logits = torch.tensor([[big, 0], [big, 0], [0, big], [0, big]])
    target = torch.tensor([0, 0, 0, 1])
    # class 0: overlap 2, masses 2 and 3: 4/5; class 1: overlap 1, masses 2 and 1: 2/3
    assert models.dice_loss(logits, target).item() == pytest.approx(1 - (4 / 5 + 2 / 3) / 2)


def test_dice_scores_an_all_background_prediction_low_and_leaves_absent_classes_out():
    background = torch.zeros(1, 5, 8, 8)
    background[:, 0] = 50
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    # classes 1-4 are absent: not scored
    assert models.dice_loss(background, target).item() == pytest.approx(0)
    target[0, 0, 0], target[0, 0, 1] = 1, 2  # of three present classes two are missed
    assert models.dice_loss(background, target).item() > 0.6


def test_losses_take_half_precision_logits_in_float32():
    logits = (torch.randn(4, 5, 8, 8) * 50).bfloat16()
    target = torch.randint(0, 5, (4, 8, 8))
    for loss in (models.cross_entropy, models.dice_loss):
        value = loss(logits, target)
        assert value.dtype == torch.float32
        assert torch.equal(value, loss(logits.float(), target))


def test_class_weights_by_hand():
    counts = torch.tensor([16, 4, 0])
    assert models.class_weights(counts, 1.0).tolist() == pytest.approx([1 / 5 * 3, 4 / 5 * 3, 0])
    assert models.class_weights(counts, 0.5).tolist() == pytest.approx([1 / 3 * 3, 2 / 3 * 3, 0])
    assert models.class_weights(torch.full((5,), 7), 1.0).tolist() == pytest.approx([1] * 5)


# ---- void pixels ----

LOSSES = {"ce": models.cross_entropy, "dice": models.dice_loss,
          "wce": lambda *args: models.cross_entropy(*args, weight=torch.tensor([0.5, 1, 3]))}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_with_void_is_that_of_the_labelled_pixels_alone(name):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 6, requires_grad=True), torch.randint(0, 3, (2, 4, 6))
    void = target.where(torch.rand(2, 4, 6) < 0.6, models.VOID).to(torch.uint8)
    labelled = void != models.VOID
    found = LOSSES[name](logits, void)
    rows = logits.movedim(1, -1)[labelled], target[labelled]
    assert found.item() == pytest.approx(LOSSES[name](*rows).item(), rel=1e-6)
    found.backward()
    assert (logits.grad.movedim(1, -1)[~labelled] == 0).all()
    assert (logits.grad.movedim(1, -1)[labelled] != 0).any(1).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_void_alone_has_no_gradient(name):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = LOSSES[name](logits, torch.full((2, 4, 4), models.VOID, dtype=torch.uint8))
    loss.backward()
    assert loss.item() in (0, 1) and (logits.grad == 0).all()


def test_losses_by_name():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    weight = torch.tensor([1.0, 5.0, 0.2])
    found = {name: loss(logits, target, weight) for name, loss in models.LOSSES.items()}
    assert found == {"wce": models.cross_entropy(logits, target, weight),
                     "ce": models.cross_entropy(logits, target),
                     "dice": models.dice_loss(logits, target)}
