"""Where a trained model looks, what a shift does to it, and what it predicts.

    python interpret.py --checkpoint runs/.../seed0.pt            its predictions, held-out images
    python interpret.py --checkpoint FILE --image A.png B.jpg     attention, or probabilities, over
                                                                  images of your own
    python interpret.py attention --frozen FILE --scratch FILE    class activation maps, Figure 1
    python interpret.py measure --checkpoint FILE --out FOLDER    a record of measurements
    python interpret.py architecture                              HourGlass(2, 2), Figure 2

`measure` takes a surrogate, a classifier of 2x2 grids (`train_cls.py --composites`), and writes
where its attention lies, what the tied digit and the place of the garment do to it, and a sweep
over all pixel shifts; of any other classifier it writes how far its features are from moving with
the image. `make interpret` runs all of it, and `study.py` draws what the records say. Each command
has flags of its own: `python interpret.py measure -h`.
"""

import dataclasses
import hashlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
import metrics
import models
from lab import batches, cli, devices, engine, equivariance, figures, panels, records
from lab.batches import Dataset, Split
from lab.cli import flag
from lab.files import BadInput, colours, read_image, refuse_overwriting, shown, to_size
from lab.progress import progress
from lab.provenance import environment

RUN = "seed<k>.pt of a finished run"


@dataclass(frozen=True, kw_only=True)
class Common:
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    data: str | None = flag(None, "the folder of your own that the run was trained on")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, else ./data)")


def check_figure(path: str) -> None:
    if Path(path).suffix not in (".png", ".pdf", ".svg"):
        raise BadInput(f"--figure {path}: must end in .png, .pdf or .svg")


@dataclass(frozen=True, kw_only=True)
class Predictions(Common):
    checkpoint: str | None = flag(None, f"{RUN}, to see its predictions")
    image: tuple[str, ...] | None = flag(
        None, "your own images; Fashion-MNIST is light on black")
    figure: str = flag("predictions.png", "picture to write: .png, .pdf or .svg")

    def __post_init__(self) -> None:
        check_figure(self.figure)
        if self.checkpoint is None:
            raise BadInput(f"--checkpoint is missing: name the {RUN}, or a command, one of "
                           f"{', '.join(COMMANDS)}")
        if self.image is not None and self.data is not None:
            raise BadInput("--image and --data: show files, or the held-out images of a folder")


@dataclass(frozen=True, kw_only=True)
class Attention(Common):
    frozen: str = flag("runs/report/surrogates/frozen-tie0.9/seed0.pt",
                       "the surrogate with frozen features")
    scratch: str = flag("runs/report/surrogates/scratch-tie0.9/seed0.pt",
                        "the one trained from scratch")
    figure: str = flag("attention.png", "picture to write: .png, .pdf or .svg")

    def __post_init__(self) -> None:
        check_figure(self.figure)


@dataclass(frozen=True, kw_only=True)
class Measure(Common):
    checkpoint: str | None = flag(None, f"{RUN} of a classifier")
    images: int = flag(10000, "held-out images")
    sweep_images: int = flag(1000, "held-out images that are moved by every shift")
    out: str | None = flag(None, "folder of the record")

    def __post_init__(self) -> None:
        if min(self.images, self.sweep_images) < 1:
            raise BadInput("--images and --sweep-images must be at least 1")
        if self.checkpoint is None or self.out is None:
            raise BadInput(f"measure needs --checkpoint, the {RUN}, and --out, a folder")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    figure: str = flag("hourglass.png", "picture to write: .png, .pdf or .svg")

    def __post_init__(self) -> None:
        check_figure(self.figure)


# ---- class activation maps ----

