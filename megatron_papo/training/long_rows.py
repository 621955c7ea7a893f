"""Prompts that have no room in a packed row with their longest response: the row gets longer, or they are left out.

Which of the two follows from the settings and the lengths alone (`costs/row_limit.py`), so that the ranks that hold the
same groups do the same. A prompt beyond the limit is a bad row of one update: `data.on_bad_row` says whether it is left
out or ends the run. Its row may be drawn again, since other responses to it may be shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.packing import too_long_in_words, whole
from megatron_papo.training.console import warn
from megatron_papo.training.session import Run
from megatron_papo.types import Group

_KEY = "train.tokens_per_micro_batch"


def without_too_long(run: Run, groups: Sequence[Group], joint: bool) -> list[Group]:
    """The groups that a row can hold; all data-parallel ranks call it together.

    Says once what the longest row was, and once what was left out, which is counted as `rows_too_long`. Raises
    ValueError, on all of them, for a group that no row can hold where `data.on_bad_row` is `stop`.
    """
    budget, limit = run.config.train.tokens_per_micro_batch, run.longest_row
    kept: list[Group] = []
    left_out: list[str] = []
    longer: list[str] = []
    for group in groups:
        piece = whole(group, joint)
        if piece.least_tokens > budget:
            (left_out if piece.least_tokens > limit else longer).append(too_long_in_words(piece))
        if piece.least_tokens <= limit:
            kept.append(group)
    shares = gather_objects((longer, left_out), run.layout.data_group)
    all_longer, all_left_out = ([text for share in shares for text in share[which]] for which in (0, 1))
    if all_left_out and run.config.data.on_bad_row == "stop":
        raise ValueError(
            f"data.train: no packed row can hold {all_left_out[0]}: {_KEY} is {budget}, and a row can have {limit}"
        )
    _say(run, budget, all_longer, all_left_out)
    return kept


def shortened_group(group: Group) -> Group:
    """The group with the first token of its first response alone: rows of no weight need to hold no more."""
    first = group.rollouts[0]
    rollout = replace(
        first,
        response_ids=first.response_ids[:1],
        rollout_logprobs=first.rollout_logprobs[:1],
        sampled=None if first.sampled is None else first.sampled[:1],
    )
    return replace(group, rollouts=(rollout,), advantages=group.advantages[:1])


def _say(run: Run, budget: int, longer: Sequence[str], left_out: Sequence[str]) -> None:
    if longer and "longer" not in run.said:
        run.said.add("longer")
        warn(
            run,
            f"{_KEY}={budget} is too small for {longer[0]}: rows for such a prompt are as long as it takes (said once)",
        )
    if left_out:
        run.counts["rows_too_long"] = run.counts.get("rows_too_long", 0) + len(left_out)
    if left_out and "left out" not in run.said:
        run.said.add("left out")
        warn(
            run,
            f"data.train: left out of its update, since no packed row can hold it: {left_out[0]}, {_KEY} is {budget} "
            "(said once, and counted as rows_too_long)",
        )
