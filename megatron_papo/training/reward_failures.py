"""Rows for which `reward.function` failed: counted over all ranks, written to a file, warned of, or the end of the run.

The part `failed` of a group's rewards (1 or 0 a rollout) becomes the metric `reward/failed`, and tells which groups
`reward.on_failure=drop_group` leaves out of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.files.small_files import append_record
from megatron_papo.rewards.own_function import OwnFunction
from megatron_papo.rewards.returned import FAILED, Failed
from megatron_papo.rewards.reward_row import RewardRow
from megatron_papo.text.untrusted import shortened
from megatron_papo.training.console import warn
from megatron_papo.training.session import Run
from megatron_papo.types import Group

FILE = "reward_failures.jsonl"
"""In the run's folder."""
_MOST_RECORDS = 20
"""Records that a rank writes of a step."""
_MOST_BYTES = 64 << 20
"""Size of the file beyond which nothing is added."""
_MOST_LETTERS = 2000
"""Of a response or a problem in a record."""


def has_failed(group: Group) -> bool:
    """Whether the user's function failed for a response of the group."""
    return any(group.reward_parts.get(FAILED, ()))


def without_failures(group: Group) -> Group:
    """The group without the part `failed`."""
    return replace(group, reward_parts={name: part for name, part in group.reward_parts.items() if name != FAILED})


def tell_of_failures(
    run: Run,
    function: OwnFunction,
    own: Sequence[tuple[RewardRow, Failed]],
    groups: Sequence[Group],
    step: int | None,
) -> int:
    """How many rows failed on all ranks. Writes them to RUN/reward_failures.jsonl and warns; all ranks call it.

    `own`: the rows that this rank asked for and that failed. `groups`: all that its model-parallel group holds. Raises
    ValueError on every rank, where reward.on_failure asks for it or all rows of a step failed.
    """
    records = [_record(row, failed) for row, failed in own[:_MOST_RECORDS]]
    in_model_group = gather_objects((len(own), records), run.layout.model_group)
    share = (
        sum(count for count, _ in in_model_group),
        sum(len(group.rollouts) for group in groups),
        list(chain.from_iterable(some for _, some in in_model_group)),
    )
    counts, sizes, all_records = zip(*gather_objects(share, run.layout.data_group))
    num_failed, num_rows, records = sum(counts), sum(sizes), list(chain.from_iterable(all_records))
    if num_failed:
        _write(run, records)
        first = records[0]
        reason = f"reward.function: {function.name} {first['reason']}"
        place = f"the first is response {first['rollout']} to {first['prompt']}"
        if run.config.reward.on_failure == "stop":
            raise ValueError(f"{reason} ({num_failed} of {num_rows} rows; {place})")
        if step is not None and num_failed == num_rows:
            raise ValueError(f"{reason} (all {num_rows} rows of the step; {place})")
        _warn(run, f"{reason} ({num_failed} of {num_rows} rows; {place})", num_failed)
    return num_failed


def _record(row: RewardRow, failed: Failed) -> dict[str, Any]:
    return {
        "step": row.step,
        "prompt": row.prompt_id,
        "source": row.source,
        "rollout": row.rollout,
        "reason": failed.reason,
        "problem": shortened(row.problem, _MOST_LETTERS),
        "answer": shortened(row.answer, _MOST_LETTERS),
        "response": shortened(row.response, _MOST_LETTERS),
    }


def _write(run: Run, records: Sequence[dict[str, Any]]) -> None:
    path = run.folder / FILE
    if not run.is_writer or (path.exists() and path.stat().st_size > _MOST_BYTES):
        return
    with suppress(OSError):  # a full disk: the warning remains
        for record in records:
            append_record(path, record)


def _warn(run: Run, text: str, num_failed: int) -> None:
    """Warns of the first failure, and each time that there are twice as many as at the time before."""
    before = run.counts.get("rewards_failed", 0)
    run.counts["rewards_failed"] = before + num_failed
    if before.bit_length() != run.counts["rewards_failed"].bit_length():
        effect = "drop_group leaves their groups out" if _drops(run) else "what it returns counts 0 there"
        so_far = run.counts["rewards_failed"]
        warn(run, f"{text}: {effect}; so far {so_far}, of which {run.folder / FILE} tells")


def _drops(run: Run) -> bool:
    return run.config.reward.on_failure == "drop_group"
