"""A stand-in for the Python interpreter: starts as one, and has a process forked that has its imports done.

`FOLDER/bin/python`, which `write_environment` makes, is `sys.executable` of every process that a server of
`tests/support/process_server.py` forks, and FOLDER the virtual environment of jobs of Slurm. What it starts has the
arguments, environment, folder, open files and namespaces of this process, which stays, passes signals on, ends as the
other ends, and takes it along when it is killed. Where options ask for an interpreter in another state (`-S`, `-P`, `-X
importtime`), and where the servers are gone, it becomes the real one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import sys
from pathlib import Path

from tests.support.process_wire import FOLDER, Request, receive, send

PYTHON = str(Path(sys.prefix, "bin", "python"))
"""The interpreter itself, for what is to import by itself: `sys.executable` may be the stand-in."""
SERVER = "PAPO_TEST_SERVER"
"""The variable with the name of a server. It is set in every process that the server forked, and what that process
starts is forked from the same server."""
PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_HARMLESS = ("-B", "-u")
"""No bytecode is written and streams are not buffered, which a forked process may ignore but for a user's terminal."""
_NAMESPACES = ("uts", "mnt", "pid")
"""The namespaces of a node of tools/slurm_lab.sh. That of process IDs comes last, since it applies to later forks."""


def write_environment(folder: Path, root: Path) -> None:
    """`folder`/bin/python, for processes of the servers in `folder`; the tests are those under `root`.

    `python3` beside it is the real one, which job scripts of Slurm take for what needs no package.
    """
    file = folder / "bin" / "python"
    file.parent.mkdir()
    file.with_name("python3").symlink_to(PYTHON)
    file.write_text(
        f"#!{PYTHON} -IS\n"
        f"import sys\n"
        f"sys.path.append({str(root)!r})\n"
        f"from tests.support.interpreter import main\n"
        f"main({str(folder)!r})\n"
    )
    file.chmod(0o755)


def main(folder: str) -> None:
    words = tuple(itertools.dropwhile(_HARMLESS.__contains__, sys.argv[1:]))
    connection = _connected(folder) if words and (words[0] in ("-m", "-c") or words[0][0] != "-") else None
    if connection is None:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    heard = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    for number in heard:
        signal.signal(number, lambda number, _: _pass_on(connection, number))
    files = _open_files(connection.fileno())
    namespaces = tuple(os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in _NAMESPACES)
    request = Request(
        dict(os.environ) | {FOLDER: folder}, os.getcwd(), argv=words, new_session=True, descriptors=files, tied=True
    )
    send(connection, request, files + namespaces)
    for number in (*files[3:], *namespaces):
        os.close(number)
    receive(connection)  # its id
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
    end_as(receive(connection)[0])


def _pass_on(connection: socket.socket, number: int) -> None:
    """A signal for a process that has just ended comes to nothing, as it would for any process."""
    with contextlib.suppress(OSError):
        send(connection, int(number))


def _connected(folder: str) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"{folder}/{os.environ.get(SERVER, 'plain')}")
    except OSError:
        return None
    return connection


def _open_files(ours: int) -> tuple[int, ...]:
    """The standard streams first."""
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    return (0, 1, 2, *(number for number in sorted(listed) if number > 2 and number != ours and _is_open(number)))


def _is_open(number: int) -> bool:
    """The listing's own is closed by now."""
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def end_as(code: int) -> None:
    """With an exit code, or by a signal's negative number."""
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code)
