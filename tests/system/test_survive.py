"""Runs on a real Slurm cluster that lose ranks, nodes and time, and still end with the curve of an undisturbed one."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import pytest

from megatron_papo.cluster.attempts import read_attempts
from megatron_papo.config import dump_config
from megatron_papo.runtime.progress import read_progress
from tests.support.commands import papo
from tests.support.slurm_lab import Slurm
from tests.support.tiny_run import metrics, tiny_run
from tests.system.test_submit import Tool, job_ids, tool, until  # noqa: F401 - a fixture among them

TWO_BY_TWO = {
    "cluster.ranks_per_node": 2,
    "parallel.tensor": 2,
    "parallel.distributed_optimizer": True,
    "checkpoint.save_every": 3,
    "observe.console": True,
    "run.heartbeat_s": 0.5,
    "run.heartbeat_limit_s": 15,
    "reward.function": "tests.support.slow:slow_share",
}
"""On two nodes: tensor 2 x data 2."""


def undisturbed(tool: Tool, steps: int) -> list[dict]:  # noqa: F811
    """The same run in one go, without Slurm."""
    folder = tool.folder / "undisturbed"
    settings = {
        "parallel__tensor": 2, "parallel__distributed_optimizer": True, "train__steps": steps,
        "train__tokens_per_micro_batch": 5000,
    }  # fmt: skip
    config = tiny_run(tool.folder / "inputs", folder / "run", **settings)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    words = "train", "--ranks", 4, folder / "config.yaml"
    done = papo(*words, cwd=tool.folder, environ=tool.cluster.environ)
    assert done.returncode == 0, done.stderr
    return metrics(folder / "run")


def kill_rank(run_dir: Path, rank: int) -> None:
    """SIGKILL to a rank of the job, as the kernel does when memory runs out; found by what its process was given."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            environ = (process / "environ").read_bytes()
        except OSError:
            continue
        ours = b"megatron_papo\0train" in command and run_dir.name.encode() in command
        if ours and f"\0SLURM_PROCID={rank}\0".encode() in environ:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"rank {rank} of {run_dir} is not there")


def reached(run_dir: Path, steps: int, attempts: int) -> None:
    """Waits until the run has done so many steps, in so many attempts."""
    until(lambda: len(read_attempts(run_dir)) >= attempts and read_progress(run_dir).steps_done >= steps, 180)


def ask_to_save(cluster: Slurm, run_dir: Path) -> None:
    cluster.call("scancel", "--batch", "--signal=USR1", *job_ids(run_dir))


def kill_a_rank(cluster: Slurm, run_dir: Path) -> None:
    kill_rank(run_dir, 3)


def queue_again(cluster: Slurm, run_dir: Path) -> None:
    """As an administrator does, and preemption."""
    assert cluster.call("scontrol", "requeue", *job_ids(run_dir)).returncode == 0


def crash_unseen(cluster: Slurm, run_dir: Path) -> None:
    """The node is back before Slurm has noticed: left to itself, the job would run on without it for ever."""
    cluster.lab("crash-node", "node2")
    cluster.lab("start-node", "node2")


def crash_the_first_node(cluster: Slurm, run_dir: Path) -> None:
    """With the supervisor on it."""
    cluster.lab("crash-node", "node1")
    cluster.lab("start-node", "node1")


