"""The toy family as its authors would publish it: a model of transformers, written in plain torch.

Parity is held to it, and the transformers engine decodes with it. It has what transformers' own models have: a config,
`save_pretrained`, a cache of keys and values, a mask over padded rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from tests.toy_family import MODEL_TYPE

TOKENS = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262}


class ToyConfig(PreTrainedConfig):
    """config.json: a section for the language model and one for the tower."""

    model_type = MODEL_TYPE

    language: dict[str, Any] | None = None
    tower: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 256

    @property
    def num_hidden_layers(self) -> int:
        """Layers that keep keys and values, which transformers' cache asks for."""
        return self.language["layers"]


def toy_config(
    *, layers: int = 3, tie: bool = False, vocabulary: int = 275, inner: int = 90, width: int = 48
) -> ToyConfig:
    """A small model; `inner`, the MLP's width, and the vocabulary need padding under tensor parallelism."""
    return ToyConfig(
        language={
            "layers": layers, "width": width, "inner": inner, "heads": 4, "kv_heads": 2, "head_dim": 24,
            "vocabulary": vocabulary, "theta": 10_000.0, "sections": [6, 3, 3],
        },
        tower={"layers": 2, "width": 32, "inner": 44, "heads": 4, "out": width},
        tie_word_embeddings=tie,
        **TOKENS,
    )  # fmt: skip


class Toy(PreTrainedModel):
    """Word embedding, tower, decoder and output matrix."""

    config_class = ToyConfig
    _supports_sdpa = True  # the setting with which models are built here

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        width, vocabulary = config.language["width"], config.language["vocabulary"]
        self.tower = Tower(config.tower)
        self.words = nn.Embedding(vocabulary, width)
        self.rotary = Rotary(config.language)
        self.decoder = nn.ModuleList(Layer(config.language, number) for number in range(config.language["layers"]))
        self.last_norm = nn.LayerNorm(width)
        if not config.tie_word_embeddings:
            self.logits = nn.Linear(width, vocabulary, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_grid_thw: Tensor | None,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """Logits [B, S, vocabulary]; `position_ids` [3, B, S]; `attention_mask` [B, K] over the cache and these S."""
        hidden = self.words(input_ids)
        if pixel_values is not None:
            image = (input_ids == self.config.image_token_id)[..., None].expand_as(hidden)
            hidden = hidden.masked_scatter(image, self.tower(pixel_values, image_grid_thw).to(hidden.dtype))
        angles = self.rotary(position_ids)
        for layer in self.decoder:
            hidden = layer(hidden, angles, attention_mask, past_key_values)
        matrix = self.words.weight if self.config.tie_word_embeddings else self.logits.weight
        return SimpleNamespace(logits=self.last_norm(hidden) @ matrix.T)


class Rotary(nn.Module):
    """Frequency f turns with axis f modulo 3, while that axis has frequencies left."""

    def __init__(self, sizes: dict):
        super().__init__()
        self.half, self.theta, self.sections = sizes["head_dim"] // 2, sizes["theta"], sizes["sections"]

    def forward(self, positions_3BS: Tensor) -> Tensor:
        """Angles [B, S, head_dim / 2]."""
        chosen = []
        for frequency in range(self.half):
            axis = frequency % 3
            axis = axis if frequency < 3 * self.sections[axis] else 0
            chosen.append(positions_3BS[axis] * self.theta ** (-frequency / self.half))
        return torch.stack(chosen, dim=-1)


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, sizes: dict, number: int):
        super().__init__()
        width = sizes["width"]
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(sizes, number)
        self.mlp = nn.Sequential(nn.Linear(width, sizes["inner"]), nn.GELU(), nn.Linear(sizes["inner"], width))

    def forward(self, hidden: Tensor, angles: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        hidden = hidden + self.attention(self.before_attention(hidden), angles, mask, cache)
        return hidden + self.mlp(self.before_mlp(hidden))


class Attention(nn.Module):
    """Causal attention with grouped keys; queries and keys are normed, then rotated."""

    def __init__(self, sizes: dict, number: int):
        super().__init__()
        self.heads, self.groups, self.head_dim = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
        self.number = number
        self.queries = nn.Linear(sizes["width"], self.heads * self.head_dim)
        self.keys = nn.Linear(sizes["width"], self.groups * self.head_dim)
        self.values = nn.Linear(sizes["width"], self.groups * self.head_dim)
        self.query_norm, self.key_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        self.out = nn.Linear(self.heads * self.head_dim, sizes["width"])

    def forward(self, hidden: Tensor, angles: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        queries = _rotated(self.query_norm(self.queries(hidden).unflatten(-1, (self.heads, -1))), angles)
        keys = _rotated(self.key_norm(self.keys(hidden).unflatten(-1, (self.groups, -1))), angles).transpose(1, 2)
        values = self.values(hidden).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, self.number)
        keys, values = (each.repeat_interleave(self.heads // self.groups, dim=1) for each in (keys, values))
        scores = torch.einsum("bqnd,bnkd->bnqk", queries, keys) / self.head_dim**0.5
        num_queries, num_keys = scores.shape[2:]
        hidden_from = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1 + num_keys - num_queries)
        if mask is not None:
            hidden_from = hidden_from | (mask == 0)[:, None, None]
        weights = scores.masked_fill(hidden_from, torch.finfo(scores.dtype).min).softmax(-1)
        return self.out(torch.einsum("bnqk,bnkd->bqnd", weights, values).flatten(2))


def _rotated(values: Tensor, angles: Tensor) -> Tensor:
    """`values` [B, S, heads, head_dim] by `angles` [B, S, head_dim / 2]."""
    first, second = values.chunk(2, -1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Tower(nn.Module):
    """The vision tower: an image at a time."""

    def __init__(self, sizes: dict):
        super().__init__()
        self.patches = nn.Linear(3 * 8 * 8, sizes["width"], bias=False)
        self.blocks = nn.ModuleList(TowerLayer(sizes) for _ in range(sizes["layers"]))
        self.merge_norm = nn.LayerNorm(sizes["width"])
        self.merge = nn.Linear(sizes["width"], sizes["out"], bias=False)

    def forward(self, pixels: Tensor, grids: Tensor) -> Tensor:
        tokens = []
        for image in pixels.split(grids.prod(1).tolist()):
            hidden = self.patches(image)
            for block in self.blocks:
                hidden = block(hidden)
            tokens.append(self.merge(self.merge_norm(hidden).unflatten(0, (-1, 4)).mean(1)))
        return torch.cat(tokens)


class TowerLayer(nn.Module):
    """A layer of the tower: every patch sees every patch."""

    def __init__(self, sizes: dict):
        super().__init__()
        width = sizes["width"]
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)})
        inner = nn.Linear(width, sizes["inner"])
        self.mlp = nn.Sequential(inner, nn.GELU(approximate="tanh"), nn.Linear(sizes["inner"], width))
        self.heads = sizes["heads"]

    def forward(self, hidden: Tensor) -> Tensor:
        qkv = self.attention["qkv"](self.before_attention(hidden)).unflatten(1, (3, self.heads, -1))
        mixed = F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in qkv.unbind(1)))
        hidden = hidden + self.attention["out"](mixed.transpose(0, 1).flatten(1))
        return hidden + self.mlp(self.before_mlp(hidden))
