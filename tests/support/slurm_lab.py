"""A real Slurm cluster of two nodes on this machine, for a whole test session: `tools/slurm_lab.sh`.

The fixture `slurm` is every test's, by tests/conftest.py. Where a cluster is there already
(SLURM_CONF is set, as `.ci/run` does), it is used and left alone; else one is started under a folder and ports of its
own and stopped at the end. Tests are skipped, with the reason, where that is not possible.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "slurm_lab.sh"
NUM_NODES = 2
_PORTS = NUM_NODES + 2
_START_LIMIT_S = 180.0


@dataclass(frozen=True)
class Slurm:
    environ: dict[str, str]
    """For processes that talk to the cluster: this process's own, SLURM_CONF, and nothing of a job around it."""
    lab_environ: dict[str, str]
    """The environment of tools/slurm_lab.sh."""

    def call(self, *words: object, **options: object) -> subprocess.CompletedProcess[str]:
        """A command that talks to the cluster; its output is text."""
        given: dict = {"env": self.environ, "capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run(list(map(str, words)), check=False, **given)

    def lab(self, *words: object) -> None:
        """`tools/slurm_lab.sh crash-node node2`, `start-node node2`."""
        subprocess.run(["bash", str(TOOL), *map(str, words)], env=self.lab_environ, check=True, timeout=60)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PAPO_"))}
    plain["PYTHONPATH"] = str(TOOL.parents[1])  # rewards of these tests, from whatever folder a job starts in
    if "SLURM_CONF" in os.environ:
        conf = Path(os.environ["SLURM_CONF"])
        port = next(line for line in conf.read_text().splitlines() if line.startswith("SlurmctldPort=")).split("=")[1]
        lab = plain | {"SLURM_LAB": str(conf.parent), "SLURM_LAB_PORT": port}
        yield Slurm(plain | {"SLURM_CONF": str(conf)}, lab)
        return
    if os.geteuid() != 0:
        pytest.skip("tools/slurm_lab.sh starts its nodes as root")
    with tempfile.TemporaryDirectory(prefix="papo-slurm-") as folder:
        Path(folder).chmod(0o755)  # munged wants its socket within reach of everyone
        lab = plain | {"SLURM_LAB": folder, "SLURM_LAB_PORT": str(_free_ports()), "SLURM_LAB_NODES": str(NUM_NODES)}
        try:
            _run(lab, "start")
            yield Slurm(plain | {"SLURM_CONF": f"{folder}/slurm.conf"}, lab)
        finally:
            subprocess.run(["bash", str(TOOL), "stop"], env=lab, check=False, capture_output=True, timeout=60)


def _run(environ: dict[str, str], word: str) -> None:
    try:
        done = subprocess.run(
            ["bash", str(TOOL), word], env=environ, capture_output=True, text=True, timeout=_START_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"no Slurm: tools/slurm_lab.sh {word} took longer than {_START_LIMIT_S:.0f} s")
    if done.returncode:
        pytest.skip(f"no Slurm: tools/slurm_lab.sh {word}: {' '.join(done.stderr.split())[-300:]}")


def _free_ports() -> int:
    """The first of a few ports in a row of which none is taken."""
    for first in range(17_000, 19_000, 10):
        with_port = []
        try:
            for port in range(first, first + _PORTS):
                with_port.append(holder := socket.socket())
                holder.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for holder in with_port:
                holder.close()
    raise RuntimeError("no free ports between 17000 and 19000")
