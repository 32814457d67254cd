"""predict.py and the C++ program with a network that shows what it is given."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from lab import forms

REPO = Path(__file__).parents[1]


def masks(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(50, 37), (32, 32), (90, 70)]):
        drawn = Image.fromarray(data.synthetic_facade(i, 96)[0])
        drawn.crop((0, 0, *size)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


class Seen(torch.nn.Module):
    """A network that shows what it is given: a pixel's class is the value of one channel."""

    def __init__(self, channel: int):
        super().__init__()
        self.channel = channel

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = torch.arange(256).view(1, -1, 1, 1)
        return -(images[:, self.channel:self.channel + 1].float() - values).abs()


def seen_by(folder, channels, channel, size, suffix, named=256):
    """Its file, an .onnx or a .ts.pt, as export.py makes them, which names so many classes."""
    grey = ",".join(f"{i:02x}" * 3 for i in range(named))
    about = {"input": "images", "classes": ",".join(map(str, range(named))), "palette": grey,
             "stride": "1", "size": str(size),
             "mean": ",".join("0" * channels), "std": ",".join("1" * channels)}
    module, path = Seen(channel).eval(), folder / f"{channels}{channel}{suffix}"
    if suffix == ".onnx":
        images = torch.zeros(2, channels, 16, 16, dtype=torch.uint8)
        forms.write_onnx(forms.capture(module, images, 1), about, path)
    else:
        forms.write_torchscript(module, about, path)
    return path


@pytest.fixture(params=["python", "cpp"])
def tool(request, tmp_path):
    """predict.py or the C++ program, run in tmp_path: tool(named, argv) with a `seen_by` model."""
    def run_tool(argv, named=256, **how):
        suffix = {"python": ".onnx", "cpp": ".ts.pt"}[request.param]
        model = seen_by(tmp_path, 3, 1, 48, suffix, named)
        before = ([sys.executable, REPO / "predict.py", "--model", model] if suffix == ".onnx" else
                  [request.getfixturevalue("runner"), model])
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
        return subprocess.run([*map(str, before), *map(str, argv)], cwd=tmp_path, text=True, **how)
    return run_tool
