"""Whether the kernels of vLLM compute on this machine: a line a piece. Exit code 1 when one fails.

    python3 tools/gpu_trial/smoke_vllm.py      in the project's root, with PYTHONPATH=.

On the CPU flash attention, which vLLM's builds for CPUs have not, is left out.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.gpu_trial.pieces import DEVICE, Gap, Pieces, gap, report

LIMIT = 2e-2
"""Largest gap in bfloat16."""
EPS = 1e-6
_HOPPER = 9


def pieces() -> Pieces:
    """The pieces by name. Imports vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import _custom_ops  # noqa: F401  loads the kernels

    attends = {
        **{f"flash attention, heads of {dim}": lambda d=dim: attention(d) for dim in (32, 64, 72, 80, 128)},
        "flash attention over a cache of blocks": paged,
    }
    return {
        **(attends if DEVICE == "cuda" else {}),
        "RMS norm": norm,
        "rotary angles": rotary,
        "SiLU and product": silu,
    }


def _drawn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.bfloat16, device=DEVICE)


def _version() -> int:
    """The version of flash attention: the one that vLLM takes on Hopper, and for other cards the one that all can
    run."""
    return 3 if torch.cuda.get_device_capability()[0] == _HOPPER else 2


def attention(dim: int) -> Gap:
    """Sequences of unequal length in one call, two heads of queries to one of keys, as in the vision tower and a
    prompt's pass."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    torch.manual_seed(0)
    lengths, heads, kv_heads = (70, 1, 129), 4, 2
    starts = torch.tensor([0, 70, 71, 200], dtype=torch.int32, device=DEVICE)
    q, k, v = _drawn(200, heads, dim), _drawn(200, kv_heads, dim), _drawn(200, kv_heads, dim)
    output = flash_attn_varlen_func(q, k, v, 129, starts, 129, cu_seqlens_k=starts, causal=True, fa_version=_version())
    expected = torch.cat([attended(*each) for each in zip(*(x.split(lengths) for x in (q, k, v)))])
    return Gap(gap(output, expected), LIMIT).checked()


def paged() -> Gap:
    """One query over keys and values in blocks, as each token that is generated."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    torch.manual_seed(0)
    length, block, dim = 100, 16, 128
    k, v, q = _drawn(112, 2, dim), _drawn(112, 2, dim), _drawn(1, 16, dim)
    output = flash_attn_varlen_func(
        q, k.view(-1, block, 2, dim), v.view(-1, block, 2, dim), 1,
        torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), length,
        seqused_k=torch.tensor([length], dtype=torch.int32, device=DEVICE), causal=True,
        block_table=torch.arange(7, dtype=torch.int32, device=DEVICE)[None], fa_version=_version(),
    )  # fmt: skip
    return Gap(gap(output, attended(q, k[:length], v[:length])), LIMIT).checked()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in float64, of the last queries: [Q, heads, D] over [K, key-value heads, D] twice."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).double() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[-1] ** -0.5
    later = torch.ones(len(q), len(k), device=q.device, dtype=torch.bool).triu(1 + len(k) - len(q))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(later, float("-inf")).softmax(-1), v)


def norm() -> Gap:
    from vllm import _custom_ops

    torch.manual_seed(0)
    x, weight = _drawn(64, 2048), _drawn(2048)
    out = torch.empty_like(x)
    _custom_ops.rms_norm(out, x, weight, EPS)
    return Gap(gap(out, F.rms_norm(x.double(), (2048,), weight.double(), EPS)), LIMIT).checked()


def rotary() -> Gap:
    from vllm import _custom_ops

    torch.manual_seed(0)
    places, dim = torch.arange(50, device=DEVICE), 128
    angles = places[:, None] / 1e4 ** (torch.arange(0, dim, 2, device=DEVICE) / dim)
    q, k = _drawn(50, 4 * dim), _drawn(50, 2 * dim)
    expected = turned(q.double().view(50, 4, dim), angles.double()).flatten(1)
    _custom_ops.rotary_embedding(places, q, k, dim, torch.cat((angles.cos(), angles.sin()), -1).bfloat16(), True)
    return Gap(gap(q, expected), LIMIT).checked()


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """[T, heads, D] by [T, D/2] angles; the two halves of a head are the two coordinates (as in GPT-NeoX)."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    one, two = x.chunk(2, -1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), -1)


def silu() -> Gap:
    torch.manual_seed(0)
    x = _drawn(64, 4096)
    out = torch.empty(64, 2048, dtype=torch.bfloat16, device=DEVICE)
    torch.ops._C.silu_and_mul(out, x)
    gate, up = x.double().chunk(2, -1)
    return Gap(gap(out, F.silu(gate) * up), LIMIT).checked()


if __name__ == "__main__":
    sys.exit(report("vLLM", pieces))