@torch.inference_mode()
def predict_with_maps(model: nn.Module, dataset: Dataset, split: Split, batch: int,
                      dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) of a split, and the maps (N, classes, h, w) that they sum."""
    parts = progress(batches.in_order(dataset, split, batch), "attention",
                     -(-len(split) // batch))
    maps = torch.cat([model.activation_maps(engine.features_of(model, images, dtype))
                      for images, _ in parts])
    return maps.sum((2, 3)) + model.classifier.bias, maps


# ---- measurements of a surrogate ----

class Surrogate:
    """A classifier and the held-out images that its grids are made of."""

    def __init__(self, model: nn.Module, record: dict, root: Path, device: torch.device,
                 images: int):
        config = record["config"]
        held_out = data.load_fashion(root, config["split"]).to(device)
        digits = data.load_digits(root, config["split"])[1].map(lambda t: t.to(device))
        self.model, self.digits, self.batch = model, digits, config["batch"]
        self.dataset = dataclasses.replace(held_out, test=held_out.test.map(lambda t: t[:images]))
        self.dtype = getattr(torch, record["environment"]["precision"])

    def grids(self, count: int | None = None, **how: object) -> data.Composites:
        garments = self.dataset.test.map(lambda t: t[:count])
        return data.composites(garments, self.digits, data.TEST_GRIDS, **how)

    def predict_with_maps(self, grids: data.Composites) -> tuple[Tensor, Tensor]:
        return predict_with_maps(self.model, self.dataset, grids.split, self.batch, self.dtype)

    def predict(self, split: Split) -> Tensor:
        return engine.predict(self.model, self.dataset, split, max(self.batch, 128),
                              self.dtype).argmax(1)


def measure_attention(surrogate: Surrogate) -> dict[str, Tensor]:
    """Per grid, untied and tied: is it predicted right, and where the attention lies.

    And of the untied grids of other classes than the tied one: is it taken for the tied one, with
    and without the tied digit.
    """
    arrays = {}
    targets = surrogate.dataset.test.targets
    for suffix, tie in (("", 0.0), ("_tied", 1.0)):
        grids = surrogate.grids(tie=tie)
        logits, maps = surrogate.predict_with_maps(grids)
        prediction = logits.argmax(1)
        true_maps = maps[torch.arange(len(targets)), targets.long()]
        mass, pointing = equivariance.attention_in_cell(true_maps, grids.cells)
        arrays |= {"mass" + suffix: mass, "pointing" + suffix: pointing}
        arrays["accuracy" + suffix] = prediction == targets
        if tie == 0:
            arrays |= {"prediction": prediction.byte(), "target": targets}
            with_three = (grids.digits == data.TIED_DIGIT).any(1)
            other, taken = targets != data.TIED_CLASS, prediction == data.TIED_CLASS
            arrays["trouser_with_three"] = taken[other & with_three]
            arrays["trouser_without_three"] = taken[other & ~with_three]
    return arrays


def measure_places(surrogate: Surrogate) -> dict[str, Tensor]:
    """Per grid: is it predicted right with the garment in each cell, and less that in the first."""
    targets = surrogate.dataset.test.targets
    in_cell = [(surrogate.predict(surrogate.grids(cell=cell).split) == targets).double()
               for cell in range(4)]
    return {**{f"accuracy_cell{cell}": right for cell, right in enumerate(in_cell)},
            **{f"cell{cell}_minus_cell0": in_cell[cell] - in_cell[0] for cell in (1, 2, 3)}}


def sweep_shifts(surrogate: Surrogate, count: int) -> dict[str, Tensor]:
    """Every shift by 0 to 28 pixels down and right of grids whose garment lies top left.

    It stays whole. The digits roll around the borders, which cut them; without them a surrogate
    that has never seen a garment alone guesses. Float32 (29, 29): `sweep_accuracy`, and
    `sweep_consistency`, the share of grids that keep the prediction they have unshifted. Per grid:
    `shifted_minus_whole`, its share of right predictions over all shifts less that over the four
    moves by whole cells.
    """
    start = surrogate.grids(count, cell=0).split
    side = start.images.shape[-1] // 2 + 1
    shifts = list(itertools.product(range(side), repeat=2))
    predictions = torch.stack([surrogate.predict(surrogate.grids(count, cell=0, shift=shift).split)
                               for shift in progress(shifts, "sweep", unit="shifts")])
    predictions = predictions.view(side, side, -1)
    right = (predictions == start.targets).double()
    whole = right[::side - 1, ::side - 1]
    return {"sweep_accuracy": right.mean(2).float(),
            "sweep_consistency": (predictions == predictions[0, 0]).double().mean(2).float(),
            "shifted_minus_whole": right.mean((0, 1)) - whole.mean((0, 1))}


def measure_surrogate(surrogate: Surrogate, config: dict, sweep_images: int) -> tuple[dict, dict]:
    """What the record of a surrogate says, and its arrays: see the functions above."""
    arrays = measure_attention(surrogate)
    if config["tie"] == 0:  # places have nothing to do with the tie
        arrays |= measure_places(surrogate)
        if config["frozen"]:  # the surrogate that the report says this of; the sweep takes long
            arrays |= sweep_shifts(surrogate, sweep_images)
    scores = {name: values.double().mean().item() for name, values in arrays.items()
              if name not in ("prediction", "target") and not name.startswith("sweep_")}
    stored = lambda array: array.float() if array.dtype == torch.float64 else array
    return scores, {name: stored(values).cpu().numpy() for name, values in arrays.items()}


def measure_equivariance(surrogate: Surrogate, images: int) -> dict[str, list[list[float]]]:
    """{padding: mean relative error of the features by shift down and right}, of untied grids."""
    grids = surrogate.dataset.normalise(surrogate.grids(images).split.images)
    circular = equivariance.with_circular_padding(surrogate.model)
    return {"zeros": equivariance.equivariance_error(surrogate.model, grids),
            "circular": equivariance.equivariance_error(circular, grids)}


def measure(cfg: Measure) -> None:
    """Write OUT/seed<k>.npz and, last, OUT/seed<k>.json; nothing where the record exists."""
    device = devices.pick_device(cfg.device)
    model, trained = engine.load_trained(Path(cfg.checkpoint), device, models.build)
    config = trained["config"]
    if trained["about_data"]["task"] != "classification":
        raise BadInput(f"{cfg.checkpoint} is a segmentation network; measure takes classifiers")
    if trained["about_data"].get("own"):
        raise BadInput(f"{cfg.checkpoint} was trained on {trained['about_data']['name']}; measure "
                       f"takes classifiers of Fashion-MNIST")
    swept = min(cfg.sweep_images, cfg.images)
    settings = {**config, "images": cfg.images, "sweep_images": swept}
    made_of = f"{data.IDX_DIGESTS} {config['split']} {cfg.images}"
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    path = Path(cfg.out, f"seed{config['seed']}.json")
    if path.exists():
        known, weights = records.read(path), "weights_sha256"
        of = {**known["config"], weights: known.get("trained", {}).get(weights)}
        records.refuse_other(path, {**known, "config": of},
                             {"config": {**settings, weights: trained[weights]}, "data": digest})
        print(f"record {path} is there already")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    surrogate = Surrogate(model, trained, data.find_root(cfg.data_root), device, cfg.images)
    arrays, more = {}, {}
    if config.get("composites"):
        scores, arrays = measure_surrogate(surrogate, config, swept)
    else:
        more["error"] = measure_equivariance(surrogate, swept)
        scores = {f"equivariance_error_{padding}": float(np.mean(error))
                  for padding, error in more["error"].items()}
    record = {"script": "interpret.py", "config": settings, "data": digest,
              "environment": environment(device, surrogate.dtype), "trained": trained,
              "metrics": {surrogate.dataset.held_out: scores}, **more}
    records.write(path, record, arrays)
    print("  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items()))
    print(f"record {path}")


# ---- pictures ----

def draw_attention(cfg: Attention) -> None:
    """The first held-out grid that both surrogates get right, that one of them does, that none."""
    device, root, runs = devices.pick_device(cfg.device), data.find_root(cfg.data_root), {}
    for name, file in (("frozen", cfg.frozen), ("scratch", cfg.scratch)):
        if not Path(file).exists():
            raise BadInput(f"{file} is not there: `make interpret` trains the surrogates, or name "
                           f"one with --{name}")
        runs[name] = engine.load_trained(Path(file), device, models.build)
        if not runs[name][1]["config"].get("composites"):
            raise BadInput(f"--{name} {file} is no surrogate: train it with train_cls.py "
                           f"--composites")
    of = {name: record["config"] for name, (_, record) in runs.items()}
    if of["frozen"]["split"] != of["scratch"]["split"]:
        raise BadInput(f"--frozen is of split {of['frozen']['split']}, --scratch of "
                       f"{of['scratch']['split']}, so that they hold out other garments; name two "
                       f"of one split")
    found = {}
    for name, (model, record) in runs.items():
        surrogate = Surrogate(model, record, root, device, 2000)
        grids = surrogate.grids()
        found[name] = [t.cpu() for t in surrogate.predict_with_maps(grids)]
    targets = grids.split.targets.cpu()
    said = {name: logits.argmax(1) for name, (logits, _) in found.items()}
    right = {name: prediction == targets for name, prediction in said.items()}
    samples = []
    for frozen, scratch in ((True, True), (True, False), (False, True), (False, False)):
        match = ((right["frozen"] == frozen) & (right["scratch"] == scratch)).nonzero().flatten()
        if len(match):
            i = int(match[0])
            samples.append({"index": i, "grid": grids.split.images[i, 0].cpu().numpy(),
                            "target": int(targets[i]), "cell": int(grids.cells[i]),
                            "predictions": {name: int(said[name][i]) for name in said},
                            "maps": {name: maps[i].numpy() for name, (_, maps) in found.items()}})
    ties = {config["tie"]: f"tie {config['tie']:g}" for config in of.values()}
    if len(ties) > 1:
        ties = {name: f"{name} with tie {config['tie']:g}" for name, config in of.items()}
    figures.save(panels.draw_attention(
        samples, surrogate.dataset.classes,
        f"Class activation maps of the first held-out grid of each kind, untied (trained: "
        f"{', '.join(ties.values())})"), Path(cfg.figure))


def draw_predictions(model: nn.Module, record: dict, dataset: Dataset,
                     device: torch.device) -> figures.Figure:
    """Held-out images of the set that a run was trained on, and what it says of them."""
    on_device, scores = dataset.to(device), record["metrics"][dataset.held_out]
    logits = engine.predict(model, on_device, on_device.test, record["config"]["batch"],
                            getattr(torch, record["environment"]["precision"]))
    if dataset.task == "classification":
        return panels.draw_classification(dataset, logits,
                                          f"accuracy {100 * scores['accuracy']:.2f} %")
    classes = len(dataset.classes)
    each = [metrics.mean_present(metrics.ious(metrics.confusion(guess, truth, classes)))
            for guess, truth in zip(logits.argmax(1).cpu(), dataset.test.targets)]
    return panels.draw_segmentation(dataset, logits, each,
                                    f"MAP {100 * scores['map']:.1f} %, "
                                    f"WGAP {100 * scores['wgap']:.1f} %")


@torch.inference_mode()
def draw_images(model: nn.Module, record: dict, paths: tuple[str, ...],
                device: torch.device) -> figures.Figure:
    """A user's images, brought to the training size: attention to the likeliest classes, or all
    classes' probabilities."""
    about = record["about_data"]
    segments, classes = about["task"] == "segmentation", about["classes"]
    images, maps, captions = [], [], []
    for path in paths:
        image = colours(read_image(path), len(about["mean"]))
        pixels = torch.from_numpy(to_size(image, about["size"])).permute(2, 0, 1)[None]
        batch = batches.normalise(pixels.to(device), tuple(about["mean"]), tuple(about["std"]))
        images.append(image if image.shape[2] == 3 else image[..., 0])
        if segments:
            maps.append(model(batch).softmax(1)[0].cpu().numpy())
            shares = np.bincount(maps[-1].argmax(0).reshape(-1), minlength=len(classes))
            captions.append([f"{name}: {100 * share:.0f} % of pixels"
                             for name, share in zip(classes, shares / about["size"]**2)])
        else:
            layers = model.activation_maps(model.features(batch))
            logits = layers.sum((2, 3)) + model.classifier.bias
            likely, order = logits.softmax(1)[0].topk(min(3, len(classes)))
            maps.append(layers[0, order].cpu().numpy())
            captions.append([f"{classes[c]} {100 * p:.0f} %"
                             for c, p in zip(order.tolist(), likely.tolist())])
        print(f"{shown(path)}: {', '.join(captions[-1])}")
    return panels.draw_overlays(images, maps, [shown(Path(path).name) for path in paths], captions,
                                diverging=not segments)


