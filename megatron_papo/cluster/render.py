"""The job script of a run, from its settings: #SBATCH lines, the environment as plain variables, and the launcher.

The scripts under slurm/ are the same by hand; a test holds their heads against `sbatch_options`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_papo.cluster.slurm import COMMENT
from megatron_papo.config import ClusterConfig, Config

LOG_NAME = "job_%j.log"
"""Of a job's output, under RUN/cluster."""
ARRAY_LOG_NAME = "job_%A_%a.log"
"""Of a task's."""


def sbatch_options(config: Config) -> list[str]:
    """What the job asks for, as options of sbatch, without where its output goes."""
    cluster = config.cluster
    ranks = cluster.num_ranks // cluster.nodes
    return [
        f"--job-name={config.run.name}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={ranks}",
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        f"--cpus-per-task={cluster.cpus_per_rank}",
        *([] if cluster.memory is None else [f"--mem={cluster.memory}"]),
        f"--time={cluster.time}",
        *_named(cluster),
        *(["--exclusive"] if cluster.exclusive else []),
        *([f"--signal=B:USR1@{cluster.signal_s}"] if cluster.signal_s else []),  # B: to the batch script alone
        "--requeue" if cluster.requeue else "--no-requeue",
        "--open-mode=append",  # a job that is queued again goes on in the same log
        *cluster.sbatch,
    ]


def job_script(config: Config, *, home: Path, work_dir: Path, folder: Path, made_from: str) -> str:
    """The whole script. `home`: the project; `work_dir`: where relative paths of the settings begin; `folder`:
    RUN/cluster, which holds settings.yaml; `made_from`: the command, for whoever reads the script."""
    where = [
        f"--chdir={work_dir}",
        f"--output={folder / LOG_NAME}",
        f"--comment={COMMENT}{folder.parent}",
    ]
    lines = [
        "#!/bin/bash",
        f"# Made by: {' '.join(made_from.splitlines())}",
        *(f"#SBATCH {_quoted(option)}" for option in [*sbatch_options(config), *where]),
        "",
        f"PAPO_HOME={shlex.quote(str(home))}",
        f"PAPO_CONFIG={shlex.quote(str(folder / 'settings.yaml'))}",
        *_environment(config.cluster),
        "papo_setup() {",
        *(f"  {line}" for line in _setup(config.cluster)),
        "}",
        'source "$PAPO_HOME/slurm/launch.sh"',
    ]
    return "\n".join(lines) + "\n"


def array_script(
    options: Sequence[str], scripts: Mapping[int, Path], *, work_dir: Path, folder: Path, made_from: str
) -> str:
    """Of a job array whose task N becomes `scripts[N]`, in the same process, which is the one that Slurm signals.

    `options`: of sbatch, for every task, --array among them; `folder`: where the tasks' output goes.
    """
    where = [f"--chdir={work_dir}", f"--output={folder / ARRAY_LOG_NAME}"]
    lines = [
        "#!/bin/bash",
        f"# Made by: {' '.join(made_from.splitlines())}",
        *(f"#SBATCH {_quoted(option)}" for option in [*options, *where]),
        "",
        "case $SLURM_ARRAY_TASK_ID in",
        *(f"  {task}) exec bash {shlex.quote(str(script))} ;;" for task, script in scripts.items()),
        "esac",
        'echo "papo: error: no script for task $SLURM_ARRAY_TASK_ID" >&2',
        "exit 2",
    ]
    return "\n".join(lines) + "\n"


def _named(cluster: ClusterConfig) -> list[str]:
    named = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    return [f"--{name}={value}" for name, value in named.items() if value is not None]


def _environment(cluster: ClusterConfig) -> Iterator[str]:
    yield f"PAPO_ENVIRONMENT={cluster.environment}"
    if cluster.environment != "container":
        yield f"PAPO_VENV={shlex.quote('' if cluster.venv is None else str(cluster.venv))}"
    yield f"PAPO_MODULES={shlex.quote(' '.join(cluster.modules))}"
    if cluster.environment == "container":
        yield f"PAPO_CONTAINER={shlex.quote(cluster.container or '')}"
        yield f"PAPO_MOUNTS={shlex.quote(','.join(cluster.mounts))}"


def _setup(cluster: ClusterConfig) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.variables.items()]
    return [*cluster.setup, *exports] or [":"]


def _quoted(option: str) -> str:
    """As sbatch reads a line of its own: a value with spaces in quotes."""
    name, equals, value = option.partition("=")
    return f'{name}="{value}"' if equals and any(letter.isspace() for letter in value) else option
