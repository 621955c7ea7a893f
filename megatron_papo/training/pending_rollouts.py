"""The rollouts of a step that engines sample while the step before it trains, and how a checkpoint keeps them.

They are saved by the position of their prompt in the global order, so that a run can resume with another number of
data-parallel ranks. Prompts are not saved: the same position draws the same prompt. Unfinished rollouts are not saved
either: a checkpoint waits for them.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from zipfile import BadZipFile

import numpy as np
from torch.distributed import ProcessGroup

from megatron_papo.data.draw import Draw
from megatron_papo.data.order import DataCursor
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.types import Group, Metrics, Rollout

_ARRAYS = ("places", "lengths", "stopped", "versions", "ids", "logprobs")


@dataclass(frozen=True)
class PendingRollouts:
    """The rollouts of one step, submitted to the engines or already collected."""

    step: int
    cursor: DataCursor
    """Where the draw of their prompts began."""
    draw: Draw
    groups: tuple[Group, ...] | None = None
    """None as long as they have not been collected."""
    metrics: Metrics = field(default_factory=dict)
    """What the engines measured while they sampled, on this rank."""


def to_state(pending: PendingRollouts, data_group: ProcessGroup) -> dict[str, Any]:
    """The collected rollouts of all data-parallel ranks as plain JSON; all ranks call together."""
    assert pending.groups is not None, "collect comes first"
    own = [(place, group.rollouts) for place, group in zip(pending.draw.places, pending.groups, strict=True)]
    groups = sorted((each for share in gather_objects(own, data_group) for each in share), key=lambda each: each[0])
    rollouts = [rollout for _, several in groups for rollout in several]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        places=np.array([place for place, _ in groups], np.int64),
        lengths=np.array([len(rollout.response_ids) for rollout in rollouts], np.int64),
        stopped=np.array([rollout.finish_reason == "stop" for rollout in rollouts], bool),
        versions=np.array([rollout.policy_version for rollout in rollouts], np.int64),
        ids=np.array([token for rollout in rollouts for token in rollout.response_ids], np.int32),
        logprobs=np.array([value for rollout in rollouts for value in rollout.rollout_logprobs], np.float64),
        sampled=np.array([read for rollout in rollouts for read in rollout.loss_mask], bool),
    )
    return {"step": pending.step, "rollouts": base64.b64encode(buffer.getvalue()).decode()}


def from_state(
    state: dict[str, Any], step: int, draw: Draw, group_size: int, decode: Callable[[tuple[int, ...]], str]
) -> tuple[Group, ...] | None:
    """The saved groups of this rank's `draw`. None where the run needs others than were saved: of another step, of
    other prompts, or more or fewer per prompt. Raises ValueError for a state that `to_state` has not made."""
    if state.get("step") != step:
        return None
    arrays = _unpacked(state)
    places = arrays["places"].tolist()
    if len(arrays["lengths"]) != len(places) * group_size or not set(draw.places) <= set(places):
        return None
    rollouts = list(_rollouts(arrays, group_size, decode))
    first = {place: index * group_size for index, place in enumerate(places)}
    return tuple(
        Group(prompt, tuple(rollouts[first[place] : first[place] + group_size]))
        for place, prompt in zip(draw.places, draw.prompts, strict=True)
    )


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    """The saved arrays by name; raises ValueError where there are none or their lengths disagree."""
    try:
        packed = np.load(io.BytesIO(base64.b64decode(state["rollouts"])), allow_pickle=False)
        arrays = {name: packed[name] for name in _ARRAYS}
        # a checkpoint written before there were turns does not say which tokens were sampled: all of them
        arrays["sampled"] = packed["sampled"] if "sampled" in packed else np.ones(len(arrays["ids"]), bool)
        num_tokens = int(arrays["lengths"].sum())
        consistent = all(len(arrays[name]) == num_tokens for name in ("ids", "logprobs", "sampled"))
    except (KeyError, TypeError, ValueError, EOFError, OSError, BadZipFile, zlib.error) as error:
        raise ValueError(f"not rollouts: {error}") from None
    if not consistent:
        raise ValueError("not rollouts: their lengths contradict the tokens")
    return arrays


def _rollouts(arrays: Any, group_size: int, decode: Callable[[tuple[int, ...]], str]) -> Iterator[Rollout]:
    """The saved rollouts, group after group."""
    tokens = [arrays[name].tolist() for name in ("ids", "logprobs", "sampled")]
    facts, start = zip(*(arrays[name].tolist() for name in ("lengths", "stopped", "versions"))), 0
    for number, (length, stopped, version) in enumerate(facts):
        ids, logprobs, sampled = (tuple(values[start : start + length]) for values in tokens)
        yield Rollout(
            index=number % group_size,
            response_ids=ids,
            rollout_logprobs=logprobs,
            text=decode(ids),
            finish_reason="stop" if stopped else "length",
            policy_version=version,
            sampled=None if all(sampled) else sampled,
        )
        start += length


def age(groups: Sequence[Group], step: int) -> tuple[float, float]:
    """How many steps older the weights that sampled the rollouts are than those that `step` begins with: the sum over
    all rollouts, and their number."""
    ages = [step - rollout.policy_version for group in groups for rollout in group.rollouts]
    return float(sum(ages)), float(len(ages))
