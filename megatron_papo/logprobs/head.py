"""Log-probs, entropy and exact KL of response tokens, from hidden states and one rank's shard of the vocabulary.

Logits exist one tile at a time (`tiling.py`), so memory does not grow with the number of tokens. Forward sums over the
words tile by tile, then over the tensor-parallel group once. So every rank has the full, equal result and computes the
same loss from it, and the backward of these sums over ranks is the identity. Backward computes each tile again and
needs no collective. The gradient of a hidden state is this shard's part of it: the caller sums it over the group
(Megatron's `copy_to_tensor_model_parallel_region` in front of the head does).

Logits are fp32 even from bf16 inputs, where Hugging Face and most engines round them. Beside tiles, inputs and outputs
there are a few numbers for each row in memory and, for bf16 hidden states that need a gradient, its fp32 sum. Leaves
out: adding the weight's gradient to an accumulator of the optimizer directly. The recomputation is that of cut
cross-entropy (Wijmans et al. 2024), except that small gradients are not skipped: gradients are exact.
Suffixes: R response tokens, C rows of a tile, W its words, V words of this shard, H hidden size, N views of a row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_papo.logprobs import torch_tile
from megatron_papo.logprobs.gradients import Gradients, RowPulls
from megatron_papo.logprobs.sums import RowSums
from megatron_papo.logprobs.tiling import Task, tile_of, tiles, wide


class HeadValues(NamedTuple):
    """The results for R response tokens, [R] each, in nats, fp32 (fp64 for fp64 inputs); None where not requested."""

    logprobs_R: Tensor
    entropy_R: Tensor | None
    masked_logprobs_R: Tensor | None
    masked_entropy_R: Tensor | None
    kl_R: Tensor | None


def vocab_parallel_head(
    hidden_RH: Tensor,
    masked_hidden_RH: Tensor | None,
    weight_VH: Tensor,
    target_ids_R: Tensor,
    *,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int,
    banned_ids: tuple[int, ...],
    temperature: float,
    entropy: bool,
    kl: bool,
    tile: tuple[int, int] | None = None,
) -> HeadValues:
    """Log-prob of each target in one view or two. With `entropy` also the entropy of each view over the whole
    vocabulary, with `kl` also KL(policy || masked policy) over it.

    hidden_RH: [R, H] per view, equal on every rank. weight_VH: [V, H], the words from `vocab_start` on; rows from
    `vocab_size` on are padding. Banned words and padding have probability 0. Logits are divided by `temperature`.
    `tile`: rows and words of a tile, by default what suits the device. Targets must be words that are not banned;
    `check_targets` checks this while the ids are on the host.
    """
    assert temperature > 0 and not (kl and masked_hidden_RH is None)
    num_words = min(max(vocab_size - vocab_start, 0), weight_VH.shape[0])
    places = (word - vocab_start for word in banned_ids)
    task = Task(
        group=None if group is None or dist.get_world_size(group) == 1 else group,
        start=vocab_start,
        num_words=num_words,
        banned=tuple(sorted(place for place in places if 0 <= place < num_words)),
        temperature=temperature,
        entropy=entropy,
        kl=kl,
        tile=tile or tile_of(hidden_RH.device, hidden_RH.shape[0]),
    )
    return HeadValues(*_Head.apply(hidden_RH, masked_hidden_RH, weight_VH, target_ids_R, task))


def check_targets(target_ids_R: Tensor, vocab_size: int, banned_ids: tuple[int, ...]) -> None:
    """Raises ValueError for a target that is banned or outside the vocabulary. Waits for the device of the ids."""
    banned = torch.tensor(banned_ids, dtype=target_ids_R.dtype, device=target_ids_R.device)
    wrong_R = (target_ids_R < 0) | (target_ids_R >= vocab_size) | torch.isin(target_ids_R, banned)
    if wrong_R.any():
        ids = sorted(set(target_ids_R[wrong_R].tolist()))
        raise ValueError(
            f"token ids {ids[:8]} are in a response, but are banned or outside a vocabulary of {vocab_size}"
        )


def _kernels(like: Tensor) -> ModuleType:
    """The module whose `tile_sums` and `tile_gradients` suit inputs such as `like`. Triton is imported on CUDA only."""
    if not like.is_cuda or like.dtype == torch.float64:
        return torch_tile
    from megatron_papo.logprobs import triton_tile

    return triton_tile


class _Head(torch.autograd.Function):
    """The head with its backward. For logits z with p = softmax(z) and y with q = softmax(y): dlogp_t/dz_j = 1[j = t] -
    p_j, dH/dz_j = -p_j (log p_j + H), dKL/dz_j = p_j (log p_j - log q_j - KL) and dKL/dy_j = q_j - p_j."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, masked_RH: Tensor | None, weight_VH: Tensor, target_ids_R: Tensor, task: Task
    ) -> tuple[Tensor | None, ...]:
        hidden = [hidden_RH] if masked_RH is None else [hidden_RH, masked_RH]
        passes: list[tuple[int, ...]] = [(0, 1)] if task.kl else [(view,) for view in range(len(hidden))]
        sums = {views: RowSums.of_no_words(len(views), len(target_ids_R), hidden_RH.device) for views in passes}
        kernels = _kernels(weight_VH)
        for tile in tiles(task, passes, hidden, weight_VH, target_ids_R):
            part = kernels.tile_sums(tile.logits, task.scale, tile.columns_C, task.entropy)
            sums[tile.views].add(tile.rows, part)
        whole = [one.over_ranks(task.group) for one in sums.values()]
        dtype = wide(hidden_RH.dtype)
        normaliser_NR = torch.cat([one.log_normaliser_NR for one in whole]).to(dtype)
        logprobs = list(torch.cat([one.logprobs_NR for one in whole]).to(dtype).unbind())
        entropy_NR = torch.cat([one.entropy_NR for one in whole]).to(dtype) if task.entropy else None
        entropies = [None] * len(hidden) if entropy_NR is None else list(entropy_NR.unbind())
        kl_R = whole[0].kl_R.to(dtype) if task.kl else None
        ctx.save_for_backward(hidden_RH, masked_RH, weight_VH, target_ids_R, normaliser_NR, entropy_NR, kl_R)
        ctx.task = task
        ctx.set_materialize_grads(False)
        nothing = [None] * (2 - len(hidden))
        (policy, masked), (entropy_R, masked_entropy_R) = logprobs + nothing, entropies + nothing
        return policy, entropy_R, masked, masked_entropy_R, kl_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_RH, masked_RH, weight_VH, target_ids_R, normaliser_NR, entropy_NR, kl_R = ctx.saved_tensors
        task: Task = ctx.task
        hidden = [hidden_RH] if masked_RH is None else [hidden_RH, masked_RH]
        reached = [view for view in range(len(hidden)) if any(g is not None for g in upstream[2 * view : 2 * view + 2])]
        passes: list[tuple[int, ...]] = [(view,) for view in reached] if upstream[4] is None else [(0, 1)]
        if not passes:
            return (None,) * 5
        pulls = {views: RowPulls.of(views, task, normaliser_NR, entropy_NR, kl_R, upstream) for views in passes}
        grads = Gradients(hidden, weight_VH, task.num_words if len(target_ids_R) else 0, ctx.needs_input_grad)
        kernels = _kernels(weight_VH)
        for tile in tiles(task, passes, hidden, weight_VH, target_ids_R):
            pull, dtype = pulls[tile.views].rows(tile.rows), tile.weight_WH.dtype
            grads.add(tile, kernels.tile_gradients(tile.logits, task.scale, tile.columns_C, pull, dtype))
        masked_grad = grads.hidden(1) if masked_RH is not None else None
        return grads.hidden(0), masked_grad, grads.weight_VH, None, None
