"""Attention of one block of places, forward and backward, with the log-sum-exp that lets blocks be merged.

Queries that see several runs of keys attend to each run separately; the outputs are then weighted by their log-sum-exp
(`merge`). Backward needs no merging: given the final output and log-sum-exp, the backward of each run computes exactly
its share of the gradients, since both belong to the softmax over all keys (Ring Attention, arXiv 2310.01889).
On the CPU the kernel is torch's flash attention. On a GPU it is variable-length flash attention in half precision
(`varlen.py`, a whole row at once) and plain torch in fp32, a slice of queries at a time.
Suffixes: B sequences, N heads, G key-value heads, Q queries, K keys, D values of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCORES = 1 << 24
"""About the largest number of scores that plain torch computes at a time."""


def attend(q_BNQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention's output [B, N, Q, D] and log-sum-exp [B, N, Q]. `causal` needs as many keys as queries."""
    if q_BNQD.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNQD, k_BGKD, v_BGKD, 0.0, causal, scale=scale
        )
    return plain_attend(q_BNQD, k_BGKD, v_BGKD, causal=causal, scale=scale)


def attend_backward(
    grad_BNQD: Tensor, q_BNQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, out_BNQD: Tensor, lse_BNQ: Tensor,
    *, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values. `out` and `lse` may be the results over more keys than these."""
    if q_BNQD.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BNQD, q_BNQD, k_BGKD, v_BGKD, out_BNQD, lse_BNQ, 0.0, causal, scale=scale
        )
    tensors = (grad_BNQD, q_BNQD, k_BGKD, v_BGKD, out_BNQD, lse_BNQ)
    return plain_attend_backward(*tensors, causal=causal, scale=scale)


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over two sets of keys, from those over each set: outputs [..., D], log-sum-exps [...]."""
    both = torch.logaddexp(lse, more_lse)
    own, more = ((part - both).exp()[..., None] for part in (lse, more_lse))
    return (own * out + more * more_out).to(out.dtype), both


def plain_attend(
    q_BNQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same as `attend`, in plain torch."""
    out_BNQD, lse_BNQ = torch.empty_like(q_BNQD), q_BNQD.new_empty(q_BNQD.shape[:-1])
    k_BNKD, v_BNKD = (_for_every_head(tensor, q_BNQD) for tensor in (k_BGKD, v_BGKD))
    for rows in _slices(q_BNQD, k_BGKD):
        scores = _scores(q_BNQD, k_BNKD, rows, causal, scale)
        lse_BNQ[:, :, rows] = scores.logsumexp(-1)
        out_BNQD[:, :, rows] = (scores - lse_BNQ[:, :, rows, None]).exp() @ v_BNKD
    return out_BNQD, lse_BNQ


def plain_attend_backward(
    grad_BNQD: Tensor, q_BNQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, out_BNQD: Tensor, lse_BNQ: Tensor,
    *, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same as `attend_backward`, in plain torch: dS = P (dP - rowsum(dO O)), see FlashAttention, arXiv 2205.14135,
    appendix B."""
    k_BNKD, v_BNKD = (_for_every_head(tensor, q_BNQD) for tensor in (k_BGKD, v_BGKD))
    grad_q, grad_k, grad_v = torch.empty_like(q_BNQD), torch.zeros_like(k_BNKD), torch.zeros_like(v_BNKD)
    for rows in _slices(q_BNQD, k_BGKD):
        grad = grad_BNQD[:, :, rows]
        weights = (_scores(q_BNQD, k_BNKD, rows, causal, scale) - lse_BNQ[:, :, rows, None]).exp()
        grad_v += weights.transpose(-1, -2) @ grad
        pull = (grad * out_BNQD[:, :, rows]).sum(-1, keepdim=True)
        grad_scores = weights * (grad @ v_BNKD.transpose(-1, -2) - pull) * scale
        grad_q[:, :, rows] = grad_scores @ k_BNKD
        grad_k += grad_scores.transpose(-1, -2) @ q_BNQD[:, :, rows]
    groups = (k_BGKD.shape[1], -1)
    return grad_q, grad_k.unflatten(1, groups).sum(2), grad_v.unflatten(1, groups).sum(2)


def _for_every_head(tensor_BGKD: Tensor, q_BNQD: Tensor) -> Tensor:
    return tensor_BGKD.repeat_interleave(q_BNQD.shape[1] // tensor_BGKD.shape[1], dim=1)


def _slices(q_BNQD: Tensor, k_BGKD: Tensor) -> list[slice]:
    num_scores = q_BNQD.shape[0] * q_BNQD.shape[1] * k_BGKD.shape[2]
    step = max(1, _SCORES // num_scores)
    return [slice(begin, begin + step) for begin in range(0, q_BNQD.shape[2], step)]


def _scores(q_BNQD: Tensor, k_BNKD: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    scores = q_BNQD[:, :, rows] @ k_BNKD.transpose(-1, -2) * scale
    if not causal:
        return scores
    query = torch.arange(q_BNQD.shape[2], device=scores.device)[rows, None]
    return scores.masked_fill(torch.arange(k_BNKD.shape[2], device=scores.device) > query, -torch.inf)
