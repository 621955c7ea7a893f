"""Megatron-Core's TransformerConfig for the language model and for the vision tower, from our settings and the shape.

What only a GPU has is in `fusions.py`. Megatron-Core sums gradients and does not average them, since the loss has its
weights already (`calculate_per_token_loss`). It never sets weights: the loader or `initialize.py` does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_papo.config import Config
from megatron_papo.distributed.accelerator import parameter_dtype
from megatron_papo.model.fusions import fusions
from megatron_papo.model.mlp import ACTIVATIONS
from megatron_papo.model.shape import LanguageShape, ModelShape, VisionShape, padded, stage_layers


def language_config(config: Config, shape: ModelShape, spec: str) -> TransformerConfig:
    """The configuration of the language model; `spec` is `local` or `transformer_engine`."""
    language, parallel = shape.language, config.parallel
    return TransformerConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads,
        kv_channels=language.head_dim,
        ffn_hidden_size=padded(language.intermediate_size, parallel.tensor),
        layernorm_epsilon=language.norm_eps,
        add_bias_linear=language.linear_bias,
        add_qkv_bias=language.qkv_bias,
        qk_layernorm=language.qk_norm,
        pipeline_model_parallel_size=parallel.pipeline,
        pipeline_model_parallel_layout=_pipeline_layout(config, shape),
        first_last_layers_bf16=config.fp8.first_layers + config.fp8.last_layers > 0,
        num_layers_at_start_in_bf16=config.fp8.first_layers,
        num_layers_at_end_in_bf16=config.fp8.last_layers,
        **_fp8(config, spec),
        **recompute_settings(config, spec, fp8=config.fp8.enabled),
        **_kinds(language),
        **_common(config, spec),
        **fusions(config, spec, language=True, mlp=language.mlp),
    )


def vision_config(config: Config, shape: ModelShape, spec: str) -> TransformerConfig:
    """The configuration of a vision tower whose linear layers all have biases and whose heads have keys of their own.
    The whole tower is on the first pipeline stage, split over the tensor ranks."""
    vision = shape.vision
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        kv_channels=vision.head_dim,
        ffn_hidden_size=padded(vision.intermediate_size, config.parallel.tensor),
        layernorm_epsilon=vision.norm_eps,
        add_bias_linear=True,
        add_qkv_bias=True,
        **(_fp8(config, spec) if config.fp8.vision else {}),
        **recompute_settings(config, spec, fp8=config.fp8.vision),
        **_kinds(vision),
        **_common(config, spec),
        **fusions(config, spec, language=False, mlp=vision.mlp),
    )


def _fp8(config: Config, spec: str) -> dict[str, Any]:
    """The FP8 fields for Transformer Engine's layers; `model/fp8/switch.py` sets `fp8` for the passes that use it.

    Megatron-Core counts layers over all stages, so under pipeline parallelism too the first and last layers are those
    of the model. The local spec emulates FP8 in its own linear layers and leaves these fields at their defaults.
    """
    if not config.fp8.enabled or spec != "transformer_engine":
        return {}
    hybrid = config.fp8.recipe in ("tensorwise", "delayed")
    return {
        "fp8": "hybrid" if hybrid else "e4m3",
        "fp8_recipe": config.fp8.recipe,
        "fp8_amax_history_len": config.fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        # by default also over data-parallel ranks, which may have unequal numbers of rows and would wait for one
        # another
        "tp_only_amax_red": True,
    }


def recompute_settings(config: Config, spec: str, *, fp8: bool) -> dict[str, Any]:
    """Recomputation by Megatron-Core itself: of whole layers, and of whole MLPs where Transformer Engine must know of
    it, for the scales of FP8 and for the buffers of its communication. `model/recompute.py` does everything else."""
    if config.model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    told = spec == "transformer_engine" and (fp8 or config.parallel.overlap_tensor)
    if config.model.recompute == "mlp" and told:
        return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    return {}


def _kinds(shape: LanguageShape | VisionShape) -> dict[str, Any]:
    """The kinds of norm and MLP, in the terms of Megatron-Core."""
    return {
        "normalization": {"rms": "RMSNorm", "layer": "LayerNorm"}[shape.norm],
        "gated_linear_unit": shape.mlp == "swiglu",
        "activation_func": ACTIVATIONS[shape.mlp],
    }


def _common(config: Config, spec: str) -> dict[str, Any]:
    dtype = parameter_dtype(config.model.dtype)
    return {
        "tensor_model_parallel_size": config.parallel.tensor,
        "sequence_parallel": config.parallel.sequence,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "perform_initialization": False,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",  # Megatron-Core refuses variable lengths without it
        "calculate_per_token_loss": True,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "transformer_impl": spec,
    }


def _pipeline_layout(config: Config, shape: ModelShape) -> list[list[str]] | None:
    if config.parallel.pipeline == 1:
        return None
    stages = [["decoder"] * layers for layers in stage_layers(config.parallel, shape)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages
