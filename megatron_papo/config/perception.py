"""The section `perception`: the masked image, the KL between the views with and without it, and the collapse guard."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Fraction, NoAsOff, NonNegative, Positive, Section


class MaskConfig(Section):
    """Which perturbation makes the masked image."""

    kind: Literal["cells", "blur", "noise", "swap", "crop"] = "cells"
    """How the image is perturbed: black cells (the paper), blur, noise, another row's image (swap) or a crop."""
    ratio: Fraction = 0.6
    """How strongly the image is perturbed. cells: probability that a cell becomes black; noise: weight of the noise;
    crop: share of the area that is cut off; blur and swap do not use it."""
    cell: Count | None = None
    """Edge of a cell in pixels, or the radius of the blur; null: the edge of a patch of the model folder's image
    processor, 14 or 16 by the model's family."""
    align: Literal["raw", "patches"] = "raw"
    """Where the cells lie: `raw`, on the image as loaded (the paper); `patches`, on the resized image, with one cell
    for each merged patch."""
    function: str | None = None
    """Own function in place of `kind`, written `module:function`: `(image, rng)`, a PIL picture in RGB and a
    numpy.random.RandomState, gives a picture of the same size in RGB. See docs/guides/plug_ins.md."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if self.align == "patches" and self.kind != "cells":
            raise ValueError(f"perception.mask.align=patches works with kind=cells, not {self.kind}")
        if self.function is not None and (self.kind != "cells" or self.align != "raw"):
            raise ValueError("perception.mask.function takes the place of kind and align; leave them out")
        return self


class GuardConfig(Section):
    """Watches for collapse of the perception term and acts before reward falls."""

    action: Annotated[Literal["off", "lower", "stop"], NoAsOff] = "off"
    """What the guard does: nothing, multiply the perception coefficient by `factor`, or save and stop the run."""
    perception_kl: Positive = 1.0
    """A mean perception KL above this, in nats a token, is a sign of collapse."""
    clip_fraction: Positive = 0.007
    """A fraction of tokens with a clipped ratio above this, whatever the sign of their advantage, is a sign of
    collapse."""
    masked_entropy: Positive = 1.1
    """A mean entropy with the image masked above this, in nats a token, is a sign of collapse."""
    patience: Count = 3
    """Steps in a row that must show a sign before the guard acts."""
    factor: Fraction = 0.5
    """`action: lower` multiplies the perception coefficient by this. It leaves the entropy terms, which counter
    collapse."""

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
    """How the log-probs of the masked view are computed. `frozen`: once per rollout batch, without gradient; `joint`:
    in each update, with gradient through both views."""
    kl: Literal["k3", "full"] = "k3"
    """How the perception KL is computed: `k3`, the one-sample estimate, or `full`, the exact KL over the vocabulary
    (joint only)."""
    mask: MaskConfig = MaskConfig()
    clamp: Positive | None = None
    """Upper bound of the per-token perception KL in the loss (0.2 counters collapse); null: only the bound of k3
    itself, +-10."""
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Fraction of each response's tokens, those of the highest KL, that the perception term reads."""
    coef_end: NonNegative | None = None
    """Value to which loss.perception_coef moves linearly in `coef_steps` steps; null: it stays. Both entropy
    coefficients follow it as in the reference code: they are multiplied by the coefficient's share of the larger of its
    two ends."""
    coef_steps: Count | None = None
    """Number of steps in which loss.perception_coef reaches coef_end."""
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _check(self) -> PerceptionConfig:
        if (self.coef_end is None) != (self.coef_steps is None):
            raise ValueError("perception.coef_end and perception.coef_steps go together")
        return self
