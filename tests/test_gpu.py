"""What surrounds a GPU, as far as a machine without one can show it."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import bench_inference
import gpu
import gpu_checks
import onnx
import onnxruntime
import pytest
import torch
from conftest import real_root
from torch.utils import cpp_extension

import export
import models
from lab import cli, devices, engine, forms, provenance

GPU = torch.device("cuda")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++: install it")


def toolkit(folder: Path, header: bool, library: bool) -> str:
    """A CUDA toolkit, as far as one is needed to link a program."""
    for name in ("include", "lib64/stubs"):
        (folder / name).mkdir(parents=True)
    if header:
        (folder / "include/cuda.h").write_text('extern "C" int cuInit(unsigned flags);\n')
    if library:
        subprocess.run(
            ["g++", "-x", "c++", "-", "-shared", "-o", folder / "lib64/stubs/libcuda.so"],
            input='extern "C" int cuInit(unsigned) { return 0; }', text=True, check=True)
    return str(folder)


@needs_compiler
@pytest.mark.parametrize("header, library", [(False, True), (True, False)])
def test_a_toolkit_that_lacks_a_part_is_refused_before_the_work(
        tmp_path, capsys, monkeypatch, header, library):
    home = toolkit(tmp_path / "cuda", header, library)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    monkeypatch.setattr(devices, "pick_device", lambda name: GPU)
    monkeypatch.setattr(engine, "load_trained", lambda *args: pytest.fail("the work began"))
    if torch.cuda.is_available() or Path("/usr/include/cuda.h").exists():
        pytest.skip("this machine's own CUDA is found where the toolkit's is missing")
    assert cli.guard(lambda: export.main(["--checkpoint", "seed0.pt", "--device", "cuda"])) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the AOTInductor package needs cuda.h and libcuda.so, ")
    assert f"CUDA_HOME is {home} (" in said and "set CUDA_HOME to" in said and "--no-aot" in said
    assert ("lcuda" if header else "cuda.h: No such file") in said


@needs_compiler
def test_a_whole_toolkit_is_enough_and_none_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path / "cuda", True, True))
    forms.check_compiler(GPU)
    forms.check_compiler(torch.device("cpu"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    if not Path("/usr/include/cuda.h").exists():
        with pytest.raises(export.BadInput, match="CUDA_HOME is None"):
            forms.check_compiler(GPU)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_the_benchmark_names_the_provider_that_was_used(tmp_path, monkeypatch):
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", "x", "y")], "graph", [x], [y])
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [
        "MIGraphXExecutionProvider", "CPUExecutionProvider"])  # the first will not start here
    assert bench_inference.providers_of(tmp_path / "model.onnx", torch.ones(1)) == "CPU"


# ---- make gpu ----

NOT_NEEDED = ["pytest", "hypothesis", "sklearn", "matplotlib", "onnx", "onnxruntime", "onnxscript",
              "scipy"]


@pytest.fixture
def root(tiny_root):
    """A data root with all three sets: the facades are tiny."""
    for name in ("FashionMNIST", "MNIST"):
        (tiny_root / name).symlink_to((real_root(name) / name).resolve())
    return tiny_root


def test_the_first_minutes_on_a_cpu(root, tmp_path):
    """In time, a verdict for each check, all records in one archive; where training can run."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/sitecustomize.py").write_text(
        f"import sys\nfor name in {NOT_NEEDED}:\n    sys.modules[name] = None\n")
    begun = time.monotonic()
    done = subprocess.run(
        ["make", "gpu", "DEVICE=cpu", "PROTOCOL=smoke", "SECONDS=40", f"PY={sys.executable}",
         f"RESULTS={tmp_path}/results/smoke"],
        cwd=provenance.SOURCE, capture_output=True, text=True,
        env={**os.environ, "DATA_ROOT": str(root), "PYTHONPATH": f"{tmp_path}/bare"})
    assert time.monotonic() - begun < 50
    verdicts = re.findall(r"^ (\d)  (.+?)  +(passed|failed|skipped)  ?(.+)$", done.stdout, re.M)
    assert [number for number, *_ in verdicts] == list("123456789"), done.stdout + done.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    for *_, verdict, why in verdicts:
        assert verdict == "passed" or verdict == "skipped" and why.startswith("because "), verdicts
    with tarfile.open(tmp_path / "runs/smoke-records.tar.gz") as archive:
        packed = {member.name for member in archive}
    records = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "results").rglob("*")
               if path.suffix in (".json", ".npz")}
    assert packed == records and "results/smoke/gpu.json" in packed
    found = {title: verdict for _, title, verdict, _ in verdicts}
    if found["base rows"] == "passed":  # on a machine that is not too busy
        assert {f"results/smoke/{row}/seed0.{kind}" for kind in ("json", "npz") for row in (
            "table1/maxpool-2-32", "table2/standard")} < packed