ENDS = {
    ask_to_save: ("saved", ""),
    queue_again: ("told to end", "queued again"),
    kill_a_rank: ("failed", "papo: rank 3 failed: killed: on node2: Killed"),
    crash_unseen: ("failed", "node2"),
    crash_the_first_node: ("lost", "ended without a word"),
}
"""How the attempt ends, and what its reason says."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "disturbances",
    [
        pytest.param([ask_to_save, crash_unseen], id="saved_and_crashed", marks=pytest.mark.slow),
        pytest.param(
            [kill_a_rank, crash_the_first_node, queue_again, crash_unseen, ask_to_save],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_curve_is_that_of_an_undisturbed_run(tool: Tool, disturbances):  # noqa: F811
    """Each disturbance a few steps after the last; then the rest of the run on another layout, on one node. In the real
    environment, whose ranks are Slurm's own processes."""
    run_dir, steps = tool.folder / "runs" / "survivor", 8 + 8 * len(disturbances)
    expected = undisturbed(tool, steps)
    settings = [*tool.settings, *(f"{key}={value}" for key, value in TWO_BY_TWO.items()), f"train.steps={steps}"]
    settings.append(f"cluster.venv={sys.prefix}")
    assert tool(*settings, "run.dir=runs/survivor").returncode == 0

    for number, disturb in enumerate(disturbances, 1):
        reached(run_dir, read_progress(run_dir).steps_done + 4, attempts=number)
        disturb(tool.cluster, run_dir)
        reached(run_dir, 0, attempts=number + 1)
        ended = read_attempts(run_dir)[number - 1]
        assert ended.end == ENDS[disturb][0] and ENDS[disturb][1] in ended.reason

    reached(run_dir, read_progress(run_dir).steps_done + 1, attempts=len(disturbances) + 1)
    assert tool("cancel", "runs/survivor").returncode == 0
    until(lambda: read_attempts(run_dir)[-1].end == "told to end")
    (job,) = job_ids(run_dir)
    until(lambda: tool.lines()[job]["state"] == "cancelled")  # it completes for a moment yet, and holds its folder
    other = ["parallel.pipeline=2", "parallel.tensor=1", "parallel.distributed_optimizer=false", "cluster.nodes=1"]
    done = tool("resume", "runs/survivor", *other, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr

    attempts = read_attempts(run_dir)
    assert [attempt.ranks for attempt in attempts] == [4] * (len(disturbances) + 1) + [2]
    assert all(attempt.lost_steps <= 3 for attempt in attempts), "checkpoints are three steps apart"
    assert [attempt.lost_seconds > 0 for attempt in attempts[1:-1]] == [
        disturb is not ask_to_save for disturb in disturbances
    ]
    for number, attempt in enumerate(attempts[1:], 1):  # shown by pytest -rP
        stood = attempt.began - attempts[number - 1].ended
        what = disturbances[number - 1].__name__ if number <= len(disturbances) else "cancel, another layout"
        print(
            f"{what}: {attempt.lost_steps} steps, {attempt.lost_seconds} s of work lost, stood still for {stood:.0f} s"
        )
    found, same_layout = metrics(run_dir), attempts[-1].steps_saved
    assert attempts[-1].end == "done" and [line["step"] for line in found] == list(range(steps))
    assert json.dumps(found[:same_layout]) == json.dumps(expected[:same_layout]), "bit for bit"
    for want, got in zip(expected[same_layout:], found[same_layout:], strict=True):
        wrong = {
            name: (want[name], got[name])
            for name in want
            if not math.isclose(want[name], got[name], rel_tol=2e-4, abs_tol=2e-5)
        }
        assert not wrong, f"step {want['step']}"


def test_three_failures_at_the_same_step_stop_the_run_with_the_reason(tool: Tool):  # noqa: F811
    run_dir = tool.folder / "runs" / "stuck"
    settings = [
        *tool.settings,
        "parallel.tensor=2",
        "train.steps=9",
        "reward.function=tests.support.slow:fails_at_a_step",
    ]
    done = tool(*settings, "run.dir=runs/stuck", "--follow")
    assert done.returncode != 0
    said = done.stdout.splitlines()
    reason = (
        "ValueError: reward.function: tests.support.slow:fails_at_a_step failed: OSError: the verifier's host is down"
    )
    attempts = read_attempts(run_dir)
    assert [(attempt.end, attempt.reached) for attempt in attempts] == [("failed", 2)] * 3
    assert said[-1].startswith("papo: stopped: failed 3 times in a row at step 2, without progress: papo: rank ")
    assert said[-1].count(reason) in (1, 2), "once for each rank that came first"
    first = next(index for index, line in enumerate(said) if line.startswith("papo: the last lines of rank"))
    ended = next(index for index, line in enumerate(said) if line.startswith("papo: attempt 1: failed"))
    assert any(reason in line for line in said[first:ended]), "the failing rank's own lines come first"
    assert (run_dir / "logs" / "attempt_0003" / "rank_1.log").exists()


def test_a_stall_leaves_the_stacks_of_all_ranks_and_the_run_goes_on(tool: Tool):  # noqa: F811
    run_dir = tool.folder / "runs" / "stall"
    settings = [*tool.settings, "parallel.tensor=2", "train.steps=4", "reward.function=tests.support.slow:stalls_once"]
    limits = ["run.stage_limits_s={reward: 5}", "checkpoint.save_every=1"]
    done = tool(*settings, *limits, "run.dir=runs/stall", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    stalled, second = read_attempts(run_dir)
    assert stalled.end == "failed" and stalled.reached == 2
    assert "stalled: stage reward made no progress for run.stage_limits_s.reward=5" in stalled.reason
    assert (second.end, second.steps_saved, second.lost_steps) == ("done", 2, 0)
    stacks = "".join(path.read_text() for path in sorted((run_dir / "logs" / "attempt_0001" / "stacks").iterdir()))
    assert "in stalls_once" in stacks and "in gather_objects" in stacks