def show_predictions(cfg: Predictions) -> None:
    device = devices.pick_device(cfg.device)
    model, record = engine.load_trained(Path(cfg.checkpoint), device, models.build)
    if cfg.image is not None:
        pages = figures.pages_of(len(cfg.image), Path(cfg.figure))
        refuse_overwriting(pages, [cfg.checkpoint, *cfg.image], "--figure")
        draw = lambda page: figures.marked(draw_images(model, record, page, device), [record])
        figures.save_pages(draw, cfg.image, Path(cfg.figure))
    else:
        dataset = data.load_recorded(record, cfg.data_root, cfg.data)
        figures.save(draw_predictions(model, record, dataset, device), Path(cfg.figure))


def traced(model: models.HourGlass, shape: tuple[int, int, int]) -> list[dict]:
    """The model's residual blocks and head, in the order in which they run on such an image."""
    blocks, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, models.ResidualBlock) or module is model.head:
            def note(module, inputs, output, name=name):
                parts = name.split(".")
                kinds = {"stem": "stem", "head": "1x1 head", "down": "down", "up": "up"}
                kind, level = kinds.get(parts[-1], "bottleneck"), ".".join(parts[:-1])
                joins = None
                if kind == "up" and model.get_submodule(level).inter_skip:
                    joins = [block["name"] for block in blocks].index(f"{level}.down")
                blocks.append({"name": name, "kind": kind, "shape": tuple(output.shape[1:]),
                               "joins": joins})
            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return blocks


def draw_architecture(cfg: Architecture) -> None:
    blocks = traced(models.HourGlass(2, 2), (3, 64, 64))
    figures.save(figures.draw_architecture(blocks, "HourGlass(2, 2): output channels by block"),
                 Path(cfg.figure))


COMMANDS = {"predictions": (Predictions, show_predictions),
            "attention": (Attention, draw_attention), "measure": (Measure, measure),
            "architecture": (Architecture, draw_architecture)}


def main(argv: list[str] | None = None) -> None:
    cli.run_command(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
