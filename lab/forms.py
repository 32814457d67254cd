"""Exported forms of a network: written, made of 8 bits, opened, compared.

A form takes uint8 images (N, C, H, W) and gives float32 logits; an .onnx may give `maps` as well,
a second output of the module that was captured. What a file says of itself is
plain text. Nothing here knows which network it is, nor what its classes are.
"""

import copy
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper
from onnxruntime import quantization
from onnxscript import rewriter
from onnxscript.rewriter import pattern
from torch import Tensor, nn

from lab import records
from lab.files import BadInput
from lab.progress import progress

INPUT, OUTPUTS = "images", ("logits", "maps")
FLOAT_TOLERANCE = 1e-4  # of logits, between float32 forms: they only sum in another order
LOSS = 0.005  # of the metric, in lossy forms


@dataclass(frozen=True)
class Form:
    """A kind of exported file, and what it must keep of the network."""
    file: str
    lossy: bool = False  # 8 bits: it must keep the metric, the others each logit
    on_device: bool = False  # made for one device; the others are run, and judged, on the CPU


FORMS = {"TorchScript": Form("model.ts.pt"),
         "ONNX": Form("model.onnx"),
         "AOTInductor": Form("model.pt2", on_device=True),
         "ONNX int8": Form("model.int8.onnx", lossy=True),
         "ONNX int8 for ONNX Runtime": Form("model.int8-ort.onnx", lossy=True),
         "TorchScript int8": Form("model.int8.ts.pt", lossy=True)}


class ParityError(FloatingPointError):
    """A form predicts something else than the network, or cannot be made (exit code 1)."""


# ---- writing ----

def describe(model: nn.Module, record: dict) -> dict[str, str]:
    """What every form says of a run's network: plain text that a split at commas reads."""
    about = record["about_data"]
    palette = about["palette"] or ()
    content = records.encoded(record)
    join = lambda values: ",".join(map(str, values))
    return {"input": INPUT, "classes": join(about["classes"]),
            "palette": join(bytes(colour).hex() for colour in palette),
            "stride": str(model.stride), "size": str(about["size"]), "mean": join(about["mean"]),
            "std": join(about["std"]), "data": about["name"],
            "record_sha256": hashlib.sha256(content).hexdigest(),
            "weights_sha256": record["weights_sha256"]}


def write_torchscript(module: nn.Module, about: dict[str, str], path: Path) -> None:
    torch.jit.save(torch.jit.freeze(torch.jit.script(module)), str(path), _extra_files=dict(about))


def capture(module: nn.Module, images: Tensor, stride: int) -> torch.export.ExportedProgram:
    """The graph of any batch and any height and width that are multiples of the stride.

    images (2, C, H, W), contiguous: at batch 1 the batch would be fixed, and the layout always is.
    """
    batch = torch.export.Dim("batch")
    height, width = (stride * torch.export.Dim(name, max=65536 // stride)
                     for name in ("rows", "columns"))
    shape = {0: batch, 2: height, 3: width}
    return torch.export.export(module, (images,), dynamic_shapes=(shape,))


def write_aotinductor(program: torch.export.ExportedProgram, about: dict[str, str],
                      path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": about})


def write_onnx(program: torch.export.ExportedProgram, about: dict[str, str], path: Path) -> None:
    names = list(OUTPUTS[:len(program.graph_signature.user_outputs)])
    model = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=names,
                              opset_version=20, verbose=False).model_proto
    for value in (*model.graph.input, *model.graph.output):  # the exporter's names say nothing
        of = "map_" if value.name == "maps" else ""
        dims = ("batch", "", f"{of}height", f"{of}width")
        for dim, name in zip(value.type.tensor_type.shape.dim, dims):
            if dim.dim_param:
                dim.dim_param = name
    for node in model.graph.node:  # stack traces, which name files of this machine
        del node.metadata_props[:]
    del model.graph.value_info[:]
    save_onnx(model, about, path)


def save_onnx(model: onnx.ModelProto, about: dict[str, str], path: Path) -> None:
    helper.set_model_props(model, about)
    onnx.checker.check_model(model)
    onnx.save(model, path)


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
                       f"{home} ({reason}); set CUDA_HOME to a CUDA toolkit, or to the nvidia/cu13 "
                       f"folder beside torch's own, which has the headers; or --no-aot")


# ---- 8 bits in ONNX ----

class Calibration(quantization.CalibrationDataReader):
    """Images uint8 (N, C, H, W), one at a time."""

    def __init__(self, images: Tensor):
        self.images = progress(images, "calibration", unit="images")

    def get_next(self) -> dict | None:
        return next(({INPUT: image.numpy()[None]} for image in self.images), None)