ROW = """#!/bin/sh
touch running/$$
echo $(ls running | wc -l) $OMP_NUM_THREADS >> log
sleep 0.3
rm running/$$
for word; do out=$word; done  # the last one
mkdir -p $out && touch $out/seed0.json
"""


@pytest.mark.parametrize("words, most", [
    (["rows/table1"], "4 2"), (["rows/table2"], "3 2"), (["rows/table1", "rows/table2"], "3 2"),
    (["rows/table1", "-j2"], "2 2"), (["rows/table2", "RUN=env OMP_NUM_THREADS=5"], "1 5")])
def test_rows_of_report_run_side_by_side(tmp_path, words, most):
    (tmp_path / "running").mkdir()
    (tmp_path / "row").write_text(ROW)
    (tmp_path / "row").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    subprocess.run(["make", "-f", provenance.SOURCE / "Makefile", "PROTOCOL=report", "SEEDS=0",
                    f"PY={tmp_path}/row", *words], cwd=tmp_path, env=environment, check=True)
    assert max((tmp_path / "log").read_text().splitlines()) == most


MAKE = """#!{python}
import pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
target = next(word for word in sys.argv[1:] if word.startswith("rows/"))
folder = pathlib.Path(words["RESULTS"], target.removeprefix("rows/"))
record = folder / f"seed{words['SEEDS']}.json"
if "-q" in sys.argv:
    sys.exit(not record.exists())
folder.mkdir(parents=True, exist_ok=True)
if target == "rows/table2" and words["SEEDS"] == "1":
    def stop(*_):
        (folder / "seed1.pt").write_text("its step")
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    print("waits", flush=True)
    time.sleep(60)
if target == "rows/attention":
    print("error: it broke\\nmake: *** Error 2")
    sys.exit(2)
record.write_text("{}")
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Its make is a few lines: table2 of seed 1 waits to be stopped, attention fails."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/make").write_text(MAKE.replace("{python}", sys.executable))
    (tmp_path / "bin/make").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    plan = gpu.Plan("smoke", "cpu", 30, ["0", "1"], tmp_path / "results/smoke")
    with gpu.opened(plan) as session:
        yield session


def test_rows_run_in_seed_order_until_the_time_is_over(session, tmp_path, capsys):
    with pytest.raises(gpu.TimeOver):
        session.rows(time.monotonic() + 3)
    said = [line.rsplit(" in ", 1)[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert said == ["seed 0, table1: 1 records", "seed 0, table2: 1 records",
                    "seed 0, attention: 0 records",
                    "a row failed, the others ran: error: it broke",
                    "seed 1, table1: 1 records", "seed 1, table2: 0 records"]
    assert (tmp_path / "results/smoke/table2/seed1.pt").read_text() == "its step"
    with tarfile.open(tmp_path / "runs/smoke-records.tar.gz") as archive:
        assert archive.getnames() == [f"results/smoke/{name}.json" for name in (
            "table1/seed0", "table1/seed1", "table2/seed0")]
    for table, seed in (("table2", 1), ("attention", 0), ("attention", 1)):
        session.plan.results.joinpath(table, f"seed{seed}.json").write_text("{}")
    assert session.rows(time.monotonic() + 30)  # nothing is missing any more
    assert capsys.readouterr().out == ""


def test_what_a_missing_package_costs(session, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(session, "plan", dataclasses.replace(session.plan, device="cuda"))
    assert session.rehearsed_tests(0)[:2] == ("skipped", "because pytest is not installed")
    assert session.export(0)[0] == session.bench(0)[0] == "skipped"
    assert session.export(0)[1].startswith("because onnx, onnxruntime, ")
    session.plan.results.joinpath("table2").mkdir(parents=True)
    session.plan.results.joinpath("table2/seed1.json").write_text("{}")  # else it waits
    assert session.rows(time.monotonic() + 30)
    said = capsys.readouterr().out
    assert "attention is left out, because matplotlib is not installed" in said
    assert said.count("attention") == 1 and said.count("1 records") == 3


def test_verdicts(session, capsys):
    session.told["environment"] = session.before["environment"] = {"device": "this one"}
    session.before["checks"] = {"old": {"verdict": "passed", "why": "as it was", "found": {}},
                                "bad": {"verdict": "failed", "why": "a fault", "found": {}}}
    now = time.monotonic()

    def slow(deadline):
        raise gpu.TimeOver

    assert session.verdict("old", lambda deadline: pytest.fail("run again"), now + 9)
    broken, mended = ("failed", "now it does", {}), ("passed", "mended", {})
    assert not session.verdict("old", lambda deadline: broken, now + 9, again=True)
    assert session.verdict("bad", lambda deadline: mended, now + 9)
    assert session.verdict("late", lambda deadline: pytest.fail("it had no time"), now - 1)
    assert session.verdict("slow", slow, now + 9)
    said = [line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()]
    assert said == [["old", "passed   before: as it was"], ["old", "failed   now it does"],
                    ["bad", "passed   mended"], ["late", "skipped  because its time was over"],
                    ["slow", "skipped  because it was not done after 0 s"]]


def test_a_check_that_dies_or_fails_leaves_the_next_its_turn(session, monkeypatch):
    monkeypatch.setattr(gpu_checks, "check_dies", lambda plan: os._exit(3), raising=False)
    monkeypatch.setattr(gpu_checks, "check_breaks", lambda plan: 1 / 0, raising=False)
    monkeypatch.setattr(gpu_checks, "check_hangs", lambda plan: time.sleep(60), raising=False)
    monkeypatch.setattr(gpu_checks, "check_works", lambda plan: ("well", {"a": 1}), raising=False)
    ask = lambda name, seconds=30: session.ask(name)(time.monotonic() + seconds)
    assert ask("dies") == ("failed", "its process died with code 3", {})
    assert ask("breaks") == ("failed", "ZeroDivisionError: division by zero", {})
    with pytest.raises(gpu.TimeOver):
        ask("hangs", 0.5)
    session.drop_worker()
    assert ask("works") == ("passed", "well", {"a": 1})
    assert ask("waits") == ("skipped", "because nothing waits for a CPU", {})


def test_checks_on_a_cpu(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(root))
    monkeypatch.setattr(gpu_checks, "WARM", 1)
    plan = gpu.Plan("smoke", "cpu", 60, ["0"], tmp_path / "results/smoke")
    assert plan.base_rows == ["table1/maxpool-2-32", "table2/standard"]
    said, found = gpu_checks.check_profile(plan)
    assert set(found) == {"train_cls.py", "train_seg.py"} and "ms a step, most of it in" in said
    for told in found.values():
        assert 0 < sum(told["longest"].values()) <= told["device_ms"]
    monkeypatch.setattr(models, "cross_entropy", lambda logits, *args, weight=None: (
        logits * torch.rand(logits.shape[1], generator=unseeded)).square().mean())
    unseeded = torch.Generator().manual_seed(0)  # goes on from run to run
    with pytest.raises(gpu_checks.Failed, match="train_cls.py --deterministic ends with other"):
        gpu_checks.check_same_bits(plan)
    torch.use_deterministic_algorithms(False)


def test_a_profile_of_a_gpu_counts_kernels_and_not_the_ranges_over_them():
    event = lambda name, device, microseconds=0, annotation=False: SimpleNamespace(
        name=name, device_type=device, is_user_annotation=annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds))
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [event("conv", cuda, 3000), event("relu", cuda, 500), event("conv", cuda, 3000),
              event("Optimizer.step", cuda, 9000, annotation=True), event("aten::conv", cpu, 7000),
              *[event("cudaLaunchKernel", cpu), event("cuLaunchKernelEx", cpu)] * 30]
    plan = gpu.Plan("smoke", "cuda", 60, ["0"], Path("results/smoke"))
    assert gpu_checks.summary(SimpleNamespace(events=lambda: events), plan) == {
        "device_ms": 0.325, "launches": 3, "longest": {"conv": 0.3, "relu": 0.025}}


def test_a_root_that_lacks_a_set_is_refused_at_once(tiny_root, monkeypatch, capsys):
    monkeypatch.setenv("DATA_ROOT", str(tiny_root))
    assert gpu.main(["--protocol", "smoke", "--device", "cpu"]) == 2
    assert "lacks FashionMNIST, MNIST: put it there" in capsys.readouterr().err
