"""Deploy a trained model: export it in every form, prove that each predicts the same, time them, use them.

    python export.py --checkpoint runs/.../seed0.pt                 into the folder runs/.../seed0/
    python export.py bench --checkpoint runs/.../seed0.pt           time all forms side by side, after the export
    python export.py predict --model FILE.onnx IMAGES...            needs onnxruntime, NumPy and Pillow, no torch

Every form takes uint8 RGB (grey for Fashion-MNIST) images (N, C, H, W), any N, H and W multiples of the model's stride,
and gives float32 logits. Normalisation is inside, BatchNorm is folded into the convolutions. Files, one each:

    model.ts.pt            TorchScript, for Python and C++
    model.pt2              AOTInductor, compiled for the machine that makes it, for Python and C++
    model.onnx             float32
    model.int8.onnx        8 bits, calibrated on training images; weights use 7, so that every CPU computes the same
    model.int8-ort.onnx    the same numbers, arranged for ONNX Runtime's speed
    model.int8.ts.pt       8 bits in TorchScript, for Python and C++
    parity.json            how each compares with the trained model on the whole held-out split

An export counts only if the float32 forms' logits are within 1e-4 of the model's, and the 8-bit forms lose at most half
a point of MAP or accuracy; else no file is left, and the exit code is 1.
"""

# ruff: noqa: E402 -- predict must run where torch is not installed, so that torch is imported below it

import argparse
import os
import sys
from pathlib import Path

import numpy as np


def predict(argv: list[str]) -> None:
    """Classes of images, printed, or their masks: PNGs with the classes' palette, whose pixel value is the class."""
    import onnxruntime
    from PIL import Image

    def fail(message: str) -> None:
        raise ValueError(message)

    parser = argparse.ArgumentParser(prog="export.py predict", description=predict.__doc__, allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--model", required=True, help="an .onnx file that export.py made")
    parser.add_argument("--out", default="predictions", help="folder of the masks (predictions)")
    parser.add_argument("images", nargs="+", help="image files of any size")
    args = parser.parse_args(argv)
    onnxruntime.set_default_logger_severity(4)  # its errors arrive as exceptions
    try:
        session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        classes, stride, channels = about["classes"].split(","), int(about["stride"]), len(about["mean"].split(","))
        if not (1 <= stride <= 64 and channels in (1, 3) and about["classes"].isprintable()):
            raise ValueError("its description is damaged")
        palette, entry = bytes.fromhex(about["palette"].replace(",", "")), about["input"]
    except Exception as error:  # onnxruntime raises its own kinds for a missing or damaged file
        raise ValueError(f"{args.model} is no model that export.py made ({str(error).splitlines()[0]})") from error
    targets = {}
    for path in args.images:
        target = Path(args.out, f"{Path(path).stem}.png")
        if target in targets:
            raise ValueError(f"{path} and {targets[target]} would both write {target}; predict them into two --out")
        targets[target] = path
    for target, path in targets.items():
        try:
            image = Image.open(path, formats=("PNG", "JPEG", "PPM", "BMP", "GIF", "TIFF", "WEBP"))
            if image.width * image.height > 1 << 26:  # the limits of data.py, which needs torch
                raise OSError(f"{image.width}x{image.height} pixels")
            image = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error})") from error
        height, width = image.shape[:2]
        # the network halves the image: repeat its edge up to the next size that it can
        image = np.pad(image.reshape(height, width, channels), ((0, -height % stride), (0, -width % stride), (0, 0)),
                       mode="edge")
        logits = session.run(None, {entry: image.transpose(2, 0, 1)[None]})[0][0]
        if palette:
            mask = Image.fromarray(logits.argmax(0).astype(np.uint8)[:height, :width])
            mask.putpalette(palette)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_suffix(".tmp").unlink(missing_ok=True)  # a link that someone put there would be followed
            mask.save(target.with_suffix(".tmp"), format="PNG")
            os.replace(target.with_suffix(".tmp"), target)
            print(f"{path} -> {target}")
        else:
            odds = np.exp(logits - logits.max())
            print(f"{path}: {classes[odds.argmax()]} {100 * odds.max() / odds.sum():.1f} %")


if __name__ == "__main__" and sys.argv[1:2] == ["predict"]:
    try:
        predict(sys.argv[2:])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
