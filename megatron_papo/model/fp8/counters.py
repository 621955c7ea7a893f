"""Counts what FP8 does to the inputs of its linear layers during a forward pass.

Hooks do the counting, in the same way for Transformer Engine's layers and for emulated ones. Left out: weights, whose
range is narrow, and gradients, since a pass that only scores has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_papo.distributed.exchange import larger
from megatron_papo.distributed.layout import layout
from megatron_papo.model.fp8.rounding import BLOCKS, E4M3, e8m0_scale, float_scale, largest, round_rows, rounded
from megatron_papo.model.policy import VisionLanguageModel


@dataclass
class Counters:
    """Counts over all values that the linear layers of this rank read. A maximum over values with a NaN is NaN."""

    amax: float = 0.0
    """Largest magnitude of the values."""
    num_values: int = 0
    num_saturated: int = 0
    """Values that their scale puts beyond the range of the format. Only `delayed` has them: its scales come from
    earlier micro-batches."""
    num_flushed: int = 0
    """Values that are not zero and are rounded to zero."""
    padding_amax: float = 0.0
    """Largest magnitude in the padding of the language model; it must be zero."""


@contextmanager
def counted(policy: VisionLanguageModel, num_tokens: int) -> Iterator[Counters]:
    """Gives the counters of what `policy` computes within the block, where it scores rows of `num_tokens` tokens in
    FP8."""
    counters = Counters()
    with ExitStack() as stack:
        for name, linear in policy.fp8.linears.items():
            column = name.endswith(("qkv", "fc1"))
            if column and not policy.config.sequence_parallel and layout().tensor_rank:
                continue  # this layer reads what the first tensor rank reads, where it is counted
            places = policy.language.num_padding, num_tokens if name.startswith("language") else None
            hook = partial(count_inputs, counters=counters, recipe=policy.fp8.settings.recipe, places=places)
            stack.callback(linear.register_forward_pre_hook(hook).remove)
        yield counters


@torch.no_grad()
def count_inputs(linear: Any, inputs: tuple[Tensor, ...], *, counters: Counters, recipe: str, places: Any) -> None:
    """A forward hook: adds the inputs of `linear` to `counters`. `places` is a function from the tokens of a row to its
    padding, and the number of tokens of the row, or None where the padding is not told apart."""
    values_TC = _as_rounded(linear, inputs[0]).flatten(0, -2)
    num_padding, num_tokens = places
    if num_tokens is not None:
        values_TC, padding_TC = _apart(values_TC, num_tokens, num_padding(num_tokens))
        counters.padding_amax = larger(counters.padding_amax, float(largest(padding_TC)))
    amax, scale = largest(values_TC), _delayed_scale(linear) if recipe == "delayed" else None
    if scale is not None:
        counters.num_saturated += int((values_TC.abs() * scale > torch.finfo(E4M3).max).sum())
        rounded_TC = rounded(values_TC, scale, E4M3)
    elif recipe in BLOCKS:
        scale_of = e8m0_scale if recipe == "mxfp8" else float_scale
        rounded_TC = round_rows(values_TC, BLOCKS[recipe], scale_of, E4M3)
    else:
        rounded_TC = rounded(values_TC, float_scale(amax, E4M3), E4M3)
    counters.amax = larger(counters.amax, float(amax))
    counters.num_flushed += int(((rounded_TC == 0) & (values_TC != 0)).sum())
    counters.num_values += values_TC.numel()


def _as_rounded(linear: Any, values: Tensor) -> Tensor:
    """The values that `linear` rounds. Where Transformer Engine fuses a norm, of the kind without bias, into a linear
    layer, it rounds the norm's output."""
    weight = linear._parameters.get("layer_norm_weight")
    return values if weight is None else F.rms_norm(values, values.shape[-1:], weight, linear.eps)


def _delayed_scale(linear: nn.Module) -> Tensor:
    operands = linear.__dict__.get("operands")
    if operands is not None:
        return operands.histories["input"].scale
    scales: Any = linear.fp8_meta
    return scales["scaling_fwd"].scale[0]


def _apart(values_TC: Tensor, num_tokens: int, num_padding: int) -> tuple[Tensor, Tensor]:
    """The tokens of a row and the padding after them. `values_TC` has the whole row, or this tensor rank's share of
    it."""
    ranks, first = layout(), 0
    if values_TC.shape[0] != num_tokens + num_padding:
        assert values_TC.shape[0] * ranks.tensor_size == num_tokens + num_padding
        first = ranks.tensor_rank * values_TC.shape[0]
    end = max(num_tokens - first, 0)
    return values_TC[:end], values_TC[end:]
