"""The checks of `gpu.py` that run inside one process, where torch and the data are loaded once.

Each takes the plan and returns what to say and what to record, or raises Failed or Skipped. They
import what they need, so that gpu.py has `Plan` and `commands` without torch.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
Found = tuple[str, dict]  # what to say, what to record


class Failed(Exception):
    """Why a check did not pass."""


class Skipped(Exception):
    """Why a check does not apply here: "because ..."."""


@dataclass(frozen=True)
class Plan:
    protocol: str
    device: str
    seconds: float
    seeds: list[str]
    results: Path  # PLACE/results/PROTOCOL

    @property
    def archive(self) -> Path:
        return self.results.parents[1] / f"runs/{self.protocol}-records.tar.gz"

    @property
    def grace(self) -> float:
        """Seconds that what runs has for saving its step, of the time given."""
        return min(20.0, self.seconds / 6)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def profiled_steps(self) -> int:
        return 20 if self.on_gpu else 2  # on a CPU it only shows that the check works

    @property
    def make(self) -> list[str]:
        return ["make", f"PY={sys.executable}", f"PROTOCOL={self.protocol}",
                f"DEVICE={self.device}", f"RESULTS={self.results}"]

    @functools.cached_property
    def base_rows(self) -> list[str]:
        """The first row of each table, as the Makefile has them."""
        rows = re.findall(r"^(table[12]/[^\s:=]+)\s*:?=", (ROOT / "Makefile").read_text(), re.M)
        return [next(row for row in rows if row.startswith(table))
                for table in ("table1", "table2")]


def commands(plan: Plan, *rows: str) -> list[tuple[str, list[str]]]:
    """(script, flags) of each row, read from what make would run; the flag --out is left out."""
    with tempfile.TemporaryDirectory() as nowhere:
        done = subprocess.run([*plan.make, f"RESULTS={nowhere}", "-n", *rows, "SEEDS=0"], cwd=ROOT,
                              capture_output=True, text=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines() if " train_" in line]
    if done.returncode or len(lines) != len(rows):
        raise Failed(f"make -n {' '.join(rows)}: {(done.stderr or done.stdout).strip()}")
    scripts = [next(i for i, word in enumerate(words) if word.endswith(".py")) for words in lines]
    return [(words[i], words[i + 1:words.index("--out")]) for words, i in zip(lines, scripts)]


def serve(pipe: Connection, plan: Plan, log: int) -> None:
    """Answer each check's name on the pipe with (verdict, why, what was found), until it ends."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(ROOT))
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("passed", *globals()[f"check_{name}"](plan))
        except Skipped as reason:
            answer = ("skipped", str(reason), {})
        except Failed as reason:
            answer = ("failed", str(reason), {})
        except BaseException as error:  # whatever it is, it is the verdict
            answer = ("failed", f"{type(error).__name__}: {error}", {})
        pipe.send(answer)


# ---- what a check runs ----

@functools.cache
def loader(script: str) -> tuple[str, Callable]:
    """What loads a script's set, by the name that the script calls it, and reads it once."""
    name = "load_facades" if script == "train_seg.py" else "load_fashion"
    return name, functools.cache(getattr(importlib.import_module(script[:-3]), name))


def run(script: str, flags: list[str], out: str, steps: int | None = None) -> dict:
    """Run a training script here and return its record if it leaves one.

    With `steps` an epoch has so many, of images that are repeated where the set has fewer.
    """
    import torch

    from lab import cli

    module, (name, load) = importlib.import_module(script[:-3]), loader(script)
    images = steps and steps * cli.parse(module.Config, "", flags, module.PROTOCOLS).batch
    cut = lambda split: split.map(lambda tensor: tensor[torch.arange(images) % len(tensor)])

    def few(*args: object) -> object:
        dataset = load(*args)
        return dataclasses.replace(dataset, train=cut(dataset.train), test=cut(dataset.test))

    with mock.patch.object(module, name, few if steps else load):
        module.main([*flags, "--out", out])
    record = Path(out, "seed0.json")
    return json.loads(record.read_text()) if record.exists() else {}


def check_device(plan: Plan) -> Found:
    from lab import devices, provenance

    device = devices.pick_device(plan.device)
    found = provenance.environment(device, devices.pick_dtype("auto", device))
    return f"{found['device']}, {found['precision']}, torch {found['torch']}", found


def check_dry_runs(plan: Plan) -> Found:
    """Both scripts in half precisions and --deterministic, and the rows that differ most."""
    base = commands(plan, *plan.base_rows)
    runs = [(script, [*flags, *more]) for script, flags in base for more in (
        ["--precision", "bf16"], ["--precision", "fp16"], ["--deterministic"])]
    others = commands(plan, "table1/blurpool-2-32", "table1/maxpool-2-32-transformer",
                      "table2/unet", "table2/dice")
    runs += [(script, [*flags, "--deterministic"]) for script, flags in others]
    with tempfile.TemporaryDirectory() as out:
        for script, flags in runs:
            try:
                run(script, [*flags, "--dry-run"], out)
            except Exception as error:
                said = f"{script} {' '.join(flags)}: {type(error).__name__}: {error}"
                raise Failed(said) from error
    return f"{len(runs)} of them", {}


