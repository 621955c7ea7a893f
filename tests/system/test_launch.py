"""Local ranks: they talk, one reason for a failed run, stalls, and nothing left behind. Real gloo ranks throughout."""

import json
import multiprocessing.context
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron_papo.runtime.failure_notes import NotesInMemory
from megatron_papo.runtime.failures import SAVED_EXIT
from megatron_papo.runtime.heartbeat import PEER_EXIT
from megatron_papo.runtime.launch import Work, free_port, launch, outer_rank
from megatron_papo.runtime.rank_watch import watch_ranks
from megatron_papo.runtime.watchdog import STALL_EXIT
from tests.support.commands import begin
from tests.support.interpreter import PYTHON

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As a user's shell: no rank's variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)


def run(name: str, folder: Path, num_ranks: int = 2) -> tuple[int, float]:
    """Exit code and seconds of a launch."""
    start = time.monotonic()
    code = launch(Work(f"tests.system.launch_targets:{name}", (str(folder),), folder), num_ranks)
    return code, time.monotonic() - start


def own_lines(capfd) -> list[str]:
    """Without what torch.distributed's C++ says of a peer that is gone; there is no Python traceback among it."""
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    return [line for line in printed.splitlines() if line.startswith("papo:")]


def last_line(capfd) -> str:
    return capfd.readouterr().err.strip().splitlines()[-1]


