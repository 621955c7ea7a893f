"""The files of a bundle of wheels (`bundle.py`), their checksums, and the installation from it without an index."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megatron_papo.preflight.tested_versions import ROOT, spelt

SUMS, ABOUT, WHEELS, LIST, SET, SOURCE = (
    "SHA256SUMS", "bundle.json", "wheels", "requirements.txt", "constraints.txt", "megatron_papo.tar.gz",
)  # fmt: skip
_NEEDS_GLIBC = re.compile(r"manylinux_2_(\d+)_")
LEGACY_TAGS = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
"""Old names of platform tags → the second number of the glibc that they mean."""


def own_glibc() -> int:
    """The second number of this machine's glibc, 0 where the C library is another."""
    name, version = platform.libc_ver()
    return int(version.split(".")[1]) if name == "glibc" else 0


def glibc_of(wheel: str) -> int:
    """The second number of the oldest glibc that a wheel's name admits, 0 for any."""
    tags = wheel.removesuffix(".whl").rsplit("-", 1)[-1].split(".")
    numbers = [int(found[1]) for tag in tags if (found := _NEEDS_GLIBC.match(tag))]
    return min(
        numbers + [number for tag in tags for name, number in LEGACY_TAGS.items() if tag.startswith(name)], default=0
    )


def wheels_of(folder: Path) -> list[tuple[str, str]]:
    """Name and version of each wheel in `folder`."""
    return [(spelt(parts[0]), parts[1]) for parts in (file.name.split("-") for file in sorted(folder.glob("*.whl")))]


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS: a line for every file below `folder` but itself."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / SUMS)
    (folder / SUMS).write_text("".join(f"{digest(file)}  {file.relative_to(folder)}\n" for file in files))


def verify(folder: Path) -> int:
    """Number of files; ValueError, a line each, for files that lack, differ or are not in the list: `pip` would take
    those too."""
    if not (folder / SUMS).is_file():
        raise ValueError(f"{folder}: has no {SUMS}: no bundle, or one that was not finished")
    lines = [line.partition("  ") for line in (folder / SUMS).read_text().splitlines()]
    listed = {name: told for told, _, name in lines}
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()} - {SUMS}
    faults = [f"{name}: is not there" for name in sorted(listed.keys() - there)]
    faults += [f"{name}: is not in {SUMS}" for name in sorted(there - listed.keys())]
    same = sorted(listed.keys() & there)
    faults += [f"{name}: is damaged: its checksum differs" for name in same if digest(folder / name) != listed[name]]
    if faults:
        raise ValueError("\n".join(f"{folder}/{fault}" for fault in faults))
    return len(there)


def check_machine(about: dict[str, Any], python: str, arch: str, glibc: int) -> None:
    """Raises ValueError where a bundle is for another kind of machine."""
    here = {"python": python, "arch": arch}
    for key, value in here.items():
        if about[key] != value:
            raise ValueError(f"the bundle is for {key} {about[key]}, this machine has {value}")
    if about["glibc"] > glibc:
        raise ValueError(f"the bundle needs glibc 2.{about['glibc']}, this machine has 2.{glibc}")


def install(folder: Path, venv: Path) -> None:
    """Installs a bundle and this checkout into `venv`, asking no index. Raises ValueError for a damaged bundle."""
    started = time.monotonic()
    files = verify(folder)
    about = json.loads((folder / ABOUT).read_text())
    check_machine(about, "{}.{}".format(*sys.version_info), platform.machine(), own_glibc())
    print(f"bundle: {files} files are as the list says; installing the {about['set']} set into {venv}", flush=True)
    make_venv(venv)
    python = venv / "bin" / "python"
    offline = ["--no-index", "--no-deps", "--find-links", str(folder / WHEELS)]
    if uv := shutil.which("uv"):
        pip = [uv, "--no-config", "--offline", "pip", "install", "--quiet", "--python", str(python), *offline]
    else:
        pip = [str(python), "-m", "pip", "--isolated", "install", "--quiet", *offline]
    run([*pip, "-r", str(folder / LIST)])
    run([*pip, "--no-build-isolation", "-e", str(ROOT)])
    shutil.copy(folder / SET, venv / "constraints.txt")
    (venv / "set").write_text(f"{about['set']}\n")
    print(f"bundle: {venv} is ready, after {time.monotonic() - started:.0f} s; now: {venv}/bin/papo doctor")


def make_venv(venv: Path) -> None:
    """By Python's own module, which brings its pip along; uv's is for a Python that lacks that."""
    if os.access(venv / "bin" / "python", os.X_OK):
        return
    done = subprocess.run([sys.executable, "-m", "venv", str(venv)], text=True, capture_output=True)
    uv = shutil.which("uv")
    if done.returncode and uv is None:
        raise ValueError(f"{venv}: {sys.executable} makes no environment: {(done.stdout + done.stderr).strip()}")
    if done.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        run([str(uv), "--offline", "venv", "--quiet", "--python", sys.executable, str(venv)])


def run(command: list[str], **variables: str) -> None:
    """Raises ValueError with the command, whose own words stand above it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UV_")} | variables
    done = subprocess.run(command, cwd=ROOT, env=environ)
    if done.returncode:
        raise ValueError(f"this failed with status {done.returncode}: {' '.join(command[:6])} ...")
