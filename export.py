"""Deploy a trained model: export it in every form, prove that each predicts the same, time them.

    python export.py --checkpoint runs/.../seed0.pt            into the folder runs/.../seed0/
    python export.py bench --checkpoint runs/.../seed0.pt      time all forms, after the export
    python export.py predict --model FILE.onnx IMAGES...       predict.py, which needs no torch

The flags of the first are below; `python export.py bench -h` shows those of the other.

Every form takes uint8 RGB (grey for Fashion-MNIST) images (N, C, H, W), any N, H and W multiples
of the model's stride, and gives float32 logits. Normalisation is inside, BatchNorm is folded into
the convolutions. A classifier's ONNX files have a second output, `maps`, float32 (N, classes, h,
w): its class activation maps, whose sum over positions plus the classifier's bias are the logits
(in the 8-bit files to rounding). TorchScript and AOTInductor give the logits alone, as a tensor.
Each says the size that the model was trained at: predict.py, the C++ program and interpret.py
bring an image to it. Files, one each:

    model.ts.pt            TorchScript, for Python and C++
    model.pt2              AOTInductor, compiled for the machine that makes it, for Python and C++
    model.onnx             float32
    model.int8.onnx        8 bits, calibrated on training images; weights use 7, for every CPU
    model.int8-ort.onnx    the same numbers, arranged for ONNX Runtime's speed
    model.int8.ts.pt       8 bits in TorchScript, for Python and C++
    parity.json            how each compares with the trained model on the whole held-out split

A float32 form counts only if its logits, and maps, are within 1e-4 of the model's, an 8-bit form
if it loses at most half a point of MAP or accuracy. One that does not is named and not written, and
the exit code is 1; the others are.
"""

# ruff: noqa: E402 -- predict runs where torch is not installed, so that torch is imported below it

import os
import sys
from pathlib import Path

