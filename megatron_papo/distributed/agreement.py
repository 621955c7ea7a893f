"""The one way for ranks to fail together: what goes wrong on one rank is raised on every rank, with its reason.

`fail_together` runs an action on every rank of a group, `on_first_rank` on the first rank alone; both return only when
the action has succeeded wherever it runs. Without this, the ranks that succeed would wait for ever, in their next
collective, for the one that failed.

A group of None stands for a single process: nothing is exchanged, and errors have the same classes and messages.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch.distributed as dist

from megatron_papo.distributed.exchange import gather_objects

_MAX_SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """Why an action failed on one rank."""

    rank: int
    """Rank within the group that acts together."""
    reason: str
    """One line where the input or a disk is to blame; the traceback of a mistake in the program."""
    kind: Literal["input", "damage", "bug"] = "input"
    """What is to blame: `input` or a disk (ValueError, OSError), `damage` of a checkpoint (DamagedCheckpoint), or a
    `bug` in the program (any other error)."""


class DamagedCheckpoint(ValueError):
    """The content of a checkpoint is not what was written, or cannot be read; another checkpoint may be undamaged.

    The message names the folder, and the file where one is known. Raised on every rank alike.
    """


class RanksFailed(Exception):
    """Some ranks failed. Raised on every rank alike; the message names each of them and its reason.

    What is raised is an `InputFailed`, which is a ValueError, if a user can put all faults right; and this class itself
    if a mistake in the program is among them.
    """

    def __init__(self, faults: list[Fault]):
        super().__init__(faults)
        self.faults = faults

    @property
    def is_bug(self) -> bool:
        """Whether a mistake in the program is among the faults."""
        return any(fault.kind == "bug" for fault in self.faults)

    def __str__(self) -> str:
        shown = "; ".join(f"rank {fault.rank}: {fault.reason}" for fault in self.faults[:_MAX_SHOWN])
        left_out = len(self.faults) - _MAX_SHOWN
        return f"{shown}; and {left_out} more ranks" if left_out > 0 else shown


class InputFailed(RanksFailed, ValueError):
    """Some ranks failed, each for its input or a disk: the message is all that a user needs."""


def failure(faults: list[Fault]) -> RanksFailed:
    """The exception that names `faults`, of the class that fits them."""
    failed = RanksFailed(faults)
    return failed if failed.is_bug else InputFailed(faults)


def fault_of(rank: int, error: BaseException) -> Fault:
    """The fault of `rank` that `error` stands for. The fault of a disk (no space, quota, permission) names its file, if
    it is known."""
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return Fault(rank, f"{error.strerror or error}{where}")
    if isinstance(error, ValueError):
        return Fault(rank, str(error), "damage" if isinstance(error, DamagedCheckpoint) else "input")
    return Fault(rank, "".join(traceback.format_exception(error)).strip(), "bug")


def fail_together[Value](group: dist.ProcessGroup | None, action: Callable[[], Value]) -> Value:
    """What `action` returns on this rank, once it has succeeded on every rank of `group`. Collective over `group`.

    When it fails anywhere, raises RanksFailed or InputFailed on all ranks. A rank that fails leaves `action` early:
    collectives within it are safe only where no rank can fail before they are through.
    """
    value, fault = _attempt(group, action)
    _raise_faults(_everywhere(group, fault))
    return cast("Value", value)


def on_first_rank[Value](group: dist.ProcessGroup | None, action: Callable[[], Value]) -> Value:
    """What `action` returns on the first rank of `group`, on every rank; the other ranks do not call it.

    For what must be done once, or looked at once: other nodes may see a change on a shared disk later. Collective over
    `group`; the value is pickled. When it fails, raises RanksFailed or InputFailed on all ranks.
    """
    is_first = group is None or dist.get_rank(group) == 0
    own = _attempt(group, action) if is_first else (None, None)
    value, fault = _everywhere(group, own)[0]
    _raise_faults([fault])
    return cast("Value", value)


def read_on_first_rank[Value](action: Callable[[], Value]) -> Value:
    """`on_first_rank` of the world, or of this process where torch.distributed was not started, for reading what a user
    named: a ValueError gives the reason without the rank."""
    try:
        return on_first_rank(dist.group.WORLD if dist.is_initialized() else None, action)
    except InputFailed as failed:
        raise ValueError(failed.faults[0].reason) from None


def read_together[Value](group: dist.ProcessGroup, where: object, action: Callable[[], Value]) -> Value:
    """`fail_together` for an action that reads the checkpoint `where`.

    Raises what the first failing rank did, without its number: DamagedCheckpoint, also for a disk's fault, which names
    its file or `where`; another ValueError; or RanksFailed for a mistake in the program.
    """

    def read() -> Value:
        try:
            return action()
        except OSError as error:
            raise DamagedCheckpoint(f"{error.filename or where}: {error.strerror or error}") from error

    try:
        return fail_together(group, read)
    except InputFailed as failed:
        first = failed.faults[0]
        raise (DamagedCheckpoint if first.kind == "damage" else ValueError)(first.reason) from None


def _attempt[Value](group: dist.ProcessGroup | None, action: Callable[[], Value]) -> tuple[Value | None, Fault | None]:
    try:
        return action(), None
    except Exception as error:
        return None, fault_of(0 if group is None else dist.get_rank(group), error)


def _everywhere[Each](group: dist.ProcessGroup | None, own: Each) -> list[Each]:
    return [own] if group is None else gather_objects(own, group)


def _raise_faults(faults: list[Fault | None]) -> None:
    known = [fault for fault in faults if fault is not None]
    if known:
        raise failure(known) from None
