"""The guard of FP8: it measures how far FP8 moves log-probs on rows of the step, and turns FP8 off where it is too far.

At the first step of a process and every `fp8.gap_every` steps a few rows are scored twice, in FP8 and in model.dtype.
Where the mean absolute gap is over `fp8.gap_limit`, FP8 goes off on all ranks for the rest of the run, also after it
resumes. In the same pass the inputs of FP8 linears are counted (model/fp8/counters.py). Left out: the gap of
gradients, and supervised training, which runs in FP8 without this guard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_papo.config import Fp8Config
from megatron_papo.distributed.accelerator import device
from megatron_papo.model.fp8.counters import counted
from megatron_papo.model.policy import HeadRequest, VisionLanguageModel
from megatron_papo.optimization.pipeline import score
from megatron_papo.types import Metrics, MicroBatch

_MOST_ROWS = 2
"""How many rows are scored twice on each data-parallel rank."""


@dataclass
class GapSums:
    """What a rank measured. Over ranks, fields that end in `_max` combine by their maximum, the others by their sum."""

    gap: float = 0.0
    """Absolute difference of log-probs between FP8 and model.dtype, summed over response tokens; nats."""
    gap_max: float = 0.0
    num_tokens: float = 0.0
    amax_max: float = 0.0
    """Largest absolute input of an FP8 linear."""
    num_values: float = 0.0
    """Inputs of FP8 linears that were counted."""
    num_saturated: float = 0.0
    """Those beyond FP8's range under their scale, which happens with the recipe `delayed` alone."""
    num_flushed: float = 0.0
    """Those that FP8 rounds to zero although they are not."""
    padding_max: float = 0.0
    """Largest absolute input in a place of padding, where all must be zero."""

    @property
    def gap_mean(self) -> float:
        """Mean gap in nats per response token; 0 where there are no tokens."""
        return self.gap / max(self.num_tokens, 1.0)

    def metrics(self) -> Metrics:
        """What a step records of these sums."""
        return {
            "fp8/gap_mean": (self.gap_mean, 1.0),
            "fp8/gap_max": (self.gap_max, 1.0),
            "fp8/amax_max": (self.amax_max, 1.0),
            "fp8/saturated": (self.num_saturated, self.num_values),
            "fp8/flushed": (self.num_flushed, self.num_values),
        }


@dataclass(frozen=True)
class PrecisionGuard:
    """Whether the run still computes in FP8, and when that is measured next. A frozen value: `observe` returns the next
    one."""

    config: Fp8Config
    on: bool
    has_measured: bool = False
    """Whether this process has measured: one that resumes a run measures again."""

    @classmethod
    def of(cls, config: Fp8Config) -> PrecisionGuard:
        """The guard of a run as it starts."""
        return cls(config, on=config.enabled and (config.update or config.score))

    def is_due(self, step: int) -> bool:
        """Whether `step` (from 0) measures the gap."""
        every = self.config.gap_every
        return self.on and (not self.has_measured or bool(every and step % every == 0))

    def observe(self, gap_mean: float) -> tuple[PrecisionGuard, str]:
        """The next guard, and the reason why it turns FP8 off, empty where it does not; NaN is over every limit."""
        if gap_mean <= self.config.gap_limit:
            return replace(self, has_measured=True), ""
        reason = f"mean log-prob gap {gap_mean:.4g} nats > fp8.gap_limit={self.config.gap_limit:g}"
        return replace(self, has_measured=True, on=False), reason

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"on": self.on}

    @classmethod
    def from_state(cls, config: Fp8Config, state: dict[str, Any] | None) -> PrecisionGuard:
        """The guard that a checkpoint keeps; `state` is None where it was written before there was one. FP8 stays off
        where the settings turn it off."""
        guard = cls.of(config)
        return guard if state is None else replace(guard, on=guard.on and bool(state["on"]))


def watch_precision(
    guard: PrecisionGuard, policy: VisionLanguageModel, rows: Sequence[MicroBatch], head: HeadRequest, step: int
) -> tuple[PrecisionGuard, Metrics, str]:
    """Measures the gap where that is due and turns FP8 off where it is over its limit. Returns the next guard, what the
    step records, and a warning or an empty text; the same on every rank."""
    if not guard.config.enabled:
        return guard, {}, ""
    metrics, reason = {}, ""
    if guard.is_due(step):
        sums = over_ranks(measure(policy, rows[:_MOST_ROWS], head))
        guard, reason = guard.observe(sums.gap_mean)
        metrics = sums.metrics()
        if reason:
            reason = f"FP8 ({guard.config.recipe}) is off from step {step} on: {reason}, max {sums.gap_max:.4g}"
    if not guard.on:
        policy.fp8.turn_off()
    return guard, metrics | {"fp8/on": (float(guard.on), 1.0)}, reason


def measure(policy: VisionLanguageModel, rows: Sequence[MicroBatch], head: HeadRequest) -> GapSums:
    """The sums over `rows` on this rank. Every pipeline stage has the same gap, and the counters of its own layers."""
    head, sums = replace(head, full_entropy=False, full_kl=False), GapSums()
    if policy.fp8.settings.recipe == "delayed":  # otherwise scales that no pass has set yet would be measured
        score(policy, rows, head, fp8=True)
        policy.fp8.settle()
    for row in rows:
        (plain,) = score(policy, [row], head, fp8=False)
        with counted(policy, row.num_tokens) as counters:
            (in_fp8,) = score(policy, [row], head, fp8=True)
        gap_R = (in_fp8.policy_logprobs_R - plain.policy_logprobs_R).abs()[row.loss_mask_R.to(device())]
        sums.gap += _number(gap_R.sum().item())
        sums.gap_max = max(sums.gap_max, _number(gap_R.max().item()) if gap_R.numel() else 0.0)
        sums.num_tokens += gap_R.numel()
        sums.amax_max = max(sums.amax_max, _number(counters.amax))
        sums.padding_max = max(sums.padding_max, _number(counters.padding_amax))
        sums.num_values += counters.num_values
        sums.num_saturated += counters.num_saturated
        sums.num_flushed += counters.num_flushed
    return sums


def over_ranks(sums: GapSums) -> GapSums:
    """The sums over all ranks of the world. Raises AssertionError on every rank where padding was not zero."""
    names = [field.name for field in fields(sums)]
    values = torch.tensor(astuple(sums), dtype=torch.float64, device=device())
    largest = values.clone()
    dist.all_reduce(values)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    pairs = zip(names, values.tolist(), largest.tolist())
    combined = GapSums(**{name: most if name.endswith("_max") else total for name, total, most in pairs})
    assert combined.padding_max == 0.0, f"an FP8 layer reads {combined.padding_max} in a place of padding"
    return combined


def _number(value: float) -> float:
    """The value, or infinity for NaN, which a maximum over ranks would drop."""
    return math.inf if math.isnan(value) else value
