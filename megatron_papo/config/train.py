"""The sections `train` and `sft`: how many steps of how many prompts, and how they become optimizer updates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Fraction, Section


class DynamicSamplingConfig(Section):
    enabled: bool = False
    """DAPO's: train only on prompts whose rollouts disagree, and generate until there are enough."""
    low: Fraction = 0.01
    """Mean accuracy must be above this."""
    high: Fraction = 0.99
    """Mean accuracy must be below this."""
    prompts_per_round: Count | None = None
    """Prompts that are drawn at a time, over all ranks; null: train.prompts_per_step."""
    max_rounds: Count = 20
    """Rounds of a step before giving up."""
    when_none_kept: Literal["drop", "keep"] = "drop"
    """A round of which no prompt would be kept: drop it as any other, or keep all of it (PAPO's reference code)."""


class TrainConfig(Section):
    steps: Count = 202
    """Rollout batches of the whole run."""
    prompts_per_step: Count = 384
    """Over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Rollouts of a prompt."""
    updates_per_step: Count = 3
    """Optimizer steps of one rollout batch; prompts_per_step must divide by it."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    tokens_per_micro_batch: Count = 16_384
    """Budget of a packed row: each prompt once with its responses, and once more for the masked view of a joint row."""
    ahead: bool = False
    """Generate the rollouts of the next step while this one trains, with weights one update old. Needs
    generation.placement=separate."""
    fixed_rows: bool = False
    """Pad every row to tokens_per_micro_batch: what CUDA graphs and overlapped tensor-parallel exchanges need."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """0: only after the last step, when data.eval is set."""
    eval_at_start: bool = False
    """Evaluate the starting weights too, before the first step, when data.eval is set."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"train.prompts_per_step={self.prompts_per_step} does not divide by "
                f"train.updates_per_step={self.updates_per_step}"
            )
        dynamic, most = self.dynamic_sampling, self.dynamic_sampling.max_rounds * self.prompts_per_round
        if dynamic.enabled and most < self.prompts_per_step:
            raise ValueError(
                f"train.dynamic_sampling: max_rounds={dynamic.max_rounds} rounds of {self.prompts_per_round} prompts "
                f"are fewer than train.prompts_per_step={self.prompts_per_step}"
            )
        return self

    @property
    def prompts_per_round(self) -> int:
        """Drawn and generated at a time, over all ranks: a whole step's but under dynamic sampling."""
        dynamic = self.dynamic_sampling
        return (dynamic.prompts_per_round if dynamic.enabled else None) or self.prompts_per_step


class SftConfig(Section):
    steps: Count = 100
    """Optimizer steps."""
    batch_size: Count = 64
    """Rows of an optimizer step, over all data-parallel ranks."""
    response_column: str = "response"
    """Column of the demonstration."""
