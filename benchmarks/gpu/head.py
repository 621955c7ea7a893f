"""The vocabulary-parallel head against logits made whole and against Liger's fused head: time and memory.

At the 3B model's width and vocabulary in bfloat16; the log-probs of all response tokens, summed, and the gradients of
hidden states and weight. Ours is the tiled head (Triton's kernels on a GPU); `whole logits` is log_softmax of all
logits in fp32; Liger's linear cross-entropy is measured where `liger_kernel` is installed, and makes its gradients in
the forward pass. The values are compared first. Peaks are beyond inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import held, in_turns, peak_row, peaks
from benchmarks.gpu.rows import GpuRow, Options, attempt, compared, not_measured, reason_of, release
from benchmarks.timing import Seconds
from megatron_papo.distributed.accelerator import device, has_gpu, parameter_dtype
from megatron_papo.logprobs import vocab_parallel_head

_TINY = (64, 2048, (128, 256))
SIZES = {
    "3b": (2048, 151_936, (4096, 16_384)), "4b": (2560, 151_936, (4096, 16_384)), "tiny": _TINY, "tiny-qwen3": _TINY,
}  # fmt: skip
"""Hidden size, vocabulary, response tokens."""
_QUICK_TOKENS = 1
_CLOSE = {True: 2e-2, False: 1e-4}
"""Relative, of the summed log-probs: logits in bfloat16 where a baseline rounds them, with a GPU; fp32 without."""

Inputs = tuple[Tensor, Tensor, Tensor]


def run(options: Options) -> Iterator[GpuRow]:
    hidden, vocab, tokens = SIZES[options.shape]
    for num_tokens in tokens[:_QUICK_TOKENS] if options.quick else tokens:
        yield from attempt(f"{num_tokens} tokens", partial(_rows, options, num_tokens, hidden, vocab))
    if importlib.util.find_spec("liger_kernel") is None:
        yield not_measured("against Liger", "liger_kernel is not installed")


def _rows(options: Options, num_tokens: int, hidden: int, vocab: int) -> Iterator[GpuRow]:
    inputs = _inputs(num_tokens, hidden, vocab)
    sums, failed = _values(inputs)
    for name, reason in failed.items():
        yield not_measured(f"{num_tokens} tokens: {name}", reason)
    for name in sums:
        if abs(sums[name] / sums["ours"] - 1) > _CLOSE[has_gpu()]:
            yield not_measured(f"{num_tokens} tokens: {name}", f"its sum is {sums[name]:.6g}, ours {sums['ours']:.6g}")
            failed[name] = "wrong"
    names = [name for name in sums if name not in failed]
    forward = in_turns({name: partial(_forward, name, inputs) for name in names}, options.rounds, "head, forward")
    whole = {name: partial(_backward, name, inputs) for name in names}
    both = in_turns(whole, options.rounds, "head, forward and backward")
    for leaf in inputs[:2]:
        leaf.grad = None
    most = peaks(whole, besides=held())
    for name in names[1:]:
        what = f"{num_tokens} tokens"
        yield _time_row(f"{what}: forward, ours / {name}", forward, name)
        yield _time_row(f"{what}: forward and backward, ours / {name}", both, name)
        yield peak_row(most, f"{what}: peak memory, ours / {name}", "ours", name)


def _inputs(num_tokens: int, hidden: int, vocab: int) -> Inputs:
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": device(), "dtype": parameter_dtype("auto")}
    hidden_RH = torch.randn(num_tokens, hidden, **place).requires_grad_()
    weight_VH = torch.empty(vocab, hidden, **place).normal_(std=hidden**-0.5).requires_grad_()
    return hidden_RH, weight_VH, torch.randint(vocab, (num_tokens,), device=device())


def _values(inputs: Inputs) -> tuple[dict[str, float], dict[str, str]]:
    """Summed log-probs of every side, and why a side has none. Raises what ours raises."""
    sums, failed = {"ours": float(_ours(*inputs).detach())}, {}
    for name, side in _sides().items():
        if name != "ours":
            try:
                sums[name] = float(side(*inputs).detach())
            except Exception as error:  # of a baseline: the others are measured
                failed[name] = reason_of(error)
            release()
    return sums, failed


def _sides() -> dict[str, Callable[..., Tensor]]:
    own: dict[str, Callable[..., Tensor]] = {"ours": _ours, "whole logits": _whole_logits}
    return own | ({"Liger": _liger} if importlib.util.find_spec("liger_kernel") is not None else {})


def _ours(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    values = vocab_parallel_head(
        hidden_RH, None, weight_VH, targets_R, group=None, vocab_start=0, vocab_size=len(weight_VH), banned_ids=(),
        temperature=1.0, entropy=False, kl=False,
    )  # fmt: skip
    return values.logprobs_R.sum()


def _whole_logits(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    return F.log_softmax((hidden_RH @ weight_VH.T).float(), -1).gather(1, targets_R[:, None]).sum()


def _liger(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="sum")(weight_VH, hidden_RH, targets_R)


def _forward(name: str, inputs: Inputs) -> None:
    """Keeps what a backward would need."""
    _sides()[name](*inputs)


def _backward(name: str, inputs: Inputs) -> None:
    for leaf in inputs[:2]:
        leaf.grad = None
    _sides()[name](*inputs).backward()


def _time_row(name: str, seconds: Seconds, other: str) -> GpuRow:
    row = compared(name, 1e3 * seconds.median("ours"), 1e3 * seconds.median(other), "ms")
    return GpuRow(row.name, row.value, row.unit, row.baseline, seconds.ratio("ours", other))