def test_ranks_talk_with_one_thread_each_and_leave_no_empty_files(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, _ = run("sum_ranks", tmp_path, num_ranks=3)
    assert code == 0
    found = [(tmp_path / f"sum_{rank}").read_text() for rank in range(3)]
    assert found == ["6.0 1 0 ForkProcess", "6.0 1 1 ForkProcess", "6.0 1 2 ForkProcess"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sum_0", "sum_1", "sum_2"]


def test_ranks_that_have_gpus_are_spawned(tmp_path, monkeypatch):
    """A forked process cannot use a GPU that its parent has asked about."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("megatron_papo.runtime.launch.has_gpu", lambda: True)
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(PYTHON))  # a rank makes a process group
    assert run("sum_ranks", tmp_path, num_ranks=1)[0] == 0
    assert (tmp_path / "sum_0").read_text() == "1.0 1 0 SpawnProcess"


def test_the_rank_that_failed_is_named_last_and_its_victims_are_not(tmp_path, capfd):
    code, seconds = run("rank_one_raises", tmp_path, num_ranks=3)
    printed = capfd.readouterr().err
    assert code == 1
    assert printed.strip().splitlines()[-1] == "papo: rank 1 failed: ValueError: row 7: no such image"
    assert "closed by peer" not in printed.lower()
    assert seconds < 10


def test_what_a_user_can_put_right_is_said_without_a_traceback(tmp_path, capfd):
    code, _ = run("rank_one_raises", tmp_path)
    assert code == 1
    kept = tmp_path / "failures" / "rank_1.txt"
    assert own_lines(capfd) == [
        "papo: starting 2 ranks",
        f"papo: the traceback is in {kept}",
        "papo: rank 1 failed: ValueError: row 7: no such image",
    ]
    assert "in rank_one_raises" in kept.read_text()


def test_any_other_failure_shows_its_traceback(tmp_path, capfd):
    code, _ = run("rank_one_breaks", tmp_path)
    printed = capfd.readouterr().err
    assert code == 1
    assert "in rank_one_breaks" in printed
    assert printed.splitlines()[-1] == "papo: rank 1 failed: RuntimeError: a bug"
    assert not (tmp_path / "failures").exists()


class _LateToSay(multiprocessing.context.ForkProcess):
    """Its sentinel fires a moment before its exit code is there, as happens on a busy machine."""

    asked = 0

    @property
    def exitcode(self) -> int | None:
        self.asked += 1
        return None if self.asked == 1 else super().exitcode


def test_a_failure_that_shows_late_is_no_success(tmp_path, capfd):
    process = _LateToSay(target=os._exit, args=(3,))
    process.start()
    assert watch_ranks([process], tmp_path, NotesInMemory()) == 1
    assert last_line(capfd) == "papo: rank 0 failed: ended: with exit code 3"


def test_a_rank_that_a_signal_ended_is_named_with_the_signal(tmp_path, capfd):
    code, seconds = run("rank_one_is_killed", tmp_path)
    assert code == 1
    assert last_line(capfd).startswith("papo: rank 1 failed: killed: by signal SIGKILL")
    assert seconds < 10


def test_a_setting_that_a_rank_refuses_has_no_traceback(tmp_path, capfd):
    code, _ = run("refused", tmp_path)
    assert code == 2
    assert own_lines(capfd) == ["papo: starting 2 ranks", "papo: error: data.train: is empty"]


def test_a_stalled_collective_ends_with_the_stack_of_every_rank(tmp_path, capfd):
    code, seconds = run("rank_one_never_comes", tmp_path)
    printed = capfd.readouterr().err
    assert code == 1
    assert 3 < seconds < 12, "the limit is 3 s"
    assert "in _waits_in_a_collective" in printed and "in _sleeps_instead" in printed
    assert "stalled: stage update made no progress for run.stall_limit_s=3" in printed.strip().splitlines()[-1]
    stacks = [(tmp_path / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert "in _waits_in_a_collective" in stacks[0] and "distributed_c10d.py" in stacks[0]
    assert "in _sleeps_instead" in stacks[1]


def test_a_stall_between_stages_ends_with_the_stack_of_a_rank_that_is_not_watched_too(tmp_path, capfd):
    code, _ = run("rank_one_stalls_between_stages", tmp_path)
    printed = capfd.readouterr().err
    assert code == 1
    assert printed.strip().splitlines()[-1] == (
        "papo: rank 1 failed: stalled: the run, after stage pack, made no progress for run.stall_limit_s=1"
    )
    stacks = [(tmp_path / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert all("in _sleeps_instead" in stack for stack in stacks) and stacks[0] in printed


def test_of_ranks_that_stall_the_one_that_gives_no_sign_of_life_is_the_cause(tmp_path, capfd):
    code, _ = run("rank_one_is_stopped", tmp_path)
    printed = capfd.readouterr().err
    assert code == 1
    assert "papo: rank 0: the run, after stage pack, made no progress for run.stall_limit_s=2" in printed
    reason = rf"papo: rank 1 failed: dead: no sign of life from {re.escape(socket.gethostname())} for [23] s "
    assert re.fullmatch(reason + r"\((between stages|in stage pack)\)", printed.strip().splitlines()[-1])


def test_a_stage_that_moves_may_take_longer_than_the_limit(tmp_path, capfd):
    code, seconds = run("slow_but_moving", tmp_path, num_ranks=1)
    assert code == 1
    assert (tmp_path / "survived").exists()
    assert last_line(capfd) == "papo: rank 0 failed: stalled: stage update made no progress for run.stall_limit_s=2"
    assert 9 < seconds < 20


def test_a_blocked_interpreter_is_ended_too_counted_from_its_last_progress(tmp_path, capfd):
    code, seconds = run("blocks_the_interpreter", tmp_path, num_ranks=1)
    assert code == 1
    assert (tmp_path / "survived").exists(), "the limit with its reserve is 3 s, and it moved for 3.5"
    assert "in _keeps_the_interpreter" in (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert 6 < seconds < 20


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
    ids=["terminated", "interrupted", "hung up", "killed"],
)
def test_nothing_outlives_the_command(tmp_path, number, code):
    """Nor does it leave a file but the run's own. Stopped and continued, as from a terminal, all of it is."""
    temporary, folder = tmp_path / "temporary", tmp_path / "run"
    temporary.mkdir(), folder.mkdir()
    words = "-m", "tests.system.launch_targets", "wait_with_a_child", folder, 2
    process = begin(*words, log=tmp_path / "log", environ=dict(os.environ) | {"TMPDIR": str(temporary)})
    try:
        pids = [pid for rank in range(2) for pid in _pids(folder / f"pids_{rank}")]
        assert len(pids) == 4 and all(map(_lives, pids))
        if number == signal.SIGTERM:
            process.send_signal(signal.SIGTSTP)
            _until(lambda: all(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in [process.pid, *pids]))
            process.send_signal(signal.SIGCONT)
            _until(lambda: not any(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in pids))
        for _ in range(2):  # in a hurry
            with suppress(ProcessLookupError):
                process.send_signal(number)
        assert process.wait(timeout=20) == code
    finally:
        process.kill()
    _until(lambda: not any(map(_lives, pids)))
    assert list(temporary.iterdir()) == []
    assert ("papo: interrupted" in (tmp_path / "log").read_text()) == (number == signal.SIGINT)


def test_who_asks_for_a_save_while_a_run_starts_is_heard(tmp_path):
    words = "-m", "tests.system.launch_targets", "asked_to_save_while_starting", tmp_path, 1
    assert begin(*words, log=tmp_path / "log").wait(timeout=60) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "asked").read_text() == "True"


@pytest.mark.parametrize(("name", "times", "code"), [("leaves", 1, SAVED_EXIT), ("stays", 2, 130)])
def test_ctrl_c_saves_and_a_second_one_leaves_at_once(tmp_path, name, times, code):
    folder = tmp_path / name
    folder.mkdir()
    process = begin("-m", "tests.system.launch_targets", "saves_when_asked", folder, 1, log=tmp_path / "log")
    try:
        _until(lambda: (folder / "ready").exists())
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            _until(lambda: "papo: interrupted" in (tmp_path / "log").read_text())
        assert process.wait(timeout=20) == code
    finally:
        process.kill()
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "interrupted" in line]
    assert said[0].startswith("papo: interrupted: the run ends after its step and saves what checkpoint.contents says")
    assert said[1:] == ["papo: interrupted"][: times - 1]


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _pids(path: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().split()) < 2:
        assert time.monotonic() < deadline, f"{path.name} was never written"
        time.sleep(0.1)
    return [int(word) for word in path.read_text().split()]


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def torchrun(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    command += ["tests.system.launch_targets", name, str(folder), "2"]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


def test_under_torchrun_it_takes_its_place_and_leaves_no_empty_files(tmp_path):
    done = torchrun("sum_ranks", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"sum_{rank}").read_text() for rank in range(2)] == [
        "3.0 1 0 _MainProcess",
        "3.0 1 1 _MainProcess",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sum_0", "sum_1"]


def test_torchruns_closing_report_names_the_reason(tmp_path):
    done = torchrun("rank_one_raises", tmp_path)
    assert done.returncode != 0
    reason = "papo: rank 1 failed: ValueError: row 7: no such image"
    before, _, report = done.stderr.partition("Root Cause (first observed failure):")
    assert [line for line in before.splitlines() if "papo: rank" in line] == [reason]
    assert reason in report
    assert not (tmp_path / "stacks" / "rank_1.txt").exists()


def test_a_rank_that_waits_for_nobody_hears_that_another_has_failed(tmp_path):
    """Under torchrun no launcher of ours is there; by hand on two machines there would be none at all."""
    start = time.monotonic()
    done = torchrun("rank_one_raises_while_rank_zero_computes", tmp_path)
    assert done.returncode != 0
    note = json.loads((tmp_path / "failures" / "rank_1.json").read_text())
    assert (note["rank"], note["kind"], note["message"]) == (1, "value", "row 7: no such image")
    assert time.monotonic() - start < 60, "rank 0 would have slept for 600 s"


def by_hand(name: str, folder: Path) -> list[tuple[int, str]]:
    """Exit code and errors of two ranks as on two machines: nothing but the shared folder connects them."""
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = "-m", "tests.system.launch_targets", name, folder, 2
    logs = [folder.with_name(f"{folder.name}_{rank}.log") for rank in range(2)]
    ranks = [begin(*command, log=log, environ=common | {"RANK": str(rank)}) for rank, log in enumerate(logs)]
    return [(process.wait(timeout=60), log.read_text()) for process, log in zip(ranks, logs)]


def test_without_any_launcher_no_rank_outlives_the_failure(tmp_path):
    (code, said), (cause, _) = by_hand("rank_one_raises_while_rank_zero_computes", tmp_path)
    assert (code, cause) == (PEER_EXIT, 1)
    assert "papo: rank 0 ends, since rank 1 failed: ValueError: row 7: no such image" in said


def test_a_stage_limit_of_its_own_and_the_stacks_of_all_ranks_without_any_launcher(tmp_path):
    (code, _), (cause, said) = by_hand("rank_one_stalls_in_generate", tmp_path)
    assert (code, cause) == (PEER_EXIT, STALL_EXIT)
    assert "stage generate made no progress for run.stage_limits_s.generate=2" in said
    stacks = [(tmp_path / "stacks" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert stacks[0].startswith("while rank 1 stalled: ") and "in _waits_in_a_collective" in stacks[0]
    assert "in _sleeps_instead" in stacks[1]


def test_signs_of_life_go_with_a_rank_that_ends_well(tmp_path):
    code, _ = run("ends_well_with_a_heartbeat", tmp_path)
    assert code == 0
    signs = [json.loads((tmp_path / f"sign_{rank}").read_text()) for rank in range(2)]
    assert all(sign["count"] > 2 and sign["stage"] == "update" and sign["host"] for sign in signs)
    assert not (tmp_path / "heartbeats").exists()


def test_srun_variables_become_those_of_torch_distributed():
    step = {
        "SLURM_PROCID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16",
        "SLURM_LOCALID": "1", "SLURM_JOB_ID": "40123", "SLURM_STEP_NODELIST": "gpu[07-08]",
    }  # fmt: skip
    assert outer_rank(step) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "20123",
    }  # fmt: skip
    second = outer_rank({**step, "SLURM_STEP_ID": "1"})
    assert second["MASTER_PORT"] == "20220", "a job's second attempt does not meet what the first left"
    assert outer_rank({**step, "MASTER_ADDR": "head", "MASTER_PORT": "7"})["MASTER_ADDR"] == "head"
    assert outer_rank({**step, "SLURM_STEP_NODELIST": "gpu07,k1"})["MASTER_ADDR"] == "gpu07"
    assert outer_rank({**step, "SLURM_STEP_NODELIST": "gpu07"})["MASTER_ADDR"] == "127.0.0.1", "nobody else is asked"


def test_a_batch_script_and_a_plain_shell_are_no_ranks():
    assert outer_rank({}) is None
    assert outer_rank({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}) is None
    assert outer_rank({"RANK": "0", "WORLD_SIZE": "1"}) == {}