# the benchmark lies beside the other one; this form of its command saves importing torch twice
if __name__ == "__main__" and sys.argv[1:2] == ["bench"]:
    source = Path(__file__).resolve().parent
    # without the filter an unset PYTHONPATH would mean the current folder
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))
    os.execv(sys.executable, [sys.executable, str(source / "tests/bench_inference.py"), *sys.argv[2:]])

import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import onnx
import onnxruntime
import torch
from onnx import helper
from onnxruntime import quantization
from onnxscript import rewriter
from onnxscript.rewriter import pattern
from torch import Tensor, nn

import data
import engine
import metrics
import models
from data import BadInput
from engine import flag

warnings.filterwarnings("ignore", "`torch.jit|torch.quantize_per_tensor")  # deprecated; here they make one form of many
INPUT = "images"
FILES = {"TorchScript": "model.ts.pt", "AOTInductor": "model.pt2", "ONNX": "model.onnx", "ONNX int8": "model.int8.onnx",
         "ONNX int8 for ONNX Runtime": "model.int8-ort.onnx", "TorchScript int8": "model.int8.ts.pt"}
FLOAT_TOLERANCE = 1e-4  # of logits, between float32 forms: they only sum in another order
INT8_LOSS = 0.005  # of MAP or accuracy


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: str | None = flag(None, "seed<k>.pt of a finished run")
    out: str | None = flag(None, "folder of the models (default: the checkpoint's name without .pt)")
    calibration: int = flag(64, "training images that set the ranges of 8-bit activations")
    aot: bool = flag(True, "make the AOTInductor package, which needs a C++ compiler")
    device: str = flag("auto", "device of the AOTInductor package: auto, cpu, cuda, ...")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, else ./data)")

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise BadInput("--checkpoint is missing: name the seed<k>.pt of a finished run")
        if self.calibration < 1:
            raise BadInput(f"--calibration {self.calibration}: must be at least 1")


class ParityError(FloatingPointError):
    """An exported form predicts something else than the trained model (exit code 1)."""


# ---- the forms ----

def describe(model: nn.Module, record: dict) -> dict[str, str]:
    """What every form carries: plain text that needs no parser but a split at commas."""
    about = record["about_data"]
    palette = [bytes(colour).hex() for colour in data.FACADE_PALETTE] if "arch" in record["config"] else []
    join = lambda values: ",".join(map(str, values))
    return {"input": INPUT, "classes": join(about["classes"]), "palette": join(palette), "stride": str(model.stride),
            "mean": join(about["mean"]), "std": join(about["std"]), "data": about["name"],
            "record_sha256": hashlib.sha256((json.dumps(record, indent=1) + "\n").encode()).hexdigest(),
            "weights_sha256": record["weights_sha256"]}


def write_torchscript(deployed: models.Deployed, about: dict[str, str], path: Path) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(deployed)), str(path), _extra_files=dict(about))


def capture(deployed: models.Deployed, images: Tensor) -> torch.export.ExportedProgram:
    """The graph of any batch and any height and width that are multiples of the stride.

    images (2, C, H, W), contiguous: at batch 1 the batch would be fixed, and the layout always is.
    """
    batch, stride = torch.export.Dim("batch"), deployed.model.stride
    height, width = (stride * torch.export.Dim(name, max=65536 // stride) for name in ("rows", "columns"))
    return torch.export.export(deployed, (images,), dynamic_shapes=({0: batch, 2: height, 3: width},))


def write_onnx(program: torch.export.ExportedProgram, about: dict[str, str], path: Path) -> None:
    model = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=["logits"], opset_version=20,
                              verbose=False).model_proto
    for value in (*model.graph.input, *model.graph.output):  # the exporter's own names are of no use to a reader
        for dim, name in zip(value.type.tensor_type.shape.dim, ("batch", "", "height", "width")):
            if dim.dim_param:
                dim.dim_param = name
    del model.graph.value_info[:]
    save_onnx(model, about, path)


def save_onnx(model: onnx.ModelProto, about: dict[str, str], path: Path) -> None:
    helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    onnx.save(model, path)


class Calibration(quantization.CalibrationDataReader):
    """Images uint8 (N, C, H, W), one at a time."""

    def __init__(self, images: Tensor):
        self.feeds = iter([{INPUT: image.numpy()[None]} for image in images])

    def get_next(self) -> dict | None:
        return next(self.feeds, None)


def layers_of(path: Path) -> tuple[list[str], list[str]]:
    """Names of the nodes that always stay in float, and of the layers that are quantised, in order.

    In float stay the normalisation before the first convolution, and a classifier's last layer, which
    takes no time and whose output would be clipped to the range seen in calibration.
    """
    nodes = onnx.load(path).graph.node
    first = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    return ([node.name for i, node in enumerate(nodes) if i < first or node.op_type == "Gemm"],
            [node.name for node in nodes if node.op_type in ("Conv", "MatMul")])


def seven_bits(path: Path) -> dict[str, list[dict]]:
    """The range of each output channel of each weight, a 63rd wider than it is, for `quantize_static`.

    Where a CPU lacks VNNI, kernels add two products of a weight and an activation in 16 bits:
    2 * 255 * 64 fits, 2 * 255 * 127 saturates. ONNX Runtime's own reduced range ends at 64, a 7-bit
    number at 63.
    """
    graph, ranges = onnx.load(path).graph, {}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "LayerNormalization": 0}.get(node.op_type)
        if axis is not None and node.input[1] in weights:
            values = np.moveaxis(onnx.numpy_helper.to_array(weights[node.input[1]]), axis, 0)
            most = abs(values).reshape(len(values), -1).max(1) * np.float32(64 / 63)
            ranges[node.input[1]] = [{"axis": axis, "rmin": -value, "rmax": value} for value in most]
    return ranges


