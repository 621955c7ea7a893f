"""The number of GPUs that a process started here could use, told without torch: before anything is refused.

NVIDIA's driver counts those of the machine that this process is allowed to use, and CUDA_VISIBLE_DEVICES chooses among
them as CUDA reads it. Leaves out whether torch can use them (an old driver, a build for CPUs): the
launcher compares (`runtime/launch.py`), and `papo doctor` says why not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_papo.distributed.nvidia_driver import driver

_VARIABLE = "CUDA_VISIBLE_DEVICES"
HIDDEN = {_VARIABLE: ""}
"""What hides every GPU from processes that are started with it."""


def num_visible_gpus(environ: Mapping[str, str]) -> int:
    """The number of GPUs that CUDA shows a process with the variables `environ`; 0 without one."""
    installed = _num_installed()
    asked = environ.get(_VARIABLE)
    if asked is None or not installed:
        return installed
    return _num_chosen(asked, installed)


def _num_chosen(asked: str, installed: int) -> int:
    """How many of `installed` GPUs the value `asked` of CUDA_VISIBLE_DEVICES names: indices or identifiers, up to the
    first that is none. One that stands twice hides all."""
    chosen: list[str] = []
    for word in (part.strip() for part in asked.split(",")):
        if not word.startswith(("GPU-", "MIG-")) and not (word.isdecimal() and int(word) < installed):
            break
        chosen.append(word)
    if len(set(chosen)) < len(chosen):
        return 0
    return 1 if any(word.startswith("MIG-") for word in chosen) else len(chosen)  # a process sees one part of a GPU


def _num_installed() -> int:
    """The GPUs of this machine that this process may use."""
    answer = driver()
    return answer.num_gpus if answer is not None else len(list(Path("/dev").glob("nvidia[0-9]*")))
