"""Log-probs, entropy and exact KL of response tokens, from hidden states and one rank's shard of the vocabulary.

Only rows that a loss reads come in, and only the logits of one chunk of rows are alive at a time: backward computes
them again from the saved normalisers, with no further collective. Everything is reduced over the tensor-parallel
group, so that every rank holds the full, equal result and computes the same loss from it; hence the reductions'
backward is the identity. The gradient of `hidden` is this shard's part of it: the caller sums it over the group
(Megatron's `copy_to_tensor_model_parallel_region` in front of the head does).

Leaves out: a fused kernel. Logits are fp32 even from bf16 inputs, where Hugging Face and most engines round them.
Suffixes: R response tokens, C those of a chunk, V words of this shard, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

FORBIDDEN = -1e30
"""Logit of a word that cannot be said: exp gives exactly 0, and 0 times it is 0, where 0 times -inf is NaN."""


def vocab_parallel_logprobs(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    target_ids_R: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    banned_ids: tuple[int, ...],
    temperature: float,
    entropy: bool,
    chunk: int = 4096,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target and, with `entropy`, the entropy over the whole vocabulary.

    hidden_RH: [R, H], equal on every rank. weight_VH: [V, H], the words from `vocab_start` on; rows at or beyond
    `vocab_size` are padding. Banned words and padding have probability 0. Logits are divided by `temperature`.
    Returns two [R] in nats, fp32 (fp64 for fp64 inputs). Raises ValueError for a target that is banned or no word.
    """
    _check_targets(target_ids_R, vocab_size, banned_ids)
    shard = _Shard.of(weight_VH, group, vocab_start, vocab_size, banned_ids, temperature, chunk)
    logprobs_R, entropy_R = _Logprobs.apply(hidden_RH, weight_VH, target_ids_R, shard, entropy)
    return logprobs_R, entropy_R if entropy else None


def vocab_parallel_kl(
    hidden_RH: Tensor,
    masked_hidden_RH: Tensor,
    weight_VH: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    banned_ids: tuple[int, ...],
    temperature: float,
    chunk: int = 4096,
) -> Tensor:
    """KL(policy || masked policy) over the whole vocabulary, [R] nats; arguments as of `vocab_parallel_logprobs`."""
    assert hidden_RH.shape == masked_hidden_RH.shape
    shard = _Shard.of(weight_VH, group, vocab_start, vocab_size, banned_ids, temperature, chunk)
    return _KL.apply(hidden_RH, masked_hidden_RH, weight_VH, shard)


def _check_targets(target_ids_R: Tensor, vocab_size: int, banned_ids: tuple[int, ...]) -> None:
    banned = torch.tensor(banned_ids, dtype=target_ids_R.dtype, device=target_ids_R.device)
    wrong_R = (target_ids_R < 0) | (target_ids_R >= vocab_size) | torch.isin(target_ids_R, banned)
    if wrong_R.any():
        ids = sorted(set(target_ids_R[wrong_R].tolist()))
        raise ValueError(
            f"token ids {ids[:8]} are in a response, but are banned or outside a vocabulary of {vocab_size}"
        )


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the vocabulary and how to reduce over the others."""

    group: dist.ProcessGroup | None
    start: int
    forbidden_V: Tensor
    temperature: float
    chunk: int

    @classmethod
    def of(
        cls, weight_VH: Tensor, group: dist.ProcessGroup | None, start: int, vocab_size: int,
        banned_ids: tuple[int, ...], temperature: float, chunk: int,
    ) -> _Shard:  # fmt: skip
        assert temperature > 0 and chunk > 0
        num_words = weight_VH.shape[0]
        forbidden_V = torch.arange(start, start + num_words, device=weight_VH.device) >= vocab_size
        forbidden_V[[word - start for word in banned_ids if start <= word < start + num_words]] = True
        alone = group is None or dist.get_world_size(group) == 1
        return cls(None if alone else group, start, forbidden_V, temperature, chunk)

    def chunks(self, num_rows: int) -> Iterator[slice]:
        return (slice(first, first + self.chunk) for first in range(0, num_rows, self.chunk))

    def reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, op, group=self.group)
        return tensor

    def logits(self, hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
        logits_CV = _wide_matmul(hidden_CH, weight_VH.T).div_(self.temperature)
        return logits_CV.masked_fill_(self.forbidden_V, FORBIDDEN)

    def log_normaliser(self, logits_CV: Tensor) -> Tensor:
        """[C] log of the sum of exp over the whole vocabulary."""
        max_C = self.reduce(logits_CV.amax(-1), dist.ReduceOp.MAX)
        return max_C + self.reduce((logits_CV - max_C[:, None]).exp_().sum(-1)).log()

    def target_places(self, target_ids_C: Tensor) -> tuple[Tensor, Tensor]:
        """Column of each target in this shard (any, when it is not here) and whether it is here."""
        place_C = target_ids_C - self.start
        here_C = (place_C >= 0) & (place_C < self.forbidden_V.numel())
        return place_C.where(here_C, 0)[:, None], here_C[:, None]


class _Logprobs(torch.autograd.Function):
    """For logits z with p = softmax(z): dlogp_t/dz_j = 1[j = t] - p_j and dH/dz_j = -p_j (log p_j + H)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, target_ids_R: Tensor, shard: _Shard, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        num_rows = hidden_RH.shape[0]
        normaliser_R, logprobs_R, entropy_R = _three_zeros(hidden_RH)
        for rows in shard.chunks(num_rows):
            logits_CV = shard.logits(hidden_RH[rows], weight_VH)
            normaliser_R[rows] = shard.log_normaliser(logits_CV)
            logprobs_CV = logits_CV.sub_(normaliser_R[rows, None])
            place_C1, here_C1 = shard.target_places(target_ids_R[rows])
            sums_2C = logprobs_CV.new_zeros(2, logprobs_CV.shape[0])
            sums_2C[0] = logprobs_CV.gather(1, place_C1).where(here_C1, 0)[:, 0]
            if entropy:
                sums_2C[1] = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
            logprobs_R[rows], entropy_R[rows] = shard.reduce(sums_2C)
        ctx.save_for_backward(hidden_RH, weight_VH, target_ids_R, normaliser_R, entropy_R)
        ctx.shard, ctx.entropy = shard, entropy
        return logprobs_R, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs_R: Tensor, grad_entropy_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RH, weight_VH, target_ids_R, normaliser_R, entropy_R = ctx.saved_tensors
        shard: _Shard = ctx.shard
        grads = _Gradients(weight_VH, [hidden_RH], ctx.needs_input_grad[1])
        for rows in shard.chunks(hidden_RH.shape[0]):
            logprobs_CV = shard.logits(hidden_RH[rows], weight_VH).sub_(normaliser_R[rows, None])
            grad_CV = logprobs_CV.exp()
            upstream_C1 = grad_logprobs_R[rows, None]
            if ctx.entropy:
                pull_CV = logprobs_CV.add_(entropy_R[rows, None]).mul_(grad_entropy_R[rows, None])
                grad_CV.mul_(pull_CV.add_(upstream_C1)).neg_()
            else:
                grad_CV.mul_(-upstream_C1)
            place_C1, here_C1 = shard.target_places(target_ids_R[rows])
            grad_CV.scatter_add_(1, place_C1, upstream_C1.where(here_C1, 0))
            grads.add(0, rows, grad_CV.div_(shard.temperature), hidden_RH)
        return grads.hidden[0], grads.weight, None, None, None


