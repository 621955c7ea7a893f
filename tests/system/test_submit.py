"""Submitting, following, listing, cancelling and resuming on a real Slurm cluster of two nodes of one rank each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_papo.cluster.attempts import read_attempts
from megatron_papo.runtime.progress import read_progress
from tests.support.commands import heeds_ctrl_c
from tests.support.processes import environment, interpreter
from tests.support.slurm_lab import Slurm
from tests.support.tiny_run import OVERRIDES, make_inputs

REPO = Path(__file__).parents[2]
TOOL = REPO / "tools" / "submit_slurm.py"
TWO_NODES = {
    "cluster.nodes": 2,
    "cluster.gpus_per_node": 0,
    "cluster.ranks_per_node": 1,
    "cluster.cpus_per_rank": 1,
    "cluster.memory": "null",
    "cluster.exclusive": False,
    "cluster.time": 10,
    "cluster.signal_s": 60,
    "run.heartbeat_s": 1,
    "train.tokens_per_micro_batch": 5000,
}


class Tool:
    """`tools/submit_slurm.py` in a folder, on inputs of its own."""

    def __init__(self, cluster: Slurm, folder: Path, inputs: Path):
        self.cluster, self.folder = cluster, folder
        paths = {"model.path": inputs / "model", "data.train": inputs / "rows.jsonl", "cluster.venv": environment()}
        self.settings = [f"{key}={value}" for key, value in (OVERRIDES | TWO_NODES | paths).items()]

    def command(self, *words: object) -> list[str]:
        return [str(interpreter()), str(TOOL), *map(str, words)]

    def __call__(self, *words: object) -> subprocess.CompletedProcess[str]:
        return self.cluster.call(*self.command(*words), cwd=self.folder)

    def lines(self) -> dict[str, dict[str, str]]:
        """What `list` prints, by job."""
        head, *rows = [line.split("\t") for line in self("list").stdout.splitlines()]
        return {row[0]: dict(zip(head, row)) for row in rows}


@pytest.fixture
def tool(slurm: Slurm, tmp_path: Path) -> Iterator[Tool]:
    yield Tool(slurm, tmp_path, make_inputs(tmp_path / "inputs"))
    for jobs in tmp_path.glob("**/cluster/jobs.jsonl"):
        slurm.call("scancel", *job_ids(jobs.parents[1]))


def job_ids(run_dir: Path) -> list[str]:
    return [json.loads(line)["job"] for line in (run_dir / "cluster" / "jobs.jsonl").read_text().splitlines()]


def until(reached: Callable[[], object], limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.3)


def test_submitted_followed_listed_and_resumed_on_one_node(tool: Tool):
    run_dir = tool.folder / "runs" / "a"
    secrets = tool.folder / "secrets"
    secrets.write_text("JUDGE_TOKEN=nobody-may-see-this\n")
    named = [f"cluster.secrets_file={secrets}", "cluster.setup=['test -z \"$JUDGE_TOKEN\"']"]
    named.append("reward.function=tests.support.slow:share_with_a_token")
    words = [*tool.settings, *named, "run.dir=runs/a", "run.name=a", "checkpoint.save_every=1", "--follow"]
    refused = tool(*words)
    assert refused.stderr.endswith(
        f"cluster.secrets_file: {secrets}: others may read it (mode 644): chmod 600 {secrets}\n"
    )
    secrets.chmod(0o600)
    done = tool(*words)
    assert done.returncode == 0, done.stderr + done.stdout
    (first,) = job_ids(run_dir)
    said = [line for line in done.stderr.splitlines() if "completing" not in line]  # seen or not, as it is asked for
    assert said[:2] == [
        "submit: 2 ranks (tensor 1 x pipeline 1 x data 2), up to 2 checkpoints of 2.2 MiB: 4.3 MiB of disk",
        f"submit: job {first}, runs/a",
    ]
    assert said[-2:] == [f"submit: job {first}: running on 2 nodes", f"submit: job {first}: completed"]
    assert "papo: check: 2 ranks (tensor 1 x pipeline 1 x data 2)" in done.stdout
    assert done.stdout == (run_dir / "cluster" / f"job_{first}.log").read_text()
    kept = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(kept) > 5 and not [path for path in kept if b"nobody-may-see-this" in path.read_bytes()]
    line = tool.lines()[first]
    assert (line["state"], line["nodes"], line["steps"], line["attempts"]) == ("completed", "2", "2 of 2", "1")
    assert line["run"] == "runs/a"

    # from another folder: relative paths of the settings still begin where the run was submitted
    words = ["resume", run_dir, "cluster.nodes=1", "cluster.ranks_per_node=2", "train.steps=3", "--follow"]
    again = tool.cluster.call(*tool.command(*words), cwd=REPO)
    assert again.returncode == 0, again.stderr + again.stdout
    assert [attempt.ranks for attempt in read_attempts(run_dir)] == [2, 2]
    assert read_attempts(run_dir)[1].nodes in ("node1", "node2") and read_attempts(run_dir)[1].steps_saved == 2
    assert read_progress(run_dir).steps_saved == 3

    finished = tool("resume", "runs/a", "--follow")
    assert finished.returncode == 0
    assert f"papo: {run_dir}: finished already, 3 steps; nothing to do" in finished.stdout
    assert len(read_attempts(run_dir)) == 2


def test_a_chain_goes_on_and_is_refused_a_second_time(tool: Tool):
    run_dir = tool.folder / "runs" / "b"
    slow = ["reward.function=tests.support.slow:slow_share", "train.steps=60", "run.dir=runs/b", "observe.console=true"]
    done = tool(*tool.settings, *slow, "--chain", 2)
    assert done.returncode == 0, done.stderr
    first, second = job_ids(run_dir)
    assert tool.lines()[second]["state"] == "pending" and tool.lines()[second][""] == "Dependency"
    twice = tool(*tool.settings, *slow)
    assert twice.returncode == 2
    assert twice.stderr.splitlines()[-1].startswith(f"submit: error: runs/b: job {first} of this run is in the queue (")
    resumed = tool("resume", "runs/b")
    assert resumed.returncode == 2 and f"job {first} of this run is in the queue" in resumed.stderr

    follower = subprocess.Popen(
        tool.command("follow", "runs/b"),
        cwd=tool.folder,
        env=tool.cluster.environ,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heeds_ctrl_c,
    )
    until(lambda: read_progress(run_dir).steps_done)
    time.sleep(4)  # from the rank's log to the job's, and from there to us
    follower.send_signal(signal.SIGINT)
    shown = follower.communicate(timeout=20)[0]
    assert follower.returncode == 130 and "step    0 of 60" in shown
    assert shown.endswith(f"submit: job {first} goes on; `submit_slurm.py follow {first}` shows it again, "
                          f"`cancel {first}` ends it\n")  # fmt: skip

    tool.cluster.call("scancel", "--batch", "--signal=USR1", first)
    until(lambda: len(read_attempts(run_dir)) == 2)
    one, two = read_attempts(run_dir)
    assert (one.job, one.end, two.job) == (first, "saved", second)
    assert two.steps_saved == one.reached > 0
    assert "JobState=COMPLETED" in tool.cluster.call("scontrol", "show", "job", first).stdout
    stopped = tool("stop", "runs/b")
    saves = f"submit: job {second} ends after its step and saves what checkpoint.contents says; "
    assert (stopped.returncode, stopped.stdout.startswith(saves)) == (0, True)
    until(lambda: read_attempts(run_dir)[-1].end and tool.lines()[second]["state"] == "completed")
    assert read_attempts(run_dir)[-1].end == "saved"
    assert "papo: asked to stop: saved; " in (run_dir / "cluster" / f"job_{second}.log").read_text()

    third, fourth = job_ids(run_dir)[2:] if tool("resume", "runs/b", "--chain", 2).returncode == 0 else ()
    assert f"submit: cancelled job {fourth}, which waited\n" in tool("stop", fourth).stdout
    cancelled = tool("cancel", "runs/b")
    assert (cancelled.returncode, cancelled.stdout) == (0, f"submit: cancelled job {third}\n")
    until(lambda: tool.lines().get(fourth, {}).get("state") == "cancelled")  # the newest, once the other is over too
    for action in ("stop", "cancel"):
        assert tool(action, "runs/b").stderr == "submit: error: runs/b: has no job in the queue\n"


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_that_saves_nothing_ends_when_it_is_asked_to_and_does_not_begin_anew(tool: Tool, nodes):
    """With one task the rank has a launcher between itself and Slurm."""
    run_dir = tool.folder / "runs" / "n"
    slow = ["reward.function=tests.support.slow:slow_share", "train.steps=60", "run.dir=runs/n"]
    done = tool(*tool.settings, *slow, "checkpoint.contents=none", f"cluster.nodes={nodes}")
    assert done.returncode == 0, done.stderr
    (job,) = job_ids(run_dir)
    until(lambda: read_progress(run_dir).steps_done)
    tool.cluster.call("scancel", "--batch", "--signal=USR1", job)
    until(lambda: tool.lines()[job]["state"] == "failed")
    (attempt,) = read_attempts(run_dir)
    assert (attempt.job, attempt.end) == (job, "stopped")
    assert attempt.reason.endswith("; nothing is saved (checkpoint.contents=none)")


def test_a_job_script_by_hand_with_slurms_own_flags(tool: Tool):
    """From a folder that is not the project's: the fake GPUs of the lab are asked for, and torch finds none. In the
    real environment, where every rank does its imports."""
    run_dir = tool.folder / "hand"
    flags = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=4000", "--time=60"]
    plain = ["parallel.tensor=1", "parallel.sequence=false", "parallel.distributed_optimizer=false"]
    plain += ["data.preset=none", "data.eval=null", "generation.engine=transformers", f"run.dir={run_dir}"]
    words = [word for word in tool.settings if not word.startswith("cluster.")]
    environ = tool.cluster.environ | {"PAPO_VENV": sys.prefix}
    script = REPO / "slurm" / "papo_3b.sh"
    options = ["--parsable", "--wait", *flags, f"--output={tool.folder}/hand.log"]
    done = tool.cluster.call("sbatch", *options, script, *words, *plain, cwd=tool.folder, env=environ)
    log = (tool.folder / "hand.log").read_text()
    assert done.returncode == 0, done.stderr + log
    assert [(attempt.ranks, attempt.end) for attempt in read_attempts(run_dir)] == [(2, "done")]
    kept = json.loads((run_dir / "cluster" / "settings.json").read_text())["cluster"]
    assert (kept["nodes"], kept["gpus_per_node"], kept["ranks_per_node"]) == (2, 1, 1)
    assert tool.lines()[done.stdout.strip()]["steps"] == "2 of 2"


NO_MODEL = (
    "papo: error: model.path: Qwen2.5-VL-3B-Instruct: no such folder, and a name of the hub is not downloaded by "
    "itself: `hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir Qwen2.5-VL-3B-Instruct`, then "
    "model.path=Qwen2.5-VL-3B-Instruct"
)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({}, NO_MODEL),
        (
            {"PAPO_VENV": "gone"},
            f"papo: error: cluster.venv: no virtual environment in {REPO}/gone; 'make gpu-venv' in {REPO} makes one",
        ),
        ({"PAPO_ENVIRONMENT": "container"}, "papo: error: cluster.container: names no image"),
        (
            {"PAPO_ENVIRONMENT": "container", "PAPO_CONTAINER": "image"},
            "papo: error: cluster.environment=container: srun knows no --container-image; pyxis is not installed on "
            "this cluster",
        ),
        ({"PAPO_CONFIG": "gone.yaml"}, "papo: error: gone.yaml: no such config file"),
        (
            {"PAPO_ENVIRONMENT": "conda"},
            "papo: error: cluster.environment: conda is none of venv, modules, container, apptainer",
        ),
    ],
)
def test_the_launcher_refuses_in_one_line(slurm: Slurm, tmp_path, variables, reason):
    lines = refused(slurm, tmp_path, {"PAPO_VENV": str(environment())} | variables)
    assert lines[0] == reason and all("data." in line or "vLLM" in line for line in lines[1:])


MODULE = '() { [ "$2" = good ] || { echo "ERROR: unable to locate $2" >&2; return 1; }; }'
"""A shell function, exported as the ones of environment modules are."""


def test_modules_are_loaded_in_their_order(slurm: Slurm, tmp_path):
    modules = {"PAPO_ENVIRONMENT": "modules", "BASH_FUNC_module%%": MODULE}
    log = refused(slurm, tmp_path, modules | {"PAPO_MODULES": "good bad"})
    assert log == ["papo: error: cluster.modules: module load bad: ERROR: unable to locate bad "]
    log = refused(slurm, tmp_path, modules | {"PAPO_MODULES": "good", "PAPO_VENV": str(environment())})
    assert log[0] == NO_MODEL


PYXIS = """#!/bin/bash
[ "$1" != --help ] || { echo "  --container-image=IMAGE"; exit; }
for word; do case $word in *container-*) echo "$word" >>"$SAID" ;; *) words+=("$word") ;; esac; done
exec /usr/bin/srun "${words[@]}"
"""
"""Stands before srun: writes the container's flags down and starts the step without them."""


