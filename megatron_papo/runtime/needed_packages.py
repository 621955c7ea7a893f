"""One line instead of a traceback for a Python that lacks the project's packages, such as the system's own.

Programs call it before they import anything else. Imports the standard library only, for Python 3.9 and later.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("pydantic", "yaml", "rich", "numpy", "torch", "transformers", "megatron")
"""Modules that tell a Python with the project's packages from one without: those that its programs import first."""
_ROOT = Path(__file__).resolve().parents[2]


def lacking() -> list[str]:
    """Those of NEEDED that this Python does not find; none is imported."""
    return [name for name in NEEDED if find_spec(name) is None]


def check_packages(module: str | None = None) -> None:
    """Ends the process with exit status 2 and one line where packages are not installed. `module` is the one that the
    user runs by `python -m`; None for a script."""
    missing = lacking()
    if not missing:
        return
    script = Path(sys.argv[0]).resolve()
    command = str(script.relative_to(_ROOT)) if _ROOT in script.parents else str(script)
    command = f"-m {module}" if module else command
    told = f"{sys.executable} has no {', '.join(missing)}: run `make venv` in {_ROOT}, then .venv/bin/python {command}"
    print(f"{module or script.stem}: error: {told}", file=sys.stderr)
    sys.exit(2)
