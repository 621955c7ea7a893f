"""Job scripts from settings, the scripts under slurm/ against them, and what is known of a run from its folder."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_papo.cluster.finished import is_finished
from megatron_papo.cluster.render import job_script, sbatch_options
from megatron_papo.cluster.slurm import SlurmError, sbatch
from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.config.cluster import time_limit_s

REPO = Path(__file__).parents[2]


def render(config: Config, run_dir: Path = Path("/data/runs/a")) -> list[str]:
    script = job_script(
        config, home=Path("/home/papo"), work_dir=Path("/work"), folder=run_dir / "cluster", made_from="submit"
    )
    return script.splitlines()


def head(lines: list[str]) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("size", ["3b", "7b", "72b"])
def test_the_scripts_ask_for_what_the_tool_asks_for(size: str):
    lines = (REPO / "slurm" / f"papo_{size}.sh").read_text().splitlines()
    config = load_config(REPO / "examples" / f"papo_g_{size}.yaml")
    assert head(lines) == [*sbatch_options(config), "--output=%x_%j.log"]
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(index < first_command for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert f': "${{PAPO_CONFIG:=$PAPO_HOME/examples/papo_g_{size}.yaml}}"' in lines


def test_a_script_written_out():
    words = [
        "run.name=mine",
        "cluster.nodes=4",
        "cluster.time=2-00:00:00",
        "cluster.partition=gpu",
        "cluster.account=a",
    ]
    more = ["cluster.requeue=false", "cluster.signal_s=120", "cluster.sbatch=[--reservation=spring]"]
    assert head(render(load_config(None, [*words, *more]))) == [
        "--job-name=mine",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=8",
        "--mem=0",
        "--time=2-00:00:00",
        "--partition=gpu",
        "--account=a",
        "--exclusive",
        "--signal=B:USR1@120",
        "--no-requeue",
        "--open-mode=append",
        "--reservation=spring",
        "--chdir=/work",
        "--output=/data/runs/a/cluster/job_%j.log",
        "--comment=papo:/data/runs/a",
    ]


def test_ranks_without_gpus_and_the_partitions_own_memory():
    words = ["cluster.gpus_per_node=0", "cluster.ranks_per_node=3", "cluster.memory=null", "cluster.exclusive=false"]
    asked = sbatch_options(load_config(None, [*words, "cluster.signal_s=0"]))
    assert "--ntasks-per-node=3" in asked
    assert not [word for word in asked if word.startswith(("--gpus", "--mem", "--exclusive", "--signal"))]


def test_a_folder_with_a_space_is_quoted():
    lines = render(load_config(None, []), Path("/data/my runs/a"))
    assert '#SBATCH --output="/data/my runs/a/cluster/job_%j.log"' in lines
    assert "PAPO_CONFIG='/data/my runs/a/cluster/settings.yaml'" in lines


def variables(lines: list[str], *names: str) -> tuple[str, ...]:
    """As bash has them after the lines of the script before the launcher, and after `papo_setup`."""
    shown = " ".join(f'"${{{name}-unset}}"' for name in names)
    script = "\n".join([*lines[:-1], "papo_setup", f"printf '%s\\n' {shown}"])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": "/bin"})
    return tuple(done.stdout.splitlines())


def test_each_environment_is_described_by_plain_variables():
    names = ("PAPO_ENVIRONMENT", "PAPO_VENV", "PAPO_MODULES", "PAPO_CONTAINER", "PAPO_MOUNTS")
    found = variables(render(load_config(None, ["cluster.venv=/opt/venv"])), *names)
    assert found == ("venv", "/opt/venv", "", "unset", "unset")
    words = ["cluster.environment=modules", "cluster.modules=[gcc/13, cuda/13.0]", "cluster.venv=null"]
    found = variables(render(load_config(None, words)), *names)
    assert found == ("modules", "", "gcc/13 cuda/13.0", "unset", "unset")
    words = ["cluster.environment=container", "cluster.container=/images/papo.sqsh", "cluster.mounts=['/data:/data']"]
    found = variables(render(load_config(None, words)), *names)
    assert found == ("container", "unset", "", "/images/papo.sqsh", "/data:/data")


def test_setup_lines_come_before_variables():
    words = ["cluster.setup=['export A=1', 'export B=2']", "cluster.variables={B: 'it is 3'}"]
    assert variables(render(load_config(None, words)), "A", "B") == ("1", "it is 3")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["cluster.environment=container"], "cluster.environment=container needs cluster.container, an image"),
        (["cluster.venv=null"], "cluster.environment=venv needs cluster.venv, a folder"),
        (
            ["cluster.ranks_per_node=4"],
            "cluster.ranks_per_node: 4 ranks for cluster.gpus_per_node=8: it is one rank a GPU",
        ),
        (
            ["cluster.time=10"],
            "cluster.signal_s: 900 s before the end of cluster.time=10 is before its start: the run would save and "
            "leave after its first step",
        ),
    ],
)
def test_sections_that_cannot_be(words: list[str], fault: str):
    with pytest.raises(ConfigError) as error:
        load_config(None, words)
    assert str(error.value) == f"cluster: {fault}"


def test_a_run_is_finished_with_its_last_checkpoint_and_its_export(tmp_path: Path):
    settings = json.loads(load_config(None, [f"run.dir={tmp_path}", "train.steps=4"]).model_dump_json())
    for step, serial in ((3, 1), (4, 2)):
        assert not is_finished(settings)
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"serial": serial, "step": step}))
    assert not is_finished(settings)
    (tmp_path / "export").mkdir()
    assert is_finished(settings)
    settings["train"]["steps"] = 5
    assert not is_finished(settings)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 600), ("10:30", 630), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("2-00:00:01", 172801),
        ("UNLIMITED", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(text: str, seconds: int | None):
    assert time_limit_s(text) == seconds


def test_without_slurm_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"^sbatch is not in PATH: submit from a login node of a Slurm cluster$"):
        sbatch("job.sh")


def test_every_script_is_bash():
    for script in (REPO / "slurm").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
