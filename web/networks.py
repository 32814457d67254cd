"""The networks of the page: trained runs -> web/models/*.onnx and web/models/index.json.

    make page-networks PROTOCOL=desk    trains what is missing under runs/desk/, then runs this
    PYTHONPATH=. python web/networks.py --runs runs/desk --records results/desk

A classifier's file gives logits and class activation maps, as export.py's does. Surrogates of one
base share its frozen features, so that one file holds them once, and the heads side by side:
classes 0-9 are those of the first, 10-19 of the second. Weights of convolutions are stored in 8
bits, each output channel with a scale of its own, and widened once when a file is opened: every
sum is of float32. What it costs is measured on the held-out split and written to the index.
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import data
import metrics
import models
from lab import cli, engine, forms, records
from lab.batches import Dataset
from lab.cli import flag
from lab.deployed import Deployed, WithMaps, fold_batchnorm
from lab.files import BadInput, write_atomic

DOWNS, TIES = ("maxpool", "stride", "blurpool"), ("0", "0.9")
LIMIT = 12_000_000  # bytes of all files: what a reader waits for
COMPARED = 1000  # images whose logits are compared
STORED = 1024  # values of a tensor; smaller ones stay in float32


@dataclass(frozen=True, kw_only=True)
class Config:
    runs: str = flag("runs/desk", "folder of the trained runs")
    records: str = flag("results/desk", "folder of the records that go with them")
    out: str = flag("web/models", "folder of the files")
    data_root: str | None = flag(None, "folder of the data sets (default: $DATA_ROOT, ./data)")


@dataclass(frozen=True)
class Source:
    """One file of the page: the runs that it is made of, and what the page calls each of them."""
    file: str
    runs: dict[str, dict[str, str]]


SOURCES = [
    *(Source(f"{down}-frozen.onnx", {f"page/{down}-frozen-tie{tie}":
                                     {"down": down, "kind": "frozen", "tie": tie} for tie in TIES})
      for down in DOWNS),
    *(Source(f"{down}-scratch-tie{tie}.onnx", {f"page/{down}-scratch-tie{tie}":
                                               {"down": down, "kind": "scratch", "tie": tie}})
      for down in DOWNS for tie in TIES),
    Source("facade.onnx", {"table2/standard": {"kind": "facade"}})]


# ---- one file of several runs ----

def stacked(parts: list[nn.Module]) -> nn.Module:
    """Classifiers that share their features as one, whose classes are theirs in order."""
    first, *others = parts
    for other in others:
        for name, value in first.stages.state_dict().items():
            if not torch.equal(value, other.stages.state_dict()[name]):
                raise BadInput(f"two surrogates of one file have other features ({name}): "
                               f"train both on the same base")
    if others:
        heads = [part.classifier for part in parts]
        head = nn.Linear(heads[0].in_features, sum(one.out_features for one in heads))
        head.weight.data = torch.cat([one.weight.data for one in heads])
        head.bias.data = torch.cat([one.bias.data for one in heads])
        first.classifier = head
    return first


def stored_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each convolution's large float32 weights (out, ...) become int8 times float32 (out, 1, ...).

    Cast and Mul of constants are folded when a session is made: nothing of it runs per image. The
    values go up to 127: they are arithmetic's business no more, unlike those of an 8-bit form.
    """
    graph, nodes, kept = model.graph, [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.ndim != 4 or values.size < STORED:
            kept.append(tensor)
            continue
        most = np.abs(values).reshape(len(values), -1).max(1)
        scale = np.where(most > 0, most / 127, 1).astype(np.float32)
        scale = scale.reshape(-1, *[1] * (values.ndim - 1))
        names = [f"{tensor.name}/{part}" for part in ("int8", "scale", "wide")]
        kept += [numpy_helper.from_array(np.rint(values / scale).astype(np.int8), names[0]),
                 numpy_helper.from_array(scale, names[1])]
        nodes += [helper.make_node("Cast", names[:1], names[2:], f"{names[2]}/cast", to=1),
                  helper.make_node("Mul", names[2:0:-1], [tensor.name], f"{names[2]}/scaled")]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes += list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def write(parts: list[tuple[nn.Module, dict]], example: Tensor, path: Path) -> nn.Module:
    """The file of these trained networks and their records; the network in it, in float."""
    network = stacked([model for model, _ in parts])
    record = parts[0][1]
    about = forms.describe(network, record)
    deployed = Deployed(fold_batchnorm(network), record["about_data"]["mean"],
                        record["about_data"]["std"])
    module = WithMaps(deployed) if hasattr(network, "activation_maps") else deployed
    forms.write_onnx(forms.capture(module, example, network.stride), about, path)
    buffer = io.BytesIO()
    onnx.save(stored_weights(onnx.load(path)), buffer)
    onnx.checker.check_model(onnx.load_from_string(buffer.getvalue()))
    write_atomic(path, buffer.getvalue())
    return deployed


# ---- what it costs ----

def judged(path: Path, deployed: nn.Module, dataset: Dataset, reached: list[float]) -> list[dict]:
    """What storing costs each network of a file, whose records have `reached` a metric.

    The file's metric is of the whole held-out split; its logits are compared with those of the
    network in float32 on the split's first images.
    """
    classes, split = len(dataset.classes), dataset.test
    metric = metrics.SCORES[dataset.task][1][0]
    found = forms.logits_of(forms.open_form(path), split.images, 64)
    exact = forms.logits_of(deployed, split.images[:COMPARED], 64)
    costs = []
    for head, before in enumerate(reached):
        part = slice(head * classes, (head + 1) * classes)
        score = metrics.SCORES[dataset.task][0](found[:, part], split.targets, dataset.classes)
        if not before - score[metric] <= forms.LOSS:
            raise forms.ParityError(f"{path} loses {100 * (before - score[metric]):.2f} points of "
                                    f"{metric}, allowed {100 * forms.LOSS:g}")
        costs.append({metric: {"record": before, "file": score[metric]},
                      "logits": forms.compare(found[:COMPARED, part], exact[:, part], {})})
    return costs


def page_record(cfg: Config, run: str, record: dict) -> Path:
    """The page's own record of a run's network; one there of the same weights stays as it is.

    The study's record may be of other weights: those of the machine that ran it.
    """
    path = Path(cfg.records, "page", Path(run).name, "seed0.json")
    if not path.exists() or records.read(path)["weights_sha256"] != record["weights_sha256"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        records.write(path, record)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(cfg: Config, source: Source, earlier: dict | None) -> dict:
    """Writes one file, and returns its entry of the index; an earlier one stays if it still holds.

    The held-out grids are the same whatever the tie.
    """
    path = Path(cfg.out, source.file)
    parts = [engine.load_trained(Path(cfg.runs, run, "seed0.pt"), torch.device("cpu"),
                                 models.build) for run in source.runs]
    files = [page_record(cfg, run, record) for run, (_, record) in zip(source.runs, parts)]
    parts = [(model, json.loads(file.read_text())) for (model, _), file in zip(parts, files)]
    if earlier and path.exists() and earlier["sha256"] == sha256(path) and (
            [one["record_sha256"] for one in earlier["networks"]] == [*map(sha256, files)]):
        return earlier
    dataset = data.load_recorded(parts[0][1], cfg.data_root)
    deployed = write(parts, dataset.train.images[:2].contiguous(), path)
    metric = metrics.SCORES[dataset.task][1][0]
    costs = judged(path, deployed, dataset, [record["metrics"][dataset.held_out][metric]
                                             for _, record in parts])
    networks = [{**source.runs[run], "head": head, "record": file.as_posix(),
                 "record_sha256": sha256(file), "weights_sha256": record["weights_sha256"],
                 "cost": cost}
                for head, (run, file, (_, record), cost) in enumerate(
                    zip(source.runs, files, parts, costs))]
    for run, cost in zip(source.runs, costs):
        print(f"{source.file} {run}: {cost}", flush=True)
    about = parts[0][1]["about_data"]
    return {"file": source.file, "bytes": path.stat().st_size, "sha256": sha256(path),
            "size": about["size"], "classes": about["classes"], "palette": about["palette"],
            "networks": networks}


def available(cfg: Config) -> Iterator[Source]:
    """The files whose runs are there. BadInput where the least that the page needs is missing."""
    for source in SOURCES:
        missing = [run for run in source.runs if not Path(cfg.runs, run, "seed0.json").exists()]
        if not missing:
            yield source
        elif "scratch" in source.file:
            print(f"{source.file} is left out: {cfg.runs}/{missing[0]} is not there")
        else:
            raise BadInput(f"{cfg.runs}/{missing[0]} is not there: make page-networks "
                           f"PROTOCOL=desk trains it")


def main(argv: list[str] | None = None) -> None:
    cfg = cli.parse(Config, __doc__, argv)
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    index = Path(cfg.out, "index.json")
    known = json.loads(index.read_text())["files"] if index.exists() else []
    earlier = {one["file"]: one for one in known if "sha256" in one}
    files = [make(cfg, source, earlier.get(source.file)) for source in available(cfg)]
    total = sum(one["bytes"] for one in files)
    if total > LIMIT:
        raise BadInput(f"the files of {cfg.out} have {total:,} bytes, allowed {LIMIT:,}")
    for name in earlier.keys() - {one["file"] for one in files}:
        Path(cfg.out, name).unlink(missing_ok=True)
    records.write(index, {"bytes": total, "files": files})
    print(f"{len(files)} files, {total / 1e6:.2f} MB, in {cfg.out}/")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
