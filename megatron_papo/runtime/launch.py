"""Starts the ranks of a verb on this machine, or takes its place among those that torchrun or srun started.

Without a GPU the ranks are forked from this process after one import of the verb's module (the import costs more CPU
than a small run's step); with GPUs they are spawned, since CUDA does not survive a fork. Every rank is the leader of
its own process group, so that whatever it started ends with it. The first rank that fails ends the run; its reason is
the last thing printed. Signals to this process are for all ranks: SIGTERM and SIGHUP end them, Ctrl-Z stops them,
SIGUSR1 asks them to save and end after their step; the exit code is then SAVED_EXIT. Ctrl-C asks for the same where the
verb can save, and the second one ends them at once. Nothing of a run is left in folders for temporary files. Leaves out
several machines: that is what torchrun and srun are for, and `supervise.py` in a Slurm job.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_papo.config import ConfigError
from megatron_papo.runtime.failure_notes import NotesInMemory, announce, report_to, tell_launcher, tell_torchrun
from megatron_papo.runtime.failures import SAVED_EXIT, describe, print_failure
from megatron_papo.runtime.hostlist import first_host
from megatron_papo.runtime.keeper import kept_groups
from megatron_papo.runtime.process import (
    begin,
    go_on_without_readers,
    interrupted_at_once,
    save_requested,
    save_requests_blocked,
)
from megatron_papo.runtime.rank_signals import forward, ignore_ends, signals_to, stop
from megatron_papo.runtime.rank_watch import watch_ranks
from megatron_papo.runtime.stacks import drop_empty_stack_file, dump_stacks_on_sigterm
from megatron_papo.runtime.unused_gpu import fault_of_gpus

_VICTIM_WAIT_S = 5.0
"""A rank whose peer is gone waits this long before it ends, so that the peer's own reason is seen first."""
_OPEN_FILES = 256
"""Files that a rank may have open: libraries, connections to other ranks and files of a checkpoint."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Work:
    """What every rank calls: `target` is `module:function`."""

    target: str
    args: tuple[Any, ...]
    run_dir: Path
    saves: bool = False
    """Whether a rank that is asked to (SIGUSR1) saves after its step and ends."""

    def call(self) -> int:
        """Calls the function on this rank. Returns the rank's exit code."""
        module, _, function = self.target.partition(":")
        return getattr(_imported(module), function)(*self.args) or 0


def _imported(name: str) -> ModuleType:
    """Imports a verb's module, with the garbage collector off, and excludes the imported objects from it afterwards: it
    would look again and again at a million objects that stay, which takes a quarter of the import's time."""
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        with interrupted_at_once():
            return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def outer_rank(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The variables of torch.distributed when torchrun or srun started this process among others, else None."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return {}
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    # a batch script itself has SLURM_PROCID=0 and SLURM_NTASKS, but belongs to no step
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ or tasks == 1:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "localhost")
    variables = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": first_host(nodes) if set(nodes) & set(",[") else "127.0.0.1",  # where all ranks are on one node
        # the same on every rank, and another one for every job on a shared machine and every step of a job
        "MASTER_PORT": str(20_000 + (int(environ.get("SLURM_JOB_ID", "0")) + 97 * _number(environ)) % 20_000),
    }
    return {name: environ.get(name, value) for name, value in variables.items()}


def _number(environ: Mapping[str, str]) -> int:
    """Number of the Slurm job step. A second attempt thereby has another port than the first one, which may still be
    listening on its own."""
    return int(environ["SLURM_STEP_ID"])


def launch(work: Work, num_ranks: int) -> int:
    """Calls `work` on ranks 0 to num_ranks-1, or in this process only when it is a rank already. Returns the exit code.

    Raises ConfigError when the run's folder, or one for temporary files, cannot be written to, or the machine has GPUs
    that torch cannot use, before it starts a rank; a rank that was started from outside fails then, and may be started
    again.
    """
    begin()
    go_on_without_readers()
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # an Adam on the host gets more, for its part of a step (optimization/optimizer.py)
    _quieten()
    outer = outer_rank(os.environ)
    if outer is not None:
        os.environ.update(outer)
        rank = int(os.environ["RANK"])
        try:
            _make_folder(work.run_dir)
            _check_gpus()
        except ConfigError as error:
            failure = describe(rank, ValueError(str(error)))
            print_failure(failure, work.run_dir)
            tell_torchrun(failure.reason())
            return failure.exit_code
        return _call_here(work, rank)
    if (most := _most_open_files()) < _OPEN_FILES:
        print(f"papo: error: ulimit -n: {most} open files are too few, ranks need {_OPEN_FILES}", file=sys.stderr)
        return 2
    _check_gpus()
    made = [folder for folder in (work.run_dir, *work.run_dir.parents) if not folder.exists()]
    _make_folder(work.run_dir)
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(f"TMPDIR: {error.strerror}") from None
    print(f"papo: starting {num_ranks} rank{'s' * (num_ranks > 1)}", file=sys.stderr, flush=True)
    return _launch_local(work, num_ranks, made)


