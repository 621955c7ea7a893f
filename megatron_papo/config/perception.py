"""The section `perception`: how pictures are masked, how the two views are compared, and the guard against collapse."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Fraction, NoAsOff, NonNegative, Positive, Section


class MaskConfig(Section):
    """Which perturbation makes the masked image."""

    kind: Literal["cells", "blur", "noise", "swap", "crop"] = "cells"
    """Black cells (the paper), or another way to spoil the image."""
    ratio: Fraction = 0.6
    """Probability that a cell goes black."""
    cell: Count | None = None
    """Edge of a cell in pixels; null: of a patch of the model folder's image processor, 14 for Qwen2.5-VL."""
    align: Literal["raw", "patches"] = "raw"
    """`raw`: cells on the image as loaded (the paper); `patches`: on the resized image, a cell a merged patch."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if self.align == "patches" and self.kind != "cells":
            raise ValueError(f"perception.mask.align=patches works with kind=cells, not {self.kind}")
        return self


class GuardConfig(Section):
    """Watches for collapse of the perception term and acts before reward falls."""

    action: Annotated[Literal["off", "lower", "stop"], NoAsOff] = "off"
    """What to do: nothing, lower the coefficient, or save and stop."""
    perception_kl: Positive = 1.0
    """Sign: mean perception KL above this, nats a token."""
    clip_fraction: Positive = 0.007
    """Sign: fraction of tokens whose ratio is clipped, of advantages of either sign, above this."""
    masked_entropy: Positive = 1.1
    """Sign: entropy with the image masked above this, nats a token."""
    patience: Count = 3
    """Steps in a row with a sign before acting."""
    factor: Fraction = 0.5
    """`lower` multiplies the perception coefficient by this, and leaves the entropy terms, which counter collapse."""

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, tree: Any) -> Any:
        """Runs of before have written all settings into their config.yaml: what is at its default there is no wish."""
        if not isinstance(tree, dict) or "clip_high_fraction" not in tree:
            return tree
        if tree["clip_high_fraction"] != 0.007:
            raise ValueError(
                "clip_high_fraction, of positive advantages alone, is now clip_fraction, of advantages of either sign: "
                "set that"
            )
        return {key: value for key, value in tree.items() if key != "clip_high_fraction"}


class PerceptionConfig(Section):
    masked_branch: Literal["frozen", "joint"] = "frozen"
    """`frozen`: masked log-probs scored once per rollout batch, no gradient; `joint`: gradient through both views."""
    kl: Literal["k3", "full"] = "k3"
    """The one-sample estimate, or the exact KL over the vocabulary (joint only)."""
    mask: MaskConfig = MaskConfig()
    clamp: Positive | None = None
    """Upper bound of the per-token perception KL in the loss (0.2 counters collapse); None keeps k3's own +-10."""
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The term reads only this fraction of each response's tokens: those of highest KL."""
    coef_end: NonNegative | None = None
    """Linear schedule of loss.perception_coef to this value over `coef_steps`. Both entropy coefficients follow it as
    in the reference code: they are multiplied by the coefficient's share of the larger of its two ends."""
    coef_steps: Count | None = None
    """Steps of that schedule."""
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _check(self) -> PerceptionConfig:
        if (self.coef_end is None) != (self.coef_steps is None):
            raise ValueError("perception.coef_end and perception.coef_steps go together")
        return self
