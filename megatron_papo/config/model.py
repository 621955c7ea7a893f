"""The section `model`: where the model comes from, and how its layers are built and computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_papo.config.basics import Section


class FreezeConfig(Section):
    vision: bool = False
    """The vision tower without its projector gets no gradient."""
    projector: bool = False
    """The patch merger that ends the vision tower."""
    language: bool = False
    """The language model with embedding and head."""


class ModelConfig(Section):
    path: Path | None = None
    """A Hugging Face folder: config.json, tokenizer, processor, and model.safetensors or the files of its index."""
    checkpoint: Path | None = None
    """A Megatron checkpoint folder to start from instead of the weights of `path`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters; `auto` is bfloat16 on a GPU and float32 without one."""
    spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer specs; `auto` takes Transformer Engine when it is installed and a GPU is there."""
    freeze: FreezeConfig = FreezeConfig()
    recompute: Literal["none", "selective", "mlp", "full"] = "none"
    """Activations computed again in backward: none; selective: what costs no product of matrices, norms' outputs and
    SwiGLU's; mlp: the output of the MLP's first linear too; full: whole layers."""
    cuda_graphs: bool = False
    """Capture each layer's MLP as a CUDA graph. Needs a GPU, the spec transformer_engine and train.fixed_rows."""
    random_init: bool = False
    """Start from random weights of the shape in `path`/config.json."""
