"""The Python stacks of a rank, in RUN/stacks/rank_N.txt: written when it stalls, and when SIGTERM ends it."""

from __future__ import annotations

import faulthandler
import signal
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_stack_files: dict[Path, TextIO] = {}


def stack_file(run_dir: Path, rank: int) -> TextIO:
    """RUN/stacks/rank_N.txt, which the first call in this process empties, and which stays open."""
    path = run_dir / "stacks" / f"rank_{rank}.txt"
    if path not in _stack_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        _stack_files[path] = path.open("w")
    return _stack_files[path]


def dump_stacks_on_sigterm(run_dir: Path, rank: int) -> None:
    """From now on SIGTERM writes this process's stacks to its stack file, then ends it.

    C code does it, so that it works while the interpreter waits inside a collective.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.register(signal.SIGTERM, file=stack_file(run_dir, rank), all_threads=True, chain=True)


def drop_empty_stack_file(run_dir: Path, rank: int) -> None:
    """At the end of a rank, removes its stack file if nothing was written to it, and then the folder if it is empty."""
    faulthandler.unregister(signal.SIGTERM)
    file = _stack_files.pop(run_dir / "stacks" / f"rank_{rank}.txt", None)
    if file is None:
        return
    file.close()
    path = Path(file.name)
    with suppress(OSError):  # another rank still has a file in the folder, or has removed it
        if path.stat().st_size == 0:
            path.unlink()
        path.parent.rmdir()
