"""What only a GPU can show, on one of them; skipped without. Tolerances are stated here and in docs/numerics.md."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch

from tests.parallel.model_cases import CASES, write_case
from tests.support.ranks import run_ranks
from tests.support.tiny_run import make_inputs, metrics, tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
NEEDS_TE = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine")

FP32, BF16 = 1e-3, 0.06
"""fp32 log-probs, largest difference from transformers on the CPU; bf16, mean difference, nats. Transformer Engine
multiplies fp32 in TF32, which keeps 11 bits, unless NVIDIA's libraries are told not to."""


def _logprobs(folder: Path, dtype: str, spec: str) -> list[torch.Tensor]:
    from megatron_papo.checkpoint.weight_loading import load_weights
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron, device, seed_all
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import HeadRequest, build_policy
    from megatron_papo.model.shape import ModelShape

    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # before the first product
    config = load_config(None, [f"model.path={folder}", f"model.dtype={dtype}", f"model.spec={spec}"])
    adapt_megatron()
    initialize(config.parallel)
    seed_all(0)
    shape = ModelShape.from_folder(folder)
    model = build_policy(config, shape).eval()
    load_weights(model, shape, folder)
    rows = torch.load(folder / "rows.pt", weights_only=False)
    with torch.no_grad():
        return [model(row.to(device()), HeadRequest()).policy_logprobs_R.cpu() for row in rows]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("case")
    return folder, write_case(CASES[0], folder)


@pytest.mark.parametrize("spec", ["local", pytest.param("transformer_engine", marks=NEEDS_TE)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logprobs_equal_transformers(case, dtype, spec):
    folder, reference = case
    (found,) = run_ranks(_logprobs, 1, folder, dtype, spec)
    gaps = torch.cat([(got - want).abs() for got, want in zip(found, reference.logprobs, strict=True)])
    gap, limit = (gaps.max(), FP32) if dtype == "float32" else (gaps.mean(), BF16)
    assert float(gap) < limit


def _train(config) -> None:
    from megatron_papo.train import main

    main(config)


def test_a_run_trains_in_bf16(tmp_path):
    inputs = make_inputs(tmp_path / "inputs")
    run_ranks(_train, 1, tiny_run(inputs, tmp_path / "run", model__dtype="bfloat16"))
    steps = metrics(tmp_path / "run")
    assert len(steps) == 2
    assert all(math.isfinite(step["loss/total"]) and step["optim/grad_norm"] > 0 for step in steps)
    assert all(step["rollout_gap"] < BF16 for step in steps)


def test_attention_over_shared_prompts_equals_fp64():
    """Variable-length flash attention in bf16, forward and backward, against plain torch in fp64."""
    from megatron_papo.model.attention.module import StructuredAttention
    from megatron_papo.model.attention.packed_layout import build_segments
    from megatron_papo.types import Segment

    class Settings:
        attention_dropout = 0.0

    cuda = torch.device("cuda", 0)
    segments = (Segment(900), *[Segment(length, 0) for length in (70, 130, 65)], Segment(33), Segment(200, 4))
    generator = torch.Generator(cuda).manual_seed(0)
    num = sum(segment.length for segment in segments)
    values = [torch.randn(num, heads, 64, generator=generator, device=cuda) for heads in (8, 2, 2, 8)]
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = (value.to(dtype).unsqueeze(1).requires_grad_() for value in values[:3])
        layout = build_segments(segments, causal=True, device=cuda)
        out = StructuredAttention(Settings(), 1)(q, k, v, packed_seq_params=layout)
        out.backward(values[3].flatten(1).unsqueeze(1).to(dtype))
        results.append([tensor.double() for tensor in (out, q.grad, k.grad, v.grad)])
    for name, found, expected in zip(("out", "query", "key", "value"), *results):
        gap = (found - expected).abs().max() / expected.abs().max()
        assert gap < 0.02, f"{name}: {gap:.4f} of the largest value"  # bf16 keeps 8 bits: 2 ** -8 = 0.004 a rounding
