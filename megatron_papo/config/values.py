"""What no value of the settings may be, whichever its key: texts that make of a name another line, command or file.

Settings become file names, lines of job scripts, environment variables and lines on terminals. Keys that take more than
a name are listed here. What a single key takes stands with the key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath

from megatron_papo.text.secret_values import LEFT_OUT, assigned, fault_of_variable
from megatron_papo.text.untrusted import DIRECTIONS, LINES, hidden_in

_PROMPT = LINES + "\r\u2028\u2029" + DIRECTIONS
_MAY_HOLD = {
    "data.instruction": _PROMPT,
    "data.system": _PROMPT,
    "cluster.setup": LINES,
    "cluster.variables": LINES,
}
"""What the values of a key, those of its list or mapping too, may hold beyond a name: prompts in any writing, shell
lines, and values that a script puts in quotes."""
_LONGEST_PART = 255
"""Bytes of one name in a path: of Linux's file systems."""
_LONGEST_PATH = 4095
_BITS = 62
"""Most bits of a whole number: seeds and counts are stored in 64 bits, with room for what is added to them."""
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")


def faults_of_values(tree: object, path: str = "", keep: str = "", *, left_out: bool = False) -> Iterator[str]:
    """A line a fault, beginning with the key's path. `tree`: sections as mappings, values as they are.

    `left_out`: whether texts of which a secret was left out are taken, for settings that are looked at and not run.
    """
    keep = _MAY_HOLD.get(path, keep)
    if isinstance(tree, dict):
        for key, value in tree.items():
            if hidden := hidden_in(str(key)):
                yield f"{path}: a key holds {hidden}, a character that does not show"
            else:
                yield from faults_of_values(value, f"{path}.{key}" if path else str(key), keep, left_out=left_out)
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from faults_of_values(value, f"{path}.{place}", keep, left_out=left_out)
    elif isinstance(tree, int) and tree.bit_length() > _BITS:
        yield f"{path}: a whole number of {tree.bit_length()} bits is too large"
    elif isinstance(tree, str | PurePath):
        text = str(tree)
        if hidden := hidden_in(text, keep):
            yield f"{path}: holds {hidden}, {_kind(hidden)}"
        elif LEFT_OUT in text and not left_out:
            yield f"{path}: a secret was left out as these settings were written: give it again"
        elif isinstance(tree, PurePath):
            yield from _length(path, tree)


def faults_of_variables(variables: dict[str, str], setup: list[str], sbatch: list[str]) -> Iterator[str]:
    """One line for each fault: names in `cluster.variables` that a shell does not accept for a variable, and variables,
    there or set in the lines of `cluster.setup` or by `--export` in `cluster.sbatch`, whose name is that of a
    secret."""
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name):
            yield (
                f"cluster.variables: {name!r} is no name of an environment variable: letters, digits and _, the first "
                "no digit"
            )
        elif fault := fault_of_variable("cluster.variables", name, value):
            yield fault
    for place, line in enumerate(setup):
        faults = (fault_of_variable(f"cluster.setup.{place}", *each) for each in assigned(line))
        yield from filter(None, faults)
    for place, option in enumerate(sbatch):
        words = option.split(",") if option.startswith("--export") else []
        named = (word.removeprefix("--export=").partition("=") for word in words)
        yield from filter(None, (fault_of_variable(f"cluster.sbatch.{place}", name, text) for name, _, text in named))


def _kind(hidden: str) -> str:
    return "bytes that are no UTF-8" if hidden.startswith("\\ud") else "a character that does not show"


def _length(path: str, value: PurePath) -> Iterator[str]:
    longest = max((len(part.encode()) for part in value.parts), default=0)
    if longest > _LONGEST_PART:
        yield f"{path}: a name of {longest} bytes is too long for a file or folder, which has {_LONGEST_PART}"
    elif len(str(value).encode()) > _LONGEST_PATH:
        yield f"{path}: a path of {len(str(value).encode())} bytes is too long"
