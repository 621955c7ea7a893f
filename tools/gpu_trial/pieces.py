"""Pieces of a library, each computed once and held against float64: what the smoke scripts share."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MOST_LETTERS = 300
_FRAMES = 6


class Wrong(Exception):
    """A piece computes something else."""


@dataclass(frozen=True)
class Gap:
    """‖found − expected‖ / ‖expected‖, the largest of a piece."""

    value: float
    limit: float

    def checked(self) -> Gap:
        """Raises Wrong where the gap is beyond the limit, or no number."""
        if not self.value < self.limit:
            raise Wrong(f"gap {self.value:.1e}, allowed {self.limit:.1e}")
        return self


Pieces = Mapping[str, Callable[[], Gap]]


def gap(computed: Tensor, expected: Tensor) -> float:
    return float((computed.detach().double() - expected).norm() / expected.norm())


def report(library: str, make_pieces: Callable[[], Pieces]) -> int:
    """A line a piece, beginning with "ok" or "FAIL", as soon as it is known; 1 where one failed or the library cannot
    be imported, which `make_pieces` does."""
    failed, pieces = 0, _timed(library, make_pieces)
    for name, piece in (pieces or {}).items():
        failed += _timed(name, piece) is None
    return int(failed > 0 or pieces is None)


def _timed[T](name: str, call: Callable[[], T]) -> T | None:
    began = time.monotonic()
    try:
        result = call()
    except Exception as error:  # the others are still worth knowing
        text = f"{type(error).__name__}: {error}"[:_MOST_LETTERS].replace("\n", " ")
        print(f"FAIL {name}: {text}", flush=True)
        traceback.print_exc(limit=-_FRAMES, file=sys.stdout)
        return None
    said = f": gap {result.value:.1e} of {result.limit:.0e}" if isinstance(result, Gap) else ""
    print(f"ok   {name} ({time.monotonic() - began:.1f} s){said}", flush=True)
    return result
