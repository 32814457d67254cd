"""What made a run, and what came of it: code, versions, device; digest and cost of a network."""

import copy
import hashlib
import platform
import subprocess
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lab.devices import instruction_sets
from lab.distributed import ranks
from lab.files import tree_digest

SOURCE = Path(__file__).parents[1]


def environment(device: torch.device, dtype: torch.dtype) -> dict:
    """The code (commit, and a digest that needs no git), versions, device, precision."""
    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "*.py")
    except OSError:  # no git on this machine
        commit, changes = None, None
    sources = [(path.relative_to(SOURCE).as_posix(), path.read_bytes())
               for path in (*SOURCE.glob("*.py"), *SOURCE.glob("lab/*.py"))
               if not path.name.startswith(".")]  # an editor's, a link to nowhere
    return {"commit": commit, "uncommitted_changes": None if changes is None else bool(changes),
            "source_sha256": tree_digest(sources), "python": platform.python_version(),
            "torch": str(torch.__version__), "torchvision": torchvision.__version__,
            "platform": platform.platform(), "device": device_name(device),
            "instructions": instruction_sets(), "processes": ranks(),
            "precision": str(dtype).removeprefix("torch.")}


def git(*args: str) -> str | None:
    done = subprocess.run(["git", "-C", SOURCE, *args], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(named or [platform.machine()])[0]}, {torch.get_num_threads()} threads"


def weights_digest(model: nn.Module) -> str:
    """sha256 over the names and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def multiply_adds(model: nn.Module, shape: torch.Size) -> int:
    """Multiply-adds of one forward pass of one image (C, H, W), counted without computing it."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta").eval()(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops() // 2