def test_a_container_gets_the_project_and_the_working_folder(slurm: Slurm, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(PYXIS)
    (tmp_path / "bin" / "srun").chmod(0o755)
    image = tmp_path / "papo.sqsh"
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{slurm.environ['PATH']}",
        "SAID": str(tmp_path / "said"),
        "PAPO_ENVIRONMENT": "container",
        "PAPO_CONTAINER": str(image),
        "PAPO_MOUNTS": "/data:/data",
        "PAPO_PYTHON": str(interpreter()),
    }
    assert refused(slurm, tmp_path, variables) == [f"papo: error: cluster.container: {image}: no such image"]
    image.touch()
    log = refused(slurm, tmp_path, variables)
    assert log[0] == NO_MODEL
    assert (tmp_path / "said").read_text().splitlines() == [
        f"--container-image={image}",
        f"--container-workdir={tmp_path}",
        "--no-container-mount-home",
        f"--container-mounts={REPO}:{REPO},{tmp_path}:{tmp_path},/data:/data",
        "--container-env=PYTHONPATH",
    ]


def refused(cluster: Slurm, folder: Path, variables: dict[str, str]) -> list[str]:
    """The output of a job by `slurm/papo_3b.sh` that ended before its ranks."""
    options = ["--wait", "--nodes=1", "--time=2", "--signal=B:USR1@0", f"--output={folder}/log", "--open-mode=truncate"]
    script = REPO / "slurm" / "papo_3b.sh"
    done = cluster.call("sbatch", *options, script, cwd=folder, env=cluster.environ | variables)
    assert done.returncode == 2
    return (folder / "log").read_text().splitlines()


