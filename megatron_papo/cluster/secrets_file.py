"""Keys and tokens for a job's ranks, from a file that is its owner's alone: lines NAME=value, blank lines, # comments.

`python3 -m megatron_papo.cluster.secrets_file FILE` prints them as lines of shell that export them, for the batch
script to read from a pipe. So no value stands in a job script, in arguments, in what Slurm shows of a job or in a log.
The file is read and not run. Imports the standard library only, for the batch host's Python (3.9 or later).
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import sys
from pathlib import Path

from megatron_papo.runtime.process import command
from megatron_papo.text.untrusted import as_text

_KEY = "cluster.secrets_file"
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_MOST_BYTES = 1 << 16


class SecretsFault(ValueError):
    """Why the file is not taken, in one line that holds none of its values."""


def read_secrets(path: Path) -> dict[str, str]:
    """The variables in the file, by name. Raises SecretsFault for a file that others can read, that is another user's,
    or that holds a line of another form."""
    variables: dict[str, str] = {}
    for number, line in enumerate(_private_text(path).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise SecretsFault(f"{_KEY}: {path}: line {number} is not NAME=value")
        variables[found[1]] = _unquoted(found[2])
    return variables


def fault_of_secrets(path: Path) -> str:
    """Why the file is not taken; empty where it is."""
    try:
        read_secrets(path)
    except SecretsFault as fault:
        return str(fault)
    return ""


def _private_text(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise SecretsFault(f"{_KEY}: {path}: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)  # of the file that is read, whatever its name means by now
        if not stat.S_ISREG(status.st_mode):
            raise SecretsFault(f"{_KEY}: {path}: is no regular file")
        if status.st_uid != os.geteuid():
            raise SecretsFault(f"{_KEY}: {path}: belongs to another user")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise SecretsFault(f"{_KEY}: {path}: others may read it (mode {mode:o}): chmod 600 {path}")
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise SecretsFault(f"{_KEY}: {path}: more than {_MOST_BYTES // 1024} KiB")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise SecretsFault(f"{_KEY}: {path}: is no text in UTF-8")
    return text


def _unquoted(value: str) -> str:
    """The value without the pair of quotes around it, if there is one; nothing within it is replaced."""
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if quoted else value


def main() -> int:
    try:
        variables = read_secrets(Path(sys.argv[1]))
    except SecretsFault as fault:
        print(f"papo: error: {as_text(str(fault))}", file=sys.stderr)
        return 2
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items()))
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
