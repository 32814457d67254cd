"""Coverage-guided fuzzing of the IDX and the archive reader, from valid samples on.

    PYTHONPATH=. python tests/fuzz.py idx --seconds 60
    PYTHONPATH=. python tests/fuzz.py archive --seconds 60

Every input must pass the checks of test_fuzz.py. One that does not ends the run with exit code 1, and is printed.
Needs atheris, which has packages for Linux alone.
"""

import argparse
import contextlib
import io
import lzma
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    print("error: needs atheris; pip install atheris", file=sys.stderr)
    sys.exit(2)

with atheris.instrument_imports(include=["data", "tarfile", "gzip", "torchvision.datasets.mnist"]):
    import gzip
    import tarfile

    import data

import numpy as np
import test_fuzz as checks

SHAPES = (2, 3, 4), (2,), (1, 3, 4), (1,)
ARRAYS = {name: np.arange(np.prod(shape), dtype=np.uint8).reshape(shape) for name, shape in zip(data.IDX_FILES, SHAPES)}
SAMPLE = {name: checks.idx(array) for name, array in ARRAYS.items()}
BETWEEN = b"--"  # the files of one input

good = checks.tar(checks.members(checks.FILES))
link = {"name": "mini_facade", "kind": checks.LINK, "link": "real"}
links = checks.tar([*checks.members(checks.FILES, "real"), link])
long_name = tarfile.TarInfo("mini_facade/" + "é" * 99).tobuf(tarfile.PAX_FORMAT)


def parsed(content: bytes) -> np.ndarray:
    shape = np.frombuffer(content, ">u4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def fuzz_idx(content: bytes) -> None:
    found = dict(zip(data.IDX_FILES, content.split(BETWEEN)))
    with checks.pinned(SAMPLE) as root, contextlib.redirect_stderr(io.StringIO()):
        checks.put(root / "FashionMNIST/raw", found)
        checks.check_idx(checks.outcome(root, data.load_idx, root, "FashionMNIST"), ARRAYS, found)
    with checks.pinned(found) as root, contextlib.redirect_stderr(io.StringIO()):
        checks.put(root / "FashionMNIST/raw", found)
        try:
            splits = data.load_idx(root, "FashionMNIST")
        except Exception:  # no pinned set is malformed, so any will do; but what is read must be what is written
            return
    checks.check_idx(splits, {name: parsed(content) for name, content in found.items()}, found)


def fuzz_archive(content: bytes) -> None:
    blocks = bytearray(content)
    for at in range(0, len(blocks), 512):  # with right checksums, or tarfile would read no mutated header
        if blocks[at + 257:at + 262] == b"ustar":
            blocks[at + 148:at + 156] = b" " * 8
            blocks[at + 148:at + 156] = b"%06o\0 " % sum(blocks[at:at + 512])
    checks.check_archive(bytes(blocks))


TARGETS = {"idx": (fuzz_idx, [BETWEEN.join(SAMPLE.values())]),
           "archive": (fuzz_archive, [good, links, long_name + good, gzip.compress(good), lzma.compress(good)])}


def fuzz(target: Callable[[bytes], None], corpus: Path, seconds: int) -> None:
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={corpus.parent}/", f"-max_total_time={seconds}",
                   "-max_len=16384", "-rss_limit_mb=4096", "-timeout=0"], target)  # the checks stop what hangs
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    args = parser.parse_args()
    target, samples = TARGETS[args.reader]
    with checks.scratch() as folder:
        corpus = checks.put(Path(folder, "corpus"), {str(i): sample for i, sample in enumerate(samples)})
        process = multiprocessing.get_context("fork").Process(target=fuzz, args=(target, corpus, args.seconds))
        process.start()
        process.join()
        for path in Path(folder).glob("*-*"):
            print(f"{path.name}: {path.read_bytes()!r}")
    sys.exit(process.exitcode != 0)


if __name__ == "__main__":
    main()
