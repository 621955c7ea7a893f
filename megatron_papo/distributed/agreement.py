"""What goes wrong on one rank while all of them save or load, learnt by every rank.

A disk's fault (`OSError`: no room, quota, permission, a broken device) or a folder that is not as it should be
(`ValueError`) costs the checkpoint; anything else is a mistake in the program and says where.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist

from megatron_papo.distributed.exchange import gather_objects

_MAX_SHOWN = 3


@dataclass(frozen=True)
class Fault:
    rank: int
    reason: str
    is_bug: bool = False


class DamagedCheckpoint(ValueError):
    """What was read of a checkpoint is not what was written, or may not be read: another one may be whole.

    The message names the folder, and the file where one is known. Raised on every rank alike.
    """


class RanksFailed(Exception):
    """Raised on every rank alike when some failed; the message names each of them and its reason."""

    def __init__(self, faults: list[Fault]):
        shown = "; ".join(f"rank {fault.rank}: {fault.reason}" for fault in faults[:_MAX_SHOWN])
        more = f"; and {len(faults) - _MAX_SHOWN} more ranks" if len(faults) > _MAX_SHOWN else ""
        super().__init__(shown + more)
        self.is_bug = any(fault.is_bug for fault in faults)


def fault_of(rank: int, error: BaseException) -> Fault:
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return Fault(rank, f"{error.strerror or error}{where}")
    if isinstance(error, ValueError):
        return Fault(rank, str(error))
    return Fault(rank, "".join(traceback.format_exception(error)).strip(), is_bug=True)


def fail_together(group: dist.ProcessGroup, action: Callable[[], None] | None) -> None:
    """Calls `action`, where a rank has one, and waits for the other ranks of `group`; raises `RanksFailed` on all of
    them when any failed."""
    fault = None
    try:
        if action is not None:
            action()
    except Exception as error:
        fault = fault_of(dist.get_rank(group), error)
    faults = [fault for fault in gather_objects(fault, group) if fault is not None]
    if faults:
        raise RanksFailed(faults)


def agreed(look: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank: another node's view of a shared disk may lag. Where it fails for the disk or
    what lies there, a ValueError on every rank; without ranks, `look` alone."""
    if not dist.is_initialized():
        return look()
    answer: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            answer[0] = look()
        except (OSError, ValueError) as error:
            answer[1] = fault_of(0, error).reason
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise ValueError(answer[1])
    return answer[0]


def agree[T](group: dist.ProcessGroup, where: object, action: Callable[[], T]) -> T:
    """What `action`, which reads a checkpoint, returns on this rank, once it has succeeded on every rank of `group`.

    Otherwise raises, on every rank, what the first failing rank did: DamagedCheckpoint, also for a disk's fault, which
    names `where`; another ValueError; or RanksFailed for a mistake in the program.
    """
    result, own = None, None
    try:
        result = action()
    except Exception as error:
        fault = fault_of(dist.get_rank(group), error)
        if isinstance(error, OSError):
            fault = Fault(fault.rank, f"{error.filename or where}: {error.strerror or error}")
        own = fault, isinstance(error, DamagedCheckpoint | OSError)
    faults = [found for found in gather_objects(own, group) if found is not None]
    if bugs := [fault for fault, _ in faults if fault.is_bug]:
        raise RanksFailed(bugs)
    for fault, damaged in faults:
        raise (DamagedCheckpoint if damaged else ValueError)(fault.reason)
    return cast(T, result)
