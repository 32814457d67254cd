"""How the page's networks are made of runs: what web/networks.py puts together, refuses, keeps."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
import torch
from test_page import networks

from lab import forms, records
from lab.batches import Dataset, Split
from lab.files import BadInput
from models import VGGResNet


def test_surrogates_of_one_base_are_one_network_with_their_classes_in_order():
    one = VGGResNet(1, 4).eval()
    other = copy.deepcopy(one)
    other.classifier.reset_parameters()
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        exact = torch.cat([one(images), other(images)], 1)
        assert torch.allclose(networks.stacked([one, other])(images), exact, atol=1e-5)
        next(other.stages.parameters()).add_(1e-3)
    with pytest.raises(BadInput, match="other features"):
        networks.stacked([one, other])


def test_each_head_is_held_to_its_own_record():
    """Of two heads the second is wrong of one image in ten."""
    targets = (torch.arange(10) % 3).to(torch.uint8)
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    split = Split(images, targets, torch.arange(10))
    dataset = Dataset("", ("a", "b", "c"), (0.5,), (0.5,), "", False, split, split)
    right = torch.nn.functional.one_hot(targets.long(), 3).float()
    logits = torch.cat([right, right], 1)
    logits[0, 3:] = torch.tensor([0.0, 1.0, 0.0])
    network = lambda images: logits[images.flatten().long()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "open_form", lambda path: network)
        costs = networks.judged(Path("x"), network, dataset, [1.0, 0.904])
        assert [cost["accuracy"]["file"] for cost in costs] == [1.0, 0.9]
        with pytest.raises(forms.ParityError, match="x loses 0.60 points of accuracy"):
            networks.judged(Path("x"), network, dataset, [1.0, 0.906])


def record_of(weights):
    return {"config": {}, "data": "", "weights_sha256": weights,
            "metrics": {"test": {"accuracy": 0.5}},
            "about_data": {"size": 28, "classes": ["a", "b", "c"], "palette": None}}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes x.onnx of a run with these weights, after an earlier entry: its entry, how often."""
    split = Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), torch.arange(2))
    dataset = Dataset("", ("a", "b", "c"), (0.5,), (0.5,), "", False, split, split)
    cfg = networks.Config(records=str(tmp_path / "records"), out=str(tmp_path))
    written = []

    def write(parts, example, path):
        written.append(path.name)
        path.write_bytes(parts[0][1]["weights_sha256"].encode())

    monkeypatch.setattr(networks, "write", write)
    monkeypatch.setattr(networks, "judged", lambda *_: [{}])
    monkeypatch.setattr(networks.data, "load_recorded", lambda *_: dataset)

    def make(weights, earlier):
        monkeypatch.setattr(networks.engine, "load_trained", lambda *_: (None, record_of(weights)))
        return networks.make(cfg, networks.Source("x.onnx", {"run": {}}), earlier), len(written)
    return make


def test_a_file_is_kept_as_long_as_it_and_its_records_are_the_same(made, tmp_path):
    entry, count = made("one", None)
    assert made("one", entry) == (entry, 1) and count == 1
    (tmp_path / "x.onnx").write_bytes(b"damaged")
    assert made("one", entry) == (entry, 2)
    again, count = made("two", entry)
    assert count == 3 and again["networks"][0]["weights_sha256"] == "two"


def test_the_same_weights_in_another_time_are_the_same_network(made, tmp_path):
    """A fresh clone trains them anew; on another machine they are others, and so is the record."""
    entry, _ = made("one", None)
    path = tmp_path / "records/page/run/seed0.json"
    kept = json.dumps({**record_of("one"), "train_seconds": 1.0})
    path.write_text(kept)
    again, count = made("one", entry)
    assert count == 2 and path.read_text() == kept
    assert again["networks"][0]["record_sha256"] == hashlib.sha256(kept.encode()).hexdigest()
    made("two", again)
    assert json.loads(path.read_text())["weights_sha256"] == "two"


def test_more_bytes_than_a_reader_waits_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "available", lambda cfg: [networks.Source("new.onnx", {})])
    monkeypatch.setattr(networks, "make", lambda cfg, source, earlier: {
        "file": source.file, "bytes": networks.LIMIT + 1})
    (tmp_path / "index.json").write_text(json.dumps({"files": []}))
    with pytest.raises(BadInput, match="12,000,001 bytes, allowed 12,000,000"):
        networks.main(["--out", str(tmp_path)])
    assert json.loads((tmp_path / "index.json").read_text()) == {"files": []}
