"""One line of `papo doctor`, and what lines are made from: the versions of installed packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "absent", "warning", "missing"]
VersionOf = Callable[[str], str | None]
"""Name of a distribution → its installed version, None where it is not."""


@dataclass(frozen=True)
class DoctorFinding:
    name: str
    found: str
    """Version or description; empty when there is none."""
    state: State
    """`absent`: optional and not there; `warning`: there and doubtful; `missing`: the project cannot work without."""
    note: str = ""
    """What the absence costs, or what is wrong; the command that mends it."""


def version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def brings(target: str, gpu: bool) -> str:
    """The command that installs what a note is about: on a machine with a GPU everything comes by one."""
    return f"run: make {'gpu-venv' if gpu else target}"
