"""Average precision against scikit-learn on made-up inputs, and everything else by hand."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, confusion_matrix, jaccard_score

import metrics

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

finite = st.floats(-1e6, 1e6, width=32)
few = st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0])  # ties everywhere


def oracle(scores, positive):
    if not positive.any():
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return average_precision_score(positive, scores)


def same(found, expected):
    return math.isnan(found) and math.isnan(expected) or abs(found - expected) <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("elements", [finite, few], ids=["any", "ties"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=150, deadline=None)
@given(pairs=st.data())
def test_average_precision_is_scikit_learns(device, elements, dtype, pairs):
    n = pairs.draw(st.integers(1, 60))
    scores = pairs.draw(hnp.arrays(dtype, n, elements=elements))
    positive = pairs.draw(hnp.arrays(bool, n))
    on_device = (torch.from_numpy(values).to(device) for values in (scores, positive))
    assert same(metrics.average_precision(*on_device), oracle(scores, positive))


@pytest.mark.parametrize("scores, positive", [
    ([0.3] * 7, [1, 0, 0, 1, 0, 0, 0]), ([0.1, 0.2, 0.3], [1, 1, 1]),
    ([0.1, 0.2, 0.3], [0, 0, 0]), ([0.5], [1]), ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0])],
    ids=["constant", "all positive", "no positive", "one", "mixed"])
def test_average_precision_corners(scores, positive):
    scores, positive = np.array(scores), np.array(positive, dtype=bool)
    found = metrics.average_precision(torch.tensor(scores), torch.tensor(positive))
    assert same(found, oracle(scores, positive))


def test_average_precision_by_hand():
    of = lambda scores, hits: metrics.average_precision(torch.tensor(scores), torch.tensor(hits))
    # ranks 1 and 3 are hits; then a tie of one hit and one miss enters together
    found = of([0.9, 0.8, 0.7], [True, False, True])
    assert found == pytest.approx((1 / 1 + 2 / 3) / 2, abs=1e-15)
    assert of([0.5, 0.5], [True, False]) == 1 / 2


def test_average_precision_of_many_tied_pixels():
    generator = np.random.default_rng(0)
    scores = (generator.random(300_000) * 200).round().astype(np.float32) / 200
    positive = generator.random(300_000) < scores * 0.05
    assert abs(metrics.average_precision(torch.from_numpy(scores), torch.from_numpy(positive))
               - oracle(scores, positive)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_exactly(dtype):
    scores, positive = torch.rand(500).to(dtype), torch.rand(500) < 0.3
    found = metrics.average_precision(scores, positive)
    assert found == metrics.average_precision(scores.float(), positive)
    assert same(found, oracle(scores.float().numpy(), positive.numpy()))


@pytest.mark.parametrize("scores, positive, message", [
    (torch.tensor([0.1, math.nan]), torch.tensor([True, False]), "finite"),
    (torch.tensor([0.1, math.inf]), torch.tensor([True, False]), "finite"),
    (torch.tensor([1, 2]), torch.tensor([True, False]), "floating-point"),
    (torch.rand(3), torch.tensor([True, False]), "equal"),
    (torch.rand(2, 2), torch.ones(2, 2, dtype=torch.bool), "1-D")])
def test_average_precision_refuses(scores, positive, message):
    with pytest.raises(ValueError, match=message):
        metrics.average_precision(scores, positive)


NAMES = ("a", "b", "c")


def test_segmentation_against_scikit_learn():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 7, 7), torch.randint(0, 3, (4, 7, 7))
    found = metrics.segmentation(logits, target, NAMES)
    probs = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    flat = target.reshape(-1).numpy()
    for c, name in enumerate(NAMES):
        assert abs(found["ap"][name] - average_precision_score(flat == c, probs[:, c])) <= 1e-12
        raw = logits[:, c].reshape(-1).numpy()
        assert abs(found["ap_logits"][name] - average_precision_score(flat == c, raw)) <= 1e-12
    assert found["map"] == pytest.approx(sum(found["ap"].values()) / 3)
    assert found["wgap"] == min(found["ap"].values())
    prediction = logits.argmax(1).reshape(-1).numpy()
    iou = jaccard_score(flat, prediction, average=None)
    assert list(found["iou"].values()) == pytest.approx(iou.tolist())
    assert found["pixel_accuracy"] == (prediction == flat).mean()  # to the last bit, in float64
    counts = metrics.confusion(logits.argmax(1), target, 3)
    assert counts.tolist() == confusion_matrix(flat, prediction).tolist()
    assert found["classes_counted"] == 3 and found["images"] == 4


def test_an_absent_class_is_nan_and_left_out_of_the_means():
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 0, 0, :2] = logits[0, 1, 0, 2:] = 9
    found = metrics.segmentation(logits, torch.tensor([[[0, 0, 1, 1]]]), NAMES)
    assert math.isnan(found["ap"]["c"]) and math.isnan(found["iou"]["c"])
    assert found["map"] == found["wgap"] == found["miou"] == 1 and found["classes_counted"] == 2


def test_an_all_background_prediction_scores_low():
    logits = torch.zeros(1, 3, 10, 10)
    logits[:, 0] = 9
    target = torch.zeros(1, 10, 10, dtype=torch.long)
    target[0, 0, :5], target[0, 1, :5] = 1, 2
    found = metrics.segmentation(logits, target, NAMES)
    assert found["iou"] == {"a": 0.9, "b": 0, "c": 0} and found["miou"] == pytest.approx(0.3)
    assert found["wgap"] == pytest.approx(0.05)  # a constant score ranks like chance


def test_classification_by_hand():
    logits = torch.tensor([[2.0, 1, 0], [0, 2, 1], [2, 0, 1], [0, 0, 1]])
    found = metrics.classification(logits, torch.tensor([0, 1, 1, 1], dtype=torch.uint8), NAMES)
    assert found["accuracy"] == 0.5 and found["images"] == 4
    of_class = found["class_accuracy"]
    assert of_class["a"] == 1 and of_class["b"] == pytest.approx(1 / 3)
    assert math.isnan(of_class["c"])
    assert found["confusion"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_counts_are_exact_past_2_to_the_24():
    n = 2**24 + 3
    zeros = torch.zeros(n, dtype=torch.uint8)
    counts = metrics.confusion(zeros, zeros, 2)
    assert counts.tolist() == [[n, 0], [0, 0]]


def test_histograms_per_photo_give_the_average_precision_of_any_resample():
    torch.manual_seed(0)
    target = torch.randint(0, 3, (6, 16, 16))
    truth = torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
    logits = torch.randn(6, 3, 16, 16) * 2 + 3 * truth
    probs, photo = logits.softmax(1), torch.tensor([9, 4, 9, 7, 4, 9])
    found = metrics.score_histograms(probs, target, photo)
    assert found["groups"].tolist() == [4, 7, 9]
    assert found["hits"].sum((0, 2)).tolist() == target.reshape(-1).bincount().tolist()
    assert (found["hits"] + found["misses"]).sum(2).tolist() == [[512] * 3, [256] * 3, [768] * 3]
    for draw in ([0, 1, 2], [0, 0, 2], [1, 1, 1]):  # photos drawn with repetition, and their images
        images = torch.cat([(photo == found["groups"][i]).nonzero().flatten() for i in draw])
        exact = metrics.average_precisions(probs[images], target[images])
        hits, misses = (found[name][draw].sum(0) for name in ("hits", "misses"))
        binned = metrics.binned_average_precision(hits, misses)
        assert binned.tolist() == pytest.approx(exact, abs=2e-3)


def histograms_at_once(probs, target, group):
    """As records had them computed until it was done class by class."""
    classes, bins = probs.shape[1], metrics.BINS
    groups, which = group.unique(return_inverse=True)
    of_score = ((torch.logit(probs, eps=1e-6) + 12) * (bins / 24)).long().clamp_(0, bins - 1)
    each, target = torch.arange(classes).view(1, -1, 1, 1), target.unsqueeze(1)
    cell = ((which.view(-1, 1, 1, 1) * classes + each) * bins + of_score) * 2 + (target == each)
    cells = len(groups) * classes * bins * 2
    cell = cell.where(target != metrics.VOID, cells)
    counts = torch.bincount(cell.reshape(-1), minlength=cells)[:cells]
    counts = counts.reshape(len(groups), classes, bins, 2).to(torch.int32).numpy()
    return {"hits": counts[..., 1], "misses": counts[..., 0], "groups": groups.numpy()}


def average_precision_at_once(scores, positive):
    hits, misses = scores[positive].sort().values, scores[~positive].sort().values
    thresholds, counts = torch.unique_consecutive(hits, return_counts=True)
    true = counts.flip(0).cumsum(0).flip(0)
    false = len(misses) - torch.searchsorted(misses, thresholds)
    return (counts.double() / len(hits) * (true.double() / (true + false))).sum().item()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(6, 5, 64, 64), (5, 3, 7, 9), (3, 2, 1, 1)])
@pytest.mark.parametrize("void", [0, 0.3])
def test_what_is_computed_in_parts_has_the_bits_of_the_whole(layout, shape, void):
    torch.manual_seed(0)
    logits = (torch.randn(shape) * 4).to(memory_format=layout)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:])).to(torch.uint8)
    target = target.where(torch.rand(target.shape) >= void, metrics.VOID)
    probs, photo = logits.softmax(1), torch.tensor([9, 4, 9, 7, 4, 9])[:len(logits)]
    found, whole = (compute(probs, target, photo)
                    for compute in (metrics.score_histograms, histograms_at_once))
    for name, expected in whole.items():
        assert found[name].dtype == expected.dtype and np.array_equal(found[name], expected), name
    for scores in (logits, probs, (probs * 50).round()):  # the last with ties
        of_class = metrics.average_precisions(scores, target)
        for c, value in enumerate(of_class):
            labelled = target != metrics.VOID
            hits = (target == c)[labelled]
            expected = average_precision_at_once(scores[:, c][labelled], hits)
            assert value == expected if hits.any() else math.isnan(value)


def test_binned_average_precision_by_hand():
    hits, misses = np.zeros((2, 4)), np.zeros((2, 4))
    hits[0, 3], hits[0, 1], misses[0, 1] = 2, 2, 2  # two hits, then two of each mixed
    misses[1, 0] = 5
    found = metrics.binned_average_precision(hits, misses)
    assert found[0] == pytest.approx((2 * 2 / 2 + 2 * 3 / 4) / 4) and math.isnan(found[1])


def test_class_table_marks_an_absent_class():
    lines = metrics.class_table({"AP": {"a": 0.5, "b": None}}).splitlines()
    assert lines[1].split() == ["a", "50.0"] and lines[2].split() == ["b", "absent"]


def test_void_pixels_count_in_no_metric():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3, 8, 8) * 2, torch.randint(0, 3, (4, 8, 8))
    labelled = torch.rand(4, 8, 8) < 0.7
    void = target.where(labelled, metrics.VOID).to(torch.uint8)
    rows = logits.movedim(1, -1)[labelled], target[labelled]  # pixels as images of one pixel
    expected = metrics.segmentation(rows[0][..., None, None], rows[1][..., None, None], NAMES)
    found = metrics.segmentation(logits, void, NAMES)
    for key in ("ap", "ap_logits", "iou", "map", "wgap", "miou", "pixel_accuracy"):
        assert found[key] == pytest.approx(expected[key], abs=1e-12), key
    counts = metrics.score_histograms(logits.softmax(1), void, torch.tensor([0, 0, 1, 1]))
    assert counts["hits"].sum((0, 2)).tolist() == rows[1].bincount().tolist()
    assert (counts["hits"] + counts["misses"]).sum((0, 2)).tolist() == [labelled.sum()] * 3
    binned = metrics.binned_average_precision(counts["hits"].sum(0), counts["misses"].sum(0))
    assert binned.tolist() == pytest.approx(list(expected["ap"].values()), abs=0.02)


def test_a_split_of_void_alone_has_no_metric():
    found = metrics.segmentation(torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), metrics.VOID),
                                 NAMES)
    assert math.isnan(found["map"]) and math.isnan(found["miou"]) and found["classes_counted"] == 0
