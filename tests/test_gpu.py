"""What surrounds a GPU, as far as a machine without one can show it."""

import shutil
import subprocess
from pathlib import Path

import bench_inference
import onnx
import onnxruntime
import pytest
import torch
from torch.utils import cpp_extension

import engine
import export

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
    monkeypatch.setattr(engine, "pick_device", lambda name: GPU)
    monkeypatch.setattr(engine, "load_trained", lambda *args: pytest.fail("the work began"))
    if torch.cuda.is_available() or Path("/usr/include/cuda.h").exists():
        pytest.skip("this machine's own CUDA is found where the toolkit's is missing")
    assert engine.guard(lambda: export.main(["--checkpoint", "seed0.pt", "--device", "cuda"])) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the AOTInductor package needs cuda.h and libcuda.so, ")
    assert f"CUDA_HOME is {home} (" in said and "set CUDA_HOME to" in said and "--no-aot" in said
    assert ("lcuda" if header else "cuda.h: No such file") in said


@needs_compiler
def test_a_whole_toolkit_is_enough_and_none_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", toolkit(tmp_path / "cuda", True, True))
    export.check_compiler(GPU)
    export.check_compiler(torch.device("cpu"))
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    if not Path("/usr/include/cuda.h").exists():
        with pytest.raises(export.BadInput, match="CUDA_HOME is None"):
            export.check_compiler(GPU)


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
