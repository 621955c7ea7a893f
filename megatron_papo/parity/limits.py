"""How far two parties may be apart: the settings' limits, else what the less precise of the two allows.

Where the defaults come from stands in docs/certificate.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.parity.reading import ANGLES, PIXELS, Precision

_ORDER: tuple[Precision, ...] = ("float32", "bfloat16", "fp8")

_VALUES = {"float32": 1e-3, "bfloat16": 1e-2}
"""Pixels, cosines and sines, largest difference, by the type they are held in."""
_LAYERS = {"float32": 1e-4, "bfloat16": 0.05, "fp8": 0.25}
"""Of a token's root mean square, mean over tokens, by the less precise party."""
_ONE_TOKEN = 10.0
"""Times the mean, for a single token."""
_LOGPROBS_MEAN = {"float32": 1e-4, "bfloat16": 0.08}
_LOGPROBS_MAX = {"float32": 1e-3, "bfloat16": 0.8}


@dataclass(frozen=True)
class Limits:
    config: Config

    def of_values(self, kind: str, one: Tensor, other: Tensor) -> float:
        """Of pixels and angles."""
        assert kind in (PIXELS, ANGLES)
        asked = self.config.certify.limits.pixel_values if kind == PIXELS else None
        coarse = any(values.dtype != torch.float32 for values in (one, other))
        return asked or _VALUES["bfloat16" if coarse else "float32"]

    def of_layers(self, precision: Precision) -> tuple[float, float]:
        """(mean over tokens, of a single one) for image features and hidden states."""
        mean = self.config.certify.limits.features or _LAYERS[precision]
        return mean, _ONE_TOKEN * mean

    def of_logprobs(self, precision: Precision) -> tuple[float, float]:
        """(mean, largest), nats."""
        asked = self.config.certify.limits
        if precision == "fp8":
            mean = self.config.fp8.gap_limit + _LOGPROBS_MEAN["bfloat16"]
            largest = _ONE_TOKEN * mean
        else:
            mean, largest = _LOGPROBS_MEAN[precision], _LOGPROBS_MAX[precision]
        return asked.logprobs_mean or mean, asked.logprobs_max or largest


def coarser(one: Precision, other: Precision) -> Precision:
    return max(one, other, key=_ORDER.index)
