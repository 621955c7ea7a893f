"""What a program takes over from whoever started it, each in a process of its own; `megatron_papo.runtime.process`
needs no package, so such a process takes some ten milliseconds."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.interpreter import PYTHON

REPO = Path(__file__).parents[2]
PREPARED = """
import os, signal, subprocess, sys
sys.path.insert(0, {repo!r})
from megatron_papo.runtime.process import *
def run():
    go_on_without_readers()
    chatter()
    os.write(3, b"to its end")
def chatter():
    for _ in range(3):
        print("word " * 5000, flush=True)
        print("papo: a line", file=sys.stderr, flush=True)
"""


def python(code: str, shell: str = "exec {python} -S -c {code} {streams}", streams: str = "") -> tuple[int, str, str]:
    """Exit code, errors, and what was written to descriptor 3. For `streams`, descriptor 94 is a pipe nobody reads."""
    reads, writes = os.pipe()
    nobody, broken = os.pipe()
    os.close(nobody), os.dup2(writes, 93), os.dup2(broken, 94)
    command = shell.format(python=PYTHON, code='"$CODE"', streams=f"{streams} 3>&93 93>&- 94>&-")
    environ = {"CODE": PREPARED.format(repo=str(REPO)) + code, "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", command], env=environ, pass_fds=[93, 94], stderr=subprocess.PIPE, text=True)
    for descriptor in (writes, broken, 93, 94):
        os.close(descriptor)
    with os.fdopen(reads) as told:
        return done.returncode, done.stderr, told.read()


FULL, BROKEN = "No space left on device", "Broken pipe"
LINES = "papo: a line\n" * 3
GONE_ON = "papo: warning: standard output: {}; the run goes on without it, and says so once\n"


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        (">/dev/full", GONE_ON.format(FULL) + LINES),
        (">&94", GONE_ON.format(BROKEN) + LINES),
        (">/dev/full 2>/dev/full", ""),
        (">&- 2>&- <&-", ""),
    ],
    ids=["a full disk", "a reader that is gone", "both full", "closed"],
)
def test_a_run_goes_on_whatever_becomes_of_its_output(streams, said):
    assert python("sys.exit(command(run))", streams=streams) == (0, said, "to its end")


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        (">/dev/full", 1, f"papo: error: standard output: {FULL}\n"),
        (">&94", 128 + signal.SIGPIPE, ""),
        (">&-", 0, LINES),
    ],
    ids=["a full disk", "a reader that is gone", "closed"],
)
def test_a_command_ends_with_its_output(streams, code, said):
    shell = "{python} -S -c {code} {streams}; exit $?"
    assert python("sys.exit(command(chatter))", shell, streams) == (code, said, "")


def test_what_does_not_fit_the_buffer_only_at_the_end_is_an_error_too():
    said = f"papo: error: standard output: {FULL}\n"
    assert python("sys.exit(command(lambda: print('a line')))", streams=">/dev/full") == (1, said, "")
    assert python("sys.exit(command(lambda: (print('a line'), sys.exit(0))))", streams=">/dev/full") == (1, said, "")


def test_no_file_becomes_a_standard_stream():
    code = "command(lambda: os.write(3, str(open('/dev/zero').fileno()).encode()) * 0)"
    assert int(python(code, streams="<&- >&- 2>&-")[2]) > 3


def test_inherited_signals_are_set_right():
    """Blocked SIGTERM and SIGUSR1, one of which is waiting, and children that nobody would hear of."""
    code = """
def main():
    done = subprocess.run(["bash", "-c", "exit 7"]).returncode
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.write(3, f"{done} {len(mask)} {save_requested()}".encode())
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(command(main))
"""
    assert python(code) == (0, "", "7 0 True")


def test_who_asks_for_a_save_asks_no_process_that_is_started():
    code = """
with save_requests_blocked():
    child = subprocess.Popen(["bash", "-c", "read; exit 5"], stdin=subprocess.PIPE)
    os.kill(os.getpid(), signal.SIGUSR1)
    early = save_requested()
child.send_signal(signal.SIGUSR1)
child.communicate(b"\\n")
os.write(3, f"{child.returncode} {early} {save_requested()}".encode())
"""
    assert python("begin()" + code) == (0, "", "5 False True")


def test_an_interrupt_is_one_line():
    begun = "signal.signal(signal.SIGINT, signal.default_int_handler); "
    interrupted = "os.kill(os.getpid(), signal.SIGINT)"
    assert python(f"{begun}sys.exit(command(lambda: {interrupted}))") == (130, "papo: interrupted\n", "")
    swallowed = f"""
def main():
    with interrupted_at_once():
        try:
            {interrupted}
        except BaseException:
            pass
"""
    assert python(swallowed + f"{begun}sys.exit(command(main))") == (130, "papo: interrupted\n", "")


def test_a_working_folder_that_is_gone_is_said(tmp_path):
    shell = f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir ../gone; exec {{python}} -S -c {{code}} {{streams}}"
    said = "papo: error: the working folder: No such file or directory\n"
    assert python("sys.exit(command(chatter))", shell)[:2] == (2, said)
