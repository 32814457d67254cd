"""The first minutes on a GPU: checks in order, one verdict a line, then the study's missing rows.

    make gpu PROTOCOL=report SECONDS=540

A check ends as passed, failed with the reason, or skipped with the reason; one that passed
before, with this code on this device, is not repeated, and one that takes a quarter of the time
is given up. The rows run side by side in seed order, as the Makefile has them, until the time is
over. What runs then is told to stop (SIGTERM), saves the step it is at, and goes on when the same
command is given again. Verdicts go to RESULTS/gpu.json; that and all records are packed into one
archive, where each file has its place in the project.

It needs the data, no network, and no package but those that training needs: checks that ask for
more (pytest, onnx) are skipped where it is not installed. The exit code is 1 if a check or a row
failed, 2 if nothing could begin.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import gpu_checks
from gpu_checks import Plan

ROOT = Path(__file__).parents[1]
CHECKS_SHARE, CHECK_SHARE = 0.6, 0.25  # of the time: for all checks but the base rows, for each
ROWS = ("rows/table1", "rows/table2", "rows/attention")  # targets of the Makefile, in this order
Verdict = tuple[str, str, dict]  # passed, failed or skipped; why; what was found
Check = Callable[[float], Verdict]  # called with the time at which it is over


class TimeOver(Exception):
    """Of what is under way; it was told to stop."""


class Worker:
    """A process that runs one check after the other: torch and the data are loaded once."""

    def __init__(self, plan: Plan, log: TextIO) -> None:
        self.pipe, inner = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(
            target=gpu_checks.serve, args=(inner, plan, log.fileno()), daemon=True)
        self.process.start()
        inner.close()

    def ask(self, check: str, deadline: float) -> Verdict:
        """(passed, failed or skipped, why, what was found)."""
        self.pipe.send(check)
        try:
            if self.pipe.poll(max(0.0, deadline - time.monotonic())):
                return self.pipe.recv()
        except EOFError:
            self.process.join()
            return "failed", f"its process died with code {self.process.exitcode}", {}
        raise TimeOver

    def end(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass
class Session:
    """One call of this script: its plan, its time, what it found."""
    plan: Plan
    log: TextIO
    before: dict  # gpu.json of an earlier call
    told: dict = field(default_factory=lambda: {"environment": {}, "checks": {}})
    worker: Worker | None = None
    running: subprocess.Popen | None = None
    begun: float = field(default_factory=time.monotonic)

    def command(self, words: list[str], deadline: float) -> tuple[int, str]:
        """Run a command, its output into the log: its exit code, its error or else last line."""
        start = os.fstat(self.log.fileno()).st_size
        self.running = subprocess.Popen(words, cwd=ROOT, stdout=self.log, stderr=self.log,
                                        start_new_session=True)
        try:
            code = self.running.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            raise TimeOver from None
        self.running = None
        text = Path(self.log.name).read_bytes()[start:].decode(errors="replace")
        lines = [line for part in text.splitlines() if (line := part.split("\r")[-1].strip())]
        errors = [line for line in lines if line.startswith("error:")]
        return code, (errors or lines or ["no output"])[-1]

    def stop(self) -> None:
        """Tell what runs to stop; kill what will not: no file is written by halves."""
        if self.running is None:
            return
        group, end = self.running.pid, time.monotonic() + self.plan.grace
        with contextlib.suppress(ProcessLookupError):  # none of the group is left
            os.killpg(group, signal.SIGTERM)
            while time.monotonic() < end:
                self.running.poll()  # else a zombie would count
                os.killpg(group, 0)
                time.sleep(0.05)
            os.killpg(group, signal.SIGKILL)
        self.running.wait()
        self.running = None

    def close(self) -> None:
        self.stop()
        if self.worker is not None:
            self.worker.end()

    # ---- checks ----

    def verdict(self, title: str, check: Check, deadline: float, again: bool = False) -> bool:
        """Run a check and say how it ended; whether it did not fail."""
        same = self.before["environment"] == self.told["environment"]
        earlier = self.before["checks"].get(title, {}) if same and not again else {}
        begun = time.monotonic()
        if earlier.get("verdict") == "passed":
            how, said, found = "passed", f"before: {earlier['why']}", earlier["found"]
        elif begun >= deadline:
            how, said, found = "skipped", "because its time was over", {}
        else:
            limit = deadline if again else min(deadline, begun + CHECK_SHARE * self.plan.seconds)
            try:
                how, said, found = check(limit)
            except TimeOver:
                self.drop_worker()
                after = f"{time.monotonic() - begun:.0f} s"
                how, said, found = "skipped", f"because it was not done after {after}", {}
        said = " ".join(said.split())[:500]
        number = len(self.told["checks"]) + 1
        self.told["checks"][title] = {"verdict": how, "why": said.removeprefix("before: "),
                                      "found": found}
        print(f"{number:>2}  {title:<20} {how:<8} {said}", flush=True)
        return how != "failed"

    def ask(self, check: str) -> Check:
        def run(deadline: float) -> Verdict:
            self.worker = self.worker or Worker(self.plan, self.log)
            told = self.worker.ask(check, deadline)
            if told[0] == "failed":  # after a fault of the device a process is of no use
                self.drop_worker()
            return told
        return run

    def drop_worker(self) -> None:
        if self.worker is not None:
            self.worker.end()
            self.worker = None

    def rehearsed_tests(self, deadline: float) -> Verdict:
        if not self.plan.on_gpu:
            return "skipped", "because they ask for a GPU; make test rehearses them on a CPU", {}
        if lacks("pytest"):
            return "skipped", "because pytest is not installed", {}
        files = ["tests/test_cuda.py", "tests/test_engine.py"]
        if not lacks("hypothesis", "sklearn"):
            files.append("tests/test_metrics.py")
        words = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", *files]
        code, said = self.command(words, deadline)
        return "failed" if code else "passed", f"{said.strip('= ')} of {', '.join(files)}", {}

    def base_rows(self, deadline: float) -> Verdict:
        """The first row of each table, seed 0: records that count, beside the report's numbers."""
        words = [*self.plan.make, *self.plan.base_rows, f"SEEDS={self.plan.seeds[0]}"]
        code, said = self.command(words, deadline)
        return ("failed", said, {}) if code else self.ask("numbers")(deadline)

    def one_process(self, deadline: float) -> Verdict:
        script, flags = gpu_checks.commands(self.plan, self.plan.base_rows[-1])[0]
        code, said = self.command([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                   "--nproc-per-node=1", script, *flags, "--dry-run"], deadline)
        return "failed" if code else "passed", said if code else "a dry run of one process", {}

    def export(self, deadline: float) -> Verdict:
        return self.tool([*self.plan.make, "export"], deadline)

    def bench(self, deadline: float) -> Verdict:
        """The forms of the last base row, timed; the record is one of those that are packed."""
        trained = Path("runs", self.plan.protocol, self.plan.base_rows[-1], "seed0.pt")
        return self.tool([sys.executable, "export.py", "bench", "--checkpoint", str(trained),
                          "--device", self.plan.device, "--record",
                          str(self.plan.results / "inference.json")], deadline)

    def tool(self, words: list[str], deadline: float) -> Verdict:
        if lacking := lacks("onnx", "onnxruntime", "onnxscript", "matplotlib"):
            return "skipped", f"because {', '.join(lacking)} is not installed", {}
        code, said = self.command(words, deadline)
        return "failed" if code else "passed", said, {}

    # ---- rows ----

    def rows(self, deadline: float) -> bool:
        """Run what is missing, one seed of every row first; whether none failed. TimeOver."""
        whole, targets = True, list(ROWS)
        if lacks("matplotlib"):
            targets.remove("rows/attention")
            print("    attention is left out, because matplotlib is not installed", flush=True)
        for seed in self.plan.seeds:
            for target in targets:
                words = [*self.plan.make, target, f"SEEDS={seed}"]
                if self.command([*words, "-q"], deadline)[0] == 0:  # nothing is missing
                    continue
                records, begun = len(self.records()), time.monotonic()
                try:
                    code, said = self.command([*words, "-k"], deadline)
                finally:
                    made = len(self.records()) - records
                    print(f"    seed {seed}, {target.removeprefix('rows/')}: {made} records in "
                          f"{time.monotonic() - begun:.0f} s", flush=True)
                    self.pack()
                if code:
                    print(f"    a row failed, the others ran: {said}", flush=True)
                    whole = False
        return whole

    def records(self) -> list[Path]:
        files = self.plan.results.rglob("*")
        return sorted(path for path in files if path.suffix in (".json", ".npz"))

    def pack(self) -> None:
        """Write the verdicts, then one archive of them and of all records."""
        if self.told["checks"]:
            text = json.dumps(self.told, indent=1) + "\n"
            self.plan.results.mkdir(parents=True, exist_ok=True)
            replace(self.plan.results / "gpu.json", lambda path: path.write_text(text))
        self.plan.archive.parent.mkdir(parents=True, exist_ok=True)
        replace(self.plan.archive, self.write_archive)

    def write_archive(self, path: Path) -> None:
        with tarfile.open(path, "w:gz") as archive:
            for record in self.records():
                archive.add(record, record.relative_to(self.plan.results.parents[1]))


