"""The definitions of images, which no test builds: what they name is there, and both install by the same target."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DOCKER = (REPO / "container" / "Dockerfile").read_text()
APPTAINER = (REPO / "container" / "papo.def").read_text()


def _section(name: str) -> list[str]:
    """The lines of a section of the Apptainer definition."""
    body = APPTAINER.partition(f"%{name}\n")[2]
    return [line.strip() for line in body.split("\n%")[0].splitlines() if line.strip()]


def _packages(text: str) -> list[str]:
    lines = re.search(r"--no-install-recommends \\\n((?:.*\\\n)*.*)", text)
    assert lines is not None
    return re.split(r"&&|\n\s+rm ", lines[1])[0].replace("\\", "").split()


def test_files_that_an_image_copies_are_there_and_all_that_the_installation_reads():
    copied = {line.split()[0] for line in _section("files")}
    assert all((REPO / name).exists() for name in copied)
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, text=True, capture_output=True).stdout.splitlines()
    here = {name.split("/")[0] for name in listed if not name.startswith((".", "docs", "container"))}
    assert here - copied <= {"AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md"}


def test_both_images_are_made_from_the_same_image_by_the_same_target():
    (image,) = set(re.findall(r"nvidia/cuda:\S+", DOCKER + APPTAINER))
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d-devel-ubuntu24\.04", image)  # torch's CUDA, and nvcc
    assert "RUN PIP_NO_CACHE_DIR=1 make gpu-venv\n" in DOCKER and "PIP_NO_CACHE_DIR=1 make gpu-venv" in _section("post")
    assert sorted(_packages(DOCKER)) == sorted(_packages(APPTAINER))
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.M)
    assert "gpu-venv" in targets


def test_what_is_made_here_stays_out_of_an_image():
    ignored = (REPO / "container" / "Dockerfile.dockerignore").read_text().split()
    assert {"runs", "build", "dist", "wandb", ".git", ".venv*"} <= set(ignored)
