"""The section `certify`: when trainer and engine are compared, on how much, and how far apart they may be."""

from __future__ import annotations

from pydantic import Field

from megatron_papo.config.basics import Count, Positive, Section


class LimitsConfig(Section):
    """Largest differences; token ids and position ids must be equal. null: what model.dtype, fp8.recipe and the
    engine's precision allow (docs/certificate.md)."""

    pixel_values: Positive | None = None
    """Normalised pixels, largest absolute difference."""
    features: Positive | None = None
    """Image features and hidden states, difference relative to a token's root mean square, mean over tokens; a single
    token may differ ten times as much."""
    logprobs_mean: Positive | None = None
    """Log-probs, mean absolute difference, nats a token."""
    logprobs_max: Positive | None = None
    """Log-probs, largest absolute difference, nats."""


class CertifyConfig(Section):
    at_start: bool = True
    """`papo train` compares Hugging Face, trainer and engine before its first step, and does not start beyond a
    limit."""
    after_hand_over: bool = True
    """It compares trainer and engine after every weight hand-over, and stops beyond a limit."""
    prompts: Count = 2
    """Prompts, the first of the data with images."""
    tokens: Count = 16
    """Response tokens of each."""
    huggingface: bool = True
    """At the start Hugging Face too: one more copy of the model in the host memory of one rank."""
    limits: LimitsConfig = Field(default=LimitsConfig())
