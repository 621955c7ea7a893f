"""The sections `train` and `sft`: the number and size of the steps of reinforcement learning or fine-tuning."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

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


Epochs = Annotated[float, Field(gt=0.0, le=10_000.0)]


class LengthConfig(Section):
    """How long a run lasts: a number of steps, or one that follows from passes through the data."""

    steps: Count | None
    epochs: Epochs | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_to_epochs(cls, given: Any) -> Any:
        """Epochs without steps take the place of the default number of steps."""
        if isinstance(given, dict) and given.get("epochs") is not None:
            return {"steps": None, **given}
        return given

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.steps is None and self.epochs is None:
            raise ValueError("steps: null needs epochs, from which the number of steps follows")
        return self

    @property
    def num_steps(self) -> int:
        """Steps of the whole run. Where only epochs are given it is known once the data is open, after `lasting`."""
        assert self.steps is not None, "the number of steps follows from epochs once the data is open"
        return self.steps

    def lasting(self, steps_of_epochs: int) -> Self:
        """The same section with the number of steps in place, where its epochs are so many: the smaller one counts."""
        return self.model_copy(update={"steps": min(self.steps or steps_of_epochs, steps_of_epochs)})


class TrainConfig(LengthConfig):
    steps: Count | None = 202
    """Number of rollout batches of the whole run; null: it follows from train.epochs. Where both are given the run ends
    at the one that comes first."""
    epochs: Epochs | None = None
    """Number of passes through data.train, also a part such as 0.5, in place of train.steps: the run has as many steps
    as it takes to draw every row so often, rounded up. Not with train.dynamic_sampling, whose steps draw as many
    prompts as they need."""
    prompts_per_step: Count = 384
    """Number of prompts of one step, over all ranks."""
    group_size: Annotated[int, Field(ge=2)] = 5
    """Number of rollouts of each prompt."""
    updates_per_step: Count = 3
    """Optimizer steps on each rollout batch; prompts_per_step must be divisible by it."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    tokens_per_micro_batch: Count = 16_384
    """Most tokens of a packed row, which is one micro-batch: each prompt once with its responses, and once more for the
    masked view in a joint row. A prompt whose longest response has no room in it gets a longer row, of up to twice as
    many tokens and as far as memory suffices; beyond that it is left out or ends the run, by data.on_bad_row."""
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
        if self.epochs is not None and self.dynamic_sampling.enabled:
            raise ValueError(
                f"train.epochs={self.epochs:g}: with train.dynamic_sampling a step draws as many prompts as it needs, "
                "so no number of steps follows from epochs; give train.steps"
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


class SftConfig(LengthConfig):
    steps: Count | None = 100
    """Number of optimizer steps of supervised fine-tuning; null: it follows from sft.epochs. Where both are given the
    run ends at the one that comes first."""
    epochs: Epochs | None = None
    """Number of passes through data.train, also a part such as 0.5, in place of sft.steps, which follow from it,
    rounded up."""
    batch_size: Count = 64
    """Rows of one optimizer step, over all data-parallel ranks."""
    response_column: str = "response"
    """Column of the data that holds the demonstrated response."""
