"""How far two parties may be apart: the limits of the settings, else those of the less precise of the two.

Where the defaults come from stands in docs/certificate.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.generation.readings import Precision
from megatron_papo.model.observed import ANGLES, PIXELS

_ORDER: tuple[Precision, ...] = ("float32", "bfloat16", "fp8")

_VALUES = {"float32": 1e-3, "bfloat16": 1e-2}
"""Largest difference of pixels, cosines and sines, by their type."""
_LAYERS = {"float32": 1e-4, "bfloat16": 0.05, "fp8": 0.25}
"""Mean over tokens of the difference as a part of a token's root mean square, by the less precise party."""
_ONE_TOKEN = 10.0
"""How many times the mean's limit a single token may differ by."""
_LOGPROBS_MEAN = {"float32": 1e-4, "bfloat16": 0.08}
_LOGPROBS_MAX = {"float32": 1e-3, "bfloat16": 0.8}


@dataclass(frozen=True)
class Limits:
    """The limits of one run's settings."""

    config: Config

    def of_values(self, kind: str, one: Tensor, other: Tensor) -> float:
        """The largest difference of pixels or angles."""
        assert kind in (PIXELS, ANGLES)
        setting = self.config.certify.limits.pixel_values if kind == PIXELS else None
        coarse = any(values.dtype != torch.float32 for values in (one, other))
        return setting or _VALUES["bfloat16" if coarse else "float32"]

    def of_layers(self, precision: Precision) -> tuple[float, float]:
        """(mean over tokens, largest) of image features and hidden states, as parts of a token's root mean square."""
        mean = self.config.certify.limits.features or _LAYERS[precision]
        return mean, _ONE_TOKEN * mean

    def of_logprobs(self, precision: Precision) -> tuple[float, float]:
        """(mean, largest) of log-probs, in nats."""
        limits = self.config.certify.limits
        if precision == "fp8":
            mean = self.config.fp8.gap_limit + _LOGPROBS_MEAN["bfloat16"]
            largest = _ONE_TOKEN * mean
        else:
            mean, largest = _LOGPROBS_MEAN[precision], _LOGPROBS_MAX[precision]
        return limits.logprobs_mean or mean, limits.logprobs_max or largest


def coarser(one: Precision, other: Precision) -> Precision:
    """The less precise of the two."""
    return max(one, other, key=_ORDER.index)
