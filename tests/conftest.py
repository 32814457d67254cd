import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

# the networks here are tiny: more threads would only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"
# read when cuBLAS starts: on a GPU a test of --deterministic may come after others
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import avx2
import pytest
from made_set import make_shapes, make_streets
from PIL import Image

import data
from lab import cli, progress

progress.EVERY = math.inf  # else how fast the machine is would decide which test reads such a line


def real_root(*needed: str) -> Path:
    """The data root if it holds these sets, else the test is skipped with the reason."""
    root = Path(os.environ.get("DATA_ROOT") or "data")
    for name in needed:
        if not (root / name).is_dir():
            pytest.skip(f"needs the real {name} set: set DATA_ROOT to a folder that has it "
                        f"(now {root})")
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


def make_tiny_root(root: Path, train: int = 6, test: int = 3, size: int = 32) -> Path:
    """A data root with a facade set of 6 + 3 synthetic images, 32 pixels a side."""
    for part, indexes in (("train", range(train)), ("test_dev", range(train, train + test))):
        folder = root / "mini_facade" / part
        folder.mkdir(parents=True)
        for i in indexes:
            image, mask = data.synthetic_facade(i, size)
            Image.fromarray(image).save(folder / f"eecs442_{i:04d}.jpg")
            Image.fromarray(mask).save(folder / f"eecs442_{i:04d}.png")
    return root


@pytest.fixture
def streets(tmp_path) -> Path:
    """A set of one's own for segmentation, drawn."""
    return make_streets(tmp_path / "streets", groups=6, each=2)


@pytest.fixture
def shapes(tmp_path) -> Path:
    """A set of one's own for classification, drawn."""
    return make_shapes(tmp_path / "shapes", each=5)


def small_root(real: Path, root: Path) -> Path:
    """A data root of both real sets of 28x28 images and a few drawn facades: runs take seconds."""
    for name in ("FashionMNIST", "MNIST"):
        (root / name).symlink_to((real / name).resolve())
    return make_tiny_root(root, 24, 8)


def cut(share: float):
    """Damage for a file: all but this share of it from its start is gone."""
    return lambda path: path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


# ---- scripts run in this process; trained and exported once for all tests ----

def run(script: str, *argv) -> int:
    """A script's main, in this process, on the CPU unless told otherwise: its exit code."""
    main = importlib.import_module(script).main
    device = () if "--device" in argv else ("--device", "cpu")
    return cli.guard(lambda: main([*map(str, argv), *device]))


def refused(capsys, script: str, *argv) -> str:
    """The one line that a script gives for its bad input."""
    main = importlib.import_module(script).main
    code = cli.guard(lambda: main([*map(str, argv)]))
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("NOTE")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def one_error(capsys) -> str:
    """The one line of an error among what was said so far."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


def run_seg(root: Path, out: Path, *flags: str) -> int:
    """A tiny segmentation run, two epochs of three steps on the tiny facades: its exit code."""
    tiny = ("--protocol", "smoke", "--size", 32, "--width", 4, "--batch", 2)
    return run("train_seg", *tiny, "--data-root", root, "--out", out, *flags)


def result(out: Path) -> dict:
    """What a run computed, without when and where: weights, losses, metrics."""
    record = json.loads((out / "seed0.json").read_text())
    return {key: record[key] for key in ("weights_sha256", "curve", "metrics", "config", "data")}


def trained(script: str, folder: Path, *flags, root: Path) -> Path:
    assert run(script, "--protocol", "smoke", "--data-root", root, "--out", folder, *flags) == 0
    return folder


def exported(folder: Path, *flags, root: Path) -> Path:
    assert run("export", "--checkpoint", folder / "seed0.pt", "--data-root", root, *flags) == 0
    return folder


@pytest.fixture(scope="session")
def older_cpu():
    """The environment variables of a process that sees AVX2 alone."""
    try:
        return avx2.environment()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no older CPU can be had here: {getattr(error, 'stderr', error)}")


@pytest.fixture(scope="session")
def seg(tmp_path_factory) -> Path:
    """A finished segmentation run, its data root, and in seed0/ its export, every form."""
    folder = tmp_path_factory.mktemp("seg")
    root = make_tiny_root(folder / "root")
    trained("train_seg", folder, "--hourglasses", 1, "--epochs", 30, "--batch", 2, "--lr", 5e-3,
            root=root)
    return exported(folder, root=root)  # trained for long enough to have something to lose


@pytest.fixture(scope="session")
def cls(tmp_path_factory) -> Path:
    """The same for a classifier that knows a boot, without the AOTInductor package."""
    root = real_root("FashionMNIST")
    folder = trained("train_cls", tmp_path_factory.mktemp("cls"), "--depth", 1, "--epochs", 3,
                     "--train-images", 12000, "--batch", 32, "--lr", 4e-3, root=root)
    return exported(folder, "--no-aot", root=root)


@pytest.fixture(scope="session", params=[(64, 256), (128, 1024)], ids=["64px", "128px"])
def sized(request, tmp_path_factory) -> tuple[Path, int, int]:
    """The float forms of a run at another size than its photos', in seed0/; both sizes."""
    size, photos = request.param
    folder = tmp_path_factory.mktemp("sized")
    root = make_tiny_root(folder / "root", size=photos)
    trained("train_seg", folder, "--hourglasses", 1, "--epochs", 20, "--batch", 2, "--lr", 5e-3,
            "--precision", "fp32", "--size", size, root=root)
    return exported(folder, "--no-aot", "--no-int8", root=root), size, photos


@pytest.fixture(scope="session")
def runner() -> Path:
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        pytest.skip("no C++ compiler (CXX, else g++): the C++ program cannot be built")
    headers = "#include <cstdio>\n#include <png.h>\n#include <jpeglib.h>\n"
    if subprocess.run([compiler, "-fsyntax-only", "-x", "c++", "-"], input=headers.encode(),
                      stderr=subprocess.PIPE).returncode:
        pytest.skip("no libpng-dev or libjpeg-dev: the C++ program cannot be built")
    repo = Path(__file__).parents[1]
    subprocess.run(["make", "cpp/runner", f"PY={sys.executable}"], cwd=repo, check=True)
    return repo / "cpp/runner"
