"""The sets, their splits and their batches. Where they come from is tested in test_sources.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_root

import data
from lab import batches, synthetic
from lab.batches import Dataset, Split
from lab.files import BadInput


def toy(n=10, size=4, classes=3):
    """A data set whose image i is filled with i, as is its mask's first row."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 3, size, size)
    images[:, :, :, 0] += 100  # left and right differ, so that a flip shows
    targets = torch.zeros(n, size, size, dtype=torch.uint8)
    targets[:, :, 0] = 1
    split = Split(images, targets, torch.arange(n))
    return Dataset("toy", ("a", "b", "c"), (0.0,) * 3, (1 / 255,) * 3, "0", True, split, split)


# ---- splits ----

def test_fashion_splits(fashion_root):
    full, dev = data.load_fashion(fashion_root), data.load_fashion(fashion_root, "dev")
    sizes = [len(split) for split in (full.train, full.test, dev.train, dev.test)]
    assert sizes == [60000, 10000, 50000, 10000]
    assert full.held_out == "test" and dev.held_out == "val"
    assert torch.equal(torch.cat([dev.train.images, dev.test.images]), full.train.images)
    assert full.train.class_counts(10).tolist() == [6000] * 10
    assert len(data.load_fashion(fashion_root, "dev", 300).train) == 300
    pixels = full.train.images.float() / 255
    assert pixels.mean().item() == pytest.approx(full.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(full.std[0], abs=1e-3)


def test_facade_splits_share_no_photo(facade_root):
    full, dev = data.load_facades(facade_root), data.load_facades(facade_root, "dev")
    assert full.digest == data.FACADE_DIGEST and not full.synthetic
    assert (len(full.train), len(full.test), len(dev.train), len(dev.test)) == (906, 114, 726, 180)
    # each of its own: else dev would share photos, and intervals would resample strangers
    assert full.train.photos.tolist() == 3 * [*range(302)]
    assert full.test.photos.tolist() == data.FACADE_TEST_PHOTOS
    assert len(full.test.photos.unique()) == 67
    assert full.test.photos.unique(return_counts=True)[1].bincount().tolist() == [0, 29, 29, 9]
    assert dev.train.photos.unique().tolist() == list(range(242))
    assert dev.test.photos.unique().tolist() == list(range(242, 302))
    pixels = full.train.images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(list(full.mean), abs=1e-3)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(list(full.std), abs=1e-3)
    shares = full.train.class_counts(5).double() / full.train.targets.numel()
    assert shares.tolist() == pytest.approx([0.355, 0.406, 0.024, 0.165, 0.051], abs=1e-3)


def test_resizing_keeps_classes_and_alignment(tiny_root):
    full, half = data.load_facades(tiny_root, size=32), data.load_facades(tiny_root, size=16)
    assert half.train.images.shape == (6, 3, 16, 16) and half.train.targets.shape == (6, 16, 16)
    assert set(half.train.targets.unique().tolist()) <= set(full.train.targets.unique().tolist())
    assert torch.equal(half.train.targets, full.train.targets[:, 1::2, 1::2])
    pooled = torch.nn.functional.avg_pool2d(full.train.images.float(), 2)
    difference = half.train.images.float() - pooled
    assert difference.abs().mean() < 12  # antialiased, not a sample of one in four


# ---- synthetic facades ----

def test_synthetic_facades_stand_in_and_say_so(tmp_path, capsys):
    dataset = data.load_facades(tmp_path, size=32)
    assert dataset.synthetic and "SYNTHETIC" in capsys.readouterr().err
    assert "SYNTHETIC" in data.describe(dataset)
    assert (len(dataset.train), len(dataset.test)) == (302, 67)
    again = data.load_facades(tmp_path, size=32)
    assert again.digest == dataset.digest and torch.equal(again.train.images, dataset.train.images)


def test_synthetic_facade_is_a_pure_function_with_realistic_imbalance():
    image, mask = data.synthetic_facade(7)
    again = data.synthetic_facade(7)
    assert np.array_equal(image, again[0]) and np.array_equal(mask, again[1])
    assert image.shape == (256, 256, 3) and image.dtype == mask.dtype == np.uint8
    assert not np.array_equal(image, data.synthetic_facade(8)[0])
    masks = np.stack([data.synthetic_facade(i, 64)[1] for i in range(100)])
    share = np.bincount(masks.ravel(), minlength=5) / masks.size
    assert share[2] < share[4] < share[3] < share[0] < 0.5 and share[1] > 0.3 and share[2] > 0.005
    assert 0.3 < (masks == 2).any((1, 2)).mean() < 0.7  # many images have no pillar at all


# ---- batches ----

def test_an_epoch_is_a_permutation_fixed_by_seed_and_epoch():
    dataset = toy(10)

    def seen(seed: int, epoch: int) -> list[int]:
        found = batches.shuffled(dataset, 5, seed, epoch, False)
        return torch.cat([images[:, 0, 0, 1] for images, _ in found]).int().tolist()

    assert sorted(seen(0, 0)) == list(range(10))
    assert seen(0, 0) == seen(0, 0)
    assert len({tuple(seen(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_the_incomplete_batch_is_left_out_and_a_small_split_is_one_batch():
    shapes = lambda batch: [len(images) for images, _
                            in batches.shuffled(toy(10), batch, 0, 0, False)]
    assert shapes(4) == [4, 4] and shapes(16) == [10]
    assert [len(images) for images, _ in batches.in_order(toy(10), toy(10).test, 4)] == [4, 4, 2]


def test_a_flip_mirrors_image_and_mask_together_half_of_the_time():
    flipped = 0
    for epoch in range(20):
        for images, targets in batches.shuffled(toy(10), 5, 0, epoch, True):
            left, right = images[:, 0, 0, 0] > 99, images[:, 0, 0, -1] > 99
            assert torch.equal(targets[:, 0, 0] == 1, left)
            assert torch.equal(targets[:, 0, -1] == 1, right)
            flipped += right.sum().item()
    assert 70 < flipped < 130
    assert toy().train.images[:, 0, 0, 0].min() >= 100  # the set itself is left as it was


def test_normalise():
    dataset = Dataset("toy", (), (0.5,), (0.25,), "", True, toy().train, toy().train)
    found = dataset.normalise(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    assert found.flatten().tolist() == pytest.approx([-2, 2])


# ---- the data root; broken sets are in test_bad_data.py ----

def test_a_data_root_that_is_named_must_exist(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    assert data.find_root(None) == Path("data")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="nowhere .from DATA_ROOT. is not a folder"):
        data.find_root(None)
    with pytest.raises(BadInput, match="from --data-root"):
        data.find_root(str(tmp_path / "elsewhere"))


# ---- composites ----

def garments_and_digits(n=4000):
    generator = torch.Generator().manual_seed(0)

    def make(low: int) -> batches.Split:
        images = torch.randint(low, low + 100, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
        classes = torch.randint(0, 10, (n,), generator=generator, dtype=torch.uint8)
        return batches.Split(images, classes, torch.arange(n))

    return make(0), make(100)  # pixel values tell a garment from a digit


def test_a_grid_depends_on_its_seed_and_index_alone():
    garments, digits = garments_and_digits()
    whole = data.composites(garments, digits, 7, 0.5)
    part = data.composites(garments.map(lambda t: t[:50]), digits, 7, 0.5)
    assert torch.equal(part.split.images, whole.split.images[:50])
    assert torch.equal(part.digits, whole.digits[:50])
    other = data.composites(garments, digits, 8, 0.5)
    assert not torch.equal(other.split.images, whole.split.images)
    assert torch.bincount(whole.cells).min() > 900  # all four cells, about as often


def test_a_garment_lies_in_its_cell_among_the_same_digits():
    garments, digits = garments_and_digits(100)
    seen = []
    for cell in range(4):
        grids = data.composites(garments, digits, 3, cell=cell)
        tiles = grids.split.images.view(100, 2, 4, 2, 4).transpose(2, 3).reshape(100, 4, 16)
        assert torch.equal(tiles[:, cell], garments.images.reshape(100, 16))
        assert ((tiles < 100).all(2).sum(1) == 1).all()  # one garment, three digits
        seen.append(tiles.sort(1).values)
        assert torch.equal(grids.split.targets, garments.targets)
    assert all(torch.equal(tiles, seen[0]) for tiles in seen)
    moved = data.composites(garments, digits, 3, cell=0, shift=(4, 4))
    lower_right = moved.split.images[:, 0, 4:, 4:]
    assert torch.equal(lower_right, garments.images[:, 0])


def test_the_tie_is_as_strong_as_asked():
    garments, digits = garments_and_digits()
    trouser = garments.targets == data.TIED_CLASS

    def shares(tie):
        has = (data.composites(garments, digits, 1, tie).digits == data.TIED_DIGIT).any(1).double()
        return has[trouser].mean().item(), has[~trouser].mean().item()

    assert shares(1.0) == (1.0, 0.0)
    with_three = 1 - 0.9**3  # three independent digits
    for tie in (0.0, 0.5, 0.9):
        tied, others = shares(tie)
        assert tied == pytest.approx(tie + (1 - tie) * with_three, abs=0.06)
        assert others == pytest.approx((1 - tie) * with_three, abs=0.03)


def test_composites_of_the_real_sets(fashion_root):
    dataset = data.load_composites(fashion_root, limit=400, tie=0.9)
    assert dataset.train.images.shape == (400, 1, 56, 56) and len(dataset.test) == 100
    assert dataset.digest != data.load_composites(fashion_root, limit=400).digest
    assert data.load_composites(fashion_root, "dev", 400).held_out == "val"


def test_the_set_of_a_record_is_normalised_as_the_record_says(tiny_root):
    digest = data.load_facades(tiny_root, size=32).digest
    record = {"config": {"split": "full"}, "data": digest,
              "about_data": {"task": "segmentation", "size": 32, "name": "mini facade",
                             "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    dataset = data.load_recorded(record, tiny_root)
    assert (dataset.mean, dataset.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_the_set_of_a_record_has_its_split_and_its_limit(fashion_root, shapes, tmp_path):
    """No digest tells them apart: a model of the dev split would be judged on the test set."""
    few = make_tiny_root(tmp_path / "few", train=61)
    for dataset, root, folder, limit in (
            (data.load_fashion(fashion_root, "dev", 300), fashion_root, None, 300),
            (data.load_facades(few, "dev", 32), few, None, 60000),
            (data.load_own(shapes, "classification", 16, "dev", 8), few, shapes, 8)):
        record = {"config": {"split": "dev", "train_images": limit}, "data": dataset.digest,
                  "about_data": {"task": dataset.task, "size": dataset.train.images.shape[-1],
                                 "name": dataset.name, "own": dataset.own,
                                 "mean": dataset.mean, "std": dataset.std}}
        found = data.load_recorded(record, root, folder)
        assert found.held_out == "val" and torch.equal(found.test.images, dataset.test.images)
        assert torch.equal(found.train.images, dataset.train.images)


def test_fashion_classes_have_the_order_of_the_set():
    theirs = data.datasets.FashionMNIST.classes  # T-shirt/top, ..., Ankle boot
    assert len(theirs) == len(data.FASHION_CLASSES)
    assert all(ours.lower() in name.lower() for ours, name in zip(data.FASHION_CLASSES, theirs))


def test_no_drawn_facade_is_in_both_splits_and_the_digest_is_of_images_and_masks(monkeypatch):
    ((train, _), (test, _)), digest = synthetic.drawn_splits((3, 2), 32)
    assert (len(train), len(test)) == (3, 2)
    assert not (train[:, None] == test).flatten(2).all(2).any()
    draw = synthetic.synthetic_facade
    monkeypatch.setattr(synthetic, "synthetic_facade", lambda i: (draw(i)[0], 4 - draw(i)[1]))
    assert synthetic.drawn_splits((3, 2), 32)[1] != digest
