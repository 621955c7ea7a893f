"""One run at a time in a folder: who is refused, and what a run that was killed leaves to the next."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_papo.runtime import run_lock
from megatron_papo.runtime.run_lock import Holder, RunHeld, drop_own, exclusive_run, look, touch

MINE = Holder.here("train", {"SLURM_JOB_ID": "7"}, 0.2)
ELSEWHERE = replace(MINE, machine="another boot", host="node2", job="6", limit_s=0.2)
LONG_AGO = 1000.0


def leave(run_dir: Path, holder: Holder | bytes, touched: float | None = None) -> Path:
    """The lock of a run that was killed."""
    run_dir.mkdir(exist_ok=True)
    file = run_dir / "lock"
    file.write_bytes(holder if isinstance(holder, bytes) else json.dumps(asdict(holder)).encode())
    if touched is not None:
        os.utime(file, (touched, touched))
    return file


def may_begin(run_dir: Path, mine: Holder = MINE) -> bool:
    with exclusive_run(run_dir, mine, takes=True):
        return json.loads((run_dir / "lock").read_text())["pid"] == os.getpid()


def test_a_second_run_is_refused_by_name_until_the_first_has_ended(tmp_path):
    run = tmp_path / "run"
    with subprocess.Popen(["sleep", "60"]) as other:
        first = replace(MINE, pid=other.pid, started=run_lock.started_at(other.pid))
        leave(run, first, LONG_AGO)  # a disk that has not answered it for long: its process is what counts
        for takes in (True, False):
            with pytest.raises(RunHeld) as error, exclusive_run(run, replace(MINE, verb="eval"), takes):
                pass
            assert str(error.value).startswith(f"run.dir: {run} is in use by papo train, process {other.pid} on ")
            assert f"{socket.gethostname()}, Slurm job 7, since " in str(error.value)
            assert str(error.value).endswith(f"if it is gone, remove {run / 'lock'}")
        other.kill()
        while run_lock.started_at(other.pid):  # killed, and not yet asked for its exit code
            time.sleep(0.001)
        assert may_begin(run)
    assert os.listdir(run) == []


def test_a_number_that_another_process_has_by_now_is_no_run(tmp_path):
    leave(tmp_path, replace(MINE, started=MINE.started - 1))
    assert may_begin(tmp_path)


def test_a_run_on_another_machine_lives_as_long_as_it_gives_signs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "_LOOK_S", 0.01)
    leave(tmp_path, ELSEWHERE, LONG_AGO)
    assert may_begin(tmp_path) and capsys.readouterr().err == "", "at once"
    leave(tmp_path, ELSEWHERE)
    assert may_begin(tmp_path), "once its limit is over"
    assert "papo train, process" in capsys.readouterr().err
    file = leave(tmp_path, replace(ELSEWHERE, limit_s=60.0))
    timer = threading.Timer(0.05, lambda: os.utime(file, (time.time() + 1, time.time() + 1)))
    timer.start()
    with pytest.raises(RunHeld, match="on node2, Slurm job 6"):
        may_begin(tmp_path)


def test_a_job_that_slurm_has_queued_again_goes_on_at_once(tmp_path):
    before = replace(ELSEWHERE, job="7", limit_s=3600.0)
    leave(tmp_path, before)
    assert may_begin(tmp_path, replace(MINE, restarts="1"))
    leave(tmp_path, before)
    drop_own(tmp_path, "8")
    drop_own(tmp_path, "")
    assert (tmp_path / "lock").exists()
    drop_own(tmp_path, "7")
    drop_own(tmp_path, "7")
    assert may_begin(tmp_path)


def test_the_ranks_of_a_run_know_its_lock(tmp_path):
    environ = {"MASTER_ADDR": "node1", "MASTER_PORT": "2000"}
    first = Holder.here("train", environ, 60.0)
    with exclusive_run(tmp_path, first, takes=True):
        other = replace(first, pid=1, started=0, machine="", host="node2")
        with exclusive_run(tmp_path, other, takes=False):
            assert (tmp_path / "lock").exists()
        assert (tmp_path / "lock").exists(), "it is not theirs"
        with pytest.raises(RunHeld):
            look(tmp_path, replace(first, launch="node1:2001"))
    here = [Holder.here("train", {"MASTER_ADDR": name, "MASTER_PORT": "1"}, 60.0).launch for name in ("localhost", "")]
    assert here == [f"{socket.gethostname()}:1", ""], "every machine has a localhost"


@pytest.mark.parametrize("content", [b"", b"\xff", b"null", b"[]", b"{}", b'{"pid": "x"}'])
def test_a_lock_that_cannot_be_read_is_as_old_as_its_file(tmp_path, monkeypatch, content):
    leave(tmp_path, content, LONG_AGO)
    assert may_begin(tmp_path)
    monkeypatch.setattr(run_lock, "_LOOK_S", 0.01)
    leave(tmp_path, content)
    assert may_begin(tmp_path, replace(MINE, limit_s=0.05))


def test_what_cannot_be_locked_goes_on_and_says_so(tmp_path, capsys):
    (tmp_path / "lock").mkdir()
    with exclusive_run(tmp_path, MINE, takes=True):
        pass
    assert "Is a directory: another run in this folder would not be noticed" in capsys.readouterr().err
    (tmp_path / "lock").rmdir()
    (tmp_path / "lock").symlink_to("nothing")
    assert may_begin(tmp_path)


def test_a_folder_that_was_made_for_the_lock_goes_with_it_unless_something_is_in_it(tmp_path):
    assert may_begin(tmp_path / "runs" / "a")
    assert os.listdir(tmp_path) == []
    with exclusive_run(tmp_path / "runs" / "a", MINE, takes=True):
        (tmp_path / "runs" / "a" / "metrics.jsonl").touch()
    assert os.listdir(tmp_path / "runs" / "a") == ["metrics.jsonl"]


def test_a_sign_of_life_is_of_the_run_that_has_the_lock(tmp_path):
    touch(tmp_path)
    for holder, alive in ((MINE, True), (replace(MINE, pid=os.getppid()), True), (replace(MINE, pid=1), False)):
        file = leave(tmp_path, holder, LONG_AGO)
        touch(tmp_path)
        assert (file.stat().st_mtime > LONG_AGO) == alive


def _race(run_dir: Path, begin, end, results) -> None:
    begin.wait()
    try:
        with exclusive_run(run_dir, Holder.here("train", {}, 60.0), takes=True):
            results.put(True)
            end.wait()
    except RunHeld:
        results.put(False)


def test_of_several_that_begin_at_once_one_does(tmp_path):
    context = multiprocessing.get_context("fork")
    leave(tmp_path, replace(MINE, started=MINE.started - 1))
    begin, end, results = context.Barrier(6), context.Event(), context.Queue()
    runs = [context.Process(target=_race, args=(tmp_path, begin, end, results)) for _ in range(6)]
    for run in runs:
        run.start()
    assert sorted(results.get(timeout=30) for _ in runs) == [False] * 5 + [True]
    end.set()
    for run in runs:
        run.join()
