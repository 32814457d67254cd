"""Runs in two processes under torchrun, gloo on the CPU, against the same run in one.

In float64: there the two differ by the order of sums alone. In float32 BatchNorm and Adam blow the
last bit up, as they do between two numbers of threads.
"""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_tiny_root

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "--no-python"]
# HIT="1 5 9": process 1 gets signal 9 before its step 5, counted from 0 over all epochs
SCRIPT = """
import importlib, itertools, os, sys
import torch
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
from lab import batches, cli, distributed
normalise, shuffled = batches.normalise, batches.shuffled
batches.normalise = lambda *args: normalise(*args).double()
if "HIT" in os.environ:
    process, at, number = map(int, os.environ["HIT"].split())
    count = itertools.count()
    def hit(*args):
        for batch in shuffled(*args):
            if (distributed.rank(), next(count)) == (process, at):
                os.kill(os.getpid(), number)
            yield batch
    batches.shuffled = hit
sys.argv = [word.replace("RANK", os.environ.get("RANK", "")) for word in sys.argv]
name = sys.argv[1]
sys.argv[0] = f"{name}.py"
sys.exit(cli.guard(lambda: importlib.import_module(name).main(sys.argv[2:])))
"""
SEG = ["train_seg", "--protocol", "smoke", "--hourglasses", "1", "--width", "4", "--batch", "4"]
CLS = ["train_cls", "--protocol", "smoke", "--width", "4", "--batch", "64", "--train-images", "512"]


def run(out, root, flags, processes=1, hit=None, stdin=None):
    """The process that ended, and the record if there is one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"HIT": hit} if hit else {})}
    done = subprocess.run([*(TORCHRUN if processes == 2 else []), sys.executable, "-c", SCRIPT,
                           *flags, "--precision", "fp32", "--device", "cpu",
                           "--data-root", str(root), "--out", str(out)],
                          capture_output=True, text=True, env=environment, timeout=300,
                          input=stdin)
    record = out / "seed0.json"
    return done, json.loads(record.read_text()) if record.exists() else None


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_close(found[name], expected[name])
    else:
        found, expected = (np.array(values, float) for values in (found, expected))  # a null is NaN
        np.testing.assert_allclose(found, expected, atol=1e-6)


def assert_same_run(one, two):
    np.testing.assert_allclose(two["curve"]["loss"], one["curve"]["loss"], rtol=0, atol=1e-5)
    assert_close(two["metrics"], one["metrics"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A root of 24 + 8 facades, and the run in one process that the others must equal."""
    folder = tmp_path_factory.mktemp("whole")
    root = make_tiny_root(folder / "root", 24, 8)
    done, record = run(folder / "one", root, SEG)
    assert done.returncode == 0, done.stderr
    return root, record


def test_two_processes_train_what_one_does(whole, tmp_path):
    root, one = whole
    done, two = run(tmp_path, root, SEG, processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(one, two)
    assert (one["environment"]["processes"], two["environment"]["processes"]) == (1, 2)
    for said in ("epoch 2/2", "record "):  # one of them speaks
        assert done.stdout.count(said) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"seed0.json", "seed0.npz", "seed0.pt"}
    done, again = run(tmp_path, root, SEG, processes=2)  # complete: nothing is trained
    assert done.returncode == 0 and again == two and "epoch" not in done.stdout


def test_two_processes_classify_as_one_does(fashion_root, tmp_path):
    (_, one), (done, two) = (run(tmp_path / str(n), fashion_root, CLS, n) for n in (1, 2))
    assert done.returncode == 0, done.stderr
    assert_same_run(one, two)


@pytest.mark.parametrize("processes", [(2, 1), (1, 2)])
def test_a_run_stopped_within_an_epoch_goes_on_in_other_numbers(whole, tmp_path, processes):
    root, one = whole
    hit = f"{processes[0] - 1} 3 {signal.SIGTERM.value}"  # of two, the one that does not write
    done, record = run(tmp_path, root, SEG, processes[0], hit)
    assert "stopped by SIGTERM; the same command goes on from step 4 of 6 of epoch 1" in done.stderr
    assert "engine.py" not in done.stderr and record is None  # the only traceback is the launcher's
    done, record = run(tmp_path, root, SEG, processes[1])
    assert done.returncode == 0 and "goes on after epoch 0/2, step 4" in done.stderr
    assert_same_run(one, record)


def test_a_killed_process_ends_the_other_and_the_run_goes_on(whole, tmp_path):
    root, one = whole
    done, record = run(tmp_path, root, SEG, 2, f"1 8 {signal.SIGKILL.value}")
    assert done.returncode != 0 and record is None
    said = "error: process 0: another process of the group has ended; run the same command to go on"
    assert said in done.stderr
    done, record = run(tmp_path, root, SEG, processes=2)
    assert done.returncode == 0
    assert_same_run(one, record)


def test_processes_of_other_data_do_not_train_together(whole, tmp_path):
    """A machine that lacks the photos would else train on drawn ones beside the others."""
    roots = [make_tiny_root(tmp_path / str(process), 8, 4) for process in (0, 1)]
    mask = roots[1] / "mini_facade/train/eecs442_0000.png"
    mask.write_bytes((roots[1] / "mini_facade/train/eecs442_0001.png").read_bytes())
    done, record = run(tmp_path / "out", tmp_path / "RANK", SEG, processes=2)
    assert record is None and done.returncode != 0
    assert "process 1: this process has other data or settings than the first" in done.stderr


def test_a_batch_that_cannot_be_shared_is_refused(whole, tmp_path):
    done, record = run(tmp_path, whole[0], [*SEG[:-1], "3"], processes=2)
    assert record is None
    assert done.stderr.count("--batch 3: 2 processes cannot share 3 images evenly") == 2


def test_what_rows_of_two_processes_take_is_planned_by_both(whole, tmp_path):
    done, record = run(tmp_path, whole[0], [*SEG, "--plan", "3"], 2, stdin="\n--width 8\n")
    assert done.returncode == 0 and record is None, done.stderr
    assert done.stdout.count("2 rows of 3 runs") == done.stdout.count("time: about") == 1
