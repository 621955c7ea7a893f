"""Runs micro-batches through the pipeline: the only callers of Megatron's forward-backward schedules.

`score_logprobs` is forward only; `update_policy` accumulates gradients over the micro-batches of one optimizer step
and takes the step. Both give every pipeline stage the same results. How many micro-batches a rank has may differ
between data-parallel ranks, never within a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_papo.config import Config
from megatron_papo.distributed.accelerator import device
from megatron_papo.distributed.exchange import broadcast_from_last_stage, merge_metric, sum_metrics
from megatron_papo.model.policy import HeadRequest, VisionLanguageModel
from megatron_papo.optimization.gradient_guard import fault_of
from megatron_papo.optimization.optimizer import Optimizer
from megatron_papo.optimization.reference import ReferencePolicy
from megatron_papo.packing import masked_row
from megatron_papo.types import Batch, HeadOutputs, Metrics, MicroBatch

MicroLoss = Callable[[HeadOutputs, MicroBatch], tuple[Tensor, Metrics]]


def score_logprobs(
    policy: VisionLanguageModel,
    batches: Sequence[Batch],
    config: Config,
    head: HeadRequest,
    reference: ReferencePolicy | None,
    *,
    reference_is_policy: bool = False,
) -> list[Batch]:
    """The batches with the log-probs that the loss compares against, and no others.

    `old_logprobs_R` from the second update of a rollout batch on: in the first the policy is the old policy. Not where
    the engine's log-probs stand for them.
    `masked_logprobs_R` for a frozen masked branch, in rows with an image; `ref_logprobs_R` when there is a reference.
    All that the policy is asked for goes through the pipeline in one forward-only pass, the reference in another, or in
    the same as long as it has the policy's weights (`reference_is_policy`). Of what `head` asks for the log-probs alone
    are made.
    """
    head = replace(head, full_entropy=False, full_kl=False)
    rows = [row for batch in batches for row in batch]
    asked: list[tuple[int, MicroBatch, tuple[str, ...]]] = []
    for place, row in enumerate(rows):
        of_first_update = place < len(batches[0])
        as_is = [] if of_first_update or config.loss.old_logprobs == "rollout" else ["old_logprobs_R"]
        if reference_is_policy and reference is not None:
            as_is.append("ref_logprobs_R")
        if as_is:
            asked.append((place, row, tuple(as_is)))
        if config.reads_masked_view and not config.reads_joint_rows and row.pixel_values:
            asked.append((place, masked_row(row), ("masked_logprobs_R",)))
    found = _ask(policy, asked, head)
    if reference is not None and not reference_is_policy:
        with reference.swapped_into(policy):
            found += _ask(policy, [(place, row, ("ref_logprobs_R",)) for place, row in enumerate(rows)], head)
    for place, values in found:
        rows[place] = replace(rows[place], **values)
    scored = iter(rows)
    return [tuple(next(scored) for _ in batch) for batch in batches]


def _ask(
    policy: VisionLanguageModel, asked: Sequence[tuple[int, MicroBatch, tuple[str, ...]]], head: HeadRequest
) -> list[tuple[int, dict[str, Any]]]:
    """For every (place, row, names): (place, the row's log-probs under each of these names)."""
    outputs = score(policy, [row for _, row, _ in asked], head)
    return [
        (place, dict.fromkeys(names, output.policy_logprobs_R))
        for (place, _, names), output in zip(asked, outputs, strict=True)
    ]


@torch.no_grad()
def score(
    policy: VisionLanguageModel, rows: Sequence[MicroBatch], head: HeadRequest, *, fp8: bool | None = None
) -> list[HeadOutputs]:
    """What the head says of every row's response tokens, forward only, on every stage; in the order of `rows`.

    For rows of one view: a joint row's second view is not asked for. `fp8`: whether in FP8, by default as `fp8.score`
    says.
    """
    if not rows:
        return []
    policy.eval()
    with policy.fp8.scoring() if fp8 is None else policy.fp8.during(fp8):
        found: list[HeadOutputs] = run_schedule(policy, rows, head, None)
    policy.train()
    return [_from_last_stage(found[index] if found else None, row, head) for index, row in enumerate(rows)]


def score_views(
    policy: VisionLanguageModel, rows: Sequence[MicroBatch], head: HeadRequest
) -> list[tuple[HeadOutputs, HeadOutputs]]:
    """Every row as it is and with its images masked, in one pass; without images both are the same and scored once."""
    outputs = score(policy, [*rows, *(masked_row(row) for row in rows if row.pixel_values)], head)
    masked = iter(outputs[len(rows) :])
    return [(own, next(masked) if row.pixel_values else own) for row, own in zip(rows, outputs)]


def _from_last_stage(outputs: HeadOutputs | None, row: MicroBatch, head: HeadRequest) -> HeadOutputs:
    shape = tuple(row.target_ids_R.shape)
    logprobs_R = broadcast_from_last_stage(outputs.policy_logprobs_R if outputs else None, shape, torch.float32)
    if not head.full_entropy:
        return HeadOutputs(logprobs_R)
    entropy_R = broadcast_from_last_stage(outputs.entropy_R if outputs else None, shape, torch.float32)
    return HeadOutputs(logprobs_R, entropy_R)


def update_policy(optimizer: Optimizer, batch: Batch, head: HeadRequest, micro_loss: MicroLoss) -> Metrics:
    """One optimizer step over `batch`; the metrics of all its micro-batches on all data-parallel ranks. An update with
    a loss or log-probs that are not finite on any of them is skipped on all.

    `loss/...` are values of this step's loss, so that adding up the metrics of updates gives their mean.
    """
    optimizer.zero_grad()
    with optimizer.policy.module.fp8.updating():
        collected: list[Metrics] = run_schedule(optimizer.policy, batch, head, micro_loss)
    total: Metrics = {}
    for metrics in collected:
        add_metrics(total, metrics)
    total = {
        name: (numerator, 1.0 if name.startswith("loss/") else count)
        for name, (numerator, count) in sum_metrics(total).items()
    }
    values = optimizer.step(fault_of(total))
    return total | {f"optim/{name}": (value, 1.0) for name, value in values.items()}


def add_metrics(total: Metrics, more: Metrics) -> None:
    """Adds numerators and counts of `more` into `total`; of a maximum the larger stays."""
    for name, (numerator, count) in more.items():
        total[name] = merge_metric(name, total.get(name), (float(numerator), float(count)))


def run_schedule(
    model: nn.Module, rows: Sequence[MicroBatch], head: HeadRequest, micro_loss: MicroLoss | None
) -> list[Any]:
    """On the last stage, what each micro-batch left behind: its HeadOutputs when scoring, its Metrics when updating."""
    for row in rows:  # on every stage alike, before any waits for another
        unwrap_model(model).check(row, head)
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, head=head, micro_loss=micro_loss),
        data_iterator=iter(rows),
        model=[model],
        num_microbatches=len(rows),
        seq_length=1,  # ignored: lengths differ between rows (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=micro_loss is None,
    )


def _forward_step(
    rows: Iterator[MicroBatch], model: nn.Module, *, head: HeadRequest, micro_loss: MicroLoss | None
) -> tuple[Any, Callable[[Any], tuple[Tensor, Tensor, Any]]]:
    row = next(rows).to(device())
    return model(row, head), partial(_finish, row=row, micro_loss=micro_loss)


def _finish(outputs: HeadOutputs, *, row: MicroBatch, micro_loss: MicroLoss | None) -> tuple[Tensor, Tensor, Any]:
    no_tokens = torch.zeros((), dtype=torch.int, device=outputs.policy_logprobs_R.device)
    if micro_loss is None:
        return outputs.policy_logprobs_R.sum(), no_tokens, outputs
    loss, metrics = micro_loss(outputs, row)
    return loss, no_tokens, metrics
