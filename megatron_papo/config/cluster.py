"""The section `cluster`: what a Slurm job asks for and what its ranks run in.

A run that is started by hand reads none of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Positive, Section


class ClusterConfig(Section):
    nodes: Count = 1
    """Number of machines: Slurm's --nodes."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    """GPUs of each machine: Slurm's --gpus-per-node. Each has one rank. 0: ranks without GPUs, `ranks_per_node` of
    them."""
    ranks_per_node: Count | None = None
    """Number of ranks on each machine; null: one for each GPU."""
    gpu: str = "H100"
    """Kind of GPU whose memory the plan is checked against: a name in the table of GPUs of `costs/`."""
    gpu_memory_gib: Positive | None = None
    """Memory of one GPU in GiB, where the table lacks the kind or the cluster's GPUs have another size."""
    cpus_per_rank: Count = 8
    """CPU cores of each rank: Slurm's --cpus-per-task."""
    memory: str | None = "0"
    """Memory of each machine: Slurm's --mem; 0: all of it; null: the partition's default."""
    time: str = "24:00:00"
    """Time limit of the job: Slurm's --time, as minutes, minutes:seconds, hours:minutes:seconds or
    days-hours:minutes:seconds."""
    partition: str | None = None
    """Partition to which the job is sent: Slurm's --partition."""
    account: str | None = None
    """Account to which the job is charged: Slurm's --account."""
    qos: str | None = None
    """Quality of service of the job: Slurm's --qos."""
    constraint: str | None = None
    """Features that the machines must have: Slurm's --constraint."""
    exclusive: bool = True
    """Whether the job has its machines for itself: Slurm's --exclusive."""
    signal_s: Annotated[int, Field(ge=0, le=65535)] = 900
    """Seconds before the time limit at which Slurm sends USR1: the run saves after the step it is in, and queues itself
    again. Must be longer than a step with its save. 0: no signal."""
    requeue: bool = True
    """Whether a job that was preempted, or whose machine crashed, is queued again: Slurm's --requeue."""
    sbatch: list[str] = []
    """Further options of sbatch, e.g. `--reservation=spring`."""
    environment: Literal["venv", "modules", "container", "apptainer"] = "venv"
    """What the ranks run in: a virtual environment, environment modules, or a container, started by srun (`container`:
    pyxis) or by Apptainer or Singularity (`apptainer`)."""
    venv: Path | None = Path(".venv")
    """Folder of the virtual environment, relative to the project's folder; used by `environment: venv`, and by
    `environment: modules` unless null."""
    modules: list[str] = []
    """Names of environment modules that the batch script loads before the virtual environment; the ranks inherit
    them."""
    container: str | None = None
    """Image of the container: srun's --container-image, or what `apptainer exec` takes."""
    mounts: list[str] = []
    """Further folders that the container sees, as HOST, HOST:CONTAINER or HOST:CONTAINER:ro. The project, the working
    folder and every folder that the settings name are there anyway, at the same path."""
    setup: list[str] = []
    """Shell lines that the batch script runs after the modules and the environment."""
    variables: dict[str, str] = {}
    """Environment variables of every rank; they win over those of slurm/fabric.sh. Keys and tokens are refused here:
    they go into cluster.secrets_file."""
    secrets_file: Path | None = None
    """File of lines NAME=value (WANDB_API_KEY, HF_TOKEN, ...) that only its owner can read (chmod 600). The job reads
    it into the environment of the ranks; its name alone is kept."""

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        if self.environment in ("container", "apptainer") and self.container is None:
            raise ValueError(f"cluster.environment={self.environment} needs cluster.container, an image")
        if self.environment == "modules" and not self.modules:
            raise ValueError("cluster.environment=modules needs cluster.modules, a list of names")
        if self.environment == "venv" and self.venv is None:
            raise ValueError("cluster.environment=venv needs cluster.venv, a folder")
        if self.gpus_per_node == 0 and self.ranks_per_node is None:
            raise ValueError("cluster.gpus_per_node=0 needs cluster.ranks_per_node")
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"cluster.ranks_per_node: {self.ranks_per_node} ranks for cluster.gpus_per_node={self.gpus_per_node}: "
                "it is one rank a GPU"
            )
        limit_s = time_limit_s(self.time)
        if limit_s is not None and self.signal_s >= limit_s:
            raise ValueError(
                f"cluster.signal_s: {self.signal_s} s before the end of cluster.time={self.time} is before its start: "
                "the run would save and leave after its first step"
            )
        return self

    @property
    def image(self) -> str | None:
        """The image that the ranks run in; None where they run on the machine itself."""
        return self.container if self.environment in ("container", "apptainer") else None

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the whole job."""
        return self.nodes * (self.ranks_per_node or self.gpus_per_node)


def time_limit_s(text: str) -> int | None:
    """Slurm's --time in seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None for UNLIMITED and what is none of these."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = [0] * (3 - len(numbers)) + numbers if len(numbers) > 1 else [0, numbers[0], 0]
    return hours * 3600 + minutes * 60 + seconds
