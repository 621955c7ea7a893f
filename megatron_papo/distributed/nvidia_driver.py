"""What NVIDIA's driver says of this machine, whatever CUDA torch was built for, and without torch.

The driver is asked through its management library (NVML), as `nvidia-smi` does. Leaves out GPUs of other makers.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

_NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Driver:
    """What NVML says of this machine."""

    version: str
    """Such as 535.104.05."""
    cuda: tuple[int, int]
    """The newest CUDA that the driver runs."""
    num_gpus: int


def driver(library: str = _NVML) -> Driver | None:
    """What the driver says of itself; None where there is none, or where it does not answer."""
    try:
        nvml = ctypes.CDLL(library)
        if nvml.nvmlInit_v2():
            return None
        version, cuda, count = ctypes.create_string_buffer(96), ctypes.c_int(), ctypes.c_uint()
        failed = nvml.nvmlSystemGetDriverVersion(version, len(version))
        failed = failed or nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        failed = failed or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no such library, or no such function in it
        return None
    if failed:
        return None
    return Driver(version.value.decode(errors="replace"), (cuda.value // 1000, cuda.value % 1000 // 10), count.value)


def has_device(found: Driver | None, devices: Path = Path("/dev")) -> bool:
    """Whether an NVIDIA GPU is in this machine, whatever torch says of it. A container may show any one of several."""
    return any(devices.glob("nvidia[0-9]*")) or (found is not None and found.num_gpus > 0)
