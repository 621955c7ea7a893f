"""The tests' own processes: ranks, and what a forked process starts."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.commands import run
from tests.support.process_wire import receive, send
from tests.support.processes import environment
from tests.support.ranks import run_ranks


def _sum_of_ranks(bias: int) -> float:
    torch.distributed.init_process_group("gloo")
    value = torch.tensor(float(torch.distributed.get_rank() + bias))
    torch.distributed.all_reduce(value)
    return value.item()


def _second_rank_fails() -> None:
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("planted")
    torch.distributed.barrier()


@pytest.mark.fast
def test_ranks_talk_to_each_other_and_return_their_results():
    assert run_ranks(_sum_of_ranks, 3, 10) == [33.0, 33.0, 33.0]


@pytest.mark.fast
def test_a_rank_that_raises_fails_the_run_with_its_reason():
    with pytest.raises(Exception, match="planted"):
        run_ranks(_second_rank_fails, 2)


@pytest.mark.fast
def test_whoever_has_heard_all_may_be_gone(monkeypatch):
    """A server that was sent a signal ends the process, tells its code and closes before the sender runs again."""
    here, there = socket.socketpair()
    send_fds = socket.send_fds

    def end_with_the_signal(*words):
        num_sent = send_fds(*words)
        assert receive(there) == (15, [])
        there.close()
        return num_sent

    monkeypatch.setattr(socket, "send_fds", end_with_the_signal)
    send(here, 15)


STARTED = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"heard\\n"))
print(os.getpid(), "torch" in sys.modules, os.environ["GIVEN"], input(), os.read(int(sys.argv[1]), 9), flush=True)
while True:
    signal.pause()
"""
STARTS = """
import os, signal, subprocess, sys, time
hears, says = os.pipe()
os.write(says, b"by a pipe")
for number in (signal.SIGTERM, signal.SIGKILL):
    command, given = [sys.executable, "started.py", str(hears)], {**os.environ, "GIVEN": "x"}
    process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True, pass_fds=[hears], env=given)
    process.stdin.write("a line\\n"), process.stdin.close()
    print(process.stdout.readline(), end="")
    process.send_signal(signal.SIGUSR1)
    print(process.stdout.readline(), end="")
    process.send_signal(number)
    print(process.wait())
    os.write(says, b"by a pipe")
sys.exit(subprocess.call([sys.executable, "-S", "-c", "import sys; sys.exit(3 + 2 * ('torch' in sys.modules))"]))
"""


@pytest.mark.fast
def test_what_a_forked_process_starts_is_forked_as_well_and_is_a_process_as_any(tmp_path):
    """Its open files, environment, streams, signals, exit code, and that it does not outlive the one that is killed."""
    (tmp_path / "starts.py").write_text(STARTS)
    (tmp_path / "started.py").write_text(STARTED)
    done = run("starts.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (3, "")
    first, heard, ended, second, heard_too, killed = done.stdout.splitlines()
    assert (heard, ended, heard_too, killed) == ("heard", "-15", "heard", "-9")
    for line in (first, second):
        pid, is_forked, rest = line.split(" ", 2)
        assert is_forked == str(environment() != Path(sys.prefix)) and rest == "x a line b'by a pipe'"
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "it outlives the one that was killed"
            time.sleep(0.05)
