"""Slurm's compressed lists of hosts, as SLURM_JOB_NODELIST has them: `rack[0-1]_blade[0-3],login,n[001-010,15]-ib`.

Imports the standard library only, for Python 3.9 and later, and does not call `scontrol show hostnames`, which a
container does not have. Leaves out boxes of several dimensions, `bgp[000x133]`, of machines that no longer exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

_ENTRY = r"(?:[^,\[\]]|\[[^\[\]]+\])+"
"""One entry: everything up to a comma outside brackets."""
_LIST = re.compile(f"{_ENTRY}(?:,{_ENTRY})*")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_OF_A_RANGE = 100_000


def first_host(nodelist: str) -> str:
    """The first name of the list. Raises ValueError for a text that is no such list."""
    return next(iter(hosts(nodelist)))


def hosts(nodelist: str) -> Iterator[str]:
    """All names in Slurm's order: the last bracket changes fastest. Raises ValueError for a text that is no such
    list."""
    if not _LIST.fullmatch(nodelist):
        raise ValueError(f"{nodelist!r} is no list of Slurm's hosts")
    for entry in re.findall(_ENTRY, nodelist):
        literals, brackets = re.split(r"\[[^\]]*\]", entry), re.findall(r"\[([^\]]*)\]", entry)
        for numbers in product(*(_numbers(bracket, nodelist) for bracket in brackets)):
            yield literals[0] + "".join(map(str.__add__, numbers, literals[1:]))


def _numbers(bracket: str, nodelist: str) -> list[str]:
    """The numbers of a bracket such as `001-010,15`, as texts: each as wide as the first number of its range."""
    numbers: list[str] = []
    for part in bracket.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last < first + _MOST_OF_A_RANGE:
            raise ValueError(f"{nodelist!r} is no list of Slurm's hosts: [{bracket}] holds {part!r}")
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers
