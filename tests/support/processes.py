"""Starts processes by the servers of `tests/support/process_server.py`, or with `pytest --isolated` each on its own.

The first case that needs a server starts it; all workers of pytest share it. It ends with the session.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.interpreter import PYTHON, write_environment
from tests.support.process_wire import FOLDER, Request, receive, send

ROOT = Path(__file__).parents[2]
ISOLATED = "isolated"
"""The value of the variable FOLDER where there are no servers."""
_START_LIMIT_S = 240.0
_OURS = (FOLDER, "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_TESTRUNUID")


def open_session(isolated: bool) -> Callable[[], None]:
    """Before any test: where servers may be started; returns what ends them."""
    folder = Path(tempfile.mkdtemp(prefix="papo_tests_"))
    os.environ[FOLDER] = ISOLATED if isolated else str(folder)
    (folder / "session").write_text(str(os.getpid()))
    write_environment(folder, ROOT)
    return lambda: shutil.rmtree(folder, ignore_errors=True)  # the servers see that and end


def environment() -> Path:
    """A virtual environment whose `bin/python` has its imports done, `tests/support/interpreter.py`; with `--isolated`
    this process's own."""
    place = os.environ[FOLDER]
    if place == ISOLATED:
        return Path(sys.prefix)
    _connect(Path(place), "plain").close()  # the server is there
    return Path(place)


def interpreter() -> Path:
    """The path of `bin/python` in that environment."""
    return environment() / "bin" / "python"


class Process:
    """A process that a server forked, with the methods of subprocess.Popen."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self.pid: int = receive(connection)[0]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._ended(0.0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = receive(self._connection)[0]
            except (BlockingIOError, TimeoutError):
                return None
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def fileno(self) -> int:
        """Becomes readable at its end."""
        return self._connection.fileno()


def start(
    request: Request, output: tuple[int, int, int] | None = None, vllm: bool = False
) -> Process | subprocess.Popen:
    """`output`: descriptors of its standard input, output and errors; by default this process's own.

    `vllm`: it will import vLLM.
    """
    place = os.environ.get(FOLDER)
    assert place, "tests/conftest.py sets this"
    environ = {name: value for name, value in request.environ.items() if name not in _OURS}
    request = request._replace(environ=environ | {FOLDER: place})
    if place == ISOLATED:
        return _start_alone(request, output or (0, 1, 2))
    with open(os.devnull) as nothing:
        return _start_in_server(Path(place), "vllm" if vllm else "plain", request, output or (nothing.fileno(), 1, 2))


def _start_in_server(folder: Path, name: str, request: Request, output: tuple[int, int, int]) -> Process:
    """Asks again where the server hung up before it answered, as was seen once in its first second: then it has forked
    nothing."""
    for last in (False, False, True):
        connection = _connect(folder, name)
        try:
            send(connection, request, output)
            return Process(connection)
        except (EOFError, OSError) as error:
            connection.close()
            if last:
                raise RuntimeError(f"the {name} server: {error}; its log:\n{(folder / 'log').read_text()}") from error
        time.sleep(0.5)
    raise AssertionError("the last try returns or raises")


def _start_alone(request: Request, output: tuple[int, int, int]) -> subprocess.Popen:
    options: dict[str, Any] = dict(zip(("stdin", "stdout", "stderr"), output)) | {
        "cwd": request.cwd, "env": request.environ, "start_new_session": request.new_session,
    }  # fmt: skip
    if request.argv:
        return subprocess.Popen([PYTHON, *request.argv], **options)
    with tempfile.NamedTemporaryFile(prefix="papo_request_", delete=False) as file:
        pickle.dump(request, file)
    options["env"] = request.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([PYTHON, "-m", "tests.support.process_server", "--one", file.name], **options)


def _connect(folder: Path, name: str) -> socket.socket:
    if not (folder / name).exists():
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for each in ("plain", "vllm")[: 1 + (name == "vllm")]:
                if not (folder / each).exists():
                    _start_server(folder, each)
    return _connected(folder / name)


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return connection


def _start_server(folder: Path, name: str) -> None:
    """Returns when it answers."""
    if name == "vllm":
        asked = _connected(folder / "plain")
        send(asked, "vllm")
    else:
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        command = [PYTHON, "-m", "tests.support.process_server", str(folder), (folder / "session").read_text()]
        with (folder / "log").open("a") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True, **streams)
    deadline = time.monotonic() + _START_LIMIT_S
    while not (folder / name).exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server of {name} processes did not start: {(folder / 'log').read_text()}")
        time.sleep(0.05)