def quantise(source: Path, target: Path, images: Tensor, about: dict[str, str], keep: list[str],
             only: list[str] | None = None) -> None:
    """Static 8-bit QDQ form of an ONNX file: weights signed per channel, activations unsigned per tensor.

    Weights have 7 bits, in [-63, 63] (see `seven_bits`), so that every CPU computes the same.

    Adds, pools and upsamplings are quantised with the convolutions, so that the whole chain stays in
    8 bits. Ranges are the extremes over the calibration images. `keep` names nodes that stay in float;
    with `only` no others than these are quantised.
    """
    logging.disable(logging.WARNING)  # it advises to fold and to infer shapes first, which the export did
    quantization.quantize_static(
        str(source), str(target), Calibration(images), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        reduce_range=True, extra_options={"TensorQuantOverrides": seven_bits(source)},
        weight_type=quantization.QuantType.QInt8, activation_type=quantization.QuantType.QUInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax, nodes_to_quantize=only,
        nodes_to_exclude=[*layers_of(source)[0], *keep])
    logging.disable(logging.NOTSET)
    save_onnx(onnx.load(target), about, target)


def worst_layers(source: Path, images: Tensor) -> list[str]:
    """Layers by how far the logits of a few images move when that layer alone is quantised, worst first."""
    moved, exact = {}, open_form(source)(images)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "one.onnx")
        for layer in layers_of(source)[1]:
            quantise(source, target, images, {}, [], only=[layer])
            moved[layer] = (open_form(target)(images) - exact).abs().mean().item()
    return sorted(moved, key=moved.get, reverse=True)


def copy_upsampling(source: Path, target: Path) -> None:
    """Rewrite 8-bit nearest upsamplings as copies of whole pixels: the same bits, in a seventh of the time.

    ONNX Runtime computes Resize element by element, on one thread. In its own NHWC layout a pixel's
    channels lie together, so that doubling rows and columns is a broadcast of blocks, and the
    transposes written here cancel against those that it puts around its convolutions.
    """
    def resize(op, x, scale, zero):
        same = op.Resize(op.DequantizeLinear(x, scale, zero), _allow_other_inputs=True)
        return op.QuantizeLinear(same, scale, zero)

    def copies(op, x, **_):
        constant = lambda values: op.Constant(value_ints=values)
        nhwc = op.Transpose(x, perm=[0, 2, 3, 1])
        copied = op.Expand(op.Unsqueeze(nhwc, constant([2, 4])), constant([1, 1, 2, 1, 2, 1]))
        return op.Transpose(op.Reshape(copied, op.Mul(op.Shape(nhwc), constant([1, 2, 2, 1]))), perm=[0, 3, 1, 2])

    onnx.save(rewriter.rewrite(onnx.load(source), [pattern.RewriteRule(resize, copies)]), target)


