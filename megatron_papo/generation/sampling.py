"""Seeds, the distribution that tokens are sampled from, and the draw. Pure functions.

Each rollout has its own uniform numbers, one for each token, drawn before it starts; a token is the inverse of the
distribution's CDF at that number. So a rollout depends neither on the rows that share its batch nor on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_papo.generation.generator import Sampling


def rollout_seed(seed: int, visit: int, prompt_id: str, index: int) -> int:
    """The seed of one rollout: 63 bits, the same in every process and Python version."""
    key = f"{seed}\0{visit}\0{prompt_id}\0{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """Uniform numbers [len(seeds), num_tokens], float64 in [0, 1).

    Row b is the start of a stream that depends on seeds[b] only.
    """
    rows = [
        torch.rand(num_tokens, dtype=torch.float64, generator=torch.Generator("cpu").manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows)


def sampled_logprobs(logits_BV: Tensor, sampling: Sampling, banned_ids: Tensor) -> Tensor:
    """Log-probs [B, V], fp32, of the distribution that tokens are drawn from; -inf outside its support.

    It applies bans, temperature, top-k (ties with the k-th stay), then the smallest set of likeliest tokens whose
    probability reaches top-p, and renormalises. Greedy sampling applies only bans. vLLM's `processed_logprobs` are the
    same.
    """
    logits_BV = logits_BV.float().index_fill(-1, banned_ids, float("-inf"))
    if sampling.temperature == 0:
        return logits_BV.log_softmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1)  # ascending: the tokens that are cut come first
        below_BV = sorted_BV.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        below_BV[:, -1] = False
        logits_BV = logits_BV.masked_fill(below_BV.scatter(-1, order_BV, below_BV), float("-inf"))
    return logits_BV.log_softmax(-1)


def draw(logprobs_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Token ids [B] int64 and their log-probs [B]; `uniform_B` is not read when greedy."""
    if sampling.temperature == 0:
        ids_B = logprobs_BV.argmax(-1)
    else:
        cumulated_BV = logprobs_BV.double().exp().cumsum(-1)
        # strictly above: a token of probability 0 adds nothing, so it is never the first to pass the threshold
        above_BV = cumulated_BV > (uniform_B[:, None] * cumulated_BV[:, -1:]).clamp(max=cumulated_BV[:, -1:] - 1e-12)
        ids_B = above_BV.byte().argmax(-1)
    return ids_B, logprobs_BV.gather(-1, ids_B[:, None])[:, 0]
