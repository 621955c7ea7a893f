"""What the launched ranks of `test_launch.py` do; a module of its own, since a launcher imports it by name."""

import datetime
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_papo.config import ConfigError, RunConfig
from megatron_papo.observe.clock import StageClock
from megatron_papo.runtime.failures import SAVED_EXIT
from megatron_papo.runtime.heartbeat import Heartbeat
from megatron_papo.runtime.stop_signal import StopSignal


def _start(timeout_s: float = 60.0) -> int:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    dist.barrier()  # a rank that ends while others still join makes torch's C++ say so, which is not the subject here
    return dist.get_rank()


def sum_ranks(folder: str) -> None:
    import torch

    rank = _start()
    value = torch.tensor(float(rank + 1))
    dist.all_reduce(value)
    kind = type(multiprocessing.current_process()).__name__
    found = f"{value.item()} {torch.get_num_threads()} {os.environ['LOCAL_RANK']} {kind}"
    Path(folder, f"sum_{rank}").write_text(found)
    dist.destroy_process_group()  # as `open_run` does: gloo's threads abort an interpreter that ends without it


def rank_one_raises(folder: str) -> None:
    if _start() == 1:
        raise ValueError("row 7: no such image")
    dist.barrier()


def rank_one_breaks(folder: str) -> None:
    if _start() == 1:
        raise RuntimeError("a bug")
    dist.barrier()


def rank_one_is_killed(folder: str) -> None:
    if _start() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def refused(folder: str) -> None:
    _start()
    raise ConfigError("data.train: is empty")


def rank_one_never_comes(folder: str) -> None:
    rank = _start()
    with StageClock(RunConfig(dir=Path(folder), stall_limit_s=3.0), rank) as clock, clock.stage("update"):
        if rank == 1:
            _sleeps_instead()
        _waits_in_a_collective()


def rank_one_raises_while_rank_zero_computes(folder: str) -> None:
    """Rank 0 is in no collective that would fail: it hears of rank 1 by the note alone."""
    rank, run = _start(), RunConfig(dir=Path(folder), heartbeat_s=0.5)
    with Heartbeat(run, rank, lambda: "update"):
        Path(folder, f"pid_{rank}").write_text(str(os.getpid()))
        if rank == 1:
            time.sleep(1)
            raise ValueError("row 7: no such image")
        _sleeps_instead()


def rank_one_stalls_in_generate(folder: str) -> None:
    """A stage with a limit of its own; rank 0 is in none, and no launcher asks it for its stack."""
    rank = _start()
    run = RunConfig(dir=Path(folder), heartbeat_s=0.5, stage_limits_s={"generate": 2.0})
    with Heartbeat(run, rank, lambda: ""):
        if rank == 1:
            with StageClock(run, rank, console=False) as clock, clock.stage("generate"):
                _sleeps_instead()
        _waits_in_a_collective()


def ends_well_with_a_heartbeat(folder: str) -> None:
    rank = _start()
    with Heartbeat(RunConfig(dir=Path(folder), heartbeat_s=0.1), rank, lambda: "update"):
        time.sleep(0.5)
        Path(folder, f"sign_{rank}").write_bytes(Path(folder, "heartbeats", f"rank_{rank}.json").read_bytes())
        dist.barrier()
    dist.destroy_process_group()


def rank_one_stalls_between_stages(folder: str) -> None:
    """Nobody watches rank 0."""
    if _start() == 1:
        with StageClock(RunConfig(dir=Path(folder), stall_limit_s=1.0), 1) as clock:
            with clock.stage("pack"):
                pass
            _sleeps_instead()
    _sleeps_instead()


def rank_one_is_stopped(folder: str) -> None:
    """By the system, between stages."""
    rank = _start()
    run = RunConfig(dir=Path(folder), stall_limit_s=2.0, heartbeat_s=0.2)
    with StageClock(run, rank, console=False) as clock, Heartbeat(run, rank, clock.running) as heartbeat:
        heartbeat.met("this attempt")
        with clock.stage("pack"):
            pass
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        _waits_in_a_collective()


def asked_to_save_while_starting(folder: str) -> None:
    """Before the launcher itself has begun, as its command says."""
    with StopSignal() as stop:
        Path(folder, "asked").write_text(str(stop._received))


def saves_when_asked(folder: str) -> int:
    """Until it is asked to save; if RUN is called `stays`, it goes on all the same."""
    with StopSignal() as stop:
        Path(folder, "ready").touch()
        while not stop._received or Path(folder).name == "stays":
            time.sleep(0.05)
    return SAVED_EXIT


def slow_but_moving(folder: str) -> None:
    """A stage twice as long as the limit that reports; one whose inner stages do; then one that stands still."""
    with StageClock(RunConfig(dir=Path(folder), stall_limit_s=2.0), 0, console=False) as clock:
        with clock.stage("score", total=20) as progress:
            for done in range(20):
                time.sleep(0.2)
                progress.advance() if done % 2 else clock.report(done + 1, 20)
        with clock.stage("evaluate"):
            for _ in range(3):
                with clock.stage("answer"):
                    time.sleep(1.0)
        Path(folder, "survived").touch()
        with clock.stage("update"):
            _sleeps_instead()


def blocks_the_interpreter(folder: str) -> None:
    """Moves for a while, then a call in C that keeps the interpreter to itself: Python's watchdog cannot run."""
    run = RunConfig(dir=Path(folder), stall_limit_s=1.5)
    with StageClock(run, 0, console=False) as clock, clock.stage("update") as progress:
        for _ in range(7):
            time.sleep(0.5)
            progress.advance()
        Path(folder, "survived").touch()
        _keeps_the_interpreter()


def _keeps_the_interpreter() -> None:
    sum(range(10**15))  # a loop in C, which never lets another thread in


def _sleeps_instead() -> None:
    time.sleep(600)


def _waits_in_a_collective() -> None:
    dist.barrier()


def wait_with_a_child(folder: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    Path(folder, f"pids_{os.environ['RANK']}").write_text(f"{os.getpid()} {child.pid}")
    _start()
    time.sleep(600)


if __name__ == "__main__":
    from megatron_papo.runtime.launch import Work, launch
    from megatron_papo.runtime.process import begin, command

    name, folder, num_ranks = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if name == "asked_to_save_while_starting":
        begin()
        os.kill(os.getpid(), signal.SIGUSR1)
    work = Work(f"tests.system.launch_targets:{name}", (folder,), Path(folder), saves=name == "saves_when_asked")
    sys.exit(command(lambda: launch(work, num_ranks)))
