"""Ranks that fail together: every rank hears the reason of the one that failed, and none waits for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch.distributed as dist

from megatron_papo.distributed.agreement import InputFailed, RanksFailed, fail_together, on_first_rank, read_together
from tests.support.ranks import run_ranks


def _fail_on(rank: int, error: Exception) -> Callable[[], int]:
    def action() -> int:
        if dist.get_rank() == rank:
            raise error
        return dist.get_rank()

    return action


def _outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0]


def _all_cases() -> list[object]:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    calls: list[Callable[[], object]] = [
        lambda: fail_together(group, dist.get_rank),
        lambda: fail_together(group, _fail_on(1, OSError(28, "No space left on device", "/disk/file"))),
        lambda: fail_together(group, _fail_on(1, KeyError("planted"))),
        lambda: on_first_rank(group, lambda: f"of rank {dist.get_rank()}"),
        lambda: on_first_rank(group, _fail_on(0, ValueError("no such column"))),
        lambda: on_first_rank(group, _fail_on(1, ValueError("never called"))),
        lambda: read_together(group, "folder", _fail_on(1, OSError(5, "Input/output error"))),
    ]
    return [_outcome(call) for call in calls]


@pytest.mark.fast
def test_what_fails_on_one_rank_is_raised_on_every_rank():
    first, second = run_ranks(_all_cases, 2)
    assert (first[0], second[0]) == (0, 1)
    assert first[1:] == second[1:] == [
        ("InputFailed", "rank 1: No space left on device: /disk/file"),
        ("RanksFailed", "rank 1: Traceback (most recent call last):"),
        "of rank 0",
        ("InputFailed", "rank 0: no such column"),
        0,
        ("DamagedCheckpoint", "folder: Input/output error"),
    ]  # fmt: skip


@pytest.mark.fast
def test_a_process_by_itself_raises_the_same():
    def fail() -> None:
        raise OSError("no room")

    with pytest.raises(InputFailed, match="rank 0: no room") as error:
        on_first_rank(None, fail)
    assert isinstance(error.value, ValueError) and not error.value.is_bug
    with pytest.raises(RanksFailed) as bug:
        fail_together(None, lambda: {}["key"])
    assert bug.value.is_bug and not isinstance(bug.value, ValueError)
