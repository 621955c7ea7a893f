"""How far two parties may be apart: the settings' limits, else what the less precise of the two allows.

Where the defaults come from stands in docs/certificate.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.generation.reading import ANGLES, PIXELS, Precision

_ORDER: tuple[Precision, ...] = ("float32", "bfloat16", "fp8")

_VALUES = {"float32": 1e-3, "bfloat16": 1e-2}
"""Pixels, cosines and sines, largest difference, by the type they are held in."""
_LAYERS = {"float32": 1e-3, "bfloat16": 0.1, "fp8": 0.5}
_LOGPROBS_MEAN = {"float32": 1e-4, "bfloat16": 0.06}
_LOGPROBS_MAX = {"float32": 1e-3, "bfloat16": 0.6}
_FP8_MAX = 10.0
"""Times fp8.gap_limit, which bounds the mean."""


@dataclass(frozen=True)
class Limits:
    config: Config

    def of_values(self, kind: str, one: Tensor, other: Tensor) -> float:
        """Of pixels and angles."""
        assert kind in (PIXELS, ANGLES)
        asked = self.config.certify.limits.pixel_values if kind == PIXELS else None
        coarse = any(values.dtype != torch.float32 for values in (one, other))
        return asked or _VALUES["bfloat16" if coarse else "float32"]

    def of_layers(self, precision: Precision) -> float:
        """Of image features and hidden states."""
        return self.config.certify.limits.features or _LAYERS[precision]

    def of_logprobs(self, precision: Precision) -> tuple[float, float]:
        """(mean, largest), nats."""
        asked = self.config.certify.limits
        if precision == "fp8":
            mean = self.config.fp8.gap_limit
            largest = _FP8_MAX * mean
        else:
            mean, largest = _LOGPROBS_MEAN[precision], _LOGPROBS_MAX[precision]
        return asked.logprobs_mean or mean, asked.logprobs_max or largest


def coarser(one: Precision, other: Precision) -> Precision:
    return max(one, other, key=_ORDER.index)
