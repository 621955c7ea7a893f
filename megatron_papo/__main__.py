"""`papo`, and `python -m megatron_papo`: prepares the process, and only then imports the command line."""

from __future__ import annotations

import sys

from megatron_papo.runtime.needed_packages import check_packages
from megatron_papo.runtime.process import command, interrupted_at_once


def main() -> int:
    """Runs the command line; returns the exit code."""
    check_packages("megatron_papo")
    return command(_command_line)


def _command_line() -> int:
    with interrupted_at_once():
        from megatron_papo.cli import main as command_line

    return command_line(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
