"""Every program of the project, called with a Python that lacks the packages, says so in one line."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_papo.runtime.needed_packages import NEEDED, lacking
from tests.support.interpreter import PYTHON

REPO = Path(__file__).resolve().parents[2]
NEEDS_NOTHING = {"tools/bundle.py", "tools/record_signatures.py"}
"""Programs that need the standard library alone."""
PROGRAMS = sorted(
    str(path.relative_to(REPO))
    for pattern in ("tools/*.py", "examples/quickstart/*.py")
    for path in REPO.glob(pattern)
    if '__name__ == "__main__"' in path.read_text()
)
MODULE = "megatron_papo"
RUN_ALL = """
import contextlib, io, json, runpy, sys
path, done = list(sys.path), {}
for program in sys.argv[1:]:
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("megatron_papo")]:
        del sys.modules[name]
    is_module = "." not in program
    sys.argv = [f"{program}/__main__.py" if is_module else program]
    run = runpy.run_module if is_module else runpy.run_path
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.suppress(IndexError):
        try:
            run(program, run_name="__main__")
        except (SystemExit, ModuleNotFoundError) as end:
            code = end.code if isinstance(end, SystemExit) else repr(end)
    done[program] = [code, told.getvalue()]
print(json.dumps(done))
"""
"""Runs every program in one process, each as if it were the first: a Python that starts takes half a second."""


@pytest.fixture(scope="module")
def bare() -> dict[str, tuple[int | str, str]]:
    """Program → exit status, or what it could not import, and standard error, by a Python without packages."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, "-S", "-c", RUN_ALL, *PROGRAMS, MODULE]
    done = subprocess.run(command, cwd=REPO, env=environ, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_this_python_lacks_nothing():
    assert lacking() == []


@pytest.mark.parametrize("program", [*PROGRAMS, MODULE])
def test_a_python_without_the_packages_is_told_to_make_an_environment(program: str, bare):
    code, told = bare[program]
    if program in NEEDS_NOTHING:
        assert "ModuleNotFoundError" not in str(code)
        return
    assert code == 2, code
    (line,) = told.splitlines()
    words = f"-m {program}" if program == MODULE else program
    assert f"has no {', '.join(NEEDED)}: run `make venv` in {REPO}, then .venv/bin/python {words}" in line
