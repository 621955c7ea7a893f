"""The section `fp8`: which matrix products run in 8 bits, and when the run leaves them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, NoAsOff, Positive, Section


class Fp8Config(Section):
    recipe: Annotated[Literal["off", "tensorwise", "delayed", "blockwise", "mxfp8"], NoAsOff] = "off"
    """How values are scaled into 8 bits: a tensor by its own maximum, by the maxima of steps before, in blocks of 128
    (Hopper), or in blocks of 32 (Blackwell). On a GPU with Transformer Engine; elsewhere the rounding is emulated."""
    update: bool = True
    """Whether the forward and backward passes of the updates run in FP8."""
    score: bool = True
    """Whether the passes that only score run in FP8: old, masked and reference log-probs."""
    first_layers: Annotated[int, Field(ge=0)] = 1
    """Number of first layers of the language model that stay in model.dtype; embedding and head always do. The recipe
    delayed needs 0."""
    last_layers: Annotated[int, Field(ge=0)] = 1
    """Number of last layers of the language model that stay in model.dtype. The recipe delayed needs 0."""
    vision: bool = False
    """Whether the layers of the vision tower run in FP8 too."""
    amax_history: Count = 1024
    """Number of past maxima, one for each micro-batch, from which the recipe delayed takes its scale."""
    gap_every: Annotated[int, Field(ge=0)] = 20
    """Steps between two measurements of how far the log-probs in FP8 are from those in model.dtype, on rows of the
    step; 0: only at the first step."""
    gap_limit: Positive = 0.1
    """Mean absolute difference of log-probs, in nats a token, beyond which the run goes on without FP8."""

    @model_validator(mode="after")
    def _check(self) -> Fp8Config:
        if self.recipe == "delayed" and self.first_layers + self.last_layers:
            raise ValueError(
                "fp8.recipe: delayed keeps one set of scales for all layers of a pass, Megatron-Core refuses to leave "
                "some out; set fp8.first_layers=0 and fp8.last_layers=0"
            )
        return self

    @property
    def enabled(self) -> bool:
        return self.recipe != "off"
