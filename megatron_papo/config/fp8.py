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
    """Forward and backward of the updates."""
    score: bool = True
    """Forward passes that only score: old, masked and reference log-probs."""
    first_layers: Annotated[int, Field(ge=0)] = 1
    """Language-model layers at the start that stay in model.dtype; embedding and head always do. delayed needs 0."""
    last_layers: Annotated[int, Field(ge=0)] = 1
    """And at the end. delayed needs 0."""
    vision: bool = False
    """The layers of the vision tower too."""
    amax_history: Count = 1024
    """Maxima that `delayed` looks back on, one a micro-batch."""
    gap_every: Annotated[int, Field(ge=0)] = 20
    """Steps between measurements of the log-prob gap to model.dtype on rows of the step; 0: at the first step alone."""
    gap_limit: Positive = 0.1
    """Mean absolute gap, nats a token, beyond which the run goes on without FP8."""

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
