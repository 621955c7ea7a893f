"""Checking, rendering and submitting a run, as one job or as a chain of jobs; and submitting it again.

A chain is for clusters that do not let a job queue itself again: each job waits for the one before to end, however it
ended, and goes on from the newest checkpoint. Those that find the run finished end at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_papo.cluster import run_records
from megatron_papo.cluster.render import job_script
from megatron_papo.cluster.secrets_file import fault_of_secrets
from megatron_papo.cluster.slurm import SlurmError, sbatch
from megatron_papo.config import Config, ConfigError, dump_config, load_config
from megatron_papo.files.small_files import write_atomically
from megatron_papo.preflight.check import check_everything

HOME = Path(__file__).resolve().parents[2]
"""The project's folder, where slurm/launch.sh lies."""


@dataclass(frozen=True)
class SubmissionPlan:
    """A checked run that is about to be submitted."""

    config: Config
    script: str
    checked: str
    """The line that `papo check` prints."""
    warnings: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        return self.config.run.dir


def plan(config_file: Path | None, overrides: Sequence[str], made_from: str, num_jobs: int = 1) -> SubmissionPlan:
    """Reads and checks the settings. Raises ConfigError, a line a fault, before anything is written.

    In a chain no job queues itself again: the next one goes on.
    """
    chained = ["cluster.requeue=false"] if num_jobs > 1 else []
    config = load_config(config_file, [*overrides, *chained])
    checked = check_everything("train", config, config.cluster.num_ranks)
    faults = [*checked.faults, *_environment_faults(config)]
    if num_jobs > 1 and config.checkpoint.contents == "none":
        faults.append("checkpoint.contents=none: every job of a chain would begin anew, for none saves anything")
    if faults:
        raise ConfigError("\n".join(faults))
    folder = run_records.folder_of(config.run.dir.absolute())
    script = job_script(config, home=HOME, work_dir=Path.cwd(), folder=folder, made_from=made_from)
    return SubmissionPlan(config, script, checked.summary, (*checked.warnings, *_losses(config)))


def submit(plan: SubmissionPlan, num_jobs: int = 1) -> list[str]:
    """Writes RUN/cluster and submits, in the folder in which the plan was made; the ids of the jobs.

    Raises SlurmError when the run has a job in the queue, or with Slurm's own words.
    """
    living = run_records.living_jobs(plan.run_dir)
    if living:
        job = living[0]
        raise SlurmError(
            f"{plan.run_dir}: job {job.id} of this run is in the queue ({job.state}); "
            f"`submit_slurm.py cancel {plan.run_dir}` first, or take another run.dir"
        )
    folder = write(plan)
    jobs: list[str] = []
    for position in range(1, num_jobs + 1):
        after = [f"--dependency=afterany:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs.append(sbatch(str(folder / "job.sh"), after))
        entry = run_records.Submission(
            jobs[-1], round(time.time(), 1), plan.config.cluster.nodes, position, num_jobs, str(Path.cwd())
        )
        run_records.record(plan.run_dir, entry)
    return jobs


def write(plan: SubmissionPlan) -> Path:
    """RUN/cluster with the resolved settings and the job script, which alone hold secrets, for the job; that folder."""
    folder = run_records.folder_of(plan.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if plan.config.run.cache_dir is not None:
        plan.config.run.cache_dir.mkdir(parents=True, exist_ok=True)  # a container mounts it, which takes a folder
    write_atomically(folder / "settings.yaml", dump_config(plan.config, secrets=True), private=True)
    write_atomically(folder / "job.sh", plan.script, private=True)
    return folder


def plan_again(run_dir: Path, overrides: Sequence[str], made_from: str, num_jobs: int = 1) -> SubmissionPlan:
    """The kept settings of a run with `overrides` over them: other nodes, another layout, more steps.

    Call it in the run's `work_dir`. Raises ConfigError for overrides that would make another run of it.
    """
    for override in overrides:
        if override.startswith("run.dir="):
            raise ConfigError(f"{override}: resuming goes on in {run_dir}; submit anew for another folder")
    was_chain = run_records.submissions(run_dir)[-1].chain_length > 1  # whose jobs did not queue themselves again
    again = [f"run.dir={run_dir}", *(["cluster.requeue=true"] if was_chain else [])]
    return plan(run_records.folder_of(run_dir) / "settings.yaml", [*again, *overrides], made_from, num_jobs)


def work_dir(run_dir: Path) -> Path:
    """Where the run was last submitted from. Raises ConfigError for a folder that never was, or when that is gone."""
    submitted = run_records.submissions(run_dir)
    if not submitted or not (run_records.folder_of(run_dir) / "settings.yaml").is_file():
        raise ConfigError(
            f"{run_dir}: was never submitted: there is no {run_records.folder_of(run_dir) / 'jobs.jsonl'}"
        )
    folder = Path(submitted[-1].work_dir)
    if not folder.is_dir():
        raise ConfigError(f"{run_dir}: was submitted from {folder}, which is no more; relative paths began there")
    return folder


def _losses(config: Config) -> list[str]:
    if config.cluster.image is None or config.run.cache_dir is not None:
        return []
    return ["run.cache_dir: null: what libraries download and compile within a container may be lost with it"]


def _environment_faults(config: Config) -> list[str]:
    """What the job would refuse, as far as it shows from here: the login node sees the nodes' disks."""
    cluster = config.cluster
    faults = []
    if cluster.environment == "venv" and cluster.venv is not None:
        python = (HOME / cluster.venv) / "bin" / "python"
        if not python.exists():
            faults.append(f"cluster.venv: no virtual environment in {HOME / cluster.venv}")
    if cluster.secrets_file is not None and (fault := fault_of_secrets(cluster.secrets_file.expanduser())):
        faults.append(fault)
    image = cluster.image
    if image is not None and image.startswith(("/", "./")) and not Path(image).exists():
        faults.append(f"cluster.container: {image}: no such image")
    if not (HOME / "slurm" / "launch.sh").is_file():
        faults.append(f"{HOME}: holds no slurm/launch.sh: install the project from a checkout (pip install -e)")
    return faults
