"""lab/ knows no network, no data set and no report, and serves any. Its imports: test_house.py."""

import json
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from lab import cli, engine, guard, provenance, records
from lab.batches import Dataset, Split
from lab.files import BadInput
from lab.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    width: int = cli.flag(4, "channels")


class Net(nn.Module):
    """Of signals of one channel, of which there is none in this project: 1x16 pixels, 3 classes."""

    def __init__(self, width: int, channels: int, classes: int):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, width, (1, 3), padding=(0, 1)),
                                      nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(16 * width, classes)

    def forward(self, x):
        return self.head(self.features(x))


def build(settings, *shape):
    return Net(settings["width"], *shape)


def steps_of(images: int) -> Split:
    """A step at one of three places, which is the class."""
    targets = torch.arange(images) % 3
    signals = (torch.arange(16) >= 4 + 4 * targets[:, None]).to(torch.uint8) * 200
    return Split(signals.view(images, 1, 1, 16), targets.to(torch.uint8), torch.arange(images))


def hinge(logits, targets):
    return nn.functional.multi_margin_loss(logits, targets.long())


def share_right(logits, targets, names):
    return {"right": (logits.argmax(1) == targets).double().mean().item()}


STEPS = Dataset("steps", ("a", "b", "c"), (0.5,), (0.5,), "digest", False,
                steps_of(60), steps_of(30))


def train(out, spoil={}, **settings) -> dict:
    dataset = replace(STEPS, **spoil)
    cfg = Config(epochs=6, batch=10, lr=1e-2, device="cpu", precision="fp32", out=str(out),
                 **settings)
    run = engine.Run(cfg, dataset, build)
    engine.fit(run, hinge)
    run.finish(*run.evaluate(share_right,
                             lambda logits, split: {"prediction": logits.argmax(1).numpy()}))
    return json.loads((out / "seed0.json").read_text())


def test_a_network_a_set_and_a_loss_of_ones_own(tmp_path, monkeypatch, capsys):
    """Trained, stopped, resumed, evaluated, recorded and opened again, with lab/ alone."""
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    whole = train(tmp_path / "whole")
    assert whole["metrics"]["test"]["right"] == 1.0
    assert whole["about_data"]["classes"] == ["a", "b", "c"]
    signals = iter([0] * 8 + [15])
    with monkeypatch.context() as patch:
        patch.setattr(engine, "any_signal", lambda stops: next(signals))
        with pytest.raises(guard.Stopped, match="goes on from step 3 of 6 of epoch 2"):
            train(tmp_path / "stopped")
    again = train(tmp_path / "stopped")
    assert again["weights_sha256"] == whole["weights_sha256"] and again["curve"] == whole["curve"]
    model, record = engine.load_trained(tmp_path / "whole/seed0.pt", torch.device("cpu"), build)
    assert record == whole and isinstance(model, Net) and not model.training


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_belongs_to_the_weights_that_it_started_from(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    cfg = Config(batch=10, device="cpu", precision="fp32", out=str(tmp_path))
    one, other = (Net(4, 1, 3).state_dict() for _ in range(2))
    run = engine.Run(cfg, STEPS, build, one)
    engine.fit(run, hinge)
    if finished:
        run.finish(*run.evaluate(share_right, lambda logits, split: {"none": logits.numpy()}))
    run.files.lock.unlink(missing_ok=True)
    engine.Run(cfg, STEPS, build, one).files.lock.unlink(missing_ok=True)
    with pytest.raises(BadInput, match="made with other settings .start_sha256"):
        engine.Run(cfg, STEPS, build, other)


@pytest.mark.parametrize("spoil, said", [
    ({"classes": ("a", "b")},
     "steps: a target of the train split is 2, but the 2 classes are 0 to 1"),
    ({"mean": (0.5, 0.5), "std": (1.0, 1.0)},
     "steps: the network does not train on its images of (1, 1, 16)"),
    ({"test": steps_of(0)}, "steps: its test split has no image")])
def test_what_does_not_fit_together_is_refused_before_training(tmp_path, spoil, said):
    with pytest.raises(BadInput) as error:
        train(tmp_path, spoil)
    assert str(error.value).startswith(said)


def test_the_default_place_of_ones_own_study(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert cli.parse(Config, "", ["--width", "8"]).out == "runs/mine/report/width=8"


def test_a_network_of_other_classes_is_refused_before_training(tmp_path):
    dataset = replace(STEPS, classes=("a", "b", "c", "d"))
    cfg = Config(device="cpu", out=str(tmp_path))
    with pytest.raises(BadInput, match=r"the network gives \(1, 3\) for 1 images"):
        engine.Run(cfg, dataset, lambda settings, channels, classes: Net(4, channels, 3))


def test_settings_of_a_run_from_before_a_setting_was_added():
    """One rule for resuming, tables and --base: the setting had its default."""
    before = {"config": {"lr": 0.1}, "defaults": {"lr": 0.1}}
    after = {"config": {"lr": 0.1, "momentum": 0.9}, "defaults": {"lr": 0.1, "momentum": 0.9}}
    other = {"config": {"lr": 0.1, "momentum": 0.5}, "defaults": {"lr": 0.1, "momentum": 0.9}}
    assert records.differing(before, after) == {}
    assert records.differing(before, other) == {"momentum": (0.9, 0.5)}
    assert records.differing(other, before) == {"momentum": (0.5, 0.9)}
    assert records.differing(before, other, ("lr",)) == {}


# ---- each use of the seed, and of the settings of a step ----

def steps_run(out, seed, build=build, **more):
    cfg = Config(epochs=2, batch=10, lr=1e-2, device="cpu", precision="fp32", seed=seed,
                 out=str(out), **more)
    return engine.Run(cfg, STEPS, build)


def test_each_use_of_the_seed_counts(tmp_path):
    """First weights, the order of images, and what is drawn in a step, each alone."""
    first = [provenance.weights_digest(steps_run(tmp_path / f"first{i}", seed).model)
             for i, seed in enumerate((0, 0, 1))]
    assert first[0] == first[1] != first[2]
    weights = Net(4, 1, 3).state_dict()

    def same(settings, *shape):
        model = Net(4, *shape)
        model.load_state_dict(weights)
        return model

    orders, draws = [], []
    for seed in (0, 1):
        seen, drawn = [], []

        def loss(logits, targets):
            seen.append(targets.tolist())
            drawn.append(torch.rand(()).item())
            return hinge(logits, targets)

        engine.fit(steps_run(tmp_path / f"same{seed}", seed, same), loss)
        orders.append(seen)
        draws.append(drawn)
    assert orders[0] != orders[1] and not set(draws[0]) & set(draws[1])


def test_each_step_has_its_rate_with_the_runs_own_warmup(tmp_path, monkeypatch):
    asked, rate = [], engine.learning_rate
    monkeypatch.setattr(engine, "learning_rate", lambda *args: asked.append(args) or rate(*args))
    engine.fit(steps_run(tmp_path, 0, warmup=0.3), hinge)
    assert asked == [(1e-2, 0.3, step, 12) for step in range(12)]
