"""avx2.py hides what the CPU has beyond AVX2, from everyone who asks, and nothing else."""

import os
import subprocess
import sys

import avx2
import numpy as np
import onnx
import pytest
from onnx import helper
from tools import REPO

SCRIPT = [sys.executable, avx2.__file__]


def seen(code, env):
    return subprocess.run([sys.executable, "-c", code], env={**env, "PYTHONPATH": str(REPO)},
                          capture_output=True, text=True)


def test_what_a_run_records(older_cpu):
    """Also of a process that it starts, and of bfloat16, which "auto" must not take there."""
    code = ("import torch; from lab import devices; print(devices.instruction_sets(), "
            "devices.pick_dtype('auto', torch.device('cpu')))")
    said = "['AVX2', 'avx2', 'LD_PRELOAD=avx2.so'] torch.float32\n"
    assert seen(code, older_cpu).stdout == said
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    assert seen(nested, older_cpu).stdout == said


def conv_of(top):
    """An 8-bit convolution whose weights are all `top`, as an ONNX file, and what a pixel is."""
    constants = {"weights": np.full((8, 16, 1, 1), top, np.int8), "zero": np.uint8(0),
                 "signed": np.int8(0), "one": np.float32(1), "large": np.float32(top * 16 * 2)}
    nodes = [("QuantizeLinear", "images one zero", "q"), ("DequantizeLinear", "q one zero", "x"),
             ("DequantizeLinear", "weights one signed", "w"), ("Conv", "x w", "sums"),
             ("QuantizeLinear", "sums large zero", "p"), ("DequantizeLinear", "p large zero", "y")]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs.split(), [output]) for kind, inputs, output in nodes], "",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString(), 254 * top * 16


CONVOLVE = """import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {"images": numpy.full((1, 16, 8, 8), 254, numpy.float32)})[0].max())"""


@pytest.mark.parametrize("top", [63, 127])
def test_full_8_bit_weights_saturate_there(older_cpu, tmp_path, top):
    """ONNX Runtime's AVX2 kernels run, and are why exported weights have 7 bits."""
    model, right = conv_of(top)
    (tmp_path / "conv.onnx").write_bytes(model)
    done = subprocess.run([sys.executable, "-c", CONVOLVE, tmp_path / "conv.onnx"], env=older_cpu,
                          capture_output=True, text=True, check=True)
    assert (float(done.stdout) == right) == (top == 63), done.stdout


def test_a_compiler_tunes_for_the_older_cpu(older_cpu):
    """GCC asks with a handler of its own for segmentation faults; torch.compile's is one too."""
    done = subprocess.run(["c++", "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
                          env=older_cpu, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "__AVX2__" in done.stdout and "__AVX512F__" not in done.stdout


def test_compiled_code_is_kept_apart(older_cpu):
    """Pieces of code for this CPU and for the older one, linked together, crash."""
    code = "from torch._inductor.runtime.runtime_utils import cache_dir; print(cache_dir())"
    plain = {name: value for name, value in os.environ.items() if "INDUCTOR" not in name}
    assert seen(code, older_cpu).stdout != seen(code, plain).stdout


def test_a_crash_is_the_programs_own(older_cpu):
    """A handler of the program's own has its turn, once, and the process ends as it would."""
    for code, said in (("import ctypes; ctypes.string_at(0)", 0),
                       ("import os; os.kill(os.getpid(), 11)", 0),
                       ("import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)",
                        1)):
        done = seen(code, older_cpu)
        assert done.returncode == -11
        assert done.stderr.count("Fatal Python error: Segmentation fault") == said


def test_the_command(older_cpu):
    run = lambda *argv, **env: subprocess.run([*SCRIPT, *argv], env={**os.environ, **env},
                                              capture_output=True, text=True)
    assert run("sh", "-c", "echo said; exit 3").returncode == 3
    assert run("sh", "-c", "echo $LD_PRELOAD", LD_PRELOAD="").stdout.count("avx2.so") == 1
    done = run("no-such-command")
    assert (done.returncode, done.stderr) == (2, "error: no-such-command: no such command\n")
