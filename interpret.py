"""Where a trained model looks, what a shift does to it, and the pictures of the study.

    python interpret.py                                     Figure 1: class activation maps of both surrogates
    python interpret.py --checkpoint runs/.../seed0.pt      predictions for the held-out images of a finished run
    python interpret.py --checkpoint FILE --image A.png B.jpg    attention, or class probabilities, over your own images
    python interpret.py --measure FILE --out results/small/attention/frozen-tie0     a record of measurements
    python interpret.py --study small                       all figures that records alone can give

`--measure` takes a surrogate, a classifier of 2x2 grids (`train_cls.py --composites`), and writes where its
attention lies, what the tied digit and the place of the garment do to it, and a sweep over all pixel
shifts; of any other classifier it writes how far its features are from moving with the image.
`make interpret` runs all of it.
"""

import copy
import dataclasses
import hashlib
import io
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import data
import figures
import models
import study
from data import Composites
from lab import batches, cli, devices, engine, files, provenance, records
from lab.batches import Dataset, Split
from lab.cli import flag
from lab.files import BadInput, colours, read_image, shown, to_size
from lab.progress import progress
from study import Protocol

TEST_GRIDS = 1  # seed of the held-out grids, as in data.load_composites


@dataclass(frozen=True, kw_only=True)
class Config:
    frozen: str = flag("runs/report/surrogates/frozen-tie0.9/seed0.pt", "Figure 1: the surrogate with frozen features")
    scratch: str = flag("runs/report/surrogates/scratch-tie0.9/seed0.pt", "Figure 1: the one trained from scratch")
    checkpoint: str | None = flag(None, "seed<k>.pt of a finished run, to see its predictions")
    image: tuple[str, ...] | None = flag(None, "your own images, for --checkpoint; Fashion-MNIST is light on black")
    figure: str | None = flag(None, "picture to write: .png, .pdf or .svg (default: attention.png, predictions.png)")
    measure: str | None = flag(None, "seed<k>.pt of a finished classifier, to write a record of measurements")
    images: int = flag(10000, "measure: held-out images")
    sweep_images: int = flag(1000, "measure: held-out images that are moved by every shift")
    out: str | None = flag(None, "measure: folder of the record")
    study: Protocol = flag(None, "whose records to draw")
    results: str = flag("results", "study: folder of the records")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, else ./data)")

    def __post_init__(self) -> None:
        if self.figure is not None and Path(self.figure).suffix not in (".png", ".pdf", ".svg"):
            raise BadInput(f"--figure {self.figure}: must end in .png, .pdf or .svg")
        if min(self.images, self.sweep_images) < 1:
            raise BadInput("--images and --sweep-images must be at least 1")
        if self.measure is not None and self.out is None:
            raise BadInput("--measure needs --out, the folder of its record")
        if self.image is not None and self.checkpoint is None:
            raise BadInput("--image needs --checkpoint, the seed<k>.pt of a finished run")


# ---- class activation maps ----

def activation_maps(model: nn.Module, features: Tensor) -> Tensor:
    """Exact class activation maps (Zhou et al. 2016, section 2): float32 (N, classes, h, w).

    What each position of the features (N, C, h, w) gives to each class's logit: summed over
    positions, plus the classifier's bias, they are the logits.
    """
    positions = features.shape[2] * features.shape[3]
    return torch.einsum("nchw,kc->nkhw", features.float(), model.classifier.weight) / positions


