"""Speed and memory of every exported form beside eager PyTorch and its peers.

    python export.py bench --checkpoint runs/.../seed0.pt    after the export of the same checkpoint

Each measurement is a process of its own that loads one form, and for each batch warms up and times
forward passes of random images. Rounds go over all forms in turn, so that a busy machine slows all
of them; ratios are taken within a round. "eager" is what a plain script gets: PyTorch's default
layout and allocator. The C++ program takes part where `make cpp/runner` built it, OpenVINO where it
is installed. Metrics are of the held-out split at the run's own image size.
"""

import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import data
import export
import models
from lab import cli, devices, engine, figures, files, forms, provenance, records
from lab.cli import flag
from lab.deployed import Deployed
from lab.files import BadInput

BASE = "eager"
BACKENDS = {  # name: how it runs, the exported form that it reads, the type that it computes in
    BASE: ("eager", None, "float32"),
    "eager, channels_last, freed memory kept": ("eager", None, "float32"),
    "eager bfloat16": ("eager", None, "bfloat16"),
    "torch.compile": ("compile", None, "float32"),
    "torch.compile bfloat16": ("compile", None, "bfloat16"),
    "TorchScript": ("file", "TorchScript", "float32"),
    "TorchScript int8": ("file", "TorchScript int8", "int8"),
    "AOTInductor": ("file", "AOTInductor", "float32"),
    "ONNX Runtime": ("file", "ONNX", "float32"),
    "ONNX Runtime int8": ("file", "ONNX int8", "int8"),
    "ONNX Runtime int8, upsampling as copies": ("file", "ONNX int8 for ONNX Runtime", "int8"),
    "C++ TorchScript": ("runner", "TorchScript", "float32"),
    "C++ TorchScript int8": ("runner", "TorchScript int8", "int8"),
    "C++ AOTInductor": ("runner", "AOTInductor", "float32"),
    "OpenVINO": ("openvino", "ONNX", "f32"),
    "OpenVINO bfloat16": ("openvino", "ONNX", "bf16"),
    "OpenVINO int8": ("openvino", "ONNX int8", "f32"),
}
BATCHES = (1, 8)


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint: str | None = flag(None, "seed<k>.pt of a finished run that was exported")
    models: str | None = flag(None, "folder of its models (default: the checkpoint, without .pt)")
    size: int = flag(256, "pixels a side of the timed images")
    rounds: int = flag(3, "how often each form is measured")
    seconds: float = flag(2.0, "time of one batch's passes, at least 3 of them")
    threads: int = flag(torch.get_num_threads(), "threads of every form")
    device: str = flag("auto", "auto, cpu, cuda, ...")
    data: str | None = flag(None, "the folder of your own that the run was trained on")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, else ./data)")
    record: str | None = flag(None, "file of the results, inference<...>.json (default: results/"
                                    "bench/inference-KERNELS.json, as in inference-avx2.json); "
                                    "the table and the figure are of all such beside it")
    only: str | None = flag(None, "time this form alone, in this process; print the times as JSON")

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise BadInput("--checkpoint is missing: name the seed<k>.pt of an exported run")
        for name in ("size", "rounds", "seconds", "threads"):
            if not getattr(self, name) > 0:
                raise BadInput(f"--{name} {getattr(self, name)}: must be above 0")
        if self.only is not None and self.only not in BACKENDS:
            raise BadInput(f"--only {self.only}: must be one of {', '.join(BACKENDS)}")

    def file(self, form: str) -> Path:
        return Path(self.models or Path(self.checkpoint).with_suffix(""), forms.FORMS[form].file)