def layers_of(path: Path) -> tuple[list[str], list[str]]:
    """Names of the nodes that always stay in float, and of the layers that are quantised.

    In float stay the normalisation before the first convolution, and a classifier's last layer,
    which takes no time and whose output would be clipped to the range seen in calibration; so
    does what `maps` alone need.
    """
    graph = onnx.load(path).graph
    nodes, needed = graph.node, {OUTPUTS[0]}
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
    first = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
    kept = [node.name for i, node in enumerate(nodes)
            if i < first or node.op_type == "Gemm" or not needed & set(node.output)]
    return kept, [node.name for node in nodes
                  if node.op_type in ("Conv", "MatMul") and node.name not in kept]


def seven_bits(path: Path) -> dict[str, list[dict]]:
    """The range of each output channel of each weight, a 63rd wider than it is.

    Where a CPU lacks VNNI, kernels add two products of a weight and an activation in 16 bits:
    2 * 255 * 64 fits, 2 * 255 * 127 saturates. ONNX Runtime's own reduced range ends at 64, a
    7-bit number at 63.
    """
    graph, ranges = onnx.load(path).graph, {}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    axes = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "LayerNormalization": 0}
    for node in graph.node:
        if node.op_type in axes and node.input[1] in weights:
            axis = axes[node.op_type]
            values = np.moveaxis(onnx.numpy_helper.to_array(weights[node.input[1]]), axis, 0)
            most = abs(values).reshape(len(values), -1).max(1) * np.float32(64 / 63)
            ranges[node.input[1]] = [{"axis": axis, "rmin": -top, "rmax": top} for top in most]
    return ranges


def quantise(source: Path, target: Path, images: Tensor, about: dict[str, str], keep: list[str],
             only: list[str] | None = None) -> None:
    """Static 8-bit QDQ form of an ONNX file, calibrated on images uint8 (N, C, H, W).

    Activations are unsigned and per tensor; weights are signed, per channel and of 7 bits, in
    [-63, 63] (see `seven_bits`), so that every CPU computes the same. Adds, pools and upsamplings
    are quantised with the convolutions, so that the whole chain stays in 8 bits. Ranges are the
    extremes over the calibration images. `keep` names nodes that stay in float; with `only` no
    others than these are quantised.
    """
    logging.disable(logging.WARNING)  # it advises to fold and to infer shapes; the export did
    try:
        quantization.quantize_static(
            str(source), str(target), Calibration(images), per_channel=True, reduce_range=True,
            quant_format=quantization.QuantFormat.QDQ,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax, nodes_to_quantize=only,
            nodes_to_exclude=[*layers_of(source)[0], *keep],
            extra_options={"TensorQuantOverrides": seven_bits(source)})
    finally:
        logging.disable(logging.NOTSET)
    save_onnx(onnx.load(target), about, target)


def worst_layers(source: Path, images: Tensor) -> list[str]:
    """Layers of an ONNX file by how far the logits move when that one alone is quantised."""
    moved, exact = {}, open_form(source)(images)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "one.onnx")
        for layer in progress(layers_of(source)[1], "which layers 8 bits spoil", unit="layers"):
            quantise(source, target, images, {}, [], only=[layer])
            moved[layer] = (open_form(target)(images) - exact).abs().mean().item()
    return sorted(moved, key=moved.get, reverse=True)


def copy_upsampling(source: Path, target: Path) -> None:
    """Rewrite 8-bit nearest upsamplings as copies of whole pixels: the same bits, 7 times as fast.

    ONNX Runtime computes Resize element by element, on one thread. In its own NHWC layout a
    pixel's channels lie together, so that doubling rows and columns is a broadcast of blocks, and
    the transposes written here cancel against those that it puts around its convolutions.
    """
    def resize(op, x, scale, zero):
        same = op.Resize(op.DequantizeLinear(x, scale, zero), _allow_other_inputs=True)
        return op.QuantizeLinear(same, scale, zero)

    def copies(op, x, **_):
        constant = lambda values: op.Constant(value_ints=values)
        nhwc = op.Transpose(x, perm=[0, 2, 3, 1])
        copied = op.Expand(op.Unsqueeze(nhwc, constant([2, 4])), constant([1, 1, 2, 1, 2, 1]))
        shape = op.Mul(op.Shape(nhwc), constant([1, 2, 2, 1]))
        return op.Transpose(op.Reshape(copied, shape), perm=[0, 3, 1, 2])

    onnx.save(rewriter.rewrite(onnx.load(source), [pattern.RewriteRule(resize, copies)]), target)


# ---- 8 bits in TorchScript ----

def convolutions(model: nn.Module) -> list[str]:
    """Names of the convolutions of a folded model, in the order of execution."""
    kinds = dict(model.named_modules())
    return [node.target for node in torch.fx.symbolic_trace(model).graph.nodes
            if node.op == "call_module" and isinstance(kinds[node.target], nn.Conv2d)]