@torch.inference_mode()
def look(model: nn.Module, dataset: Dataset, split: Split, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) of a split, and the class activation maps (N, classes, h, w) that they sum."""
    maps = []
    parts = batches.in_order(dataset, split, batch)
    for images, _ in progress(parts, "attention", -(-len(split) // batch)):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            features = model.features(images)
        maps.append(activation_maps(model, features))
    maps = torch.cat(maps)
    return maps.sum((2, 3)) + model.classifier.bias, maps


def attention_in_cell(maps: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Of maps (N, h, w): the share of their positive mass that lies in cell (N,) of the 2x2 grid, and
    whether their highest point lies there (Zhang et al. 2018, the pointing game). A map that is
    positive nowhere has share 0. Chance is 1/4 for both.
    """
    n, height, width = maps.shape
    quarters = maps.view(n, 2, height // 2, 2, width // 2).transpose(2, 3).reshape(n, 4, -1)
    mass = quarters.clamp_min(0).sum(2)
    share = mass.gather(1, cells[:, None])[:, 0] / mass.sum(1).clamp_min(1e-12)
    return share, quarters.amax(2).argmax(1) == cells


# ---- measurements of a surrogate ----

class Bench:
    """A surrogate and the held-out images its grids are made of."""

    def __init__(self, model: nn.Module, record: dict, root: Path, device: torch.device, images: int):
        config = record["config"]
        held_out = data.load_fashion(root, config["split"]).to(device)
        digits = data.load_digits(root, config["split"])[1].map(lambda t: t.to(device))
        self.model, self.digits, self.batch = model, digits, config["batch"]
        self.dataset = dataclasses.replace(held_out, test=held_out.test.map(lambda t: t[:images]))
        self.dtype = getattr(torch, record["environment"]["precision"])

    def grids(self, count: int | None = None, **how: object) -> Composites:
        garments = self.dataset.test.map(lambda t: t[:count])
        return data.composites(garments, self.digits, TEST_GRIDS, **how)

    def look(self, grids: Composites) -> tuple[Tensor, Tensor]:
        return look(self.model, self.dataset, grids.split, self.batch, self.dtype)

    def predict(self, split: Split) -> Tensor:
        return engine.predict(self.model, self.dataset, split, max(self.batch, 128), self.dtype).argmax(1)


def measure_attention(bench: Bench) -> tuple[dict, dict[str, Tensor]]:
    """Accuracy and attention on untied and tied grids, per grid, and how many others are taken for the tied class."""
    arrays, scores = {}, {}
    targets = bench.dataset.test.targets
    for suffix, tie in (("", 0.0), ("_tied", 1.0)):
        grids = bench.grids(tie=tie)
        logits, maps = bench.look(grids)
        prediction = logits.argmax(1)
        true_maps = maps[torch.arange(len(targets)), targets.long()]
        arrays["mass" + suffix], arrays["pointing" + suffix] = attention_in_cell(true_maps, grids.cells)
        arrays["accuracy" + suffix] = prediction == targets
        if tie == 0:
            arrays |= {"prediction": prediction.byte(), "target": targets}
            with_three = (grids.digits == data.TIED_DIGIT).any(1)
            other = targets != data.TIED_CLASS
            false = (prediction == data.TIED_CLASS).double()
            scores["trouser_with_three"] = false[other & with_three].mean().item()
            scores["trouser_without_three"] = false[other & ~with_three].mean().item()
    return scores, arrays


def measure_places(bench: Bench) -> dict[str, Tensor]:
    """Per grid: whether the prediction is right with the garment in each cell, and less that in the first one."""
    targets = bench.dataset.test.targets
    in_cell = [(bench.predict(bench.grids(cell=cell).split) == targets).double() for cell in range(4)]
    return {**{f"accuracy_cell{cell}": right for cell, right in enumerate(in_cell)},
            **{f"cell{cell}_minus_cell0": in_cell[cell] - in_cell[0] for cell in (1, 2, 3)}}


def sweep_shifts(bench: Bench, count: int) -> dict[str, Tensor]:
    """Every shift by 0 to 28 pixels down and right of grids whose garment lies top left: it stays whole.

    The digits roll around the borders, which cut them; without them a surrogate that has never seen a
    garment alone guesses. Float32 (29, 29): `sweep_accuracy`, and `sweep_consistency`, the share of grids
    that keep the prediction they have unshifted. Per grid: `shifted_minus_whole`, its share of right
    predictions over all shifts less that over the four moves by whole cells.
    """
    start = bench.grids(count, cell=0).split
    side = start.images.shape[-1] // 2 + 1
    shifts = list(itertools.product(range(side), repeat=2))
    predictions = torch.stack([bench.predict(bench.grids(count, cell=0, shift=shift).split)
                               for shift in progress(shifts, "sweep", unit="shifts")])
    predictions = predictions.view(side, side, -1)
    right = (predictions == start.targets).double()
    whole = right[::side - 1, ::side - 1]
    return {"sweep_accuracy": right.mean(2).float(),
            "sweep_consistency": (predictions == predictions[0, 0]).double().mean(2).float(),
            "shifted_minus_whole": right.mean((0, 1)) - whole.mean((0, 1))}


# ---- how far features move with the image ----

def fourier_shift(x: Tensor, down: float, right: float) -> Tensor:
    """Roll (N, C, h, w) by fractions of a pixel: exact for what lies below the sampling limit."""
    height, width = x.shape[-2:]
    turn = -2j * torch.pi * (torch.fft.fftfreq(height, device=x.device)[:, None] * down
                             + torch.fft.rfftfreq(width, device=x.device) * right)
    return torch.fft.irfft2(torch.fft.rfft2(x) * turn.exp(), s=(height, width))


def with_circular_padding(model: nn.Module) -> nn.Module:
    """A copy without borders: what a filter would see beyond one side it sees from the other."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, models.BlurPool)):
            module.padding_mode = "circular"
    return model


@torch.inference_mode()
def equivariance_error(model: nn.Module, images: Tensor, shifts: int = 8) -> list[list[float]]:
    """Mean over images of ||f(shift x) - shift f(x)|| / ||f(x)||, for shifts down and right of 0 to shifts - 1 pixels.

    images float32 (N, C, H, W). Images are rolled; features, which are coarser by the model's stride, are
    rolled by the fraction in Fourier space, so what remains is aliasing (Zhang 2019) and the borders.
    """
    features = model.features(images)
    norm = features.flatten(1).norm(dim=1)
    error = lambda down, right: (model.features(images.roll((down, right), (2, 3))) - fourier_shift(
        features, down / model.stride, right / model.stride)).flatten(1).norm(dim=1) / norm
    moves = list(itertools.product(range(shifts), repeat=2))
    errors = [error(*move).mean() for move in progress(moves, "equivariance", unit="shifts")]
    return torch.stack(errors).view(shifts, shifts).tolist()


def measure(cfg: Config) -> None:
    """Write OUT/seed<k>.npz and, last, OUT/seed<k>.json; nothing where the record exists."""
    device = devices.pick_device(cfg.device)
    model, trained = engine.load_trained(Path(cfg.measure), device, models.build)
    config = trained["config"]
    if "depth" not in config:
        raise BadInput(f"--measure {cfg.measure} is a segmentation network; it measures classifiers")
    path = Path(cfg.out, f"seed{config['seed']}.json")
    if path.exists():
        print(f"record {path} is there already")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(model, trained, data.find_root(cfg.data_root), device, cfg.images)
    arrays, more = {}, {}
    if config.get("composites"):
        scores, arrays = measure_attention(bench)
        if config["tie"] == 0:  # places have nothing to do with the tie
            arrays |= measure_places(bench)
            if config["frozen"]:  # the surrogate that the report says this of; the sweep takes long
                arrays |= sweep_shifts(bench, cfg.sweep_images)
        scores |= {name: values.double().mean().item() for name, values in arrays.items()
                   if name not in ("prediction", "target") and not name.startswith("sweep_")}
    else:
        images = bench.dataset.normalise(bench.grids(cfg.sweep_images).split.images)
        more["error"] = {"zeros": equivariance_error(model, images),
                         "circular": equivariance_error(with_circular_padding(model), images)}
        scores = {f"equivariance_error_{padding}": float(np.mean(error)) for padding, error in more["error"].items()}
    made_of = f"{data.IDX_DIGESTS} {config['split']} {cfg.images}"
    record = files.jsonable({
        "script": "interpret.py", "config": {**config, "images": cfg.images, "sweep_images": cfg.sweep_images},
        "data": hashlib.sha256(made_of.encode()).hexdigest(), "environment": provenance.environment(device, bench.dtype),
        "trained": trained, "metrics": {"test": scores}, **more})
    if arrays:
        half = lambda array: array.float() if array.dtype == torch.float64 else array
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{key: half(x).cpu().numpy() for key, x in arrays.items()})
        files.write_atomic(path.with_suffix(".npz"), buffer.getbuffer())
    files.write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    print("  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items()))
    print(f"record {path}")


# ---- pictures ----

def draw_figure1(cfg: Config, device: torch.device) -> figures.Figure:
    """The first held-out grid that both surrogates get right, that only one of them does, that none does."""
    runs = {}
    for name, file in (("frozen", cfg.frozen), ("scratch", cfg.scratch)):
        if not Path(file).exists():
            raise BadInput(f"{file} is not there: `make interpret` trains the surrogates, or name one with --{name}")
        runs[name] = engine.load_trained(Path(file), device, models.build)
        if not runs[name][1]["config"].get("composites"):
            raise BadInput(f"--{name} {file} is no surrogate: train it with train_cls.py --composites")
    root = data.find_root(cfg.data_root)
    found = {}
    for name, (model, record) in runs.items():
        bench = Bench(model, record, root, device, min(cfg.images, 2000))
        grids = bench.grids()
        found[name] = [t.cpu() for t in bench.look(grids)]
    targets = grids.split.targets.cpu()
    right = {name: logits.argmax(1) == targets for name, (logits, _) in found.items()}
    samples = []
    for frozen, scratch in ((True, True), (True, False), (False, True), (False, False)):
        match = ((right["frozen"] == frozen) & (right["scratch"] == scratch)).nonzero().flatten()
        if len(match):
            i = int(match[0])
            samples.append({"index": i, "grid": grids.split.images[i, 0].cpu().numpy(), "target": int(targets[i]),
                            "cell": int(grids.cells[i]),
                            "maps": {name: maps[i].numpy() for name, (_, maps) in found.items()}})
    ties = {name: record["config"]["tie"] for name, (_, record) in runs.items()}
    return figures.draw_attention(samples, bench.dataset.classes, "Class activation maps of the first held-out grid of "
                                  f"each kind, untied (trained with tie {ties['frozen']} and {ties['scratch']})")


def draw_predictions(model: nn.Module, record: dict, root: Path, device: torch.device) -> figures.Figure:
    dataset = data.load_recorded(record, root)
    on_device = dataset.to(device)
    logits = engine.predict(model, on_device, on_device.test, record["config"]["batch"],
                            getattr(torch, record["environment"]["precision"]))
    draw = figures.draw_segmentation if logits.ndim == 4 else figures.draw_classification
    return draw(dataset, logits, record["metrics"][dataset.held_out])


@torch.inference_mode()
def draw_images(model: nn.Module, record: dict, paths: tuple[str, ...],
                device: torch.device) -> figures.Figure:
    """A user's images, brought to the training size: the likeliest classes' attention, or all probabilities."""
    about, segments = record["about_data"], "arch" in record["config"]
    images, maps, captions = [], [], []
    for path in paths:
        image = colours(read_image(path), 3 if segments else 1)
        pixels = torch.from_numpy(to_size(image, about["size"])).permute(2, 0, 1)[None]
        batch = batches.normalise(pixels.to(device), tuple(about["mean"]), tuple(about["std"]))
        images.append(image if segments else image[..., 0])
        if segments:
            maps.append(model(batch).softmax(1)[0].cpu().numpy())
            shares = np.bincount(maps[-1].argmax(0).reshape(-1), minlength=len(about["classes"])) / about["size"]**2
            captions.append([f"{name}: {100 * share:.0f} % of pixels" for name, share in zip(about["classes"], shares)])
        else:
            layers = activation_maps(model, model.features(batch))
            logits = layers.sum((2, 3)) + model.classifier.bias
            likely, order = logits.softmax(1)[0].topk(3)
            maps.append(layers[0, order].cpu().numpy())
            captions.append([f"{about['classes'][c]} {100 * p:.0f} %" for c, p in zip(order.tolist(), likely.tolist())])
        print(f"{shown(path)}: {', '.join(captions[-1])}")
    return figures.draw_overlays(images, maps, [shown(Path(path).name) for path in paths], captions, diverging=not segments)


def traced(model: models.HourGlass, shape: tuple[int, int, int]) -> list[dict]:
    """The model's residual blocks and head in the order they run, read off the modules as they run on `shape`."""
    blocks, hooks = [], []
    for name, module in model.named_modules():
        if isinstance(module, models.ResidualBlock) or module is model.head:
            def note(module, inputs, output, name=name):
                parts = name.split(".")
                kind = {"stem": "stem", "head": "1x1 head", "down": "down", "up": "up"}.get(parts[-1], "bottleneck")
                partner = [i for i, b in enumerate(blocks) if b["name"] == ".".join([*parts[:-1], "down"])]
                joined = kind == "up" and model.get_submodule(".".join(parts[:-1])).inter_skip
                blocks.append({"name": name, "kind": kind, "shape": tuple(output.shape[1:]),
                               "joins": partner[0] if joined else None})
            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return blocks


def draw_study(protocol: str, results: Path) -> None:
    """All figures that the records of a protocol can give, into its folder."""
    folder = results / protocol
    pictures = {"hourglass.png": figures.draw_architecture(
        traced(models.HourGlass(2, 2), (3, 64, 64)), "HourGlass(2, 2): channels of each block")}
    tables = {table: study.load_records(folder / table, protocol) for table in study.REPORT}
    if all(len(next(iter(rows.values()), {})) > 1 for rows in tables.values()):
        figures.save(figures.draw_power(tables, protocol), results / "power.png")
    for table, rows in tables.items():
        if not rows:
            print(f"{folder / table} has no record yet, so no figure")
            continue
        pictures |= {f"{table}.png": figures.draw_differences(rows, table), f"{table}-curves.png":
                     figures.draw_curves(rows)}
        if table == "table2":
            pictures["imbalance.png"] = figures.draw_imbalance(next(iter(next(iter(rows.values())).values())))
    if rows := study.load_records(folder / "attention", protocol):
        pictures["ties.png"] = figures.draw_ties(rows)
        if swept := rows.get("frozen-tie0"):
            sweep = records.mean_arrays(swept, ("sweep_accuracy", "sweep_consistency"))
            pictures["shifts.png"] = figures.draw_shifts("frozen", swept, sweep)
        names = next(iter(next(iter(rows.values())).values()))["trained"]["about_data"]["classes"]
        if confusions := {f"{row}, all seeds": records.summed_confusion(rows[row], len(names))
                          for row in ("frozen-tie0.9", "scratch-tie0.9") if row in rows}:
            pictures["confusion.png"] = figures.draw_confusions(confusions, names)
    if rows := study.load_records(folder / "equivariance", protocol):
        pictures["equivariance.png"] = figures.draw_equivariance(rows)
    for name, figure in pictures.items():
        figures.save(figure, folder / name)


def main(argv: list[str] | None = None) -> None:
    cfg = cli.parse(Config, __doc__, argv)
    if cfg.study is not None:
        return draw_study(cfg.study, Path(cfg.results))
    if cfg.measure is not None:
        return measure(cfg)
    device = devices.pick_device(cfg.device)
    if cfg.checkpoint is None:
        return figures.save(draw_figure1(cfg, device), Path(cfg.figure or "attention.png"))
    path = Path(cfg.figure or "predictions.png")
    model, record = engine.load_trained(Path(cfg.checkpoint), device, models.build)
    if cfg.image is not None:
        draw = lambda page: figures.marked(draw_images(model, record, page, device), [record])
        figures.save_pages(draw, cfg.image, path)
    else:
        figures.save(draw_predictions(model, record, data.find_root(cfg.data_root), device), path)


if __name__ == "__main__":
    sys.exit(cli.guard(main))