def open_backend(cfg: Config, name: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A row of the table: a function of uint8 images (N, C, H, W) on its device -> float32."""
    how, form, precision = BACKENDS[name]
    if how == "file":
        return forms.open_form(cfg.file(form), cfg.threads, onnxruntime.get_available_providers())
    if how == "openvino":
        import openvino
        compiled = openvino.Core().compile_model(cfg.file(form), "CPU", {
            "INFERENCE_NUM_THREADS": cfg.threads, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision})
        request = compiled.create_infer_request()
        return lambda images: torch.from_numpy(request.infer({0: images.contiguous().numpy()})[0])
    model, record = engine.load_trained(Path(cfg.checkpoint), device, models.build)
    about = record["about_data"]
    deployed = Deployed(model, about["mean"], about["std"]).to(device)
    if name == BASE:
        model.to(memory_format=torch.contiguous_format)
        return lambda images: model(deployed.normalise(images).contiguous())
    dtype = getattr(torch, precision)
    forward = lambda images: engine.forward(model, deployed.normalise(images), dtype)
    return torch.compile(forward, dynamic=False) if how == "compile" else forward


def memory_mb(which: str) -> int:
    """"VmRSS", what this process holds in memory now, or "VmHWM", the most that it ever held."""
    # not getrusage, which counts what the parent process held when it started this one
    return int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0]) // 1024


@torch.inference_mode()
def measure(cfg: Config) -> dict[str, dict]:
    """For each batch, smallest first, seconds of each pass and the peak memory of model and passes
    until then (CUDA: that of the tensors)."""
    before = memory_mb("VmRSS")  # the libraries: this process imports all, a form needs one
    torch.set_num_threads(cfg.threads)
    device = devices.pick_device(cfg.device)
    if cfg.only != BASE and device.type == "cpu":
        devices.keep_freed_memory()
    channels = len(parity_of(cfg)["mean"].split(","))
    run = open_backend(cfg, cfg.only, device)
    how, form, _ = BACKENDS[cfg.only]
    onnx = how == "file" and cfg.file(form).suffix == ".onnx"
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = {}
    for batch in BATCHES:
        images = torch.from_numpy(np.random.default_rng(0).integers(
            0, 256, (batch, channels, cfg.size, cfg.size), dtype=np.uint8)).to(device)
        for _ in range(2):
            run(images)
        seconds = []
        while sum(seconds) < cfg.seconds or len(seconds) < 3:
            wait()
            start = time.perf_counter()
            run(images)
            wait()
            seconds.append(time.perf_counter() - start)
        memory = (torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else
                  memory_mb("VmHWM") - before)
        found[str(batch)] = {"peak_mb": memory, "seconds": seconds}
    if onnx:
        found["provider"] = providers_of(cfg.file(form), images[:1])
    return found


def providers_of(path: Path, images: Tensor) -> str:
    """What ONNX Runtime runs a file's nodes on, most nodes first, such as "CUDA, CPU".

    Read from a profile: where a provider does not start, or has no kernel for a node, the next one
    takes it without an error, and a session lists what it was given rather than what it uses.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(
            path, options, providers=onnxruntime.get_available_providers())
        session.run(None, {session.get_inputs()[0].name: images.cpu().numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    used = Counter(event["args"]["provider"] for event in events
                   if event.get("args", {}).get("provider"))
    return ", ".join(name.removesuffix("ExecutionProvider") for name, _ in used.most_common())


def parity_of(cfg: Config) -> dict:
    path = cfg.file("ONNX").with_name("parity.json")
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing: run python export.py --checkpoint {cfg.checkpoint} "
                       "first") from error


def measure_apart(cfg: Config, name: str) -> dict[str, dict]:
    how, form, _ = BACKENDS[name]
    if how == "runner":
        command = [provenance.SOURCE / "cpp/runner", cfg.file(form), "--bench", cfg.size,
                   cfg.seconds, cfg.threads, *BATCHES]
    else:
        command = [sys.executable, __file__, "--only", name]
        for key in ("checkpoint", "models", "size", "seconds", "threads", "device"):
            command += [f"--{key}", getattr(cfg, key)] if getattr(cfg, key) is not None else []
    path = os.pathsep.join(filter(None, [str(provenance.SOURCE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([*map(str, command)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(cfg.threads),
                               "PYTHONPATH": path})
    if done.returncode:
        last = (done.stderr.splitlines() or ["no message"])[-1]
        raise BadInput(f"{name} cannot be timed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def hindrance(cfg: Config, name: str, device: torch.device) -> str | None:
    """Why a row is left out here, or None."""
    how, form, precision = BACKENDS[name]
    if how == "runner" and not (provenance.SOURCE / "cpp/runner").exists():
        return "make cpp/runner first"
    if form and (form not in parity_of(cfg)["forms"] or not cfg.file(form).exists()):
        return "it was not exported"
    if how == "openvino" and not importlib.util.find_spec("openvino"):
        return "needs pip install openvino"
    if device.type == "cuda":
        onnx_there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        there = how in ("eager", "compile") or form == "AOTInductor" and how == "file" or (
            form == "ONNX" and onnx_there)
        return None if there else "it does not run on CUDA here"
    if precision in ("bfloat16", "bf16") and devices.pick_dtype("auto", device) != torch.bfloat16:
        return "this CPU only emulates bfloat16, in minutes where others take seconds"
    return None


def quality(cfg: Config, names: list[str], device: torch.device) -> dict[str, dict]:
    """Each row compared with the model: the export's word, or measured here where it has none."""
    known = parity_of(cfg)["forms"]
    model, record = engine.load_trained(Path(cfg.checkpoint), device, models.build)
    dataset = data.load_recorded(record, cfg.data_root, cfg.data)
    there, batch = dataset.to(device), record["config"]["batch"]
    exact = engine.predict(model, there, there.test, batch, torch.float32).cpu()
    found = {}
    for name in names:
        how, form, _ = BACKENDS[name]
        if how in ("file", "runner"):
            found[name] = known[form]
        else:
            logits = forms.logits_of(open_backend(cfg, name, device), there.test.images, batch)
            found[name] = export.compare(logits, exact, dataset)
    return found


def summarise(rounds: list[dict], names: list[str], found: dict[str, dict]) -> list[dict]:
    """One entry a form: rounds[i][name][batch] is one measurement's peak_mb and seconds."""
    rows = []
    for name in names:
        row = {"name": name, "quality": found[name]}
        row |= {key: value for key, value in rounds[0][name].items() if key == "provider"}
        for batch in map(str, BATCHES):
            seconds = np.concatenate([one[name][batch]["seconds"] for one in rounds])
            median = lambda one, name: statistics.median(one[name][batch]["seconds"])
            ratios = [median(one, BASE) / median(one, name) for one in rounds]
            row[f"batch{batch}"] = {
                "median_ms": 1000 * np.median(seconds), "p95_ms": 1000 * np.percentile(seconds, 95),
                "images_per_second": int(batch) / np.median(seconds), "passes": len(seconds),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios), "ratio_high": max(ratios),
                "peak_mb": max(one[name][batch]["peak_mb"] for one in rounds)}
        rows.append(row)
    return rows


def metric_of(record: dict) -> tuple[str, str]:
    """The metric's key and name."""
    return ("map", "MAP") if "map" in record["results"][0]["quality"] else ("accuracy", "accuracy")


def machine_of(record: dict) -> tuple[str, str]:
    """The device, and its instruction sets."""
    environment = record["environment"]
    return environment["device"], ", ".join(environment["instructions"])


def render(record: dict) -> str:
    """One machine's table, as Markdown."""
    key, label = metric_of(record)
    lines = [f"**{': '.join(machine_of(record))}**", "",
             "| form | median ms | p95 ms | times as fast as eager (rounds) | images/s "
             f"| images/s, batch 8 | peak MB | test {label} |",
             "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in record["results"]:
        one, many = row["batch1"], row["batch8"]
        name = f"{row['name']} ({row['provider']})" if "provider" in row else row["name"]
        lines.append(f"| {name} | {one['median_ms']:.1f} | {one['p95_ms']:.1f} | "
                     f"{one['ratio']:.2f} ({one['ratio_low']:.2f} to {one['ratio_high']:.2f}) | "
                     f"{one['images_per_second']:.1f} | {many['images_per_second']:.1f} | "
                     f"{one['peak_mb']} | {100 * row['quality'][key]:.2f} |")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines.append(f"\n{record['model']}, trained on {record['parity']['data']}, {record['size']} "
                 f"pixels a side, batch 1 unless said; {versions}. "
                 f"Median and range of {record['rounds']} rounds, each form in a process of its "
                 f"own; peak memory without the libraries themselves. "
                 f"{label} is that of the split at {record['parity']['size']} pixels, the run's "
                 "own size.")
    return "\n".join(lines) + "\n"


TYPES = {"float32": figures.BLUE, "bfloat16": figures.GREEN, "int8": figures.RED}


def type_of(name: str) -> str:
    """What a row of BACKENDS computes in."""
    if "int8" in name:
        return "int8"
    return {"f32": "float32", "bf16": "bfloat16"}.get(BACKENDS[name][2], BACKENDS[name][2])


def draw(machines: list[dict], path: Path) -> None:
    """How many times as fast as eager each form is, a panel a machine, and its metric, which many
    forms share, in figures; the form that is fastest where it is fastest on top."""
    best = {}
    for row in itertools.chain(*(record["results"] for record in machines)):
        best[row["name"]] = max(row["batch1"]["ratio"], best.get(row["name"], 0))
    order = sorted(best, key=best.get)
    figure, axes = figures.subplots(1, len(machines), figsize=(3.4 + 3.2 * len(machines),
                                                               1.8 + 0.27 * len(order)),
                                    sharex=True, sharey=True, squeeze=False)
    for ax, record in zip(axes[0], machines, strict=True):
        key, label = metric_of(record)
        for row in record["results"]:
            name, one, y = row["name"], row["batch1"], order.index(row["name"])
            colour = TYPES[type_of(name)]
            ax.plot([one["ratio_low"], one["ratio_high"]], [y, y], color=colour, lw=1.6)
            ax.plot(one["ratio"], y, "o", ms=7, color=colour, mew=1.6,
                    mfc="white" if name.startswith("OpenVINO") else colour)
            ax.text(1.02, y, f"{100 * row['quality'][key]:.2f}", va="center", color=colour,
                    transform=ax.get_yaxis_transform())
        ax.text(1.02, len(order) - 0.1, f"{label} (%)", transform=ax.get_yaxis_transform())
        device, sets = machine_of(record)
        ax.set_title("\n".join([device, *textwrap.wrap(sets, 34)]), fontsize="small")
        ax.set(xscale="log", xticks=(ticks := (1, 2, 4, 8, 16)), xticklabels=ticks,
               ylim=(-0.6, len(order) - 0.4), yticks=range(len(order)), yticklabels=order)
        ax.minorticks_off()
        ax.set_xlim(0.8, 1.2 * max(best.values()))
        ax.grid(axis="x", alpha=0.3)
    sizes = " or ".join(map(str, sorted({record["size"] for record in machines})))
    axes[0, len(machines) // 2].set_xlabel(f"times as fast as eager: median and range of rounds "
                                           f"(batch 1, {sizes} pixels a side)")
    dot = functools.partial(figures.Line2D, [], [], marker="o", ls="", ms=7, mew=1.6)
    figure.legend(handles=[dot(color=colour, label=name) for name, colour in TYPES.items()]
                  + [dot(color="0.3", mfc="none", label="OpenVINO, a peer")],
                  loc="outside lower center", ncols=4, frameon=False)
    figures.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    cfg = cli.parse(Config, __doc__, argv)
    if cfg.only is not None:
        print(json.dumps(measure(cfg)))
        return
    torch.set_num_threads(cfg.threads)
    device = devices.pick_device(cfg.device)
    parity = parity_of(cfg)
    hindrances = {name: hindrance(cfg, name, device) for name in BACKENDS}
    names = [name for name, reason in hindrances.items() if reason is None]
    for name, reason in hindrances.items():
        if reason is not None:
            print(f"{name} is left out: {reason}", file=sys.stderr)
    found = quality(cfg, names, device)  # before the long part: it may refuse
    rounds = []
    for i in range(cfg.rounds):
        rounds.append({})
        for name in names:
            rounds[i][name] = measure_apart(cfg, name)
            times = [1000 * statistics.median(rounds[i][name][str(batch)]["seconds"])
                     for batch in BATCHES]
            print(f"round {i + 1}/{cfg.rounds}: {name} {times[0]:.1f} ms, "
                  f"batch {BATCHES[1]} {times[1]:.1f} ms", flush=True)
    model, trained = engine.load_trained(Path(cfg.checkpoint), device, models.build)
    settings = ", ".join(f"{name}={value}" for name, value in
                         models.arguments_of(trained["config"]).items())
    model = f"{type(model).__name__}({settings})"
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    if any(name.startswith("OpenVINO") for name in names):
        versions["openvino"] = importlib.metadata.version("openvino")
    record = {"model": model, "size": cfg.size, "threads": cfg.threads, "rounds": cfg.rounds,
              "seconds": cfg.seconds, "environment": provenance.environment(device, torch.float32),
              "versions": versions, "parity": parity,
              "results": summarise(rounds, names, found)}
    path = Path(cfg.record or f"results/bench/inference-{devices.kernels(device)}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write(path, record)
    machines = sorted((json.loads(one.read_text()) for one in path.parent.glob("inference*.json")),
                      key=lambda record: len(record["environment"]["instructions"]))
    draw(machines, path.with_name("inference.png"))
    files.write_atomic(path.with_name("inference.md"),
                       "\n".join(map(render, machines)).encode())
    print(render(record))


if __name__ == "__main__":
    sys.exit(cli.guard(main))