def lacks(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def replace(path: Path, write: Callable[[Path], object]) -> None:
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


class Told(BaseException):
    """A signal told this script to stop."""


def told(number: int, frame: object) -> None:
    raise Told(number)


@contextlib.contextmanager
def handling(handler: Callable | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def opened(plan: Plan) -> Iterator[Session]:
    """A session whose processes are stopped and whose records are packed, however it ends."""
    try:
        before = json.loads((plan.results / "gpu.json").read_text())
    except (FileNotFoundError, ValueError):
        before = {"environment": None, "checks": {}}
    plan.archive.parent.mkdir(parents=True, exist_ok=True)
    with open(plan.archive.with_name(f"gpu-{plan.protocol}.log"), "a") as log:
        session = Session(plan, log, before)
        try:
            yield session
        finally:
            with handling(signal.SIG_IGN):
                session.close()
                session.pack()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", default="report")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing runs")
    parser.add_argument("--seeds", nargs="+", default=["0"])
    parser.add_argument("--results", type=Path, help="folder of the records (results/PROTOCOL)")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # those of the make that called this script
        os.environ.pop(name, None)
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    plan = Plan(args.protocol, args.device, args.seconds, args.seeds,
                args.results or Path("results", args.protocol))
    data_root = Path(os.environ.get("DATA_ROOT") or "data")
    lacking = [name for name in ("FashionMNIST", "MNIST", "mini_facade")
               if not (data_root / name).is_dir()]
    if lacking:
        print(f"error: data root {data_root} lacks {', '.join(lacking)}: put it there, or name "
              f"another folder in DATA_ROOT; see python data.py --help", file=sys.stderr)
        return 2
    try:
        with handling(told):
            return run(plan)
    except Told as stopped:
        number = signal.Signals(stopped.args[0])
        print(f"stopped by {number.name}; the same command goes on", file=sys.stderr)
        return 128 + number


def run(plan: Plan) -> int:
    with opened(plan) as session:
        checks = session.begun + CHECKS_SHARE * plan.seconds
        rows = session.begun + plan.seconds - plan.grace
        try:
            how, why, session.told["environment"] = session.ask("device")(checks)
        except TimeOver:
            how, why = "failed", f"--device {plan.device}: did not answer in time"
        if how == "failed":
            print(f"error: {why.removeprefix('BadInput: ')}", file=sys.stderr)
            return 2
        print(f"{why}; {plan.seconds:.0f} s; details in {session.log.name}", flush=True)
        good = [session.verdict("tests on the device", session.rehearsed_tests, checks),
                session.verdict("dry runs", session.ask("dry_runs"), checks),
                session.verdict("no step waits", session.ask("waits"), checks),
                session.verdict("base rows", session.base_rows, rows, again=True),
                session.verdict("profile", session.ask("profile"), checks),
                session.verdict("the same bits twice", session.ask("same_bits"), checks),
                session.verdict("torchrun", session.one_process, checks)]
        session.drop_worker()  # its memory is for the rows
        try:
            good.append(session.rows(rows))
        except TimeOver:
            print("    the time is over; what ran saved its step, the same command goes on")
        good += [session.verdict("export", session.export, rows),
                 session.verdict("speed of the forms", session.bench, rows)]
    print(f"{len(session.records())} files in {plan.archive}")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
