"""Makes the libraries that stand for CUDA where there is no GPU, and says how a process is started with them.

`runtime.c` answers what torch asks of CUDA's runtime, `nvml.c` what it asks of NVIDIA's management library; a
libcuda.so.1 exports every function of the driver that `cuda.h` names, each of which does nothing and succeeds. A C
compiler is needed; CUDA's headers come with torch and Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

_HERE = Path(__file__).parent
_VARIANTS = ("", "_v2", "_v3", "_ptsz", "_v2_ptsz")
"""How names of the driver end beside the plain one, by version and by kind of default stream."""


class NoFakeGpu(Exception):
    """There can be none on this machine, and why."""


def headers() -> list[Path]:
    """Folders of CUDA's headers: first those of the runtime that torch loads, which lack a part (`crt`), then Triton's,
    which may be of another version of CUDA. Raises NoFakeGpu."""
    folders = [folder for place in _places("nvidia") for folder in sorted(place.glob("cu[0-9]*/include"))]
    folders += [folder for place in _places("triton") if (folder := place / "backends" / "nvidia" / "include").is_dir()]
    if not any((folder / "crt").is_dir() for folder in folders):
        raise NoFakeGpu("Triton, which brings CUDA's headers, is not installed or has none")
    return folders


def _places(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]


def build(folder: Path) -> None:
    """The libraries into `folder`. Raises NoFakeGpu without a compiler or headers, and where the compiler fails."""
    folders = headers()
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoFakeGpu("no C compiler (cc, gcc) is installed")
    names = sorted(set(re.findall(r"\b(cu[A-Z]\w+)\s*\(", (folders[0] / "cuda.h").read_text())))
    every = dict.fromkeys(name + ending for name in names for ending in _VARIANTS)
    driver = folder / "driver.c"
    driver.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in every))
    shared = [compiler, "-shared", "-fPIC", "-w", *(f"-I{each}" for each in folders)]
    _run([*shared, str(_HERE / "runtime.c"), "-o", str(folder / "libruntime.so")])
    _run([*shared, str(_HERE / "nvml.c"), "-o", str(folder / "libnvidia-ml.so.1")])
    _run([*shared, "-Wl,-soname,libcuda.so.1", str(driver), "-o", str(folder / "libcuda.so.1")])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoFakeGpu(f"{command[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}")


def environment(folder: Path) -> dict[str, str]:
    """The variables of a new process that sees the GPU of the libraries in `folder`; one that runs already cannot.

    Nothing is compiled by torch there; torch asks NVML whether there is a GPU, so that a fork can still use it.
    """
    environ = dict(os.environ)
    environ["LD_PRELOAD"] = str(folder / "libruntime.so")
    environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(folder), environ.get("LD_LIBRARY_PATH")]))
    return environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
