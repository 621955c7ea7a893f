"""The sections `train` and `sft`: the number and size of the steps of reinforcement learning or fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Fraction, Section


class DynamicSamplingConfig(Section):
    enabled: bool = False
    """Whether to sample dynamically (DAPO): train only on prompts whose rollouts differ in accuracy, and generate until
    there are enough."""
    low: Fraction = 0.01
    """A prompt is kept when the mean accuracy of its rollouts is above this."""
    high: Fraction = 0.99
    """A prompt is kept when the mean accuracy of its rollouts is below this."""
    prompts_per_round: Count | None = None
    """Prompts that are drawn in one round, over all ranks; null: train.prompts_per_step."""
    max_rounds: Count = 20
    """Most rounds of one step, after which the run gives up."""
    when_none_kept: Literal["drop", "keep"] = "drop"
    """What to do with a round of which no prompt would be kept: drop it like any other, or keep all of it (PAPO's
    reference code)."""


class TrainConfig(Section):
    steps: Count = 202
    """Number of rollout batches of the whole run."""
    prompts_per_step: Count = 384
    """Number of prompts of one step, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Number of rollouts of each prompt."""
    updates_per_step: Count = 3
    """Optimizer steps on each rollout batch; prompts_per_step must be divisible by it."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    tokens_per_micro_batch: Count = 16_384
    """Most tokens of a packed row, which is one micro-batch: each prompt once with its responses, and once more for the
    masked view in a joint row."""
    ahead: bool = False
    """Whether the rollouts of the next step are generated while this one trains, with weights that are one update old.
    Needs generation.placement=separate."""
    fixed_rows: bool = False
    """Whether every packed row is padded to tokens_per_micro_batch, as CUDA graphs and overlapped tensor-parallel
    exchanges need it."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between evaluations, when data.eval is set; 0: only after the last step."""
    eval_at_start: bool = False
    """Whether the starting weights are evaluated too, before the first step, when data.eval is set."""

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
    """Number of optimizer steps of supervised fine-tuning."""
    batch_size: Count = 64
    """Rows of one optimizer step, over all data-parallel ranks."""
    response_column: str = "response"
    """Column of the data that holds the demonstrated response."""
