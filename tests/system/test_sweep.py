"""A sweep on a real Slurm cluster of two nodes: interrupted, continued, failed points, the table."""

from __future__ import annotations

import csv
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_papo.cluster.attempts import read_attempts
from tests.support.processes import environment, interpreter
from tests.support.slurm_lab import Slurm
from tests.support.tiny_run import OVERRIDES, make_inputs

REPO = Path(__file__).parents[2]
TOOL = REPO / "tools" / "sweep.py"
NODES = {
    "cluster.gpus_per_node": 0,
    "cluster.ranks_per_node": 2,
    "cluster.cpus_per_rank": 1,
    "cluster.memory": "null",
    "cluster.exclusive": False,
    "cluster.time": 10,
    "cluster.signal_s": 60,
    "run.heartbeat_s": 1,
    "run.max_failures": 1,
    "train.tokens_per_micro_batch": 5000,
    "certify.at_start": False,
    "certify.after_hand_over": False,
}
WAITS = {"ranks": 1, "name": "ranks_1", "overrides": ["reward.function=tests.support.slow:waits_for_leave"]}
RAISES = {"ranks": 1, "name": "raises", "overrides": ["reward.function=tests.support.slow:fails_at_a_step"]}
NOWHERE = {"ranks": 1, "name": "nowhere", "overrides": ["cluster.partition=nope"]}
THIRDS = {"ranks": 4, "name": "thirds", "overrides": ["parallel.tensor=3"]}


class Tool:
    """`tools/sweep.py` in a folder, on inputs of its own."""

    def __init__(self, cluster: Slurm, folder: Path):
        self.cluster, self.folder = cluster, folder
        inputs = make_inputs(folder / "inputs")
        paths = {"model.path": inputs / "model", "data.train": inputs / "rows.jsonl", "cluster.venv": environment()}
        settings = {**OVERRIDES, **NODES, **paths, "train.updates_per_step": 1}
        del settings["train.steps"]
        self.overrides = [f"{key}={value}" for key, value in settings.items()]

    def write(self, points: list[dict], **changes: object) -> None:
        tree = {"name": "lab", "dir": "out", "scaling": "strong", "steps": 2, "overrides": self.overrides}
        (self.folder / "sweep.yaml").write_text(yaml.safe_dump(tree | {"points": points} | changes))

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.cluster.call(interpreter(), TOOL, "sweep.yaml", *words, cwd=self.folder)

    def rows(self) -> dict[str, dict[str, str]]:
        with (self.folder / "out" / "table.csv").open() as file:
            return {row["point"]: row for row in csv.DictReader(file)}

    def run_dir(self, point: str) -> Path:
        return self.folder / "out" / "points" / point

    def jobs(self, point: str) -> list[str]:
        path = self.run_dir(point) / "cluster" / "jobs.jsonl"
        return [json.loads(line)["job"] for line in path.read_text().splitlines()]


@pytest.fixture
def tool(slurm: Slurm, tmp_path: Path) -> Iterator[Tool]:
    made = Tool(slurm, tmp_path)
    yield made
    for jobs in tmp_path.glob("out/points/*/cluster/jobs.jsonl"):
        slurm.call("scancel", *made.jobs(jobs.parents[1].name))


def until(reached: Callable[[], object], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not reached():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.3)


