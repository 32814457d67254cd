"""Runs a command as on a CPU of AVX2 alone: no AVX-512, VNNI, bfloat16 or AMX.

    python tests/avx2.py make test

That is what most laptops and older servers have. torch, oneDNN, MKL, ONNX Runtime and OpenVINO all
ask the CPU what it has, and take the kernels that such a CPU runs; ONEDNN_MAX_CPU_ISA holds oneDNN
alone. Needs Linux on x86-64, a CPU whose cpuid can be made to fault, and a C compiler. It says
nothing of an older CPU's clock and caches, and of programs that are linked statically.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")


def environment() -> dict[str, str]:
    """The environment variables of such a process; OSError or CalledProcessError with the reason
    where there can be none."""
    library = Path(__file__).parents[1] / "build/avx2.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        library.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # two may build it at once
            built = Path(folder, library.name)
            subprocess.run([os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", SOURCE,
                            "-o", built, "-ldl"], check=True, capture_output=True, text=True)
            built.replace(library)
    others = [path for path in os.environ.get("LD_PRELOAD", "").split(os.pathsep)
              if path not in ("", str(library))]
    # torch.compile's cache may hold half a kernel of this CPU's own, and would build on it
    env = {**os.environ, "LD_PRELOAD": os.pathsep.join([str(library), *others]),
           "TORCHINDUCTOR_CACHE_DIR": str(library.with_name("inductor-avx2"))}
    subprocess.run(["true"], check=True, capture_output=True, text=True, env=env)
    return env


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        if not shutil.which(sys.argv[1]):
            raise FileNotFoundError(f"{sys.argv[1]}: no such command")
        os.execvpe(sys.argv[1], sys.argv[1:], environment())
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