def _call_here(work: Work, rank: int) -> int:
    try:
        dump_stacks_on_sigterm(work.run_dir, rank)
        code = work.call()
    except Exception as error:
        failure = describe(rank, error)
        if failure.kind == "distributed":
            time.sleep(_VICTIM_WAIT_S)  # usually another rank's failure ends this process before the time is over
        announce(work.run_dir, failure)
        print_failure(failure, work.run_dir)
        drop_empty_stack_file(work.run_dir, rank)
        os._exit(failure.exit_code)  # without the clean-up of process groups, which may hang on dead peers
    drop_empty_stack_file(work.run_dir, rank)
    return 0 if code == SAVED_EXIT else code  # see SAVED_FILE


def _check_gpus() -> None:
    """Raises ConfigError on a machine whose GPUs torch cannot use: the run would go on on the CPU."""
    if (fault := fault_of_gpus()) is not None:
        raise ConfigError(fault)


def _make_folder(run_dir: Path) -> None:
    """Makes the run's folder and checks that files can be written there. Raises ConfigError."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except FileExistsError:
        raise ConfigError(f"run.dir: {run_dir} is a file, where a folder belongs") from None
    except OSError as error:
        raise ConfigError(f"run.dir: {run_dir}: {error.strerror}") from None


def _launch_local(work: Work, num_ranks: int, made: list[Path]) -> int:
    """Starts the ranks on this machine and waits for them. `made`: folders that this run has made; they are removed
    again when nothing was written to them."""
    with kept_groups() as keep:  # first, for it forks a process as small as this one is by now
        spawned = has_gpu()
        if not spawned:
            _imported(work.target.partition(":")[0])  # once, for all forked ranks; a spawned one imports for itself
        context = multiprocessing.get_context("spawn" if spawned else "fork")
        notes = NotesInMemory()
        addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
        ranks = [
            context.Process(target=_rank_main, args=(work, rank, addresses, os.getpid(), notes))  # type: ignore[attr-defined]
            for rank in range(num_ranks)
        ]
        with signals_to(ranks, work.saves):
            try:
                with save_requests_blocked():  # until each rank is there and knows what it means
                    for process in ranks:
                        process.start()
                        keep(process.pid)
                if save_requested():
                    forward(ranks, signal.SIGUSR1)
                return watch_ranks(ranks, work.run_dir, notes)
            finally:
                ignore_ends()
                stop(ranks)
                notes.close()
                _tidy(work.run_dir, made)
                if sys.stdout.isatty():
                    print("\x1b[?25h", end="", flush=True)  # the cursor, which a rank's progress bar may have hidden


def _rank_main(work: Work, rank: int, addresses: dict[str, str], parent: int, notes: NotesInMemory) -> None:
    os.setpgid(0, 0)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTSTP):  # the launcher has handlers of its own
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    begin()
    go_on_without_readers()
    os.environ.update(addresses, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=addresses["WORLD_SIZE"])
    report_to(notes)
    try:
        dump_stacks_on_sigterm(work.run_dir, rank)
        code = work.call()
    except Exception as error:
        failure = describe(rank, error)
        tell_launcher(failure)
        sys.stdout.flush()
        if failure.kind == "distributed":
            time.sleep(_VICTIM_WAIT_S)
        os._exit(failure.exit_code)
    sys.exit(code)


def _tidy(run_dir: Path, made: list[Path]) -> None:
    """Removes empty stack files, and then those folders of this run that nothing was written to."""
    stacks = run_dir / "stacks"
    for path in stacks.glob("rank_*.txt"):
        if path.stat().st_size == 0:
            path.unlink()
    for folder in (stacks, *made):
        if not folder.exists() or any(folder.iterdir()):
            break
        folder.rmdir()


def _quieten() -> None:
    """Suppresses what libraries print on import about absent accelerators; `papo doctor` says it, and what it costs."""
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _most_open_files() -> int:
    """Raises the limit of open files, for this process and its ranks, as far as it may be raised. Returns it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return sys.maxsize if most == resource.RLIM_INFINITY else most


def has_gpu() -> bool:
    """Whether torch can use a GPU of this machine; imports torch."""
    import torch

    return torch.cuda.is_available()


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return holder.getsockname()[1]
