"""RUN/lock: one run at a time trains in a folder; two would mix their checkpoints, records and notes of failures.

The file names who has the folder: host, process, since when, job of Slurm. It is created with O_EXCL, which fails if
it exists, on shared disks too, and is removed at the end. The lock of a killed run is recognised:

    on the same machine   its process no longer exists, or another process has its number
    on another machine    the file was not touched for its limit, by the disk's own clock: a living run touches it with
                          every sign of life (heartbeat.py). A run that starts earlier waits and looks again
    by the same Slurm job, queued again: Slurm has ended what the job ran before

Imports the standard library only, for Python 3.9 and later, since the supervisor of a cluster job looks at the lock
too. If the disk is full or gives no permission, the run goes on without a lock, and says so.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_papo.files.small_files import made_of, parse_record, print_warning

LOCK_FILE = "lock"
_START_S = 60.0
"""Seconds for a run that begins to import its libraries, before its first sign of life."""
_LOOK_S = 0.5
_HERE = ("127.0.0.1", "localhost", "::1")


class RunHeld(ValueError):
    """Another run is alive in the folder. The message names it, and what the user can do."""


@dataclass(frozen=True)
class Holder:
    """Who has a run's folder."""

    verb: str
    host: str
    pid: int
    machine: str
    """Boot and process namespace: where both are the same, `pid` means the same process."""
    started: int
    """When the process began, in clock ticks since the boot: distinguishes it from a later process of that number."""
    since: float
    """When the lock was taken, in seconds of Unix time."""
    job: str
    """Number of the Slurm job; empty outside Slurm."""
    restarts: str
    """How often Slurm has queued that job again."""
    launch: str
    """The same for all ranks of a run that torchrun or srun started; empty for one that papo started itself."""
    limit_s: float
    """After so many seconds without a sign of life the run counts as ended."""

    @classmethod
    def here(cls, verb: str, environ: Mapping[str, str], heartbeat_limit_s: float) -> Holder:
        """This process; `environ` with MASTER_ADDR and MASTER_PORT of the ranks that were started from outside."""
        host, address = socket.gethostname(), environ.get("MASTER_ADDR", "")
        launch = f"{host if address in _HERE else address}:{environ.get('MASTER_PORT', '')}" if address else ""
        job, restarts = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT", "0")
        limit_s, pid = float(heartbeat_limit_s) + _START_S, os.getpid()
        return cls(verb, host, pid, _machine(), started_at(pid), time.time(), job, restarts, launch, limit_s)

    def describe(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        job = f", Slurm job {self.job}" if self.job else ""
        return f"papo {self.verb}, process {self.pid} on {self.host}{job}, since {since}"


@contextmanager
def exclusive_run(run_dir: Path, mine: Holder, takes: bool) -> Iterator[None]:
    """A context in which no other run may use the folder; raises RunHeld where another run is alive in it.

    `takes`: take the lock for the block. False for verbs that write no checkpoint, and on all ranks of a run but the
    first: they only look whether the folder is free.
    """
    made: list[Path] = []
    try:
        if takes:
            made = _take(run_dir, mine)
        else:
            look(run_dir, mine)
    except OSError as error:
        print_warning(f"{run_dir / LOCK_FILE}: {error.strerror}: another run in this folder would not be noticed")
    try:
        yield
    finally:
        if takes:
            _release(run_dir, mine, made)


def look(run_dir: Path, mine: Holder, *, of_own_run: bool = True) -> bytes | None:
    """The lock that a run which has ended left; None if there is no lock or, with `of_own_run`, it belongs to this run.

    Raises RunHeld if the run is alive. Waits if only a later sign of life, or its absence, can tell.
    """
    path = run_dir / LOCK_FILE
    before: tuple[bytes, float] | None = None
    while (seen := _read(path)) is not None:
        text, touched = seen
        if not text and _disk_time(run_dir) - touched < _LOOK_S:
            time.sleep(0.01)  # it is being made
            continue
        holder = made_of(Holder, parse_record(text) or {})
        if of_own_run and holder is not None and holder.launch and holder.launch == mine.launch:
            return None
        gone = None if holder is None else _is_gone(holder, mine)
        limit_s = mine.limit_s if holder is None else holder.limit_s
        if gone or (gone is None and _disk_time(run_dir) - touched > limit_s):
            return text
        who = "a run that left no name" if holder is None else holder.describe()
        waited = before is not None and before[0] == text
        if gone is False or (waited and before != seen):
            raise RunHeld(
                f"run.dir: {run_dir} is in use by {who}: end it, or take another run.dir; if it is gone, remove {path}"
            )
        if not waited:
            print_warning(f"{path}: {who}: waits for a sign of life of it, {limit_s:.0f} s at most")
        before = seen
        time.sleep(_LOOK_S)
    return None


def drop_own(run_dir: Path, job: str) -> None:
    """Removes what an earlier attempt of Slurm's job `job` left, for the supervisor, who knows that it has ended."""
    seen = _read(run_dir / LOCK_FILE)
    holder = None if seen is None else made_of(Holder, parse_record(seen[0]) or {})
    if seen is not None and holder is not None and job and holder.job == job:
        _clear(run_dir / LOCK_FILE, seen[0])


def touch(run_dir: Path) -> None:
    """Gives a sign of life, by the process that has the lock or by one that it started."""
    with suppress(OSError):
        seen = _read(run_dir / LOCK_FILE)
        holder = None if seen is None else made_of(Holder, parse_record(seen[0]) or {})
        if holder is not None and holder.machine == _machine() and holder.pid in (os.getpid(), os.getppid()):
            os.utime(run_dir / LOCK_FILE)


def _take(run_dir: Path, mine: Holder) -> list[Path]:
    """Makes the lock. Returns the folders that were made for it, the innermost first."""
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK_FILE
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            left = look(run_dir, mine, of_own_run=False)
            if left is not None:
                _clear(path, left)
            elif path.is_symlink():  # to nothing
                path.unlink()
            continue
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_text(mine))
        except OSError:
            path.unlink()
            raise
        return made


def _clear(path: Path, left: bytes) -> None:
    """Removes the lock whose text is `left`. Two runs may try at once: a lock that has meanwhile become another run's
    is restored."""
    aside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if aside.read_bytes() != left:
        with suppress(OSError):
            os.link(aside, path)
    aside.unlink()


def _release(run_dir: Path, mine: Holder, made: list[Path]) -> None:
    path = run_dir / LOCK_FILE
    with suppress(OSError):
        if path.read_bytes() == _text(mine):
            path.unlink()
        for folder in made:
            folder.rmdir()  # fails where something was written


def _text(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode() + b"\n"


def _is_gone(holder: Holder, mine: Holder) -> bool | None:
    """Whether the run that left the lock has ended; None if only waiting can tell."""
    if holder.machine and holder.machine == mine.machine:
        return started_at(holder.pid) != holder.started
    return True if holder.job and holder.job == mine.job and holder.restarts != mine.restarts else None


def _read(path: Path) -> tuple[bytes, float] | None:
    """The lock's text and the time of its last sign of life. The file is opened for it, since a shared disk asks its
    server only then."""
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _disk_time(folder: Path) -> float:
    """The present time by the clock that dates the files of `folder`; if that fails, by this machine's clock."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()


def _machine() -> str:
    """Boot and process namespace; empty where the system does not say."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def started_at(pid: int) -> int:
    """When a process began, in clock ticks since the boot; 0 when there is none, or nothing but its exit code."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a name may hold anything
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