def check_waits(plan: Plan) -> Found:
    """Four steps of both scripts in three precisions, of which none may wait for the device."""
    if not plan.on_gpu:
        raise Skipped("because nothing waits for a CPU")
    import posing

    for script, flags in commands(plan, *plan.base_rows):
        for precision in ("bf16", "fp16", "fp32"):
            with tempfile.TemporaryDirectory() as out, posing.waits_refused():
                run(script, [*flags, "--epochs", "1", "--precision", precision], out, steps=4)
    return "both scripts, three precisions, four steps each", {}


def check_numbers(plan: Plan) -> Found:
    """The base rows' metrics beside the report's."""
    import study

    said, found = [], {}
    for row in plan.base_rows:
        table, name = row.split("/")
        record = json.loads((plan.results / row / f"seed{plan.seeds[0]}.json").read_text())
        for column, (title, split, key) in study.COLUMNS[table].items():
            theirs = study.REPORT[table][name][1].get(column)
            ours = 100 * record["metrics"][split][key]
            found[f"{row} {title}"] = ours
            said.append(f"{title} {ours:.1f}" + (f" (report {theirs:.1f})" if theirs else ""))
        said.append(f"in {record['train_seconds']:.0f} s of training")
    return ", ".join(said), found


def check_same_bits(plan: Plan) -> Found:
    """Four steps of both scripts under --deterministic, twice."""
    for script, flags in commands(plan, *plan.base_rows):
        told = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as out:
                record = run(script, [*flags, "--epochs", "1", "--deterministic"], out, steps=4)
                told.append({key: record[key] for key in ("curve", "metrics", "weights_sha256")})
        if told[0] != told[1]:
            raise Failed(f"{script} --deterministic ends with other weights, losses or metrics")
    return "both scripts, the same weights, losses and metrics", {}


# ---- the profile ----

WARM = 5  # steps before: cuDNN picks its algorithms, the allocator its blocks


class Enough(Exception):
    """The steps that are measured are done."""


def check_profile(plan: Plan) -> Found:
    """Time of a step, how long the device computes in it, in how many kernels, and the longest."""
    said, found = [], {}
    for script, flags in commands(plan, *plan.base_rows):
        told: dict = {}
        with (tempfile.TemporaryDirectory() as out, profiled(plan, told),
              contextlib.suppress(Enough)):
            run(script, [*flags, "--epochs", "1"], out, steps=WARM + 2 * plan.profiled_steps)
        busy = ""
        if plan.on_gpu:
            busy = (f", the device busy for {told['device_ms']:.2f} ms with "
                    f"{told['launches']:.0f} kernels")
        said.append(f"{script} {told['step_ms']:.2f} ms a step{busy}, most of it in "
                    f"{next(iter(told['longest']))}")
        found[script] = told
    return "; ".join(said), found


@contextlib.contextmanager
def profiled(plan: Plan, told: dict) -> Iterator[None]:
    """Inside the block a run's steps are timed, then profiled, into `told`; then comes Enough."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from lab import batches

    wait = torch.cuda.synchronize if plan.on_gpu else lambda: None
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * plan.on_gpu]

    def shuffled(*args: object, real: Callable = batches.shuffled) -> Iterator:
        steps = real(*args)
        for _ in range(WARM):
            yield next(steps)
        wait()
        begun = time.perf_counter()
        for _ in range(plan.profiled_steps):
            yield next(steps)
        wait()
        told["step_ms"] = 1000 * (time.perf_counter() - begun) / plan.profiled_steps
        with profile(activities=activities) as profiler:
            for _ in range(plan.profiled_steps):
                yield next(steps)
            wait()
        told.update(summary(profiler, plan))
        raise Enough

    with mock.patch.object(batches, "shuffled", shuffled):
        yield


def summary(profiler: object, plan: Plan) -> dict:
    """Per step: the device's time and its kernels by name, in ms; on a CPU the operations'."""
    from torch.autograd import DeviceType

    longest: dict[str, float] = {}
    launches = 0
    if plan.on_gpu:
        for event in profiler.events():
            launches += event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))
            # a named range of steps lies on the device too, over its kernels
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                longest[event.name] = longest.get(event.name, 0) + event.time_range.elapsed_us()
    else:
        longest = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    names = sorted(longest, key=longest.get, reverse=True)
    steps = plan.profiled_steps
    return {"device_ms": sum(longest.values()) / steps / 1000, "launches": launches / steps,
            "longest": {name[:60]: longest[name] / steps / 1000 for name in names[:8]}}
