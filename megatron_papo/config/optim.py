"""The section `optim`: Adam, its learning rates and their schedule, and which updates are skipped."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_papo.config.basics import Count, Fraction, NonNegative, Positive, Section


class OptimConfig(Section):
    lr: Positive = 1e-6
    """Learning rate of the language model, and of the other parts unless they have their own."""
    lr_vision: Positive | None = None
    """Learning rate of the vision tower without its projector; null: optim.lr."""
    lr_projector: Positive | None = None
    """Learning rate of the projector; null: optim.lr."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up: not at all, linearly, or along half a cosine. It reaches its end
    at the first update that the run does not make. Of N updates u = 1..N, with W of warm-up and W' = max(W, 1), the
    part of the way at update u is (u - W') / (N + 1 - W'), so every update of the run moves the weights."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up: the learning rate of update u is u / warmup_steps of the full one, never 0."""
    min_lr_fraction: Fraction = 0.0
    """Where the schedule ends, as a fraction of the learning rate: the rate that the update after the last would
    have."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay (AdamW); biases and norms have none."""
    beta1: Fraction = 0.9
    """Adam's beta1: how much of the running mean of gradients is kept at each update."""
    beta2: Fraction = 0.999
    """Adam's beta2: how much of the running mean of squared gradients is kept at each update."""
    eps: Positive = 1e-8
    """Adam's epsilon: added to the denominator of each update."""
    clip_grad: NonNegative = 1.0
    """Largest norm of the gradient over all parameters: a larger gradient is scaled down to it; 0: no clipping."""
    spike_factor: Annotated[float, Field(gt=1.0)] | None = None
    """An update whose gradient norm exceeds this many times the median of the last 32 norms is skipped; null: none is
    skipped for its size. One whose gradient, loss or log-probs (also the engine's) are not finite is always skipped,
    with a warning that says which."""
    max_skipped: Count = 8
    """Number of skipped updates in a row that stops the run."""
    precision_aware: bool = False
    """Whether Adam's moments are kept in bfloat16. Needs a GPU, Transformer Engine and
    parallel.distributed_optimizer."""
    offload_fraction: Fraction = 0.0
    """Share of the optimizer's state and work that is moved to the host's CPU, where it uses this rank's share of the
    cores. Needs parallel.distributed_optimizer and bfloat16."""
