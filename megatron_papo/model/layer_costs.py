"""The cost of transformer layers: parameters, matrix products and saved activations, whatever the model family.

Both kinds of layer follow from the model's shape (`language_layer`, `vision_layer`). A family's module `costs` (the
protocol `FamilyCosts`) counts what lies outside of them: patch embedding, projector, attention windows. `costs/` adds
both up over stages and ranks.
Activations are counted from the modules as they are, as Korthikanti et al. 2022 (arXiv 2205.05198) do, and compared
with the tensors alive after a forward pass in tests/parallel/test_activations.py. Leaves out what exists only within an
operation. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast

from megatron_papo.config import Config
from megatron_papo.model.family import family_of
from megatron_papo.model.shape import ModelShape, padded

Grid = tuple[int, int, int]
"""Patches of an image in time, height and width, before merging."""

Part = Literal["language", "vision", "projector"]
"""The parts of a model that `model.freeze` can freeze."""


@dataclass(frozen=True)
class ParameterCount:
    """The number of parameters of a piece of the model, by how tensor ranks hold them."""

    part: Part
    split: int
    """Parameters shared out over the tensor ranks, padding included."""
    whole: int
    """Parameters that every tensor rank holds."""

    def on_a_rank(self, tensor: int) -> int:
        """The number of parameters on each of `tensor` tensor ranks."""
        return self.split // tensor + self.whole


@dataclass(frozen=True)
class LayerWidths:
    """The widths of one transformer layer, all tensor ranks together, and the kinds of its MLP, norms and biases."""

    hidden: int
    """Width of a token between layers."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn: int
    """Width of the MLP's product, which its second linear layer reads."""
    gated: bool = True
    """Whether the MLP's first linear layer also computes a gate (SwiGLU), and so is twice `ffn` wide."""
    qkv_bias: bool = False
    """Whether the linear layer of queries, keys and values has a bias."""
    linear_bias: bool = False
    """Whether the attention's output projection and both linears of the MLP have biases."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normed before they are rotated."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm has a weight and keeps one fp32 number a token; LayerNorm has a bias too and keeps two."""

    @property
    def query_width(self) -> int:
        """Width of the queries of all heads."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of the keys of all heads; the values are as wide."""
        return self.num_kv_heads * self.head_dim

    @property
    def first_linear(self) -> int:
        """Output width of the MLP's first linear."""
        return 2 * self.ffn if self.gated else self.ffn

    @property
    def products(self) -> int:
        """Multiply-adds of one token in the layer's matrices, which is their number of elements."""
        attention = self.hidden * (self.query_width + 2 * self.key_width) + self.query_width * self.hidden
        return attention + self.hidden * (self.first_linear + self.ffn)

    @property
    def first_linear_share(self) -> float:
        """Share of `products` that the MLP's first linear takes."""
        widths = 2 * self.query_width + 2 * self.key_width + self.first_linear + self.ffn
        return self.first_linear / widths

    @property
    def norm_parameters(self) -> int:
        """Number of parameters of one norm."""
        return self.hidden * self._norm_vectors

    @property
    def _norm_vectors(self) -> int:
        return 1 if self.norm == "rms" else 2

    def parameters(self, part: Part, num_layers: int, width: Callable[[int], int]) -> ParameterCount:
        """Number of parameters of `num_layers` such layers; `width` pads the FFN. Biases of the column-parallel linears
        (queries, keys, values; the MLP's first) are split, those of the row-parallel ones are whole."""
        layer = replace(self, ffn=width(self.ffn))
        split = layer.products
        split += layer.query_width + 2 * layer.key_width if layer.qkv_bias else 0
        split += layer.first_linear if layer.linear_bias else 0
        whole = 2 * layer.norm_parameters + (2 * layer.hidden if layer.linear_bias else 0)
        whole += 2 * layer.head_dim * layer._norm_vectors if layer.qk_norm else 0
        return ParameterCount(part, num_layers * split, num_layers * whole)


def language_layer(shape: ModelShape) -> LayerWidths:
    """One layer of the language model, of which there are `shape.language.num_layers`."""
    language = shape.language
    return LayerWidths(
        hidden=language.hidden_size,
        num_heads=language.num_heads,
        num_kv_heads=language.num_kv_heads,
        head_dim=language.head_dim,
        ffn=language.intermediate_size,
        gated=language.mlp == "swiglu",
        qkv_bias=language.qkv_bias,
        linear_bias=language.linear_bias,
        qk_norm=language.qk_norm,
        norm=language.norm,
    )


