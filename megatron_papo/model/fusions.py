"""Settings of Megatron-Core for a GPU: fused kernels, overlapped communication, CUDA graphs. On a CPU all are off.

Megatron-Core or Transformer Engine have fused kernels for bias with activation, for bias with dropout and residual,
and for gradient accumulation in fp32 (in Transformer Engine's linear layers; in Megatron's own with NVIDIA's Apex built
from source). Norms are fused into Transformer Engine's linear layers; the kernels of the head and of attention are this
package's own. Overlap and graphs need rows of one length (`train.fixed_rows`). Only the MLP of a layer is captured in a
graph, since attention depends on the structure of each row.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

from megatron.core.transformer import TransformerConfig

from megatron_papo.config import Config
from megatron_papo.distributed.accelerator import has_gpu
from megatron_papo.model.shape import MlpKind


def fusions(config: Config, spec: str, *, language: bool, mlp: MlpKind) -> dict[str, Any]:
    """Fields of the TransformerConfig of the language model, whose rows may have one length, or of the vision tower;
    `mlp` is its kind of MLP."""
    if not has_gpu():
        return {"gradient_accumulation_fusion": False, "bias_activation_fusion": False, "bias_dropout_fusion": False}
    # Apex marks the weight that a linear layer saved; under these two modes that is not the parameter (`recompute.py`)
    fused_in_apex = has_apex() and config.model.recompute not in ("selective", "mlp")
    fields: dict[str, Any] = {
        "gradient_accumulation_fusion": spec == "transformer_engine" or fused_in_apex,
        "bias_activation_fusion": mlp == "swiglu",  # `mlp.py` has no kernel for the others; Megatron-Core refuses some
        "bias_dropout_fusion": True,
    }
    if language and config.parallel.overlap_tensor:
        fields["tp_comm_overlap"] = True
    if language and config.model.cuda_graphs:
        fields |= {"cuda_graph_impl": "local", "cuda_graph_modules": ["mlp"]}
    return fields


def has_apex() -> bool:
    """Whether the extension of NVIDIA's Apex for gradient accumulation is installed."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def of_plain_linears(config: TransformerConfig) -> TransformerConfig:
    """The configuration for Megatron's own linear layers: without Apex they accumulate gradients with no fused
    kernel."""
    if not config.gradient_accumulation_fusion or has_apex():
        return config
    plain = copy.copy(config)
    plain.gradient_accumulation_fusion = False
    return plain


def start_overlap(config: Config, transformer: TransformerConfig) -> None:
    """Allocates Transformer Engine's user buffers, through which its linear layers communicate while they compute.

    They have one size for all rows: [tokens of a row, hidden size]. All ranks must call this.
    """
    if not transformer.tp_comm_overlap:
        return
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    wanted = [modes.NONE]
    if config.fp8.enabled:
        wanted = [modes.FP8, modes.NONE]  # the first and last layers stay in bf16
    base.initialize_ub(
        shape=[config.train.tokens_per_micro_batch, transformer.hidden_size],
        tp_size=transformer.tensor_model_parallel_size,
        quantization_modes=wanted,
        bootstrap_backend="nccl",
    )
