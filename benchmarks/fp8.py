"""What FP8 does to a model's log-probs, by recipe, and which linear layers it comes from.

    python tools/benchmark.py fp8 --model FOLDER

Text of this project's documentation is scored in float32, in bfloat16, and in emulated FP8: in all layers of the
language model, with its first and last left out, and in one linear at a time. The gap is that of a token's log-prob to
float32, its mean and its largest. Ratios are to the gap of bfloat16, of a single linear to that of all layers. Emulated
on the CPU with float32 weights: no seconds are measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import write_model
from benchmarks.rows import Row
from megatron_papo.checkpoint.weight_loading import load_weights
from megatron_papo.config import load_config
from megatron_papo.distributed.accelerator import adapt_megatron
from megatron_papo.distributed.layout import initialize
from megatron_papo.model.policy import HeadRequest, VisionLanguageModel, build_policy
from megatron_papo.model.shape import ModelShape
from megatron_papo.optimization.pipeline import score
from megatron_papo.types import MicroBatch, Segment

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
ENDS = (0, 1, 2, 4)
"""Number of layers at either end that are left out."""
NUM_TOKENS, QUICK_TOKENS, ROW = 128, 64, 128
"""Number of tokens of the whole text, the same in a quick run, and the tokens of one row."""
TEXT = Path(__file__).resolve().parents[1] / "docs" / "design.md"
Gap = tuple[float, float]
"""The mean and the largest difference of a token's log-prob, in nats."""


def run(quick: bool, *, rounds: int | None = None, model: Path | None = None) -> list[Row]:
    """`rounds` has no effect, since nothing is timed. Without a `model` small random weights are measured."""
    del rounds
    adapt_megatron()
    initialize(load_config(None).parallel)
    with tempfile.TemporaryDirectory() as folder:
        return _measure(model or write_model(Path(folder) / "model"), QUICK_TOKENS if quick else NUM_TOKENS)


def _measure(folder: Path, num_tokens: int) -> list[Row]:
    shape = ModelShape.from_folder(folder)
    rows = _rows(folder, shape, num_tokens)
    exact = _logprobs(_policy(folder, shape), rows)
    half = _gap(_logprobs(_policy(folder, shape, "model.dtype=bfloat16"), rows), exact)
    figures = _pair("bfloat16", half, half)
    for recipe in RECIPES:
        policy = _policy(folder, shape, f"fp8.recipe={recipe}", "fp8.first_layers=0", "fp8.last_layers=0")
        _logprobs(policy, rows)
        policy.fp8.settle()  # scales of `delayed` are those of a pass before
        num_layers = shape.language.num_layers
        for ends in (number for number in ENDS if 2 * number < num_layers):
            kept = range(ends, num_layers - ends)
            names = [name for name in policy.fp8.linears if int(name.split(".")[1]) in kept]
            which = f"all but {ends} layers at either end" if ends else "all layers"
            figures += _pair(f"{recipe}, {which}", _gap(_in_fp8(policy, names, rows), exact), half)
        whole = _gap(_in_fp8(policy, list(policy.fp8.linears), rows), exact)
        alone = {name: _gap(_in_fp8(policy, [name], rows), exact) for name in policy.fp8.linears}
        for name, gap in sorted(alone.items(), key=lambda item: -item[1][0]):
            figures += _pair(f"{recipe}, {name.removeprefix('language.')} alone", gap, whole)
    return figures


def _pair(name: str, gap: Gap, baseline: Gap) -> list[Row]:
    return [
        Row(f"{name}: {kind}", own, other, own / other if other else float("nan"), "nats")
        for kind, own, other in zip(("mean", "max"), gap, baseline)
    ]


def _policy(folder: Path, shape: ModelShape, *settings: str) -> VisionLanguageModel:
    config = load_config(None, ("model.dtype=float32", "model.spec=local", *settings))
    policy = build_policy(config, shape)
    load_weights(policy, shape, folder)
    return policy


def _in_fp8(policy: VisionLanguageModel, names: Sequence[str], rows: Sequence[MicroBatch]) -> Tensor:
    """Log-probs with these linear layers in FP8 and no others."""
    with _alone(policy, names):
        return _logprobs(policy, rows)


@contextmanager
def _alone(policy: VisionLanguageModel, names: Sequence[str]) -> Iterator[None]:
    linears: dict[str, Any] = policy.fp8.linears
    others = {name: linear.operands for name, linear in linears.items() if name not in names}
    for name in others:
        linears[name].operands = None
    yield
    for name, operands in others.items():
        linears[name].operands = operands


def _logprobs(policy: VisionLanguageModel, rows: Sequence[MicroBatch]) -> Tensor:
    outputs = score(policy, rows, HeadRequest(banned_ids=()), fp8=True)
    return torch.cat([output.policy_logprobs_R for output in outputs])


def _gap(found: Tensor, exact: Tensor) -> Gap:
    gaps = (found - exact).abs()
    return float(gaps.mean()), float(gaps.max())


def _rows(folder: Path, shape: ModelShape, num_tokens: int) -> list[MicroBatch]:
    """Rows with the first tokens of the text; all tokens but the first of a row are scored."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(TEXT.read_text()).input_ids[:num_tokens]
    assert max(ids) < shape.language.vocab_size
    return [_row(torch.tensor(ids[start : start + ROW])) for start in range(0, len(ids), ROW)]


def _row(ids_T: Tensor) -> MicroBatch:
    num = len(ids_T)
    zeros = torch.zeros(num - 1)
    return MicroBatch(
        token_ids_T=ids_T,
        position_ids_3T=torch.arange(num).expand(3, -1),
        segments=(Segment(num),),
        pixel_values=(),
        grid_thw_I3=None,
        target_ids_R=ids_T[1:],
        logit_index_R=torch.arange(num - 1),
        rollout_index_R=zeros.long(),
        loss_mask_R=zeros == 0,
        has_image_R=zeros != 0,
        weights_R=zeros,
        perception_weights_R=zeros,
        advantages_R=zeros,
        rollout_logprobs_R=zeros,
    )
