import math
import os
from pathlib import Path

# the networks here are tiny: more threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
# read when cuBLAS starts: on a GPU a test of --deterministic may come after others
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
from PIL import Image

import data
from lab import progress

progress.EVERY = math.inf  # else how fast the machine is would decide which test reads such a line


def real_root(*needed: str) -> Path:
    """The data root if it holds these sets, else the test is skipped with the reason."""
    root = Path(os.environ.get("DATA_ROOT") or "data")
    for name in needed:
        if not (root / name).is_dir():
            pytest.skip(f"needs the real {name} set: set DATA_ROOT to a folder that has it (now {root})")
    return root


@pytest.fixture
def fashion_root() -> Path:
    return real_root("FashionMNIST")


@pytest.fixture
def facade_root() -> Path:
    return real_root("mini_facade")


@pytest.fixture
def tiny_root(tmp_path) -> Path:
    return make_tiny_root(tmp_path / "root")


def make_tiny_root(root: Path, train: int = 6, test: int = 3) -> Path:
    """A data root with a facade set of 6 + 3 synthetic images, 32 pixels a side."""
    for part, indexes in (("train", range(train)), ("test_dev", range(train, train + test))):
        folder = root / "mini_facade" / part
        folder.mkdir(parents=True)
        for i in indexes:
            image, mask = data.synthetic_facade(i, 32)
            Image.fromarray(image).save(folder / f"eecs442_{i:04d}.jpg")
            Image.fromarray(mask).save(folder / f"eecs442_{i:04d}.png")
    return root
