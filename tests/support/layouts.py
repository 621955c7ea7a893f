"""Layouts of ranks by name: the name is the definition, so that test files list names and nothing else.

"single"                       one rank
"TP2", "PP2", "DP3"            tensor-, pipeline-, data-parallel ranks; "TP2 PP2": four ranks
"TP2 SP"                       with sequence parallelism
"TP2 SP, full recompute"       with `model.recompute=full`; what follows a comma may be any other remark
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

SETTINGS = {"TP": "parallel__tensor", "PP": "parallel__pipeline"}


@dataclass(frozen=True)
class Layout:
    num_ranks: int
    settings: dict[str, Any]
    """What differs from one rank, as `tiny_run` takes settings: `__` stands for the dot of a key."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """The settings as `load_config` takes them, `key=value`."""
        return tuple(f"{key.replace('__', '.')}={str(value).lower()}" for key, value in self.settings.items())


def layout(name: str, **more: Any) -> Layout:
    """The layout of this name; `more` are settings besides, as `tiny_run` takes them."""
    axes, _, remark = name.partition(",")
    sizes: dict[str, int] = {}
    settings: dict[str, Any] = {}
    for word in axes.split():
        if word == "SP":
            settings["parallel__sequence"] = True
        elif match := re.fullmatch(r"(TP|PP|DP)(\d)", word):
            sizes[match[1]] = int(match[2])
        elif word != "single":
            raise ValueError(f"{name!r}: {word!r} is no part of a layout")
    settings |= {SETTINGS[axis]: size for axis, size in sizes.items() if axis in SETTINGS}
    if recompute := re.search(r"(\w+) recompute", remark):
        settings["model__recompute"] = recompute[1]
    return Layout(math.prod(sizes.values()), settings | more)
