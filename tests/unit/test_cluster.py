"""Job scripts from settings, the scripts under slurm/ against them, and what is known of a run from its folder."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_papo.cluster.finished import is_finished
from megatron_papo.cluster.job_log import say
from megatron_papo.cluster.listing import ListedRun, print_listing
from megatron_papo.cluster.render import array_script, job_script, sbatch_options
from megatron_papo.cluster.slurm import SlurmError, sbatch
from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.config.cluster import time_limit_s
from megatron_papo.files.small_files import write_atomically
from megatron_papo.runtime.progress import STEPS_FILE, asked_length

REPO = Path(__file__).parents[2]


def render(config: Config, run_dir: Path = Path("/data/runs/a")) -> list[str]:
    script = job_script(
        config, home=Path("/home/papo"), work_dir=Path("/work"), folder=run_dir / "cluster", made_from="submit"
    )
    return script.splitlines()


def head(lines: list[str]) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("size", ["3b", "7b", "72b", "qwen3_vl_32b"])
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
    assert found == ("container", "unset", "", "/images/papo.sqsh", "/data:/data"), "run.dir is in the working folder"


def test_setup_lines_come_before_variables():
    words = ["cluster.setup=['export A=1', 'export B=2']", "cluster.variables={B: 'it is 3'}"]
    assert variables(render(load_config(None, words)), "A", "B") == ("1", "it is 3")


HOSTILE = "a'; touch pwned; $(touch pwned) `touch pwned` \"\\ # *"


def test_no_value_becomes_a_command(tmp_path: Path):
    words = [
        "cluster.environment=container",
        f"cluster.container={HOSTILE}",
        f"cluster.modules=[{json.dumps(HOSTILE)}]",
    ]
    more = [
        f"cluster.mounts=[{json.dumps(HOSTILE)}]",
        f"cluster.variables={{A: {json.dumps(HOSTILE + chr(10) + 'b')}}}",
    ]
    config = load_config(None, [*words, *more])
    folder = Path("/data/runs/a")
    script = job_script(
        config, home=tmp_path / HOSTILE, work_dir=Path("/work"), folder=folder / "cluster", made_from="x\ntouch pwned"
    )
    *lines, _ = script.splitlines()
    names = ("PAPO_CONTAINER", "PAPO_MODULES", "PAPO_MOUNTS", "PAPO_HOME", "A")
    shown = "\n".join([*lines, "papo_setup", *(f'printf "%s\\0" "${name}"' for name in names)])
    done = subprocess.run(["bash", "-c", shown], cwd=tmp_path, capture_output=True, text=True, check=True)
    home = str(tmp_path / HOSTILE)
    assert done.stdout.split("\0") == [HOSTILE, HOSTILE, HOSTILE, home, HOSTILE + "\nb", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", ["a\ntouch pwned", 'a" --wrap=x "', "a'", "a\\", "a #", "$(a)", "`a`", "\x1b[31m"])
@pytest.mark.parametrize("key", ["run.name", "cluster.partition", "cluster.time", "cluster.memory", "cluster.sbatch"])
def test_what_fits_no_sbatch_line_is_refused_with_its_key(key: str, bad: str):
    option = [f"--comment={bad}"]
    with pytest.raises(ConfigError) as refused:
        render(load_config(None, [f"{key}={json.dumps(option if key == 'cluster.sbatch' else bad)}"]))
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{key}") and "\x1b" not in line


def test_what_users_write_there_fits():
    words = [
        "run.name=größe 7b (v2.1)", "cluster.constraint=[a|b]&c*2", "cluster.partition=gpu,long", "cluster.time=1-0:30",
        "cluster.sbatch=[--mail-user=me@lab.org, --licenses=matlab@slurmdb:2, '--exclude=node[1-3]', -x node1, --hold]",
    ]  # fmt: skip
    assert head(render(load_config(None, words)))[0] == '--job-name="größe 7b (v2.1)"'


def test_folders_that_fit_no_sbatch_line_are_refused():
    config = load_config(None, [])
    for folder, work_dir, key in (("/a'b", "/w", "run.dir"), ("/a", "/w\nx", "the working folder")):
        with pytest.raises(ConfigError, match=f"^{key}: "):
            job_script(config, home=Path("/h"), work_dir=Path(work_dir), folder=Path(folder), made_from="")
    with pytest.raises(ConfigError, match=r"^dir: "):
        array_script([], {}, work_dir=Path("/w"), folder=Path("/a\\b"), made_from="")
    assert "--output=/a%%j/cluster/job_%j.log" in head(render(config, Path("/a%j")))


def test_a_script_does_not_say_the_secrets_of_its_command():
    made_from = "python tools/submit_slurm.py data.train=https://me:pass@host/a.jsonl"
    script = job_script(
        load_config(None, []), home=Path("/h"), work_dir=Path("/w"), folder=Path("/a"), made_from=made_from
    )
    assert "me:pass" not in script and "# Made by: python tools/submit_slurm.py data.train=https://" in script


def test_a_private_file_is_its_owners_from_the_beginning(tmp_path: Path):
    for private, mode in ((False, 0o644), (True, 0o600), (False, 0o644)):
        write_atomically(tmp_path / "a", "text", private=private)
        assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_list_of_runs_shows_names_as_text(capsys: pytest.CaptureFixture, monkeypatch, terminal: bool):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    print_listing([ListedRun("1", "running", "1", "0:00", "0", "0", "runs/[red]a\x1b[31m\tb", "\u202ewhy\n")])
    printed = capsys.readouterr().out
    assert r"runs/[red]a\x1b[31m\tb" in printed and r"\u202ewhy\n" in printed
    assert terminal or printed.count("\n") == 2


def test_a_jobs_log_shows_what_a_rank_printed(capsys: pytest.CaptureFixture):
    say("reason \x1b]0;x\x07")
    assert capsys.readouterr().out == "papo: reason \\x1b]0;x\\x07\n"


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
    assert str(error.value) == fault


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
    settings["train"] |= {"steps": None, "epochs": 2.0}
    assert not is_finished(settings), "the number of steps is not known"
    for epochs, finished in ((2.0, True), (3.0, False)):
        asked = asked_length({**settings, "train": {**settings["train"], "epochs": epochs}})
        (tmp_path / STEPS_FILE).write_text(json.dumps({"asked": asked, "num_steps": 4}))
        assert is_finished(settings) is finished


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


def _lab(folder: object) -> subprocess.CompletedProcess[str]:
    words = ["bash", str(REPO / "tools" / "slurm_lab.sh"), "env"]
    return subprocess.run(
        words, env=os.environ | {"SLURM_LAB": str(folder)}, capture_output=True, text=True, check=False
    )


def test_the_lab_of_root_lies_where_nobody_else_can_write(tmp_path: Path):
    (good := tmp_path / "good").mkdir(mode=0o755)
    assert _lab(good).stdout == f"export SLURM_CONF={good}/slurm.conf\n"
    (tmp_path / "link").symlink_to(good)
    (tmp_path / "file").touch()
    for name, mode in (("group", 0o775), ("all", 0o777), ("sticky", 0o1777)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "below").mkdir(mode=0o755)
        (tmp_path / name).chmod(mode)
    assert _lab(tmp_path / "sticky" / "below").returncode == 0  # as in /tmp
    for name, why in {
        "link": "is a link",
        "file": "no such folder",
        "gone": "no such folder",
        "group": "others can write to it",
        "sticky": "others can write to it",
        "all/below": "others can write to it",
        "a b": "takes a whole path",
        "$(id)": "takes a whole path",
    }.items():
        done = _lab(tmp_path / name)
        assert (done.returncode, done.stdout) == (2, "") and why in done.stderr, name
    assert "takes a whole path" in _lab("lab").stderr
