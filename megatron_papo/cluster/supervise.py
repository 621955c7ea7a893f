"""Runs a training run inside a Slurm job: starts its ranks, watches them, and sees that the run goes on.

    python3 -m megatron_papo.cluster.supervise --settings SETTINGS.json --ranks N --srun=OPTION ... -- COMMAND...

SETTINGS.json is what `papo check --json` printed. The batch script hands over to this program (exec), so that Slurm's
signals reach it. `srun COMMAND` is an attempt. When one ends:

    done                     the job ends
    saved (USR1 came)        the job queues itself again, and goes on from the checkpoint; where Slurm does not let
                             it, as in a chain of jobs, or where it was asked to stop, it ends, and all is well
    a rank failed or died    the failing rank's last lines are shown; the next attempt starts on the same nodes when
                             all of them answer, else the job queues itself again, and Slurm chooses others
    three failures at one step, too little memory twice, or refused settings     the job ends with the reason

Imports the standard library only, for Python 3.9 and later: a batch host has no more than that when the ranks run in a
container. Leaves out how ranks learn of each other's failures (runtime/heartbeat.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from megatron_papo.cluster import attempts as attempts_file
from megatron_papo.cluster.attempts import Attempt, AttemptEnding, read_attempts, reason_to_stop
from megatron_papo.cluster.job_log import closing, last_lines, opening, say, show
from megatron_papo.cluster.ranks import RankWatch, killed_tasks
from megatron_papo.cluster.stop_request import is_asked_to_stop
from megatron_papo.cluster.supervised_job import CLEARING_S, SupervisedJob, running
from megatron_papo.runtime.failure_notes import read_failures
from megatron_papo.runtime.failures import SAVED_EXIT, SAVED_FILE, Failure, the_cause
from megatron_papo.runtime.process import command, go_on_without_readers, remember, save_requested
from megatron_papo.runtime.progress import RunProgress, read_progress
from megatron_papo.runtime.run_lock import Holder, RunHeld, drop_own, look

_LOOK_S = 1.0
_NOTE_WAIT_S = 20.0
"""From the first note of a failure until ranks that have not ended by themselves are ended."""
_ASK_AGAIN_S = 30.0
"""USR1 is sent again this often: a rank that was still importing did not listen."""
_FINAL = {"done": 0, "refused": 2, "stopped": 1}
"""Ends that no other attempt follows, with the job's exit code."""
_KEPT = ("failures", "stacks")
"""Folders of an attempt, kept with its logs."""


