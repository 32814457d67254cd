"""Device, precision and memory."""

import ctypes
import os
import platform
from pathlib import Path

import torch

from lab.files import BadInput


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA where it works, else the CPU. BadInput for a device that this machine lacks.

    From here on float32 is float32: cuDNN's default, TF32, keeps 10 bits of 23.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no values
        return device
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: not usable here ({str(error).splitlines()[0]}); "
                       f"try --device cpu") from error


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a GPU; None for any other device, which shares the host's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def host_memory() -> int:
    """Bytes that this process may still take of the host's memory, the least of all limits known.

    What the kernel counts as available, and, in a container, what its group has left. What caches
    of files hold counts as free.
    """
    known = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if available := counters(Path("/proc/meminfo")).get("MemAvailable:"):
        known = [1024 * available]
    group = Path("/sys/fs/cgroup")
    for folder, limit, used, cached in (
            (group, "memory.max", "memory.current", "file"),
            (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")):
        try:
            most, now = (int((folder / name).read_text()) for name in (limit, used))
            known.append(most - now + counters(folder / "memory.stat").get(cached, 0))
        except (OSError, ValueError):  # no such group, or no limit: "max"
            pass
    return max(0, min(known))


def counters(path: Path) -> dict[str, int]:
    """The numbers in a file of lines "name number ..."; none where it cannot be read."""
    try:
        lines = map(str.split, path.read_text().splitlines())
        return {name: int(value) for name, value, *_ in lines}
    except (OSError, ValueError):
        return {}


def keep_freed_memory() -> None:
    """Stop glibc from giving a large tensor's pages back, only to fault them in again next step."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: the largest block that comes from the heap, 1 GiB
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD: the free heap that is kept


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that convolutions run in under autocast; "auto" is bfloat16 where it is native."""
    if precision == "auto":
        # where it is not native it is emulated, slower than float32: is_bf16_supported() is true of
        # such a GPU too, and asks the current one
        native = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == "cuda" else
                  torch.cpu._is_avx512_bf16_supported())
        precision = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def instruction_sets() -> list[str]:
    """Those that decide which kernels run, and so the last bits: torch's own choice comes first."""
    known = ("avx2", "avx512_f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
             "dot", "i8mm", "sve")
    found = torch.cpu.get_capabilities()  # what cpuid says, not the kernel's /proc/cpuinfo
    limits = [f"{name}={Path(part).name}" for name in ("ONEDNN_MAX_CPU_ISA", "LD_PRELOAD")
              for part in os.environ.get(name, "").replace(":", " ").split()]  # may hide some
    return [torch.backends.cpu.get_cpu_capability(),
            *(name for name in known if found.get(name)), *limits]


def kernels(device: torch.device) -> str:
    """The newest kind of kernels that run there, in a word: cuda, amx, avx512, avx2, ..."""
    if device.type != "cpu":
        return device.type
    sets = instruction_sets()
    return "amx" if "amx_int8" in sets else sets[0].lower()