def test_a_sweep_is_interrupted_and_goes_on(tool: Tool):
    tool.write([WAITS, {"ranks": 2}, RAISES, NOWHERE, THIRDS], limit=3)
    dry = tool("--dry-run")
    assert dry.returncode == 1 and not (tool.folder / "out").exists()
    assert [line for line in dry.stdout.splitlines() if "--array=" in line] == [
        "#SBATCH --array=1,3%3", "#SBATCH --array=2%3", "#SBATCH --array=4%3",
    ]  # fmt: skip
    thirds = "parallel: 4 ranks do not divide by parallel.tensor 3 x parallel.pipeline 1"
    assert f"sweep: thirds: refused: {thirds}" in dry.stderr.splitlines()

    begun = tool()
    assert begun.returncode == 1  # two points are refused
    nope = "sbatch: invalid partition specified: nope; Batch job submission failed: Invalid partition name specified"
    assert f"sweep: nowhere: refused: {nope}" in begun.stderr.splitlines()
    (one,), (two,), (raises,) = map(tool.jobs, ("ranks_1", "ranks_2", "raises"))
    array, pair = one.removesuffix("_1"), two.removesuffix("_2")
    assert raises == f"{array}_3" and begun.stderr.splitlines()[-1] == f"sweep: submitted: {array}, {pair}"
    shown = tool.cluster.call("squeue", "--noheader", "--array", f"--jobs={array},{pair}", "--format=%i %k").stdout
    assert sorted(shown.split("\n")[:-1]) == sorted(
        f"{job} papo:{tool.run_dir(point)}" for job, point in ((one, "ranks_1"), (two, "ranks_2"), (raises, "raises"))
    )

    until(lambda: read_attempts(tool.run_dir("raises")))
    cancelled = submit_slurm(tool, "cancel", two)
    assert (cancelled.returncode, cancelled.stdout) == (0, f"submit: cancelled job {two}\n")
    code, said = wait_for_the_rest(tool)
    assert code == 1
    assert not [line for line in said if line.startswith("sweep: ranks_1: 1 rank")], "what runs is not begun again"
    rows = tool.rows()
    assert {name: row["state"] for name, row in rows.items()} == {
        "ranks_1": "done", "ranks_2": "done", "raises": "failed", "nowhere": "refused", "thirds": "refused",
    }  # fmt: skip
    down = "tests.support.slow:fails_at_a_step failed: OSError: the verifier's host is down"
    assert rows["raises"]["reason"].startswith(f"rank 0 failed: ValueError: reward.function: {down} (slow.py:")
    assert (rows["nowhere"]["reason"], rows["thirds"]["reason"]) == (nope, thirds)
    assert [len(tool.jobs(name)) for name in ("ranks_1", "ranks_2", "raises")] == [1, 2, 1]
    assert read_attempts(tool.run_dir("ranks_1"))[0].job == one
    check_figures(tool, rows)

    log = tool.run_dir("ranks_1") / "cluster" / f"job_{one}.log"
    assert log.read_text() == (tool.folder / "out" / "cluster" / f"job_{one}.log").read_text()
    assert "attempt 1: done" in log.read_text()
    assert not (tool.run_dir("ranks_1") / "checkpoints").exists()
    followed = submit_slurm(tool, "follow", one)
    assert (followed.returncode, followed.stdout) == (0, log.read_text())
    listed = [line.split("\t") for line in submit_slurm(tool, "list").stdout.splitlines()]
    assert [line[6] for line in listed if line[0] == one] == ["out/points/ranks_1"]

    again = tool("--gather")
    assert again.returncode == 1 and tool.rows() == rows
    nothing = tool("run.stall_limit_s=600")
    assert nothing.stderr.splitlines()[-1] == "sweep: submitted: nothing"
    changed = tool("optim.lr=0.5")
    assert changed.returncode == 2
    assert changed.stderr == (
        f"sweep: error: {tool.run_dir('ranks_1')}: was begun with other settings (optim.lr): take another dir, or "
        "remove that folder\n"
    )


def wait_for_the_rest(tool: Tool) -> tuple[int, list[str]]:
    """`--wait`, which sees the first point running; only then it gets leave to go on."""
    said = []
    command = [interpreter(), TOOL, "sweep.yaml", "--wait"]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tool.folder, env=tool.cluster.environ, text=True, **streams) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip("\n"))
            if said[-1] == "sweep: ranks_1: running":
                (tool.folder / "leave").touch()
    return process.returncode, said


def submit_slurm(tool: Tool, *words: str) -> subprocess.CompletedProcess[str]:
    return tool.cluster.call(interpreter(), REPO / "tools" / "submit_slurm.py", *words, cwd=tool.folder)


