"""The section `model`: which weights are trained, in which precision, and which activations are recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_papo.config.basics import Section


class FreezeConfig(Section):
    vision: bool = False
    """Whether the vision tower, without its projector, is left as it is: it gets no gradient."""
    projector: bool = False
    """Whether the projector, every patch merger of the vision tower, is left as it is."""
    language: bool = False
    """Whether the language model, with embedding and head, is left as it is."""


class ModelConfig(Section):
    path: Path | None = None
    """Hugging Face folder of the model: config.json, tokenizer, processor, and model.safetensors or the files of its
    index."""
    checkpoint: Path | None = None
    """Megatron checkpoint folder whose weights are taken in place of those of `path`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the parameters; `auto` is bfloat16 on a GPU and float32 without one."""
    spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers: Megatron-Core's own (`local`) or Transformer Engine; `auto` takes Transformer
    Engine where it is installed and a GPU is present."""
    freeze: FreezeConfig = FreezeConfig()
    recompute: Literal["none", "selective", "mlp", "full"] = "none"
    """Activations that are not kept but computed again in the backward pass. none: all are kept; selective: the cheap
    ones are computed again, outputs of norms and of SwiGLU; mlp: also the output of the MLP's first linear layer; full:
    whole layers."""
    cuda_graphs: bool = False
    """Whether each layer's MLP is captured as a CUDA graph. Needs a GPU, model.spec=transformer_engine and
    train.fixed_rows."""
    random_init: bool = False
    """Whether the run starts from random weights, of the shape in `path`/config.json."""
