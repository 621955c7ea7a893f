"""Why torch cannot use the GPUs that a machine has; a run must not take such a machine for one without any.

What the driver says (`distributed/nvidia_driver.py`) is compared with what torch finds, which is imported only where
there is a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron_papo.distributed.nvidia_driver import Driver, driver, has_device

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA → first branch of NVIDIA's Linux driver that runs it, by the table of
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html."""
_INSTALL = "docs/install.md"


def is_hidden(environ: Mapping[str, str]) -> bool:
    """Whether the user keeps this process from all GPUs."""
    return environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def reason(built_for: str | None, found: Driver | None, environ: Mapping[str, str]) -> str:
    """Why torch, `built_for` a version of CUDA, finds none of the GPUs that are there, and what mends it."""
    if built_for is None:
        return f"torch is a build for CPUs; run: make clean gpu-venv ({_INSTALL})"
    needed = OLDEST_DRIVER.get(int(built_for.split(".")[0]))
    asks = f"torch is built for CUDA {built_for}" + (f", which needs driver {needed} or newer" if needed else "")
    if found is None:
        told = "NVIDIA's driver does not answer (nvidia-smi)"
        return f"{told}; a container has to be started with --nv (Apptainer) or --gpus all (Docker); {asks}"
    if found.cuda[0] < int(built_for.split(".")[0]):
        return f"driver {found.version}, which runs CUDA {'.'.join(map(str, found.cuda))}, is too old: {asks}"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} names none of the {found.num_gpus} GPUs that driver {found.version} has"
    return f"torch for CUDA {built_for} does not find them, though driver {found.version} is new enough; see nvidia-smi"


def fault_of_gpus(environ: Mapping[str, str] | None = None) -> str | None:
    """The line that ends a run on a machine whose GPUs torch cannot use; None without GPUs, with GPUs that it can use,
    and where CUDA_VISIBLE_DEVICES hides them all on purpose."""
    environ = os.environ if environ is None else environ
    found = driver()
    if not has_device(found) or is_hidden(environ):
        return None
    import torch

    if torch.cuda.is_available():
        return None
    told = reason(torch.version.cuda, found, environ)
    return f"this machine has GPUs that cannot be used: {told}; with --cpu it runs on the CPU"
