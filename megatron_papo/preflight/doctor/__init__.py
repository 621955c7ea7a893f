"""`papo doctor`: what this machine has, what each absence costs, and what is wrong with what is installed.

Versions come from the installed packages' own records; torch alone is imported, to ask for its accelerator and NCCL.
What is required, and in which versions, is read from the project's own requirements, and what was tested from its lists
of versions, so each stands in one place. What is absent or wrong is named with the command that brings it.
Leaves out other machines of a run: start it on each.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_papo.distributed.nvidia_driver import driver, has_device
from megatron_papo.preflight.doctor import gpu
from megatron_papo.preflight.doctor.finding import DoctorFinding, version
from megatron_papo.preflight.doctor.packages import apex, compared, required, shortened
from megatron_papo.text.untrusted import as_text

PROJECT = "megatron_papo"
_SHOWN = {
    "ok": "[green]ok[/]",
    "absent": "[dim]absent[/]",
    "warning": "[yellow]warning[/]",
    "missing": "[red]missing[/]",
}


def main() -> int:
    """Prints the table; 1 when something required is missing or in a version that does not work, else 0."""
    findings = examine()
    table = Table("", "found", "", "what it means", title="papo doctor", title_style="bold", title_justify="left")
    for finding in findings:
        name, found, note = (Text(as_text(text)) for text in (finding.name, finding.found or "–", finding.note))
        table.add_row(name, found, _SHOWN[finding.state], note)
    Console().print(table)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    warned = [finding.name for finding in findings if finding.state == "warning"]
    if warned:
        print(f"papo: warning: see {', '.join(warned)} above")
    print(f"papo: cannot run: {', '.join(missing)}" if missing else "papo: everything required is there")
    return 1 if missing else 0


def examine() -> list[DoctorFinding]:
    """Everything that is looked at, in the order in which it is printed."""
    device = has_device(driver())
    requirements = importlib.metadata.requires(PROJECT) or []
    findings = [_python(), _machine(), *gpu.torch_and_accelerator(), *_for_gpus(device)]
    findings += [apex([Path(entry) for entry in sys.path if entry]), compared(version, device)]
    return findings + shortened(required(requirements, version, device))


def _for_gpus(device: bool) -> list[DoctorFinding]:
    compiler = gpu.find_nvcc(os.environ)
    findings = [gpu.engine(version, device)]
    if device and version("vllm"):
        findings.append(gpu.flashinfer(version, os.environ, compiler, shutil.which("ninja") is not None))
    return [*findings, gpu.transformer_engine(version, device), gpu.nvcc(compiler, device, _cuda_of_torch())]


def _cuda_of_torch() -> str | None:
    if version("torch") is None:
        return None
    import torch

    return torch.version.cuda


def _python() -> DoctorFinding:
    good = sys.version_info[:2] == (3, 12)
    return DoctorFinding(
        "Python", platform.python_version(), "ok" if good else "missing", "" if good else "needed: 3.12"
    )


def _machine() -> DoctorFinding:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return DoctorFinding(
        "machine", f"{cores} cores, {memory:.0f} GiB memory", "ok", f"{free:.0f} GiB free on this disk"
    )
