"""Coverage-guided fuzzing of the IDX and the archive reader, by the checks of test_fuzz*.py.

    PYTHONPATH=. python tests/fuzz.py idx --seconds 60      or archive

An input that fails a check ends the run with exit code 1, and is printed. Needs atheris.
"""

import argparse
import multiprocessing
import sys
from pathlib import Path

try:
    import atheris
except ImportError:
    print("error: tests/fuzz.py needs atheris; pip install atheris", file=sys.stderr)
    sys.exit(2)

with atheris.instrument_imports(include=["data", "lab.fetch", "tarfile", "gzip"]):
    import gzip

    import data

import numpy as np
import test_fuzz as checks
import test_fuzz_archives as archives

SHAPES = (2, 3, 4), 2, (1, 3, 4), 1
ARRAYS = {name: np.ones(shape, np.uint8) for name, shape in zip(data.IDX_FILES, SHAPES)}
SAMPLE = {name: checks.idx(array) for name, array in ARRAYS.items()}
ODD = archives.tar([{"name": "mini_facade/" + "é" * 99, "kind": archives.LINK, "link": "."},
                  {"name": "z", "kind": b"x", "body": b"11 size=99\n"},
                  {"name": "z", "size": 1 << 40}])
GOOD = archives.tar(archives.members(archives.FILES))


def read(found: dict[str, bytes], pinned: dict[str, bytes]) -> object:
    with checks.pinned(pinned) as root:
        checks.put(root / "FashionMNIST/raw", found)
        return checks.outcome(root, data.load_idx, root, "FashionMNIST")


def fuzz_idx(content: bytes) -> None:
    found = dict(zip(data.IDX_FILES, content.split(b"--") + [b""] * 4))
    checks.check_idx(read(found, SAMPLE), ARRAYS, found)
    try:
        splits = read(found, found)
    except Exception:  # no pinned set is malformed, so any will do; but what is read must be right
        return
    if isinstance(splits, tuple):
        arrays = [array.numpy() for split in splits
                  for array in (split.images[:, 0], split.targets)]
        assert [checks.idx(array) for array in arrays] == list(found.values())


def fuzz_archive(content: bytes) -> None:
    blocks = bytearray(content)
    for at in range(0, len(blocks), 512):  # with right checksums: tarfile reads no other header
        if blocks[at + 257:at + 262] == b"ustar":
            summed = sum(blocks[at:at + 148] + blocks[at + 156:at + 512]) + 256
            blocks[at + 148:at + 156] = b"%06o\0 " % summed
    archives.check_archive(bytes(blocks))


TARGETS = {"idx": (fuzz_idx, [b"--".join(SAMPLE.values())]),
            "archive": (fuzz_archive, [GOOD, GOOD[:-1024] + ODD, ODD[:-1024] + GOOD,
                                       gzip.compress(GOOD)])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    args = parser.parse_args()
    check, samples = TARGETS[args.reader]

    def target(content: bytes) -> None:
        try:
            check(content)
        except BaseException:  # what hangs is no Exception
            print(f"input: {content!r}", flush=True)
            raise

    with checks.scratch() as folder:
        corpus = checks.put(Path(folder, "corpus"),
                            {str(i): sample for i, sample in enumerate(samples)})
        flags = [str(corpus), f"-artifact_prefix={folder}/", f"-max_total_time={args.seconds}",
                 "-max_len=16384", "-rss_limit_mb=4096", "-timeout=0"]  # the checks stop what hangs
        atheris.Setup([sys.argv[0], *flags], target)
        process = multiprocessing.get_context("fork").Process(target=atheris.Fuzz)  # it ends itself
        process.start()
        process.join()
    sys.exit(process.exitcode != 0)


if __name__ == "__main__":
    main()
