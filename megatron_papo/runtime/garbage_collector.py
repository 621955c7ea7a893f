"""Excludes from Python's garbage collection the objects that a run has loaded before it begins."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def present_objects_skipped() -> Iterator[None]:
    """Within the block the collector does not look again through the objects that exist now, libraries above all.

    A pass over them stops every thread for a third of a second, and a save makes enough objects to cause one.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