def test_what_cannot_run_is_not_submitted(tool: Tool):
    before = tool.lines() if tool("list").stdout.startswith("job\t") else {}
    done = tool(*tool.settings, "run.dir=runs/c", "parallel.tensor=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "submit: error: parallel: 2 ranks do not divide by parallel.tensor 3 x parallel.pipeline 1\n"
    nowhere = tool(*tool.settings, "run.dir=runs/c", "cluster.partition=nope")
    assert nowhere.returncode == 2
    assert nowhere.stderr.splitlines()[-1] == (
        "submit: error: sbatch: invalid partition specified: nope; "
        "Batch job submission failed: Invalid partition name specified"
    )
    chain = tool(*tool.settings, "run.dir=runs/d", "checkpoint.contents=none", "--chain", 2)
    assert chain.returncode == 2 and chain.stderr.startswith("submit: error: checkpoint.contents=none: every job of a ")
    dry = tool(*tool.settings, "run.dir=runs/d", "--dry-run")
    assert dry.returncode == 0 and dry.stdout.startswith("#!/bin/bash\n# Made by: python ")
    assert not (tool.folder / "runs" / "d").exists()
    for which in ("999999", "runs/nope"):
        assert tool("cancel", which).returncode == 2
    after = tool.lines() if tool("list").stdout.startswith("job\t") else {}
    assert after.keys() == before.keys()