def vision_layer(shape: ModelShape) -> LayerWidths:
    """One layer of the vision tower, of which there are `shape.vision.num_layers`: as many keys as queries, and all
    linear layers have biases (`model/transformer_config.py`)."""
    vision = shape.vision
    return LayerWidths(
        hidden=vision.hidden_size,
        num_heads=vision.num_heads,
        num_kv_heads=vision.num_heads,
        head_dim=vision.head_dim,
        ffn=vision.intermediate_size,
        gated=vision.mlp == "swiglu",
        qkv_bias=True,
        linear_bias=True,
        norm=vision.norm,
    )


@dataclass(frozen=True)
class ActivationSettings:
    """The settings of a rank that the size of its saved activations depends on."""

    value_bytes: int
    """Bytes of one value of an activation: 2 in bfloat16, 4 in float32."""
    tensor: int
    """Tensor ranks, over which heads and FFN are split."""
    sequence: int
    """Ranks that share the tokens between layers: the tensor ranks under sequence parallelism, else 1."""
    recompute: str
    """What is computed again in backward: the setting `model.recompute`."""
    fused: bool
    """Whether norms are part of Transformer Engine's linears, which keep the norms' outputs under recomputation too.
    The count of fused layers has not been compared with a measurement."""

    @classmethod
    def of(cls, config: Config, *, fused: bool) -> ActivationSettings:
        """The settings of a run with `config`."""
        parallel = config.parallel
        value_bytes = 4 if config.model.dtype == "float32" else 2
        sequence = parallel.tensor if parallel.sequence else 1
        return cls(value_bytes, parallel.tensor, sequence, config.model.recompute, fused)


def layer_saved_bytes(layer: LayerWidths, settings: ActivationSettings) -> int:
    """Bytes that one layer keeps of one token (or patch) on one rank."""
    value_bytes, tensor, recompute = settings.value_bytes, settings.tensor, settings.recompute
    if recompute == "full":
        return value_bytes * (layer.hidden // settings.sequence)
    norm_outputs = 0 if recompute != "none" and not settings.fused else 1
    norms = 2 * norm_saved_bytes(layer, settings, outputs=norm_outputs)
    queries = layer.query_width // tensor
    # rotated queries and keys, values, log-sum-exp; the output, which the projection reads
    attention = 2 * value_bytes * (queries + key_width_on_rank(layer, tensor)) + 4 * (layer.num_heads // tensor)
    attention += _head_norms_bytes(layer, settings) if layer.qk_norm else 0
    product = padded(layer.ffn, tensor) // tensor
    first_linear = 2 * product if layer.gated else product
    mlp = {"none": first_linear + product, "selective": first_linear, "mlp": 0}[recompute]
    return norms + attention + value_bytes * mlp


def _head_norms_bytes(layer: LayerWidths, settings: ActivationSettings) -> int:
    """Bytes that the norms of queries and keys keep of one token on one rank: their inputs and each head's statistics.
    Their outputs are rotated, and what is rotated is counted with the attention."""
    width = layer.query_width // settings.tensor + key_width_on_rank(layer, settings.tensor)
    return settings.value_bytes * width + statistics_bytes(layer) * (width // layer.head_dim)


def statistics_bytes(layer: LayerWidths) -> int:
    """Bytes of the fp32 numbers that a norm keeps of one token."""
    return 4 if layer.norm == "rms" else 8


def norm_saved_bytes(layer: LayerWidths, settings: ActivationSettings, *, outputs: int) -> int:
    """Bytes that a norm of the layers' width keeps of one token (or patch) on one rank: its input, its statistics, and
    its output (`outputs`: 1) where the linear layer that follows saves that."""
    values = settings.value_bytes * (layer.hidden // settings.sequence) * (1 + outputs)
    return values + statistics_bytes(layer)


def key_width_on_rank(layer: LayerWidths, tensor: int) -> int:
    """Width of the keys on a tensor rank; where there are more ranks than key-value heads, heads are repeated."""
    return max(layer.num_kv_heads // tensor, 1) * layer.head_dim


class FamilyCosts(Protocol):
    """The functions of a family's module `costs`. It imports no torch."""

    def vision_parameters(self, shape: ModelShape, width: Callable[[int], int]) -> Iterable[ParameterCount]:
        """Parameters of the vision tower and of the projector; `width` pads FFN widths."""

    def vision_flops(self, grids: Sequence[Grid], shape: ModelShape) -> int:
        """FLOPs of the matrix products of one forward pass of the tower and the projector over images of `grids`, a
        multiply-add counted as two; attention over those patches alone that attend to each other."""

    def vision_ends_bytes(self, num_patches: int, shape: ModelShape, settings: ActivationSettings) -> int:
        """Bytes that forward keeps for backward on one rank outside of the tower's layers: pixels, rotary angles,
        projector."""


def costs_of(shape: ModelShape) -> FamilyCosts:
    """The cost functions of the family that a model of `shape` belongs to."""
    return cast(FamilyCosts, family_of(shape).module("costs"))
