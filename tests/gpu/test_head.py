"""The head's Triton kernels, compiled, against the same head on the CPU in fp64; skipped without a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_papo.logprobs import vocab_parallel_head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of values in nats, and of gradients relative to their largest: bf16 rounds the tile's gradient and the result."""


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("dtype", CLOSE)
def test_head_on_the_gpu_equals_fp64(dtype: torch.dtype, kl: bool):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((300, 64), (300, 64), (5000, 64))]
    inputs[2] *= 0.3
    targets = torch.arange(300)
    found = []
    for device, wide in (("cuda", dtype), ("cpu", torch.float64)):
        leaves = [tensor.to(device, wide).requires_grad_() for tensor in inputs]
        values = vocab_parallel_head(
            *leaves, targets.to(device), group=None, vocab_start=0, vocab_size=4990, banned_ids=(4000, 4001),
            temperature=0.8, entropy=True, kl=kl, tile=(128, 1536),
        )  # fmt: skip
        sum(value.sum() for value in values if value is not None).backward()
        found.append(
            [tensor.detach().cpu().double() for tensor in (*values, *(x.grad for x in leaves)) if tensor is not None]
        )
    for place, (mine, theirs) in enumerate(zip(*found, strict=True)):
        size = 1.0 if place < 4 + kl else theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs, rtol=CLOSE[dtype] / 10, atol=CLOSE[dtype] * size)
