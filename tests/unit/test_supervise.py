"""What the supervisor of a cluster job reads and decides, on files; the real one is in tests/system/test_survive.py."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_papo.cluster.attempts import Attempt, close_lost, read_attempts, reason_to_stop, write_attempt
from megatron_papo.cluster.finished import main as finished
from megatron_papo.cluster.ranks import RankWatch, killed_tasks
from megatron_papo.cluster.stop_request import ask_to_stop
from megatron_papo.cluster.supervise import Supervisor
from megatron_papo.cluster.supervised_job import SupervisedJob
from megatron_papo.runtime.failure_notes import write_failure
from megatron_papo.runtime.failures import SAVED_EXIT, RunStopped, describe
from megatron_papo.runtime.progress import read_progress
from megatron_papo.runtime.run_lock import Holder, RunHeld, exclusive_run

REPO = Path(__file__).parents[2]
FIRST = Attempt(1, "7", "node[1-2]", 2, began=1000.0, steps_done=0, steps_saved=0, lost_steps=0, lost_seconds=0.0)


def record(run_dir: Path, steps: int, saved: dict[int, int] | None = None) -> None:
    """`steps` recorded steps of 10 s, and checkpoints: step → serial."""
    run_dir.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "unix_time": 1010.0 + 10 * step}) for step in range(steps)]
    (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for step, serial in (saved or {}).items():
        folder = run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step, "serial": serial}))


def beat(run_dir: Path, rank: int, count: int, host: str = "node1", stage: str = "update") -> None:
    (run_dir / "heartbeats").mkdir(parents=True, exist_ok=True)
    sign = {"count": count, "host": host, "pid": 1, "stage": stage}
    (run_dir / "heartbeats" / f"rank_{rank}.json").write_text(json.dumps(sign))


def failed(number: int, reached: int, reason: str = "rank 1 failed: a bug", end: str = "failed") -> Attempt:
    return replace(FIRST, number=number, end=end, reached=reached, reason=reason)


def test_progress_is_read_from_a_run_in_any_state(tmp_path):
    assert read_progress(tmp_path).steps_done == 0 and read_progress(tmp_path).lost() == ""
    record(tmp_path, 8, {5: 1, 3: 2})  # the run was once set back: the later checkpoint counts, not the higher step
    (tmp_path / "checkpoints" / "step_00000008.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_00000008.tmp" / "state.json").write_text('{"step": 8, "serial": 9}')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "unix')
    (tmp_path / "checkpoints" / "step_00000099").mkdir()
    (tmp_path / "checkpoints" / "step_00000099" / "state.json").write_text("[]")
    found = read_progress(tmp_path)
    assert (found.steps_done, found.steps_saved, found.lost_steps, found.saved_at) == (8, 3, 5, 1030.0)
    assert found.lost() == "5 steps after it to be done again"


def test_an_attempt_is_read_as_its_newest_line_says_also_after_a_line_cut_short(tmp_path):
    write_attempt(tmp_path, FIRST)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"number": 1, "job"\n[]\n{"a later version": 1}\n')
    done = replace(FIRST, end="done", ended=1200.0, reached=4)
    write_attempt(tmp_path, done)
    second = replace(FIRST, number=2)
    write_attempt(tmp_path, second)
    assert read_attempts(tmp_path) == [done, second]


def test_an_attempt_that_nobody_ended_is_lost_when_it_was_last_heard_of(tmp_path):
    write_attempt(tmp_path, FIRST)
    beat(tmp_path, 0, 3)
    os.utime(tmp_path / "heartbeats" / "rank_0.json", (1234.5, 1234.5))
    (lost,) = close_lost(tmp_path, read_attempts(tmp_path), reached=6)
    assert (lost.end, lost.ended, lost.reached) == ("lost", 1234.5, 6)
    assert read_attempts(tmp_path) == [lost]
    assert close_lost(tmp_path, [lost], reached=9) == [lost]


@pytest.mark.parametrize(
    ("attempts", "stops"),
    [
        ([failed(1, 4), failed(2, 4), failed(3, 4)], True),
        ([failed(1, 4), failed(2, 4)], False),
        ([failed(1, 4), failed(2, 5), failed(3, 5)], False),
        ([failed(1, 4), failed(2, 4, end="saved"), failed(3, 4)], False),
        ([failed(1, 4), failed(2, 4, end="told to end"), failed(3, 4)], False),
        ([failed(1, 0), failed(2, 4), failed(3, 4), failed(4, 4, end="lost")], True),
    ],
)
def test_three_failures_at_one_step_are_enough(attempts, stops):
    assert bool(reason_to_stop(attempts, 3)) == stops


def test_too_little_memory_is_not_tried_three_times():
    def short(number: int, reached: int, **other: str) -> Attempt:
        reason = "papo: rank 3 failed: OutOfMemoryError: stage update, row 7; what helps most: a smaller one"
        words = {"reason": reason, "failure": "OutOfMemoryError"}
        return replace(failed(number, reached), **words | other)

    first = reason_to_stop([short(1, 0)], 3)
    assert first.startswith("out of memory in the first step, as another attempt would be: papo: rank 3 failed: OutOf")
    assert first.endswith("row 7; what helps most: a smaller one")
    assert reason_to_stop([short(1, 4)], 3) == ""
    assert reason_to_stop([short(1, 4), short(2, 4)], 3).startswith("out of memory again at step 4, as another")
    assert reason_to_stop([short(1, 4), short(2, 6)], 3) == ""
    assert reason_to_stop([failed(1, 4), short(2, 4)], 3) == ""
    assert reason_to_stop([short(1, 4), short(2, 4, failure="RuntimeError")], 3) == ""
    assert reason_to_stop([short(1, 0), failed(2, 0, end="saved")], 3) == ""


def test_the_reason_to_stop_names_step_and_causes_once_each():
    attempts = [failed(1, 4, "rank 1 failed: a bug"), failed(2, 4, "rank 1 failed: a bug"), failed(3, 4, "node2 died")]
    assert reason_to_stop(attempts, 3) == (
        "failed 3 times in a row at step 4, without progress: rank 1 failed: a bug; node2 died"
    )


def test_a_rank_whose_sign_stands_still_is_dead_and_one_whose_file_is_gone_is_not(tmp_path):
    watch = RankWatch(tmp_path, 3, limit_s=0.5, start_limit_s=60)
    for rank in range(3):
        beat(tmp_path, rank, 1, host=f"node{rank + 1}")
    for number, text in enumerate((b"[]", b"{}", b"\xff", b"7")):  # no signs
        (tmp_path / "heartbeats" / f"rank_{number + 3}.json").write_bytes(text)
    beat(tmp_path, "of nobody", 1)
    assert watch.dead_rank(set()) is None and watch.all_started
    (tmp_path / "heartbeats" / "rank_0.json").unlink()  # ended well
    time.sleep(0.6)
    beat(tmp_path, 1, 2)
    dead = watch.dead_rank(set())
    assert dead is not None and dead.reason() == (
        "papo: rank 2 failed: dead: no sign of life from node3 for 1 s (stage update)"
    )
    assert watch.dead_rank({2}) is None, "it has told why it ended"


def test_a_rank_that_never_starts_is_dead_after_its_limit(tmp_path):
    watch = RankWatch(tmp_path, 2, limit_s=60, start_limit_s=0.2)
    beat(tmp_path, 0, 1)
    assert watch.dead_rank(set()) is None and not watch.all_started
    time.sleep(0.3)
    dead = watch.dead_rank(set())
    assert dead is not None and (dead.rank, dead.message) == (1, "gave no sign of life for 0.2 s after the start")


def test_after_the_end_the_first_silent_rank_without_a_reason_is_the_cause(tmp_path):
    watch = RankWatch(tmp_path, 3, limit_s=60, start_limit_s=60)
    for count in (1, 2):
        for rank in range(3):
            if rank != 1 or count == 1:
                beat(tmp_path, rank, count)
        watch.dead_rank(set())
        time.sleep(0.05)
    found = watch.longest_silent(but={0})
    assert found is not None and found.rank == 1
    assert watch.longest_silent(but={0, 1, 2}) is None


SRUN_LOGS = {
    "srun: error: node2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=3.0\n"
    "srun: error: node1: task 0: Terminated\n": [(1, "killed", "on node2: Killed")],
    "srun: error: node1: tasks 0-3: Exited with exit code 1\n": [(0, "ended", "on node1: Exited with exit code 1")],
    "srun: error: node2: task 3: Exited with exit code 2\n": [(3, "refused", "on node2: Exited with exit code 2")],
    "srun: error: node2: task 5,7: Out Of Memory\n": [
        (5, "OutOfMemoryError", "on node2: Out Of Memory; what helps is a larger cluster.memory, or more machines")
    ],
    "srun: error: Node failure on node2\nsrun: error: node1: task 0: Killed\n": [
        (4, "dead", "Slurm has lost its node node2"), (0, "killed", "on node1: Killed")
    ],
    "srun: Job step aborted: Waiting up to 7 seconds\nsrun: error: node1: task 0: Killed\n": [],
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), SRUN_LOGS.items())
def test_what_srun_says_of_tasks_before_it_ends_the_others(tmp_path, text, expected):
    watch = RankWatch(tmp_path, 8, limit_s=60, start_limit_s=60)
    for rank in (4, 5):
        beat(tmp_path, rank, 1, host="node2")
    watch.dead_rank(set())
    (tmp_path / "srun.log").write_text(text)
    found = killed_tasks(tmp_path / "srun.log", watch, "node[1-2]")
    assert [(failure.rank, failure.name, failure.message) for failure in found] == expected


def test_resume_false_is_for_the_beginning_alone(tmp_path):
    """Else a run would start afresh after every time limit."""
    settings = {
        "run": {"dir": str(tmp_path), "max_failures": 3, "heartbeat_limit_s": 60, "stall_limit_s": 60},
        "checkpoint": {"resume": False},
    }
    supervisor = Supervisor(SupervisedJob("7", "node[1-2]", 2), settings, 2, [], [])
    record(tmp_path, 8, {5: 1})
    (state,) = tmp_path.glob("checkpoints/*/state.json")
    os.utime(state, (900.0, 900.0))  # of an earlier run in this folder
    assert supervisor._goes_on([FIRST], read_progress(tmp_path)) == []
    os.utime(state, (1100.0, 1100.0))
    assert supervisor._goes_on([], read_progress(tmp_path)) == []
    assert supervisor._goes_on([FIRST], read_progress(tmp_path)) == ["checkpoint.resume=true"]
    assert supervisor._goes_on([replace(FIRST, job="6")], read_progress(tmp_path)) == []


def test_a_run_that_stops_itself_is_not_begun_again(tmp_path):
    (tmp_path / "failures").mkdir()
    write_failure(tmp_path / "failures", describe(1, RunStopped("perception.guard: stopped the run after step 4")))
    settings = {
        "run": {"dir": str(tmp_path), "max_failures": 3, "heartbeat_limit_s": 60, "stall_limit_s": 60},
        "checkpoint": {"resume": True},
    }
    supervisor = Supervisor(SupervisedJob("7", "node[1-2]", 2), settings, 2, [], [])
    watch = RankWatch(tmp_path, 2, limit_s=60, start_limit_s=60)
    ending = supervisor._how_it_ended(1, tmp_path / "srun.log", watch, None)
    assert (ending.end, ending.rank) == ("stopped", 1)
    assert supervisor._leave([replace(FIRST, end="stopped")]) == 1
    supervisor._told_to_end = True  # whatever the clocks of the nodes say, what is noted from now on is of that
    assert supervisor._how_it_ended(1, tmp_path / "srun.log", watch, None).end == "told to end"
    supervisor._told_to_end = False
    (tmp_path / "failures" / "rank_1.json").write_bytes(b"\xff[]")
    assert supervisor._how_it_ended(1, tmp_path / "srun.log", watch, None).reason.endswith("srun: exit code 1")
    (tmp_path / "failures" / "rank_1.json").unlink()
    (tmp_path / "saved").write_text("4")
    assert supervisor._how_it_ended(SAVED_EXIT, tmp_path / "srun.log", watch, None).end == "saved"


def test_a_job_that_was_asked_to_stop_saves_and_is_not_queued_again(tmp_path, capsys, monkeypatch):
    settings = {
        "run": {"dir": str(tmp_path), "max_failures": 3, "heartbeat_limit_s": 60, "stall_limit_s": 60},
        "checkpoint": {"resume": True, "export_at_end": False},
        "train": {"steps": 9},
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    monkeypatch.setattr("sys.argv", ["finished", str(tmp_path / "settings.json")])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert finished() == 1
    for jobs in (["7"], ["9"]):
        ask_to_stop(tmp_path, jobs)
    supervisor, other = (Supervisor(SupervisedJob(job, "node[1-2]", 2), settings, 2, [], []) for job in ("7", "8"))
    assert supervisor._asked_to_stop() and not other._asked_to_stop()
    assert supervisor._leave([replace(FIRST, end="saved")]) == 1  # nothing was saved
    (tmp_path / "saved").write_text("4")
    assert supervisor._leave([replace(FIRST, end="saved")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"papo: asked to stop: saved; `submit_slurm.py resume {tmp_path}` goes on"
    assert finished() == 0 and "this job was asked to stop" in capsys.readouterr().out
    (tmp_path / "cluster" / "stop.json").write_bytes(b"\xff")
    assert not supervisor._asked_to_stop()


def test_the_lock_of_this_jobs_earlier_attempt_goes_and_another_runs_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    settings = {
        "run": {"dir": str(tmp_path), "max_failures": 3, "heartbeat_limit_s": 60, "stall_limit_s": 60},
        "checkpoint": {"resume": True},
    }
    supervisor = Supervisor(SupervisedJob("7", "node[1-2]", 2), settings, 2, [], [])
    held = replace(Holder.here("train", {"SLURM_JOB_ID": "7"}, 60.0), machine="another", limit_s=3600.0)
    (tmp_path / "lock").write_text(json.dumps(asdict(held)))
    supervisor._drop_lock()
    assert not (tmp_path / "lock").exists(), "its ranks, wherever they were, have ended"
    with exclusive_run(tmp_path, Holder.here("train", {"SLURM_JOB_ID": "8"}, 60.0), takes=True):
        with pytest.raises(RunHeld, match="Slurm job 8"):
            supervisor._drop_lock()
        assert (tmp_path / "lock").exists()


def test_the_supervisor_needs_the_standard_library_alone():
    bare = subprocess.run(
        [sys.executable, "-S", "-m", "megatron_papo.cluster.supervise", "--help"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert bare.returncode == 0, bare.stderr
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", "import megatron_papo.cluster.supervise, sys; print(*sys.modules)"],
        cwd=REPO, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    own = [REPO / f"{name.replace('.', '/')}.py" for name in loaded if name.startswith("megatron_papo.")]
    assert len([path for path in own if path.exists()]) >= 5
    for path in own:
        if path.exists():
            ast.parse(path.read_text(), feature_version=(3, 9))
