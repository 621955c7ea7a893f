"""Commands of the project as a user types them, forked from a server that has imported what they need.

A command gets arguments, environment, folder, standard streams, signals and exit code as from a shell, and runs the
same module; what it does not show is what its imports cost and print, which `tests/system/test_cli.py` runs for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support.process_wire import Request
from tests.support.processes import ROOT, Process, start

Command = Process | subprocess.Popen


def papo(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """`papo WORDS...`; options as of `run`."""
    return run("-m", "megatron_papo", *words, **options)  # type: ignore[arg-type]


def run(
    *argv: object,
    cwd: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    vllm: bool = False,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """`python ARGV...` to its end; ended when it takes longer than `timeout` seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with open(os.devnull) as nothing:
            streams = nothing.fileno(), out.fileno(), err.fileno()
            process = start(_request(argv, cwd, environ), streams, vllm)
        try:
            code = process.wait(timeout)
        except BaseException:
            _kill(process)
            raise
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(list(map(str, argv)), code, out.read(), err.read())


def begin(
    *argv: object,
    log: Path,
    cwd: Path | str | None = None,
    environ: Mapping[str, str] | None = None,
    vllm: bool = False,
) -> Command:
    """`python ARGV... >log 2>&1 &`, the leader of a process group."""
    with log.open("w") as file, open(os.devnull) as nothing:
        return start(_request(argv, cwd, environ), (nothing.fileno(), file.fileno(), file.fileno()), vllm)


def heeds_ctrl_c() -> None:
    """A suite that runs in the background was started with SIGINT ignored, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _request(argv: tuple, cwd: Path | str | None, environ: Mapping[str, str] | None) -> Request:
    given = dict(os.environ if environ is None else environ)
    given["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), given.get("PYTHONPATH"))))
    return Request(given, str(cwd or os.getcwd()), argv=tuple(map(str, argv)), new_session=True)


def _kill(process: Command) -> None:
    process.terminate() if isinstance(process, subprocess.Popen) else process.send_signal(15)
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
