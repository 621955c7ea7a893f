"""Published Megatron figures on H100s beside what the planner says of the same runs: text-only, dense, pretraining.

Figures: NeMo's and Megatron-LM's own performance tables (Llama-3 70B in FP8; the strong scaling of GPT-3 175B in bf16).
These runs interleave stages (virtual pipeline), which the trainer here does not: their bubble is taken as
(p - 1) / (v m + p - 1) (Narayanan et al. 2021), and their exchanges as overlapped. GPT's FFN of 4 H without a gate has
as many weights as a gated one of 8/3 H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_papo.config import load_config
from megatron_papo.costs.activations import RowSize
from megatron_papo.costs.flops import Flops, causal_pairs
from megatron_papo.costs.hardware import GPUS, Cluster
from megatron_papo.distributed.rank_arithmetic import data_ranks
from megatron_papo.model.published_shapes import published_models, shape_named
from megatron_papo.model.shape import LanguageShape, ModelShape
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.candidates import Candidate
from megatron_papo.planning.collectives import gather_s
from megatron_papo.planning.compute import stage_seconds


@dataclass(frozen=True)
class PublishedRun:
    """A run of Megatron with its published speed."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    gpus: int
    tensor: int
    pipeline: int
    virtual: int
    batch: int
    """Sequences per step."""
    length: int
    fp8: bool
    published: tuple[float, float]
    """TFLOP/s per GPU, least and most."""


_LLAMA_70B = ("Llama-3 70B", 80, 8192, 28672, 64, 8, 128256)
_GPT_175B = ("GPT-3 175B", 96, 12288, 32768, 96, 96, 51200)
RUNS = (
    PublishedRun(*_LLAMA_70B, 64, 4, 8, 5, 128, 8192, True, (719, 780)),
    PublishedRun(*_LLAMA_70B, 32, 4, 4, 5, 32, 4096, True, (710, 710)),
    PublishedRun(*_GPT_175B, 96, 8, 12, 8, 1152, 2048, False, (465, 465)),
    PublishedRun(*_GPT_175B, 4608, 8, 12, 8, 1152, 2048, False, (416, 416)),
)
"""The second is supervised fine-tuning; of GPT-3 175B the MFU is published: 47 % on 96 GPUs and 42 % on 4,608 with the
same batch, here of 989.5 TFLOP/s; its layout is not, and is taken as TP 8, PP 12, 8 virtual stages."""


def predicted_tflops(run: PublishedRun, assumed: Assumptions) -> float:
    """Model TFLOP/s of one GPU over the whole step."""
    words = ["model.dtype=bfloat16", f"fp8.recipe={'tensorwise' if run.fp8 else 'off'}"]
    data = data_ranks(run, run.gpus)
    layers = (run.layers // run.pipeline,) * run.pipeline
    config = Candidate(run.tensor, run.pipeline, data, layers, "none", "fp32 moments", 1).applied(
        load_config(None, words)
    )
    parallel = config.parallel.model_copy(update={"overlap_tensor": True, "overlap_data": True})
    config = config.model_copy(update={"parallel": parallel})
    shape, cluster = _shape(run), Cluster(GPUS["H100"], run.gpus // 8)
    flops = _flops(run)
    each = stage_seconds(config, shape, cluster, assumed, flops, RowSize(run.length, 0, run.length))
    rows = run.batch // data
    bubble = (run.pipeline - 1) / (run.virtual * rows + run.pipeline - 1)
    pipeline = rows * max(f + b for f, b in zip(each.forward, each.backward)) / (1 - bubble)
    parameters = flops.language / 2 / run.length / run.tensor / run.pipeline
    exchange = gather_s(4 * parameters, data, cluster, assumed, run.tensor) * (1 - assumed.hidden_data)
    exchange += gather_s(2 * parameters, data, cluster, assumed, run.tensor) * (1 - assumed.hidden_data)
    return 3 * flops.total * run.batch / (pipeline + exchange) / run.gpus / 1e12


def beside_published(assumed: Assumptions) -> Iterator[tuple[PublishedRun, float]]:
    for run in RUNS:
        yield run, predicted_tflops(run, assumed)


def _flops(run: PublishedRun) -> Flops:
    """FLOPs of one forward pass over one sequence; every token is predicted."""
    head = run.hidden // run.heads
    layer = run.hidden * (run.heads + 2 * run.kv_heads) * head + run.hidden**2 + 3 * run.hidden * run.ffn
    return Flops(
        language=2 * run.length * run.layers * layer,
        attention=4 * causal_pairs(run.length) * run.layers * run.hidden,
        head=2 * run.length * run.hidden * run.vocabulary,
    )


def _shape(run: PublishedRun) -> ModelShape:
    language = LanguageShape(
        num_layers=run.layers,
        hidden_size=run.hidden,
        intermediate_size=run.ffn,
        num_heads=run.heads,
        num_kv_heads=run.kv_heads,
        vocab_size=run.vocabulary,
        head_dim=run.hidden // run.heads,
        norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        initializer_range=0.02,
        qkv_bias=True,
    )
    any_model = shape_named(next(iter(published_models())))
    return replace(any_model, language=language)  # its tower sees no image
