"""Variable-length flash attention in bf16, forward and backward, against the path of blocks in fp32: every structure
that the model has. Skipped without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_papo.model.attention.module import StructuredAttention
from megatron_papo.model.attention.packed_layout import build_segments
from megatron_papo.types import Segment

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CLOSE = 0.02
"""Of the largest value: bf16 keeps 8 bits, 2 ** -8 = 0.004 a rounding, and gradients go through several."""
SHARED = (Segment(500), *[Segment(length, 0) for length in (70, 129, 1)], Segment(33), Segment(200, 4), Segment(200, 4))
STRUCTURES = {
    "shared prompts, the 3B model's heads": (SHARED, True, 16, 2, 128),
    "shared prompts, heads alike": (SHARED, True, 4, 4, 64),
    "plain sequences": (tuple(Segment(length) for length in (300, 1, 77, 513)), True, 16, 2, 128),
    "windows of the vision tower": (tuple(Segment(length) for length in (64, 64, 32, 16, 64)), False, 16, 16, 80),
    "frames of Qwen3-VL 2B and 4B": (tuple(Segment(length) for length in (260, 64, 1024)), False, 16, 16, 64),
    "frames of Qwen3-VL 8B and 32B": (tuple(Segment(length) for length in (260, 64, 1024)), False, 16, 16, 72),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_variable_length_kernels_equal_blocks_in_fp32(name):
    segments, causal, heads, kv_heads, head_dim = STRUCTURES[name]
    cuda = torch.device("cuda", 0)
    generator = torch.Generator(cuda).manual_seed(0)
    num_tokens = sum(segment.length for segment in segments)
    values = [  # what bf16 can hold, so that only the kernels round
        torch.randn(num_tokens, 1, num_heads, head_dim, generator=generator, device=cuda).bfloat16()
        for num_heads in (heads, kv_heads, kv_heads, heads)
    ]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (value.to(dtype, copy=True).requires_grad_() for value in values[:3])  # leaves of each dtype's own
        layout = build_segments(segments, causal=causal, device=cuda)
        assert layout.varlen is not None
        out = StructuredAttention(SimpleNamespace(attention_dropout=0.0), 1)(q, k, v, packed_seq_params=layout)
        out.backward(values[3].flatten(2).to(dtype))
        results.append([tensor.float() for tensor in (out, q.grad, k.grad, v.grad)])
    for which, found, expected in zip(("out", "query", "key", "value"), *results):
        gap = float((found - expected).abs().max() / expected.abs().max())
        assert gap < CLOSE, f"{which}: {gap:.4f} of the largest value"
        assert gap > 0, "both went the same way"