# predict.py needs no torch, and the benchmark, which lies beside the other one, imports it itself
ELSEWHERE = {"bench": "tests/bench_inference.py", "predict": "predict.py"}
if __name__ == "__main__" and sys.argv[1:] and sys.argv[1] in ELSEWHERE:
    source = Path(__file__).resolve().parent
    # without the filter an unset PYTHONPATH would mean the current folder
    path = filter(None, [str(source), os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.execv(sys.executable, [sys.executable, str(source / ELSEWHERE[sys.argv[1]]), *sys.argv[2:]])

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import onnxruntime
import torch
from torch import Tensor, nn

import data
import metrics
import models
from lab import batches, cli, devices, engine, forms, records
from lab.batches import Dataset
from lab.cli import flag
from lab.deployed import Deployed, WithMaps, fold_batchnorm
from lab.files import BadInput, refuse_overwriting
from lab.forms import FORMS, ParityError
from lab.provenance import environment

# deprecated; here they make one form of many
warnings.filterwarnings("ignore", "`torch.jit|torch.quantize_per_tensor")


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: str | None = flag(None, "seed<k>.pt of a finished run")
    out: str | None = flag(None, "folder of the models (default: the checkpoint without .pt)")
    calibration: int = flag(64, "training images that set the ranges of 8-bit activations")
    aot: bool = flag(True, "make the AOTInductor package, which needs a C++ compiler")
    int8: bool = flag(True, "make the 8-bit forms")
    device: str = flag("auto", "device of the AOTInductor package: auto, cpu, cuda, ...")
    data: str | None = flag(None, "the folder of your own that the run was trained on")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, ./data)")

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise BadInput("--checkpoint is missing: name the seed<k>.pt of a finished run")
        if self.calibration < 1:
            raise BadInput(f"--calibration {self.calibration}: must be at least 1")

    def asked(self, name: str) -> bool:
        """Whether this form is to be made."""
        if name == "TorchScript int8" and not importlib.util.find_spec("torch.ao.quantization"):
            return False  # on its way out of torch
        return (self.aot or name != "AOTInductor") and (self.int8 or not FORMS[name].lossy)


@dataclass(frozen=True)
class Maker:
    """Writes one network in any form.

    `deployed` on the CPU, its BatchNorm folded; images uint8 (N, C, H, W) of the training split,
    for calibration; `paths` a file for each form. The 8-bit ONNX forms are made of others' files.
    """
    deployed: Deployed
    images: Tensor
    about: dict[str, str]
    paths: dict[str, Path]
    device: torch.device

    def graph(self, device: str | torch.device, maps: bool = False) -> torch.export.ExportedProgram:
        deployed = copy.deepcopy(self.deployed).to(device)
        image, stride = self.images[:1].to(device), deployed.model.stride
        tiles = 1 if min(image.shape[2:]) > stride else 2  # one position would be taken for fixed
        return forms.capture(WithMaps(deployed) if maps else deployed,
                             image.repeat(2, 1, tiles, tiles), stride)

    def write(self, name: str, keep: list[str]) -> None:
        """The form's file; the layers in `keep` stay in float."""
        path, about = self.paths[name], self.about
        if name == "TorchScript":
            forms.write_torchscript(self.deployed, about, path)
        elif name == "ONNX":
            maps = hasattr(self.deployed.model, "activation_maps")
            forms.write_onnx(self.graph("cpu", maps), about, path)
        elif name == "AOTInductor":
            forms.write_aotinductor(self.graph(self.device), about, path)
        elif name == "ONNX int8":
            forms.quantise(self.paths["ONNX"], path, self.images, about, keep)
        elif name == "ONNX int8 for ONNX Runtime":
            forms.copy_upsampling(self.paths["ONNX int8"], path)
        else:
            deployed = copy.deepcopy(self.deployed)
            deployed.model = forms.to_int8(deployed.model, deployed.normalise(self.images), keep)
            forms.write_torchscript(deployed, about, path)

    def rank(self, name: str) -> Callable[[], list[str]] | None:
        """For a form that can have layers in float: what finds which need it most."""
        few = self.images[:4]
        return {"ONNX int8": lambda: forms.worst_layers(self.paths["ONNX"], few),
                "TorchScript int8": lambda: forms.worst_convolutions(
                    self.deployed.model, self.deployed.normalise(few))}.get(name)


# ---- parity ----

def compare(logits: Tensor, exact: Tensor, dataset: Dataset) -> dict:
    """How a form's logits compare with the model's, and what it scores on the held-out split."""
    score, keys = metrics.SCORES[dataset.task]
    scores = score(logits, dataset.test.targets, dataset.classes)
    return forms.compare(logits, exact, {key: scores[key] for key in keys})


def show(name: str, found: dict) -> None:
    keys = [key for key in ("accuracy", "map", "wgap") if key in found]
    scores = "  ".join(f"{key} {100 * found[key]:.2f}" for key in keys)
    print(f"{name:<27} {scores}  logits differ by at most {found['max_difference']:.1e}, "
          f"argmax agrees in {100 * found['argmax_agreement']:.3f} %")


@torch.inference_mode()
def maps_difference(path: Path, model: nn.Module, dataset: Dataset, batch: int) -> float:
    """How far a file's class activation maps are from the model's, at most, on the split."""
    form, worst = forms.open_form(path, output="maps"), 0.0
    for i, (images, _) in enumerate(batches.in_order(dataset, dataset.test, batch)):
        exact = model.activation_maps(model.features(images))
        found = form(dataset.test.images[i * batch:(i + 1) * batch])
        worst = max(worst, (found - exact).abs().max().item())
    return worst


def prove(cfg: Config, maker: Maker, model: nn.Module, dataset: Dataset, batch: int,
          ) -> tuple[dict[str, dict], dict[str, str]]:
    """Make and judge every form that was asked for: what passed, with its comparison, and why not.

    A form is judged against the model on the device on which the form runs. No failure takes
    another form with it.
    """
    cpu, split, exact = torch.device("cpu"), dataset.test, {}
    for device in {cpu, maker.device if cfg.aot else cpu}:
        there = dataset.to(device)
        exact[device] = engine.predict(copy.deepcopy(model).to(device), there, there.test, batch,
                                       torch.float32).cpu()
    passed = {"eager": compare(exact[cpu], exact[cpu], dataset)}
    failed = {}
    print(f"{dataset.name}, {len(split)} {dataset.held_out} images")
    show("eager", passed["eager"])

    def judge(name: str) -> dict:
        path, on = maker.paths[name], maker.device if FORMS[name].on_device else cpu
        form = forms.open_form(path)
        logits = forms.logits_of(lambda images: form(images.to(on)), split.images, batch)
        found = compare(logits, exact[on], dataset)
        if name == "ONNX" and hasattr(model, "activation_maps"):
            found["maps_max_difference"] = maps_difference(path, model, dataset, batch)
        show(name, found)
        forms.gate(name, found, passed["eager"], metrics.SCORES[dataset.task][1][0])
        return {"file": path.name, "bytes": path.stat().st_size, **found}

    for name in filter(cfg.asked, FORMS):
        try:
            passed[name] = forms.proven(lambda keep: maker.write(name, keep), lambda: judge(name),
                                        maker.rank(name), lambda said: print(f"{name}: {said}"))
        except ParityError as error:
            failed[name] = str(error)
        except Exception as error:  # exporters and compilers raise their own
            failed[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return passed, failed


def main(argv: list[str] | None = None) -> None:
    cfg = cli.parse(Config, __doc__, argv)
    device = devices.pick_device(cfg.device)
    if cfg.aot:
        forms.check_compiler(device)
    model, record = engine.load_trained(Path(cfg.checkpoint), torch.device("cpu"), models.build)
    dataset = data.load_recorded(record, cfg.data_root, cfg.data)
    out = Path(cfg.out or Path(cfg.checkpoint).with_suffix(""))
    refuse_overwriting([out / form.file for form in FORMS.values()], [cfg.checkpoint], "--out")
    out.mkdir(parents=True, exist_ok=True)
    chosen = torch.linspace(0, len(dataset.train) - 1, min(cfg.calibration, len(dataset.train)))
    deployed = Deployed(fold_batchnorm(model), dataset.mean, dataset.std)
    about = forms.describe(model, record)
    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        paths = {name: Path(folder, form.file) for name, form in FORMS.items()}
        maker = Maker(deployed, dataset.train.images[chosen.long()], about, paths, device)
        passed, failed = prove(cfg, maker, model, dataset, record["config"]["batch"])
        written = [name for name in FORMS if name in passed]
        for name in written:
            os.replace(paths[name], out / FORMS[name].file)
    for name in FORMS:
        if name not in written and (out / FORMS[name].file).exists():
            print(f"{out / FORMS[name].file} was left as it is, from an earlier export")
    if written:
        report = {"checkpoint": Path(cfg.checkpoint).name, **about, "split": dataset.held_out,
                  "images": len(dataset.test), "size": dataset.test.images.shape[-1],
                  "environment": environment(device, torch.float32),
                  "onnxruntime": onnxruntime.__version__,
                  "forms": passed, "failed": failed}
        records.write(out / "parity.json", report)
        print(f"models {out}/")
    if failed:
        reasons = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise ParityError(f"{reasons}; exported: {', '.join(written) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
