"""The toy family as plain torch, one sequence at a time: what parity is held to.

Has of transformers' models what the tests call: `config`, `save_pretrained`, and a forward pass with its argument names
that gives logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.toy_family import MODEL_TYPE

TOKENS = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262}


def toy_config(*, layers: int = 3, tie: bool = False, vocabulary: int = 275, inner: int = 90) -> SimpleNamespace:
    """A small model; `inner`, the MLP's width, and the vocabulary need padding under tensor parallelism."""
    return SimpleNamespace(
        model_type=MODEL_TYPE,
        decoder={
            "layers": layers, "width": 48, "inner": inner, "heads": 4, "kv_heads": 2, "head_dim": 24,
            "vocabulary": vocabulary, "theta": 10_000.0, "sections": [6, 3, 3],
        },
        tower={"layers": 2, "width": 32, "inner": 44, "heads": 4, "out": 48},
        tie_word_embeddings=tie,
        **TOKENS,
    )  # fmt: skip


class Toy(nn.Module):
    """Word embedding, tower, decoder and output matrix."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        width, vocabulary = config.decoder["width"], config.decoder["vocabulary"]
        self.tower = Tower(config.tower)
        self.words = nn.Embedding(vocabulary, width)
        self.decoder = nn.ModuleList(Layer(config.decoder) for _ in range(config.decoder["layers"]))
        self.last_norm = nn.LayerNorm(width)
        if not config.tie_word_embeddings:
            self.logits = nn.Linear(width, vocabulary, bias=False)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None, image_grid_thw: Tensor | None, position_ids: Tensor, **_
    ) -> SimpleNamespace:
        """Logits [1, S, vocabulary] of one sequence; `position_ids` [3, 1, S]."""
        hidden = self.words(input_ids[0])
        if pixel_values is not None:
            image = (input_ids[0] == self.config.image_token_id)[:, None].expand_as(hidden)
            hidden = hidden.masked_scatter(image, self.tower(pixel_values, image_grid_thw))
        angles = self._angles(position_ids[:, 0])
        for layer in self.decoder:
            hidden = layer(hidden, angles)
        matrix = self.words.weight if self.config.tie_word_embeddings else self.logits.weight
        return SimpleNamespace(logits=(self.last_norm(hidden) @ matrix.T)[None])

    def _angles(self, positions_3S: Tensor) -> Tensor:
        """[S, head_dim / 2]: frequency f turns with axis f modulo 3, while that axis has frequencies left."""
        decoder, chosen = self.config.decoder, []
        half = decoder["head_dim"] // 2
        for frequency in range(half):
            axis = frequency % 3
            axis = axis if frequency < 3 * decoder["sections"][axis] else 0
            chosen.append(positions_3S[axis] * decoder["theta"] ** (-frequency / half))
        return torch.stack(chosen, dim=1)

    def save_pretrained(self, folder: Path) -> None:
        """Writes config.json and the weights."""
        (folder / "config.json").write_text(json.dumps(vars(self.config)))
        save_file(dict(self.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, sizes: dict):
        super().__init__()
        width = sizes["width"]
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(sizes)
        self.mlp = nn.Sequential(nn.Linear(width, sizes["inner"]), nn.GELU(), nn.Linear(sizes["inner"], width))

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.before_attention(hidden), angles)
        return hidden + self.mlp(self.before_mlp(hidden))


class Attention(nn.Module):
    """Causal attention with grouped keys; queries and keys are normed, then rotated."""

    def __init__(self, sizes: dict):
        super().__init__()
        self.heads, self.groups, self.head_dim = sizes["heads"], sizes["kv_heads"], sizes["head_dim"]
        self.queries = nn.Linear(sizes["width"], self.heads * self.head_dim)
        self.keys = nn.Linear(sizes["width"], self.groups * self.head_dim)
        self.values = nn.Linear(sizes["width"], self.groups * self.head_dim)
        self.query_norm, self.key_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)
        self.out = nn.Linear(self.heads * self.head_dim, sizes["width"])

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        queries = _rotated(self.query_norm(self.queries(hidden).unflatten(1, (self.heads, -1))), angles)
        keys = _rotated(self.key_norm(self.keys(hidden).unflatten(1, (self.groups, -1))), angles)
        values = self.values(hidden).unflatten(1, (self.groups, -1))
        keys, values = (each.repeat_interleave(self.heads // self.groups, dim=1) for each in (keys, values))
        scores = torch.einsum("qnd,knd->nqk", queries, keys) / self.head_dim**0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.out(torch.einsum("nqk,knd->qnd", weights, values).flatten(1))


def _rotated(values: Tensor, angles: Tensor) -> Tensor:
    first, second = values.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


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
