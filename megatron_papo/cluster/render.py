"""The job script of a run, from its settings: #SBATCH lines, the environment as plain variables, and the launcher.

No value becomes a command: bash gets each in quotes, and where there are none (#SBATCH lines) signs that mean something
there are refused. `cluster.setup` alone is shell, and the user's own.
The scripts under slurm/ are the same by hand; a test holds their heads against `sbatch_options`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_papo.cluster.mounts import container_mounts
from megatron_papo.cluster.slurm import COMMENT
from megatron_papo.config import ClusterConfig, Config, ConfigError
from megatron_papo.text.secret_values import text_without_secrets
from megatron_papo.text.untrusted import as_text

LOG_NAME = "job_%j.log"
"""Name of a job's output, under RUN/cluster."""
ARRAY_LOG_NAME = "job_%A_%a.log"
"""Name of the output of a job array's task."""
_OPTION = re.compile(r"--?[A-Za-z][\w-]*(?:[= ][\w ./:,=+@%&|()\[\]*!~-]*)?")
"""An option of sbatch, as a #SBATCH line holds it: without quotes, backslashes, # and all that begins something of its
own."""


def sbatch_options(config: Config) -> list[str]:
    """What the job asks for, as options of sbatch, without where its output goes.

    Raises ConfigError for values that do not fit into a line of a job script.
    """
    cluster = config.cluster
    ranks = cluster.num_ranks // cluster.nodes
    asked = [
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
    ]
    keys = {"job-name": "run.name", "mem": "cluster.memory"}
    for option in asked:
        name = option[2:].partition("=")[0]
        _check(option, keys.get(name, f"cluster.{name}"))
    for option in cluster.sbatch:
        _check(option, "cluster.sbatch")
    return [*asked, *cluster.sbatch]


def job_script(config: Config, *, home: Path, work_dir: Path, folder: Path, made_from: str) -> str:
    """The whole script. `home`: the project; `work_dir`: where relative paths of the settings begin; `folder`:
    RUN/cluster, which holds settings.yaml; `made_from`: the command, for whoever reads the script."""
    where = [*_places(work_dir, folder, LOG_NAME, "run.dir"), f"--comment={COMMENT}{folder.parent}"]
    lines = [
        "#!/bin/bash",
        f"# Made by: {_shown(made_from)}",
        *(f"#SBATCH {_quoted(option)}" for option in [*sbatch_options(config), *where]),
        "",
        f"PAPO_HOME={shlex.quote(str(home))}",
        f"PAPO_CONFIG={shlex.quote(str(folder / 'settings.yaml'))}",
        *_environment(config, home, work_dir),
        "papo_setup() {",
        *(f"  {line}" for line in _setup(config.cluster)),
        "}",
        'source "$PAPO_HOME/slurm/launch.sh"',
    ]
    return "\n".join(lines) + "\n"


def array_script(
    options: Sequence[str], scripts: Mapping[int, Path], *, work_dir: Path, folder: Path, made_from: str
) -> str:
    """The script of a job array whose task N becomes `scripts[N]`, in the same process, which is the one that Slurm
    signals.

    `options`: of sbatch, for every task, --array among them; `folder`: where the tasks' output goes.
    """
    where = _places(work_dir, folder, ARRAY_LOG_NAME, "dir")
    lines = [
        "#!/bin/bash",
        f"# Made by: {_shown(made_from)}",
        *(f"#SBATCH {_quoted(option)}" for option in [*options, *where]),
        "",
        "case $SLURM_ARRAY_TASK_ID in",
        *(f"  {task}) exec bash {shlex.quote(str(script))} ;;" for task, script in scripts.items()),
        "esac",
        'echo "papo: error: no script for task $SLURM_ARRAY_TASK_ID" >&2',
        "exit 2",
    ]
    return "\n".join(lines) + "\n"


def _places(work_dir: Path, folder: Path, log_name: str, key: str) -> list[str]:
    """Where the job begins and where its output goes; `key`: the setting that `folder` comes from."""
    chdir = f"--chdir={work_dir}"
    _check(chdir, "the working folder")
    output = f"--output={str(folder).replace('%', '%%')}/{log_name}"  # what % begins is Slurm's to replace
    _check(output, key)
    return [chdir, output]


def _check(option: str, key: str) -> None:
    if not _OPTION.fullmatch(option):
        raise ConfigError(
            f"{key}: {as_text(option)} does not fit into a line of a job script: an option of sbatch, its value of "
            "letters, digits, spaces and ./:,=+@%&|()[]*!~_-"
        )


def _shown(made_from: str) -> str:
    """The command as a comment, in one line."""
    return as_text(text_without_secrets(made_from))


def _named(cluster: ClusterConfig) -> list[str]:
    named = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
    }
    return [f"--{name}={value}" for name, value in named.items() if value is not None]


def _environment(config: Config, home: Path, work_dir: Path) -> Iterator[str]:
    cluster = config.cluster
    yield f"PAPO_ENVIRONMENT={shlex.quote(cluster.environment)}"
    if cluster.image is None:
        yield f"PAPO_VENV={shlex.quote('' if cluster.venv is None else str(cluster.venv))}"
    yield f"PAPO_MODULES={shlex.quote(' '.join(cluster.modules))}"
    if cluster.secrets_file is not None:
        yield f"PAPO_SECRETS={shlex.quote(str(cluster.secrets_file.expanduser()))}"
    if cluster.image is not None:
        yield f"PAPO_CONTAINER={shlex.quote(cluster.image)}"
        yield f"PAPO_MOUNTS={shlex.quote(','.join(container_mounts(config, home, work_dir)))}"


def _setup(cluster: ClusterConfig) -> list[str]:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.variables.items()]
    return [*cluster.setup, *exports] or [":"]


def _quoted(option: str) -> str:
    """An option as sbatch reads it in a line of its own: a value with spaces in quotes, of which it holds none
    itself."""
    name, equals, value = option.partition("=")
    return f'{name}="{value}"' if equals and any(letter.isspace() for letter in value) else option