class _KL(torch.autograd.Function):
    """For p = softmax(z), q = softmax(y): dKL/dz_j = p_j (log p_j - log q_j - KL) and dKL/dy_j = q_j - p_j."""

    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, masked_RH: Tensor, weight_VH: Tensor, shard: _Shard) -> Tensor:
        num_rows = hidden_RH.shape[0]
        p_norm_R, q_norm_R, kl_R = _three_zeros(hidden_RH)
        for rows in shard.chunks(num_rows):
            logp_CV, logq_CV = (shard.logits(hidden[rows], weight_VH) for hidden in (hidden_RH, masked_RH))
            p_norm_R[rows], q_norm_R[rows] = shard.log_normaliser(logp_CV), shard.log_normaliser(logq_CV)
            logp_CV.sub_(p_norm_R[rows, None])
            logq_CV.sub_(q_norm_R[rows, None])
            # sum of p (log p - log q) + q - p: the added terms sum to 0 and keep every summand >= 0
            p_CV = logp_CV.exp()
            kl_R[rows] = shard.reduce((p_CV * (logp_CV - logq_CV) + logq_CV.exp() - p_CV).sum(-1))
        ctx.save_for_backward(hidden_RH, masked_RH, weight_VH, p_norm_R, q_norm_R, kl_R)
        ctx.shard = shard
        return kl_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RH, masked_RH, weight_VH, p_norm_R, q_norm_R, kl_R = ctx.saved_tensors
        shard: _Shard = ctx.shard
        grads = _Gradients(weight_VH, [hidden_RH, masked_RH], ctx.needs_input_grad[2])
        for rows in shard.chunks(hidden_RH.shape[0]):
            logp_CV = shard.logits(hidden_RH[rows], weight_VH).sub_(p_norm_R[rows, None])
            logq_CV = shard.logits(masked_RH[rows], weight_VH).sub_(q_norm_R[rows, None])
            upstream_C1 = grad_kl_R[rows, None] / shard.temperature
            p_CV = logp_CV.exp()
            logp_CV.sub_(logq_CV).sub_(kl_R[rows, None]).mul_(p_CV).mul_(upstream_C1)
            logq_CV.exp_().sub_(p_CV).mul_(upstream_C1)
            grads.add(0, rows, logp_CV, hidden_RH)
            grads.add(1, rows, logq_CV, masked_RH)
        return *grads.hidden, grads.weight, None


class _Gradients:
    """Sums of the chunks' gradients: each hidden state's rows, and the shard's weight in fp32 until the end."""

    def __init__(self, weight_VH: Tensor, hidden: list[Tensor], weight_needed: bool):
        self._weight_VH = weight_VH
        self._sum_VH = torch.zeros_like(weight_VH, dtype=_wide(weight_VH.dtype)) if weight_needed else None
        self.hidden = [torch.zeros_like(hidden_RH) for hidden_RH in hidden]

    def add(self, which: int, rows: slice, grad_CV: Tensor, hidden_RH: Tensor) -> None:
        grad_CV = grad_CV.to(self._weight_VH.dtype)
        self.hidden[which][rows] = _wide_matmul(grad_CV, self._weight_VH).to(hidden_RH.dtype)
        if self._sum_VH is not None:
            self._sum_VH += _wide_matmul(grad_CV.T, hidden_RH[rows])

    @property
    def weight(self) -> Tensor | None:
        return None if self._sum_VH is None else self._sum_VH.to(self._weight_VH.dtype)


def _three_zeros(hidden_RH: Tensor) -> list[Tensor]:
    return [hidden_RH.new_zeros(hidden_RH.shape[0], dtype=_wide(hidden_RH.dtype)) for _ in range(3)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _wide_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in fp32 or wider; on a GPU without widening the operands."""
    if a.is_cuda and _wide(a.dtype) != a.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(_wide(a.dtype)) @ b.to(_wide(b.dtype))
