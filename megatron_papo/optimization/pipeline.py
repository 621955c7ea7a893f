"""Scoring and updating: the only callers of Megatron's forward-backward schedules, which run micro-batches through the
pipeline.

`score_logprobs` runs forward only. `update_policy` accumulates gradients over the micro-batches of one optimizer step
and makes the step. Both give every pipeline stage the same results. The number of micro-batches may differ between
data-parallel ranks, but not within a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

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
"""The loss of one micro-batch and its metrics, such as `losses.papo_loss` with its settings."""


def score_logprobs(
    policy: VisionLanguageModel,
    batches: Sequence[Batch],
    config: Config,
    head: HeadRequest,
    reference: ReferencePolicy | None,
    *,
    reference_is_policy: bool = False,
) -> list[Batch]:
    """The batches of a rollout batch, with those log-probs that the loss compares with and no others:

    - `old_logprobs_R` in the second update and those after it (in the first the policy is the old policy), unless
      `loss.old_logprobs` says that the engine's are taken instead;
    - `masked_logprobs_R` in rows with an image, where the masked branch is frozen;
    - `ref_logprobs_R` where there is a reference.

    Everything that the policy scores goes through the pipeline in one forward-only pass, and what the reference scores
    in another, or in the same one while it has the policy's weights (`reference_is_policy`). The head computes
    log-probs only, whatever else `head` requests.
    """
    head = replace(head, full_entropy=False, full_kl=False)
    rows = [row for batch in batches for row in batch]
    requests: list[_Request] = []
    for index, row in enumerate(rows):
        in_first_update = index < len(batches[0])
        names = [] if in_first_update or config.loss.old_logprobs == "rollout" else ["old_logprobs_R"]
        if reference_is_policy and reference is not None:
            names.append("ref_logprobs_R")
        if names:
            requests.append(_Request(index, row, tuple(names)))
        if config.reads_masked_view and not config.reads_joint_rows and row.pixel_values:
            requests.append(_Request(index, masked_row(row), ("masked_logprobs_R",)))
    _fill(rows, policy, requests, head)
    if reference is not None and not reference_is_policy:
        with reference.swapped_into(policy):
            _fill(rows, policy, [_Request(index, row, ("ref_logprobs_R",)) for index, row in enumerate(rows)], head)
    scored = iter(rows)
    return [tuple(next(scored) for _ in batch) for batch in batches]


class _Request(NamedTuple):
    """A row to be scored, and what its log-probs are for."""

    place: int
    """Index of the row that receives them."""
    row: MicroBatch
    names: tuple[str, ...]
    """Fields of `MicroBatch` that they fill."""


def _fill(rows: list[MicroBatch], policy: VisionLanguageModel, requests: Sequence[_Request], head: HeadRequest) -> None:
    """Scores the requests in one pass and replaces each row by one with the log-probs."""
    outputs = score(policy, [request.row for request in requests], head)
    for request, output in zip(requests, outputs, strict=True):
        values: dict[str, Any] = dict.fromkeys(request.names, output.policy_logprobs_R)
        rows[request.place] = replace(rows[request.place], **values)


@torch.no_grad()
def score(
    policy: VisionLanguageModel, rows: Sequence[MicroBatch], head: HeadRequest, *, fp8: bool | None = None
) -> list[HeadOutputs]:
    """What the head computes for the response tokens of every row, forward only; in the order of `rows`, and the same
    on every pipeline stage.

    Rows have one view: a joint row's second view is not scored. `fp8`: whether to compute in FP8, by default as
    `fp8.score` says.
    """
    if not rows:
        return []
    policy.eval()
    with policy.fp8.scoring() if fp8 is None else policy.fp8.during(fp8):
        outputs: list[HeadOutputs] = run_schedule(policy, rows, head, None)  # empty but on the last stage
    policy.train()
    return [_from_last_stage(outputs[index] if outputs else None, row, head) for index, row in enumerate(rows)]


def score_views(
    policy: VisionLanguageModel, rows: Sequence[MicroBatch], head: HeadRequest
) -> list[tuple[HeadOutputs, HeadOutputs]]:
    """Scores every row as it is and with its images masked, in one pass; a row without images once for both."""
    outputs = score(policy, [*rows, *(masked_row(row) for row in rows if row.pixel_values)], head)
    masked = iter(outputs[len(rows) :])
    return [(own, next(masked) if row.pixel_values else own) for row, own in zip(rows, outputs)]


def _from_last_stage(outputs: HeadOutputs | None, row: MicroBatch, head: HeadRequest) -> HeadOutputs:
    """The last stage's outputs for a row, on every stage; `outputs` is None on the others."""
    shape = tuple(row.target_ids_R.shape)
    logprobs_R = broadcast_from_last_stage(outputs.policy_logprobs_R if outputs else None, shape, torch.float32)
    if not head.full_entropy:
        return HeadOutputs(logprobs_R)
    entropy_R = broadcast_from_last_stage(outputs.entropy_R if outputs else None, shape, torch.float32)
    return HeadOutputs(logprobs_R, entropy_R)


def update_policy(optimizer: Optimizer, batch: Batch, head: HeadRequest, micro_loss: MicroLoss) -> Metrics:
    """One optimizer step over `batch`; the metrics of all its micro-batches on all data-parallel ranks. An update whose
    loss or log-probs are not finite on any rank is skipped on all of them.

    The metrics `loss/...` get a count of 1, so that the metrics of several updates add up to their mean.
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
    """Adds the numerators and counts of `more` to `total` in place; of two maxima the larger stays."""
    for name, (numerator, count) in more.items():
        total[name] = merge_metric(name, total.get(name), (float(numerator), float(count)))


def run_schedule(
    model: nn.Module, rows: Sequence[MicroBatch], head: HeadRequest, micro_loss: MicroLoss | None
) -> list[Any]:
    """Runs the rows through the pipeline. Returns one result for each row on the last stage, its HeadOutputs when
    scoring (`micro_loss` is None) and its Metrics when updating; an empty list on the other stages."""
    for row in rows:  # on every stage alike, before any stage waits for another
        unwrap_model(model).check(row, head)
    begun = _Begun(rows)
    try:
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, head=head, micro_loss=micro_loss),
            data_iterator=begun,
            model=[model],
            num_microbatches=len(rows),
            seq_length=1,  # ignored: lengths differ between rows (variable_seq_lengths)
            micro_batch_size=1,
            forward_only=micro_loss is None,
        )
    except Exception as error:
        error.add_note(begun.in_words())
        raise


class _Begun(Iterator[MicroBatch]):
    """The rows one after the other, and which of them has begun last: a failure is most probably its own."""

    def __init__(self, rows: Sequence[MicroBatch]):
        self._rows, self._num = rows, 0

    def __next__(self) -> MicroBatch:
        if self._num == len(self._rows):
            raise StopIteration
        self._num += 1
        return self._rows[self._num - 1]

    def in_words(self) -> str:
        if not self._num:
            return f"before the first of {len(self._rows)} rows"
        row = self._rows[self._num - 1]
        images = 0 if row.grid_thw_I3 is None else len(row.grid_thw_I3)
        return (
            f"row {self._num} of {len(self._rows)} ({row.num_tokens:,} tokens, {images} images, "
            f"{row.target_ids_R.numel():,} response tokens)"
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
