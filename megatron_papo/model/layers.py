"""Layer specs: the modules of which a Megatron-Core transformer layer is built.

The spec `local` has Megatron-Core's own linear layers, which can emulate FP8, and the norms of `norm.py`; it runs on
any device. The spec `transformer_engine` has Transformer Engine's linear layers, with norms that have no bias fused
into them; it needs a GPU. Both attend with StructuredAttention, so packed rows have the same structure in both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_papo.config import ConfigError, ModelConfig
from megatron_papo.model.attention.module import StructuredAttention
from megatron_papo.model.deepstack import DeepStackLayer
from megatron_papo.model.fp8.linear import RoundedColumnLinear, RoundedRowLinear
from megatron_papo.model.fp8.padding import ZeroPaddedLayer
from megatron_papo.model.mlp import GatedMLP, PlainMLP
from megatron_papo.model.norm import LayerNorm, RMSNorm
from megatron_papo.model.shape import LanguageShape, NormKind, VisionShape


def choose_spec(model: ModelConfig) -> str:
    """The layer spec, `local` or `transformer_engine`. Raises ConfigError when the latter is set and cannot be used."""
    usable = HAVE_TE and torch.cuda.is_available()
    if model.spec == "transformer_engine" and not usable:
        lacking = "a GPU" if HAVE_TE else "Transformer Engine, which is not installed"
        raise ConfigError(f"model.spec: transformer_engine needs {lacking}; use local or auto")
    if model.spec == "auto":
        return "transformer_engine" if usable else "local"
    return model.spec


def block_spec(
    spec: str, num_layers: int, shape: LanguageShape | VisionShape, *, causal: bool, num_adding_layers: int = 0
) -> TransformerBlockSubmodules:
    """The spec of a TransformerBlock with `num_layers` layers on this stage, of the kinds of norm and MLP in `shape`.

    `causal`: True for the language model, False for a vision tower. `num_adding_layers`: how many of the first
    of these layers add image tokens (`deepstack.py`).
    """
    modules = _transformer_engine_modules(shape.norm) if spec == "transformer_engine" else _local_modules(shape.norm)
    head_norm = modules["final_norm"] if isinstance(shape, LanguageShape) and shape.qk_norm else None
    mlp = GatedMLP if shape.mlp == "swiglu" else PlainMLP
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules["normed_column"],
            core_attention=StructuredAttention,
            linear_proj=modules["row"],
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    assert not (num_adding_layers and _fills_padding(shape)), "no layer adds image tokens and zeroes padding too"
    rest = ZeroPaddedLayer if _fills_padding(shape) else TransformerLayer
    kinds = [DeepStackLayer] * num_adding_layers + [rest] * (num_layers - num_adding_layers)
    parts = TransformerLayerSubmodules(
        input_layernorm=modules["norm"],
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=modules["norm"],
        mlp=functools.partial(
            mlp.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=modules["normed_column"], linear_fc2=modules["row"]),
        ),
        mlp_bda=get_bias_dropout_add,
    )
    layers = [ModuleSpec(module=kind, submodules=parts) for kind in kinds]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=modules["final_norm"])


def _fills_padding(shape: LanguageShape | VisionShape) -> bool:
    """Whether biases would fill the padding at the end of a row. Those of queries, keys and values do not, since
    attention leaves padding out. The linear layers of a vision tower always have biases."""
    return shape.norm == "layer" or not isinstance(shape, LanguageShape) or shape.linear_bias


def recompute_in(layers: Iterable[Any], mode: str) -> None:
    """Makes transformer layers compute again in backward what `mode` (`model.recompute`) says. Whole layers, and the
    MLPs that Megatron-Core computes again itself, are left to Megatron-Core. Norms within Transformer Engine's linear
    layers are saved as without recomputation."""
    if mode not in ("selective", "mlp"):
        return
    for layer in layers:
        if not layer.recompute_mlp:
            layer.mlp.recompute = "product" if mode == "selective" else "inner"
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            if isinstance(norm, RMSNorm | LayerNorm):
                norm.computed_again = True


def _local_modules(kind: NormKind) -> dict[str, Any]:
    norm = RMSNorm if kind == "rms" else LayerNorm
    return {"norm": norm, "normed_column": RoundedColumnLinear, "row": RoundedRowLinear, "final_norm": norm}


def _transformer_engine_modules(kind: NormKind) -> dict[str, Any]:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    modules = {"row": TERowParallelLinear, "final_norm": TENorm}
    if kind == "layer":
        # its bias fills padding, which has to be zero again before the linear layer takes the maximum for FP8
        return modules | {"norm": TENorm, "normed_column": TEColumnParallelLinear}
    return modules | {"norm": IdentityOp, "normed_column": TELayerNormColumnParallelLinear}