class Supervisor:
    def __init__(
        self,
        job: SupervisedJob,
        settings: dict[str, dict[str, object]],
        num_ranks: int,
        srun: list[str],
        command: list[str],
    ):
        """`settings`: the whole tree. `srun`: more options of srun. `command`: what every rank runs."""
        run = settings["run"]
        self._job, self._num_ranks, self._srun, self._command = job, num_ranks, srun, command
        self._resumes = bool(settings["checkpoint"]["resume"])
        self._run_dir = Path(str(run["dir"]))
        self._max_failures = int(str(run["max_failures"]))
        self._beat_limit_s, self._start_limit_s = float(str(run["heartbeat_limit_s"])), float(str(run["stall_limit_s"]))
        self._asked_to_save = save_requested()
        self._told_to_end = False
        self._noted: dict[int, Failure] = {}
        """Failures of the present attempt, up to when it was told to end: later ones are of that."""

    def main(self) -> int:
        """Attempts until the run is done or has to leave this job; the exit code of the job."""
        signal.signal(signal.SIGUSR1, self._on_save_request)
        signal.signal(signal.SIGTERM, self._on_end_request)
        attempts = read_attempts(self._run_dir)
        if other := self._other_running_job(attempts):
            say(f"error: run.dir: job {other} is training in {self._run_dir}; cancel it, or choose another folder")
            return 2
        try:
            self._drop_lock()
        except RunHeld as error:
            say(f"error: {error}")
            return 2
        except OSError as error:  # the ranks look too
            say(f"warning: {error}")
        attempts = attempts_file.close_lost(self._run_dir, attempts, read_progress(self._run_dir).steps_done)
        leave: int | None = None
        while leave is None:
            stop = reason_to_stop(self._counted(attempts), self._max_failures)
            if stop:
                say(f"stopped: {stop}")
                return 1
            attempts = [*attempts, self._attempt(attempts)]
            leave = self._leave(attempts)
        return leave

    def _counted(self, attempts: list[Attempt]) -> list[Attempt]:
        """The attempts whose failures count: those of this job, or of the chain that it belongs to."""
        chained = attempts_file.is_chained(self._run_dir, self._job.id)
        return [attempt for attempt in attempts if chained or attempt.job == self._job.id]

    def _leave(self, attempts: list[Attempt]) -> int | None:
        """The exit code of the job where no other attempt is to follow in it."""
        end = attempts[-1].end
        if end in _FINAL:
            return _FINAL[end]
        if self._told_to_end:
            return 128 + signal.SIGTERM
        if end == "saved":
            return self._queue_again("saved before the time limit")
        if reason_to_stop(self._counted(attempts), self._max_failures):
            return None
        if self._asked_to_save:
            return self._queue_again("failed before it had saved, at the time limit")
        return None if self._job.nodes_answer() else self._queue_again("not all nodes answer")

    def _attempt(self, earlier: list[Attempt]) -> Attempt:
        """Runs one attempt to its end, and writes its beginning and its end to RUN/attempts.jsonl."""
        progress = read_progress(self._run_dir)
        attempt = Attempt(
            number=earlier[-1].number + 1 if earlier else 1,
            job=self._job.id,
            nodes=self._job.nodes,
            ranks=self._num_ranks,
            began=time.time(),
            steps_done=progress.steps_done,
            steps_saved=progress.steps_saved,
            lost_steps=progress.lost_steps,
            lost_seconds=attempts_file.lost_seconds(earlier, progress),
        )
        self._write(attempt)
        say(opening(attempt, earlier, progress.lost()))
        ending = self._run_ranks(attempt.number, self._goes_on(earlier, progress))
        reached = read_progress(self._run_dir).steps_done
        attempt = replace(attempt, end=ending.end, ended=time.time(), reached=reached, reason=ending.reason)
        attempt = replace(attempt, failure=ending.failure)
        self._write(attempt)
        self._tell(attempt, ending)
        return attempt

    def _write(self, attempt: Attempt) -> None:
        """A full disk costs the line, not the run; failures of this job are counted in memory."""
        try:
            attempts_file.write_attempt(self._run_dir, attempt)
        except OSError as error:
            say(f"warning: attempts.jsonl: {error}")

    def _goes_on(self, earlier: list[Attempt], progress: RunProgress) -> list[str]:
        """The settings that an attempt adds: `checkpoint.resume=false` is for the beginning of a run, and a job goes on
        with what it, or its chain, has saved."""
        own = self._counted(earlier)
        if self._resumes or not own or progress.written_at < own[0].began:
            return []
        return ["checkpoint.resume=true"]

    def _drop_lock(self) -> None:
        """Removes what an earlier attempt of this job left: its ranks have ended. Raises RunHeld for another's."""
        drop_own(self._run_dir, os.environ.get("SLURM_JOB_ID", ""))
        look(self._run_dir, Holder.here("train", os.environ, self._beat_limit_s))

    def _run_ranks(self, number: int, overrides: list[str]) -> AttemptEnding:
        for name in ("heartbeats", *_KEPT):  # of an attempt whose supervisor was taken away
            shutil.rmtree(self._run_dir / name, ignore_errors=True)
        drop_own(self._run_dir, os.environ.get("SLURM_JOB_ID", ""))
        with suppress(FileNotFoundError):
            (self._run_dir / SAVED_FILE).unlink()
        logs = self._logs(number)
        logs.mkdir(parents=True, exist_ok=True)
        output = f"{str(logs).replace('%', '%%')}/rank_%t.log"
        srun = ["srun", "--kill-on-bad-exit=1", "--export=ALL", f"--output={output}", *self._srun]
        with (logs / "srun.log").open("w") as said:
            step = subprocess.Popen(
                [*srun, *self._command, *overrides], stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        watch = RankWatch(self._run_dir, self._num_ranks, self._beat_limit_s, self._start_limit_s)
        with (logs / "rank_0.log").open("a+", errors="replace") as first:
            dead = self._watch(step, watch, first)
            show(first.read())
        ending = self._how_it_ended(step.returncode, logs / "srun.log", watch, dead)
        for name in _KEPT:
            with suppress(OSError):
                (self._run_dir / name).rename(logs / name)
        return ending

    def _watch(self, step: subprocess.Popen[bytes], watch: RankWatch, first: TextIO) -> Failure | None:
        """Waits until the ranks have ended, by themselves or because one of them is dead; the failure of that one."""
        noted_at, asked_at = math.inf, -math.inf
        self._noted = {}
        while step.poll() is None:
            time.sleep(_LOOK_S)
            now = time.monotonic()
            with suppress(OSError):  # a shared disk that hiccups: the next look is a second away
                show(first.read())
                if not self._told_to_end:
                    self._noted = read_failures(self._run_dir / "failures")
            dead = watch.dead_rank(but=set(self._noted))
            self._asked_to_save = self._asked_to_save or self._asked_to_stop()
            if self._asked_to_save and watch.all_started and now - asked_at > _ASK_AGAIN_S:
                asked_at = now
                step.send_signal(signal.SIGUSR1)  # srun passes it on to every rank
            if self._noted:
                noted_at = min(noted_at, now)
            if dead or now - noted_at > _NOTE_WAIT_S or self._told_to_end:
                self._job.end_step(step)
                return dead
        return None

    def _how_it_ended(self, code: int, srun_log: Path, watch: RankWatch, dead: Failure | None) -> AttemptEnding:
        notes = list(self._noted.values())
        if not self._told_to_end:  # later ones are of being ended
            with suppress(OSError):
                notes = list(read_failures(self._run_dir / "failures").values())
        if self._told_to_end:
            if not notes and not dead:
                return AttemptEnding("told to end", "by Slurm: cancelled, preempted or queued again")
        elif code in (0, SAVED_EXIT) and not dead:  # a job of one rank ends with the latter
            return AttemptEnding("saved" if (self._run_dir / SAVED_FILE).exists() else "done")
        else:
            notes += killed_tasks(srun_log, watch, self._job.nodes)
        if all(note.kind == "distributed" for note in notes):  # victims, all of them
            dead = dead or watch.longest_silent(but={note.rank for note in notes})
        notes += [dead] if dead else []
        cause = the_cause(notes or [Failure(0, time.time(), "silent", "ended", f"srun: exit code {code}")])
        end = {"config": "refused", "stopped": "stopped"}.get(cause.kind, "failed")
        return AttemptEnding(end, cause.reason(), cause.rank, cause.name)

    def _tell(self, attempt: Attempt, ending: AttemptEnding) -> None:
        """Prints how the attempt ended; where a rank failed, that rank's last lines first."""
        logs = self._logs(attempt.number)
        if ending.rank is not None:
            lines = last_lines(logs / f"rank_{ending.rank}.log") or last_lines(logs / "srun.log")
            show("\n  ".join([f"papo: the last lines of rank {ending.rank}:", *lines]) + "\n")
        say(closing(attempt, ending.reason) + ("" if attempt.end == "done" else f" (logs: {logs})"))

    def _other_running_job(self, attempts: list[Attempt]) -> str:
        """The job that an attempt without an end belongs to, when it is another one and Slurm says that it runs."""
        if not attempts or attempts[-1].end or attempts[-1].job == self._job.id:
            return ""
        return running(attempts[-1].job)

    def _queue_again(self, why: str) -> int:
        """Has Slurm queue the job again, which ends this program when Slurm takes the job back; the exit code where it
        does not, or where the job was asked to stop."""
        if self._asked_to_stop():
            saved = (self._run_dir / SAVED_FILE).exists()
            say(f"asked to stop: {'saved' if saved else why}; `submit_slurm.py resume {self._run_dir}` goes on")
            return 0 if saved else 1
        say(f"{why}: queueing job {self._job.id} again")
        refusal = self._job.queue_again()
        if refusal is not None:
            say(f"it is not queued again ({refusal}): a chain's next job, or the same command, goes on")
            return 0 if (self._run_dir / SAVED_FILE).exists() else 1
        time.sleep(CLEARING_S)
        return SAVED_EXIT

    def _asked_to_stop(self) -> bool:
        return is_asked_to_stop(self._run_dir, self._job.id)

    def _logs(self, number: int) -> Path:
        return self._run_dir / "logs" / f"attempt_{number:04d}"

    def _on_save_request(self, *_: object) -> None:
        if not self._asked_to_save:
            say("USR1: the run ends after its step and saves what checkpoint.contents says")
        self._asked_to_save = True

    def _on_end_request(self, *_: object) -> None:
        self._told_to_end = True


def main() -> int:
    go_on_without_readers()  # the job's log may be on a disk that is full
    parser = argparse.ArgumentParser(
        prog="python3 -m megatron_papo.cluster.supervise", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--settings", type=Path, required=True, help="what `papo check --json` printed")
    parser.add_argument("--ranks", type=int, required=True, help="of the whole job")
    parser.add_argument("--save-asked", action="store_true", help="SIGUSR1 came before this program began")
    parser.add_argument("--srun", action="append", default=[], metavar="OPTION", help="one more option of srun")
    parser.add_argument("command", nargs="+", help="what every rank runs")
    options = parser.parse_args()
    if options.save_asked:
        remember()
    settings = json.loads(options.settings.read_text())
    return Supervisor(SupervisedJob.here(), settings, options.ranks, options.srun, options.command).main()


if __name__ == "__main__":
    sys.exit(command(main))
