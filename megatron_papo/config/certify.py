"""The section `certify`: when trainer and engine are compared, on how much, and how far apart they may be."""

from __future__ import annotations

from pydantic import Field

from megatron_papo.config.basics import Count, Positive, Section


class LimitsConfig(Section):
    """Largest differences; token ids and position ids must be equal. null: what model.dtype, fp8.recipe and the
    engine's precision allow (docs/certificate.md)."""

    pixel_values: Positive | None = None
    """Largest absolute difference of the normalised pixels."""
    features: Positive | None = None
    """Largest difference of image features and hidden states, relative to a token's root mean square, as the mean over
    tokens; a single token may differ ten times as much."""
    logprobs_mean: Positive | None = None
    """Largest mean absolute difference of log-probs, in nats a token."""
    logprobs_max: Positive | None = None
    """Largest absolute difference of a token's log-prob, in nats."""


class CertifyConfig(Section):
    at_start: bool = True
    """Whether `papo train` compares Hugging Face, trainer and engine before its first step; it does not start when a
    limit is exceeded."""
    after_hand_over: bool = True
    """Whether trainer and engine are compared after every weight hand-over; the run stops when a limit is exceeded."""
    prompts: Count = 2
    """Number of prompts compared: the first of the data that have images."""
    tokens: Count = 16
    """Number of response tokens compared of each prompt."""
    huggingface: bool = True
    """Whether Hugging Face is compared too at the start; this takes one more copy of the model in the host memory of
    one rank."""
    limits: LimitsConfig = Field(default=LimitsConfig())
