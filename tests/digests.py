"""Do the numbers still stand? Short runs of both scripts, and what they end with, to the last bit.

    python tests/digests.py                              one line a run: name, weights, metrics
    python tests/digests.py --out FILE.json              and keep them
    python tests/digests.py --against FILE.json          and say what differs from those kept
    python tests/digests.py --against-revision main~5    and from what another revision ends with

A refactoring may change none of them: exit code 1 where one differs, and a line that names it. Two
precisions, three seeds, one thread, a minute or two; twice that for two revisions. The digests are
of one machine: another CPU or another torch rounds otherwise. What the later runs alone report (a
metric that was added) is no difference. `--only "bf16 seed1"` takes the runs whose names hold this.
Fashion-MNIST and MNIST are those of $DATA_ROOT; the facades are drawn, the same for both revisions.
"""

import argparse
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO))

import numpy as np
from conftest import small_root

from data import find_root
from lab import files

# all runs of a tree in one process, whose folder decides which modules are imported
DRIVER = """import importlib, json, sys
for script, flags in json.load(sys.stdin):
    sys.argv[0] = f"{script}.py"
    importlib.import_module(script).main(flags)
"""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def runs(root: Path, out: Path) -> dict[str, tuple[str, list[str]]]:
    """{name: (script, flags)}. A run's folder is out/NAME; a base comes before its frozen run."""
    # steps enough for a network that no longer gives every image one class: its metrics tell more
    cls = ["train_cls", "--depth", "1", "--batch", "32", "--lr", "4e-3"]
    seg, grids = ["train_seg", "--batch", "4"], ["--composites", "--tie", "0.9"]
    found = {}
    for precision, seed in itertools.product(("fp32", "bf16"), ("seed0", "seed1", "seed2")):
        of = f"{precision} {seed}"
        frozen = ["--frozen", "--base", f"{out}/cls {of}/{seed}.pt"]
        found |= {f"cls {of}": cls, f"seg {of}": seg, f"grids {of}": cls + grids,
                  f"frozen {of}": cls + grids + frozen}
    found["transformer fp32 seed0"] = [*cls, "--block", "transformer", "--down", "blurpool"]
    found["unet fp32 seed0"] = [*seg, "--arch", "unet", "--loss", "dice"]
    for name, (script, *flags) in found.items():
        _, precision, seed = name.split()
        common = ["--protocol", "smoke", "--device", "cpu", "--precision", precision,
                  "--seed", seed.removeprefix("seed"), "--data-root", str(root),
                  "--out", f"{out}/{name}"]
        found[name] = script, flags + common
    return found


def facts(folder: Path) -> dict[str, str]:
    """What a finished run ended with: digests of its weights, data and arrays, and each metric."""
    record = json.loads(next(folder.glob("seed*.json")).read_text())
    metrics = {f"{split} {key}": str(value) for split, scores in record["metrics"].items()
               for key, value in scores.items()}
    with np.load(next(folder.glob("seed*.npz"))) as arrays:
        digests = {f"array {name}": sha256(array.tobytes()) for name, array in arrays.items()}
    return {"weights": record["weights_sha256"], "data": record["data"], **metrics, **digests}


def measure(tree: Path, root: Path, only: str = "") -> dict[str, dict]:
    """{name of a run: its facts}, by the source in `tree`. SystemExit if one fails."""
    with tempfile.TemporaryDirectory() as out:
        wanted = {name: run for name, run in runs(root, Path(out)).items() if only in name}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run([sys.executable, "-c", DRIVER], cwd=tree, env=environment, text=True,
                              input=json.dumps(list(wanted.values())), stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE)
        if done.returncode:
            sys.exit(f"error: {tree}: a run failed: {done.stderr.strip().splitlines()[-1]}")
        return {name: facts(Path(out, name)) for name in wanted}


def measure_revision(revision: str, root: Path, only: str = "") -> dict[str, dict]:
    """The same by a revision's source, unpacked for it. SystemExit if there is none such."""
    archive = ["git", "-C", REPO, "archive", revision, ":(glob)**/*.py"]
    done = subprocess.run(archive, capture_output=True)
    if done.returncode:
        sys.exit(f"error: --against-revision {revision}: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as tree:
        tarfile.open(fileobj=io.BytesIO(done.stdout)).extractall(tree, filter="data")
        return measure(Path(tree), root, only)


def differences(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """A line for each run of both that ends otherwise now: what differs, and how."""
    lines = []
    for name in (name for name in before if name in now):
        changed = [f"{key} {value[:16]} -> {now[name].get(key, 'none')[:16]}"
                   for key, value in before[name].items() if now[name].get(key) != value]
        if changed:
            lines.append(f"{name}: {'; '.join(changed)}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file to keep the results in")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs with TEXT in their names")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--against", metavar="FILE", help="results kept earlier")
    earlier.add_argument("--against-revision", metavar="REV", help="a commit, tag or branch")
    args = parser.parse_args(argv)
    before = json.loads(Path(args.against).read_text()) if args.against else None
    with tempfile.TemporaryDirectory() as scratch:
        root = small_root(find_root(None), Path(scratch))
        now = measure(REPO, root, args.only)
        if args.against_revision:
            before = measure_revision(args.against_revision, root, args.only)
    for name, found in now.items():
        rest = json.dumps([found[key] for key in found if key != "weights"])
        print(f"{name:<24} weights {found['weights'][:16]}  metrics {sha256(rest.encode())[:16]}")
    if args.out:
        files.write_atomic(Path(args.out), json.dumps(now, indent=1).encode())
    if before is None:
        return 0
    found = differences(before, now)
    compared = len(before.keys() & now.keys())
    print("\n".join(found) + "\n" * bool(found) + f"{len(found)} of {compared} runs differ")
    return int(bool(found) or not compared)


if __name__ == "__main__":
    sys.exit(main())
