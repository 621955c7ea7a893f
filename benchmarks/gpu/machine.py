"""What a figure was measured with: the GPU, its driver, and the versions of what computes."""

from __future__ import annotations

import subprocess

import torch

from megatron_papo.distributed.accelerator import device_name
from megatron_papo.preflight.doctor.finding import version

_PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron-core",
    "Transformer Engine": "transformer_engine",
    "vLLM": "vllm",
    "Liger": "liger_kernel",
    "flash-attn": "flash_attn",
}


def machine() -> str:
    """One line. Without a GPU the versions stand alone."""
    known = {shown: version(package) for shown, package in _PACKAGES.items()}
    versions = ", ".join(f"{shown} {number}" for shown, number in known.items() if number is not None)
    absent = ", ".join(shown for shown, number in known.items() if number is None)
    name = device_name()
    device = f"{name} (driver {_driver()}, CUDA {torch.version.cuda})" if name else "no GPU"
    return f"{device}; {versions}" + (f"; without {absent}" if absent else "")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()