def to_int8(model: nn.Module, images: Tensor, in_float: list[str]) -> nn.Module:
    """A copy of a folded model whose convolutions, sums and poolings run in 8 bits, in oneDNN.

    images float32 (N, C, H, W), normalised, set the ranges of the activations, which are unsigned
    and per tensor; weights are signed, per channel and of 7 bits, in [-63, 63], as in
    `seven_bits`. Linear layers, transposed convolutions and the convolutions named `in_float` stay
    in float32.
    """
    # imported here, as it is on its way out of torch
    from torch.ao import quantization as ao
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    weights = ao.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-63, quant_max=63)
    eight_bits = ao.QConfig(ao.MinMaxObserver.with_args(dtype=torch.quint8), weights)
    mapping = ao.QConfigMapping().set_global(eight_bits)
    for kind in (nn.Linear, nn.ConvTranspose2d):
        mapping.set_object_type(kind, None)
    for name in in_float:
        mapping.set_module_name(name, None)
    observed = prepare_fx(copy.deepcopy(model), mapping, (images[:1],))
    with torch.inference_mode():
        for image in images:
            observed(image[None])
    return convert_fx(observed)


@torch.inference_mode()
def worst_convolutions(model: nn.Module, images: Tensor) -> list[str]:
    """A folded model's convolutions by how far logits move when that one alone has 8 bits.

    images as in `to_int8`. Sums and poolings have 8 bits each time, a share that all have.
    """
    names, exact, moved = convolutions(model), model(images), {}
    for name in progress(names, "which layers 8 bits spoil", unit="layers"):
        alone = to_int8(model, images, [other for other in names if other != name])
        moved[name] = (alone(images) - exact).abs().mean().item()
    return sorted(moved, key=moved.get, reverse=True)


# ---- opening and comparing ----

def open_form(path: Path, threads: int = 0, providers: tuple[str, ...] = ("CPUExecutionProvider",),
              output: str = OUTPUTS[0]) -> Callable[[Tensor], Tensor]:
    """An exported file as a function of uint8 images (N, C, H, W) -> float32 logits.

    An .onnx runs with `providers` on `threads` threads, 0 for as many as torch takes, and gives
    the `output` of that name.
    """
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        return lambda images: torch.from_numpy(
            session.run([output], {INPUT: images.cpu().numpy()})[0])
    if path.suffix == ".pt2":
        package = torch._inductor.aoti_load_package(str(path))
        # compiled for one layout, NCHW, and reads any other as if it were that, without an error
        return lambda images: package(images.contiguous())
    return torch.jit.load(str(path), map_location="cpu")


@torch.inference_mode()
def logits_of(form: Callable[[Tensor], Tensor], images: Tensor, batch: int) -> Tensor:
    """float32 (N, ...) on the CPU, of images uint8 (N, C, H, W) on the form's device."""
    return torch.cat([form(part).cpu() for part in progress(images.split(batch), "evaluation")])


def compare(logits: Tensor, exact: Tensor, scores: dict[str, float]) -> dict:
    """How a form's logits differ from the network's, both (N, classes, ...), and its `scores`."""
    difference, same = (logits - exact).abs(), logits.argmax(1) == exact.argmax(1)
    return {"max_difference": difference.max().item(), "mean_difference": difference.mean().item(),
            "argmax_agreement": same.double().mean().item(), **scores}


def gate(name: str, found: dict, exact: dict, metric: str) -> None:
    """Refuse a form that predicts something else than the network: ParityError says how much."""
    loss = exact[metric] - found[metric]
    if FORMS[name].lossy and not loss <= LOSS:
        raise ParityError(f"loses {100 * loss:.2f} points of {metric}, allowed {100 * LOSS:g}")
    for what, key in (("logits", "max_difference"), ("maps", "maps_max_difference")):
        if not FORMS[name].lossy and not found.get(key, 0.0) <= FLOAT_TOLERANCE:
            raise ParityError(f"{what} differ by up to {found[key]:.2g}, "
                              f"allowed {FLOAT_TOLERANCE:g}")


def proven(make: Callable[[list[str]], None], judge: Callable[[], dict],
           rank: Callable[[], list[str]] | None, say: Callable[[str], None]) -> dict:
    """What `judge` finds of a form that `make` wrote. ParityError, or what kept it from being so.

    With `rank`, where 8 bits everywhere fail, layers go back to float: the first of the ranking,
    then twice as many at each try. With half of them in float it is no 8-bit form any more, and
    the last ParityError stands. `make` gets the names of the layers that stay in float.
    """
    keep, order = [], []
    while True:
        make(keep)
        try:
            return {**judge(), **({} if rank is None else {"layers_in_float": keep})}
        except ParityError as error:
            if rank is None:
                raise
            order = order or rank()
            if 4 * len(keep) > len(order):
                raise
            keep = order[:max(1, 2 * len(keep))]
            say(f"{error}; tries again with {len(keep)} of {len(order)} layers in float")