def open_form(path: Path, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """An exported file as a function of uint8 images (N, C, H, W) on the CPU -> float32 logits."""
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
        return lambda images: torch.from_numpy(session.run(None, {INPUT: images.cpu().numpy()})[0])
    if path.suffix == ".pt2":
        package = torch._inductor.aoti_load_package(str(path))
        # compiled for one layout, NCHW, and reads any other as if it were that, without an error
        return lambda images: package(images.contiguous())
    return torch.jit.load(str(path))


# ---- parity ----

@torch.inference_mode()
def logits_of(form: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    return torch.cat([form(part).cpu() for part in images.split(batch)])


def compare(logits: Tensor, exact: Tensor, targets: Tensor, names: tuple[str, ...]) -> dict:
    """How one form's logits compare with the model's, and the metrics that they reach on the split."""
    scores = (metrics.segmentation if exact.ndim == 4 else metrics.classification)(logits, targets, names)
    difference = (logits - exact).abs()
    return {"max_difference": difference.max().item(), "mean_difference": difference.mean().item(),
            "argmax_agreement": (logits.argmax(1) == exact.argmax(1)).double().mean().item(),
            **{key: scores[key] for key in ("accuracy", "map", "wgap", "miou") if key in scores}}


def gate(name: str, found: dict, exact: dict) -> None:
    """Refuse a form that predicts something else than the model: ParityError says by how much."""
    key = "map" if "map" in exact else "accuracy"
    loss = exact[key] - found[key]
    if "int8" not in name and not found["max_difference"] <= FLOAT_TOLERANCE:
        raise ParityError(f"{name}: logits differ by up to {found['max_difference']:.2g}, allowed {FLOAT_TOLERANCE:g}; "
                          f"nothing was exported")
    if "int8" in name and not loss <= INT8_LOSS:
        raise ParityError(f"{name}: loses {100 * loss:.2f} points of {key}, allowed {100 * INT8_LOSS:g}; nothing was "
                          f"exported")


def write_int8(source: Path, target: Path, images: Tensor, about: dict[str, str],
               judge: Callable[[str, Path], dict]) -> tuple[dict, list[str]]:
    """The 8-bit form that passes the gate: its comparison, and the layers that had to stay in float.

    Where plain quantisation fails, layers go back to float, the worst first and twice as many at each
    try; with half of them in float it is no 8-bit form any more, and the last ParityError stands.
    """
    keep, worst = [], []
    while True:
        quantise(source, target, images, about, keep)
        try:
            return judge("ONNX int8", target), keep
        except ParityError as error:
            worst = worst or worst_layers(source, images[:4])
            if 4 * len(keep) > len(worst):
                raise
            keep = worst[:max(1, 2 * len(keep))]
            print(f"{error}; tries again with {len(keep)} of {len(worst)} layers in float")


def instructions() -> list[str]:
    """The instruction sets that the CPU forms were proven on: torch's own choice, then those that 8 bits depend on."""
    known = {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve"}
    try:
        found = known.intersection(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        found = set()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return [torch.backends.cpu.get_cpu_capability(), *sorted(found), *[f"ONEDNN_MAX_CPU_ISA={limit}"] * bool(limit)]


def show(name: str, found: dict) -> None:
    scores = "  ".join(f"{key} {100 * found[key]:.2f}" for key in ("accuracy", "map", "wgap") if key in found)
    print(f"{name:<27} {scores}  logits differ by at most {found['max_difference']:.1e}, argmax agrees in "
          f"{100 * found['argmax_agreement']:.3f} %")


def check_compiler(device: torch.device) -> None:
    """Refuse, before any work, a device for which no AOTInductor package can be built here."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise BadInput("no C++ compiler (CXX, else g++), which the AOTInductor package needs; "
                       "install one, or --no-aot")
    if device.type != "cuda":
        return
    from torch.utils import cpp_extension  # imported here, as it looks for CUDA and says so
    home, places = cpp_extension.CUDA_HOME, []
    if home is not None:
        places = [*[f"-I{path}" for path in cpp_extension.include_paths("cuda")],
                  *[f"-L{path}{stubs}" for path in cpp_extension.library_paths("cuda")
                    for stubs in ("", "/stubs")]]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [compiler, "-x", "c++", "-", "-o", f"{folder}/program", *places, "-lcuda"], text=True,
            capture_output=True, input="#include <cuda.h>\nint main() { return cuInit(0); }\n")
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines()
                       if "error" in line or "cannot find" in line), "the compiler failed")
        raise BadInput(f"the AOTInductor package needs cuda.h and libcuda.so, and CUDA_HOME is "
                       f"{home} ({reason}); set CUDA_HOME to a CUDA toolkit, or to the folder "
                       f"nvidia/cu13 beside torch's own, which has the headers; or --no-aot")


def main(argv: list[str] | None = None) -> None:
    cfg = engine.parse(Config, __doc__, argv)
    device = engine.pick_device(cfg.device)
    if cfg.aot:
        check_compiler(device)
    model, record = engine.load_trained(Path(cfg.checkpoint), device)
    dataset = data.load_recorded(record, data.find_root(cfg.data_root))
    split, names, batch = dataset.test, dataset.classes, record["config"]["batch"]
    about = describe(model, record)
    out = Path(cfg.out or Path(cfg.checkpoint).with_suffix(""))
    out.mkdir(parents=True, exist_ok=True)
    for name in (*FILES.values(), "parity.json"):  # what lies there is of this checkpoint, or nothing does
        (out / name).unlink(missing_ok=True)
    exact = engine.predict(model, dataset.to(device), split.map(lambda t: t.to(device)), batch, torch.float32).cpu()
    forms = {"eager": compare(exact, exact, split.targets, names)}
    show("eager", forms["eager"])

    def judge(name: str, path: Path) -> dict:
        form = open_form(path)
        on = device if path.suffix == ".pt2" else "cpu"
        found = compare(logits_of(lambda images: form(images.to(on)), split.images, batch), exact, split.targets, names)
        show(name, found)
        gate(name, found, forms["eager"])
        return {"file": path.name, "bytes": path.stat().st_size, **found}

    with tempfile.TemporaryDirectory(dir=out, prefix=".export-") as folder:
        paths = {form: Path(folder, name) for form, name in FILES.items()}
        deployed = models.Deployed(models.fold_batchnorm(model).cpu(), dataset.mean, dataset.std)
        write_torchscript(deployed, about, paths["TorchScript"])
        example = split.images[[0, 0]].contiguous()
        write_onnx(capture(deployed, example), about, paths["ONNX"])
        if cfg.aot:
            torch._inductor.aoti_compile_and_package(
                capture(deployed.to(device), example.to(device)), package_path=str(paths["AOTInductor"]),
                inductor_configs={"aot_inductor.metadata": about})
        for form in ("TorchScript", "ONNX", *["AOTInductor"] * cfg.aot):
            forms[form] = judge(form, paths[form])
        chosen = torch.linspace(0, len(dataset.train) - 1, min(cfg.calibration, len(dataset.train))).long()
        images = dataset.train.images[chosen]
        forms["ONNX int8"], in_float = write_int8(paths["ONNX"], paths["ONNX int8"], images, about, judge)
        copy_upsampling(paths["ONNX int8"], paths["ONNX int8 for ONNX Runtime"])
        forms["ONNX int8 for ONNX Runtime"] = judge("ONNX int8 for ONNX Runtime", paths["ONNX int8 for ONNX Runtime"])
        if importlib.util.find_spec("torch.ao.quantization"):  # on its way out of torch
            convs = [node.name for node in onnx.load(paths["ONNX"]).graph.node if node.op_type == "Conv"]
            deployed.model = models.to_int8(deployed.cpu().model, deployed.normalise(images),
                                            [i for i, name in enumerate(convs) if name in in_float])
            write_torchscript(deployed, about, paths["TorchScript int8"])
            forms["TorchScript int8"] = judge("TorchScript int8", paths["TorchScript int8"])
        for form in forms.keys() - {"eager"}:
            os.replace(paths[form], out / FILES[form])
    report = {"checkpoint": Path(cfg.checkpoint).name, **about, "split": dataset.held_out, "images": len(split),
              "size": split.images.shape[-1], "layers_in_float": in_float,
              "environment": engine.environment(device, torch.float32), "onnxruntime": onnxruntime.__version__,
              "instructions": instructions(), "forms": forms}
    engine.write_atomic(out / "parity.json", (json.dumps(engine.jsonable(report), indent=1) + "\n").encode())
    print(f"models {out}/")


if __name__ == "__main__":
    sys.exit(engine.guard(main))
