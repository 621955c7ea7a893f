"""Metrics that have been renamed. Runs of this version write both names; readers know each by the name of today.

A stage's name has no spaces any more, and memory is given in GiB, as the planner gives it. Whoever reads what a run
wrote, of this version or of an older one, goes through `with_new_names`. Imports nothing, so that any room may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_STAGES = {"hand_over": "hand over", "set_up": "set up"}
"""Stage -> its name before, in `time/<stage>`, `planned/time/<stage>`, `memory_gib/<stage>` and, for the setting
`run.stage_limits_s`, wherever spaces stood."""
RENAMED_PREFIXES = {"memory_gib/": ("memory/", 2.0**30)}
"""Prefix of today -> the prefix of before, and the number that today's values are multiplied with to give those."""
_OF_STAGES = ("time/", "planned/time/", *RENAMED_PREFIXES)


def with_old_names(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step, and those that have been renamed once more under the name of before."""
    return {**values, **{old: value for name, number in values.items() for old, value in _before(name, number)}}


def with_new_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of any version by the names of today; values that are no numbers keep their old name."""
    found = dict(record)
    for old, value in record.items():
        name, factor = _today(old)
        if name != old and name not in record and isinstance(value, (int, float)):
            found[name] = value / factor
    return found


def _before(name: str, value: float) -> list[tuple[str, float]]:
    """The name of before with its value; nothing where the name has not changed."""
    if not name.startswith(_OF_STAGES):
        return []
    old, factor = "/".join(RENAMED_STAGES.get(part, part) for part in name.split("/")), 1.0
    for prefix, (old_prefix, times) in RENAMED_PREFIXES.items():
        if name.startswith(prefix):
            old, factor = old_prefix + old.removeprefix(prefix), times
    return [(old, value * factor)] if old != name else []


def _today(old: str) -> tuple[str, float]:
    """The name of today of a metric that may have an old one, and the number to divide its value by."""
    name, factor = old, 1.0
    for prefix, (old_prefix, times) in RENAMED_PREFIXES.items():
        if old.startswith(old_prefix):
            name, factor = prefix + old.removeprefix(old_prefix), times
    if name.startswith(_OF_STAGES):
        name = name.replace(" ", "_")
    return name, factor
