"""Packs groups of rollouts into the micro-batches of one optimizer step, on the ranks of a run.

`packing/` lays out the rows and knows no ranks. This module moves groups between data-parallel ranks until every rank
has about as much to compute, and sums the totals that token weights divide by over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_papo.config import LossConfig
from megatron_papo.costs.flops import group_flops
from megatron_papo.distributed.exchange import gather_objects, move_items
from megatron_papo.model.positions import positions_of
from megatron_papo.packing import Cost, Totals, balance, empty_like, pack, sum_totals, token_totals, whole
from megatron_papo.training.long_rows import shortened_group
from megatron_papo.training.session import Run
from megatron_papo.types import Batch, Group

_ROWS_PER_STAGE = 2
"""A pipeline gets at least this many rows a stage, as far as there are prompts: with p stages and m rows it is idle
for (p - 1) / (m + p - 1) of the time."""


def pack_update(
    run: Run, groups: Sequence[Group], placeholder: Group, loss: LossConfig | None = None, joint: bool = False
) -> Batch:
    """The micro-batches of one optimizer step on this rank; all data-parallel ranks call it together.

    A token's weight is its share in the mean over all data-parallel ranks, taken as `loss` says (by default the token
    mean). `joint`: leave room for the masked view in every row. A rank that is left without groups packs
    `placeholder` with weights of zero, so that it takes part in the update all the same. Raises ValueError where no
    rank has a group, or a group has no room in any row.
    """
    groups = _balanced(run, groups, joint)
    totals = sum_totals(gather_objects(token_totals(groups), run.layout.data_group))
    if groups:
        return pack_rows(run, groups, totals, loss, joint)
    if not totals.num_sequences:
        raise ValueError("train.tokens_per_micro_batch: no prompt of an update fits a packed row with its responses")
    if whole(placeholder, joint).least_tokens > run.config.train.tokens_per_micro_batch:
        placeholder = shortened_group(placeholder)
    idle = replace(placeholder, advantages=(0.0,) * len(placeholder.rollouts))
    return tuple(empty_like(row) for row in pack_rows(run, [idle], totals, loss, joint))


def pack_rows(
    run: Run, groups: Sequence[Group], totals: Totals | None = None, loss: LossConfig | None = None, joint: bool = False
) -> Batch:
    """The groups as rows under the token budget. Weights are shares of the mean over `totals`, by default of the mean
    over these groups; `loss` and `joint` are as in `pack_update`."""
    return pack(
        groups,
        tokens_per_micro_batch=run.config.train.tokens_per_micro_batch,
        longest_row=run.longest_row,
        loss=loss or LossConfig(),
        totals=totals or token_totals(groups),
        joint=joint,
        cost=_group_cost(run),
        least_rows=_ROWS_PER_STAGE * run.layout.pipeline_size if run.layout.pipeline_size > 1 else 1,
        positions=positions_of(run.shape),
        banned_ids=run.banned_ids,
    )


def _balanced(run: Run, groups: Sequence[Group], joint: bool) -> Sequence[Group]:
    """This rank's groups after the exchange between data-parallel ranks."""
    if run.layout.data_size == 1:
        return groups
    costs = [whole(group, joint).cost(_group_cost(run)) for group in groups]
    moves = balance(gather_objects(costs, run.layout.data_group))
    return move_items(groups, moves, run.layout.data_group)


def _group_cost(run: Run) -> Cost:
    """The function that balancing compares groups by: FLOPs of a prompt with its responses. Which pass they go through
    does not matter, since only ratios of costs do."""
    return lambda prompt, responses, grids: group_flops(prompt, responses, grids, run.shape).total
