"""The section `optim`: Adam, learning rates and their schedule, and which updates are skipped."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_papo.config.basics import Count, Fraction, NonNegative, Positive, Section


class OptimConfig(Section):
    lr: Positive = 1e-6
    """Learning rate."""
    lr_vision: Positive | None = None
    """Of the vision tower without its projector; null: `lr`."""
    lr_projector: Positive | None = None
    """Of the projector; null: `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up: not, linearly or along half a cosine, to its end at the first update that
    the run does not make. Of N updates u = 1..N with W of warm-up and W' = max(W, 1) the part that has been walked is
    (u - W') / (N + 1 - W'): every update of the run moves the weights."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up: the rate of update u is u / warmup_steps of the whole one, never 0."""
    min_lr_fraction: Fraction = 0.0
    """Where the schedule ends, as a fraction of the rate: what the update after the last would have."""
    weight_decay: NonNegative = 0.01
    """Decoupled; none on biases and norms."""
    beta1: Fraction = 0.9
    """Adam's."""
    beta2: Fraction = 0.999
    """Adam's."""
    eps: Positive = 1e-8
    """Adam's."""
    clip_grad: NonNegative = 1.0
    """0: no clipping."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    """An update whose gradient norm exceeds this many times the median of the last 32 is skipped; one whose gradient,
    loss or log-probs (the engine's too) are not finite always is, with a warning that says which."""
    max_skipped: Count = 8
    """Skipped updates in a row that stop the run."""
    precision_aware: bool = False
    """Adam's moments in bfloat16. Needs a GPU, Transformer Engine and parallel.distributed_optimizer."""
    offload_fraction: Fraction = 0.0
    """Share of the optimizer's state and work that lies on the host's CPU, where it takes this rank's share of the
    cores. Needs parallel.distributed_optimizer and bfloat16."""