def check_figures(tool: Tool, rows: dict[str, dict[str, str]]) -> None:
    """The table against the runs' own records: one step is measured."""
    second = {}
    for name in ("ranks_1", "ranks_2"):
        lines = (tool.run_dir(name) / "metrics.jsonl").read_text().splitlines()
        second[name] = json.loads(lines[-1])
        assert (len(lines), rows[name]["steps"]) == (2, "1")
        assert float(rows[name]["tokens_per_s"]) == second[name]["tokens_per_s"]
        assert float(rows[name]["update_s"]) == second[name]["time/update"]
        assert float(rows[name]["planned_update_s"]) == second[name]["planned/time/update"]
    speed_up = second["ranks_2"]["tokens_per_s"] / second["ranks_1"]["tokens_per_s"]
    assert float(rows["ranks_2"]["speed_up"]) == pytest.approx(speed_up)
    assert float(rows["ranks_2"]["efficiency"]) == pytest.approx(speed_up / 2)
    assert (tool.folder / "out" / "plot.png").stat().st_size > 10_000
    page = (tool.folder / "out" / "table.md").read_text()
    assert "| ranks_2 | 2 | 1x1x2 | 4 | done |" in page


def test_without_slurm_one_after_the_other(tool: Tool, tmp_path: Path):
    tool.write([{"ranks": 1}, RAISES], scaling="weak")
    environ = {name: value for name, value in tool.cluster.environ.items() if name != "SLURM_CONF"}
    words = ("sweep.yaml", "--local", "--compare", "sweep.yaml")
    done = tool.cluster.call(interpreter(), TOOL, *words, cwd=tmp_path, env=environ)
    assert done.returncode == 1, done.stderr
    rows = tool.rows()
    assert (rows["ranks_1"]["state"], rows["ranks_1"]["steps"]) == ("done", "1")
    assert rows["raises"]["state"] == "failed" and "the verifier's host is down" in rows["raises"]["reason"]
    run = tool.run_dir("ranks_1")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    longest = yaml.safe_load((run / "cluster" / "settings.yaml").read_text())["generation"]["max_response_tokens"]
    assert [(line["response_tokens"], line["cut_off"]) for line in lines] == [(longest, 1.0)] * 2
    assert {file.suffix for file in (tmp_path / "out").glob("compared.*")} == {".png", ".pdf", ".svg"}


@pytest.mark.slow
def test_weak_scaling_on_one_two_and_four_ranks(tool: Tool):
    tool.write([{"ranks": 1}, {"ranks": 2}, {"nodes": 2}], scaling="weak", limit=1, steps=3)
    done = tool("--wait")
    assert done.returncode == 0, done.stderr
    rows = tool.rows()
    assert [(row["ranks"], row["prompts_per_step"]) for row in rows.values()] == [("1", "4"), ("2", "8"), ("4", "16")]
    ends = [read_attempts(tool.run_dir(name))[0] for name in rows]
    assert ends[0].ended <= ends[1].began and ends[1].ended <= ends[2].began  # one at a time
    assert [float(row["ideal"]) for row in rows.values()] == [1.0, 2.0, 4.0]


@pytest.mark.slow
def test_a_signal_reaches_one_task_which_queues_itself_alone_again(tool: Tool):
    """The task whose SLURM_JOB_ID is the array's own: Slurm would take that number for both tasks."""
    slow = {"overrides": ["reward.function=tests.support.slow:slow_share"]}
    points = [{"ranks": 1, "name": "a"} | slow, {"ranks": 1, "name": "b"} | slow]
    tool.write(points, steps=25, keep_checkpoints=True)
    assert tool().returncode == 0
    jobs = {name: tool.jobs(name)[0] for name in ("a", "b")}
    until(lambda: all((tool.run_dir(name) / "metrics.jsonl").exists() for name in jobs))
    raw = {
        name: tool.cluster.call("squeue", "--noheader", f"--jobs={jobs[name]}", "--format=%A").stdout for name in jobs
    }
    (last,) = [name for name in jobs if raw[name].strip() == jobs[name].partition("_")[0]]
    (other,) = jobs.keys() - {last}
    tool.cluster.call("scancel", "--batch", "--signal=USR1", jobs[last])
    done = tool("--wait")
    assert done.returncode == 0, done.stderr
    saved, resumed = read_attempts(tool.run_dir(last))
    assert (saved.job, saved.end, resumed.job, resumed.end) == (jobs[last], "saved", jobs[last], "done")
    assert 0 < saved.reached == resumed.steps_saved < 25
    assert [attempt.end for attempt in read_attempts(tool.run_dir(other))] == ["done"]
    assert tool.rows()[last]["steps"] == "23"  # without the first step and the first after the checkpoint
