"""A campaign of faults: runs killed at random instants must end with the same bits as others.

    PYTHONPATH=. python tests/faults.py --rounds 44 --out results/faults/faults.json

Each round takes a script and a precision, starts the run, sends SIGKILL after a random time (or,
after that, at the next write of its checkpoint, its arrays or its record), up to three times, lets
it end, and compares weights, losses and metrics with an uninterrupted run. The folder may then hold
nothing but the three files of a run. Rounds are drawn from --seed; the instants are wall time, so
another machine kills elsewhere.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child must not wait for its parent's threads

import numpy as np
import torch
from conftest import small_root

import data
import train_cls
import train_seg
from lab import cli, files, provenance, records
from lab.progress import progress

SCRIPTS = {"train_cls": train_cls, "train_seg": train_seg}
FLAGS = {"train_cls": ["--train-images", "512", "--width", "4", "--epochs", "4"],
         "train_seg": ["--size", "32", "--width", "8", "--epochs", "4", "--batch", "4"]}


def run(script: str, flags: list[str], log: Path) -> None:
    sys.argv[0] = f"{script}.py"
    with (open(log, "w", buffering=1) as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        os._exit(cli.guard(lambda: SCRIPTS[script].main(flags)))


def start(script: str, flags: list[str], log: Path) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=run, args=(script, flags, log))
    process.start()
    return process


def result(folder: Path) -> dict:
    record = json.loads((folder / "seed0.json").read_text())
    state = files.read_checkpoint(folder / "seed0.pt")
    assert record["weights_sha256"] == state["record"]["weights_sha256"]
    return {"weights": {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()},
            **{key: record[key] for key in ("weights_sha256", "curve", "metrics")}}


def phase(folder: Path, log: Path) -> str:
    """What a killed run was doing, as its files and its output tell."""
    if (folder / "seed0.json").exists():
        return "after the record"
    if list(folder.glob(".seed0.*.tmp")):
        return "writing " + next(folder.glob(".seed0.*.tmp")).name.split(".")[2]
    epochs = log.read_text().count("images/s") if log.exists() else 0
    training = "training" if (folder / "seed0.pt").exists() else "before training"
    return "evaluation" if epochs == 4 else training


def campaign(rounds: int, seed: int, root: Path, scratch: Path) -> dict:
    """{"rounds": [...], "kills": {what it hit: how often}, "mismatches": n}: see above."""
    random, whole, told = np.random.default_rng(seed), {}, []
    root = str(small_root(root, scratch))
    for i in progress(range(rounds), "faults", unit="rounds"):
        script, precision = list(FLAGS)[i % 2], ("fp32", "bf16", "fp16")[i // 2 % 3]
        flags = ["--protocol", "smoke", "--device", "cpu", "--precision", precision,
                 "--data-root", root, *FLAGS[script]]
        if (script, precision) not in whole:
            folder = scratch / f"whole-{script}-{precision}"
            begun = time.perf_counter()
            start(script, [*flags, "--out", str(folder)], scratch / "log").join()
            whole[script, precision] = result(folder), time.perf_counter() - begun
        expected, seconds = whole[script, precision]
        folder, phases = scratch / f"round{i}", []
        for _ in range(random.integers(1, 4)):
            process = start(script, [*flags, "--out", str(folder)], scratch / "log")
            process.join(random.uniform(0, 1.05) * seconds)
            if random.random() < 0.5:  # writes are short: half of the kills wait for one, of any
                written = f".seed0.{random.choice(['pt', 'npz', 'json'])}.*.tmp"
                while process.is_alive() and not list(folder.glob(written)):
                    time.sleep(0.0002)
            if process.is_alive():
                process.kill()
                process.join()
                phases.append(phase(folder, scratch / "log"))
        process = start(script, [*flags, "--out", str(folder)], scratch / "log")
        process.join()
        ended = process.exitcode == 0 and result(folder) == expected
        stray = {path.name for path in folder.iterdir()} - {"seed0.json", "seed0.npz", "seed0.pt"}
        told.append({"script": script, "precision": precision, "killed": phases,
                     "same_bits": ended, "stray": sorted(stray)})
    kills = Counter(phase for one in told for phase in one["killed"])
    return {"rounds": told, "kills": dict(kills),
            "mismatches": sum(not one["same_bits"] or bool(one["stray"]) for one in told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=44)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-root", help="folder of the sets (default: $DATA_ROOT, else ./data)")
    parser.add_argument("--out", default="results/faults/faults.json", help="record to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = campaign(args.rounds, args.seed, data.find_root(args.data_root), Path(scratch))
    record = {"seed": args.seed, **found,
              "environment": provenance.environment(torch.device("cpu"), torch.float32)}
    path = Path(args.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write(path, record)
    print(f"{args.rounds} rounds, {sum(found['kills'].values())} kills ({found['kills']}), "
          f"{found['mismatches']} mismatches; {platform.platform()}; record {path}")
    sys.exit(found["mismatches"] > 0)


if __name__ == "__main__":
    main()
