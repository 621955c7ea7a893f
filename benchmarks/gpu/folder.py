"""The model that the GPU check runs: a folder without weights, and weights drawn where they are needed.

It has the true shape of a published model, or that of the other benchmarks (`rows.SHAPES`). Matrices have a standard
deviation of 0.02, norms are one. A weight is drawn on the device from its Hugging Face name, so that trainer,
transformers and vLLM get the same ones without a file of 7 GB. The tokenizer of a published model has the published
size and special tokens; its words are made up.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.rows import SHAPES
from benchmarks.models import MAX_PIXELS, MIN_PIXELS, NUM_BYTES, write_model
from examples.quickstart.model_folder import byte_tokenizer, write_processor
from megatron_papo.distributed.accelerator import device
from megatron_papo.distributed.layout import layout
from megatron_papo.model.family import family_of
from megatron_papo.model.parameter_map import Index, fill_shard, parameter_table
from megatron_papo.model.published_shapes import published_config
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.held import held_parameters

STD = 0.02
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_FIRST_SPECIAL = 151_643
"""Id of the first special token of the published tokenizer; the tokens above are in its order."""


@contextmanager
def model_folder(shape: str) -> Iterator[Path]:
    """A folder with `model` in it: config.json, tokenizer, processor. Removed afterwards."""
    with TemporaryDirectory(prefix="papo_gpu_") as name:
        if shape.startswith("tiny"):
            write_model(Path(name) / "model", family=SHAPES[shape])
        else:
            write_published(Path(name) / "model", SHAPES[shape])
        yield Path(name)


def write_published(folder: Path, name: str) -> Path:
    """Everything of the published model `name` but weights; returns `folder`."""
    folder.mkdir(parents=True)
    ids = {"eos_token_id": _FIRST_SPECIAL + 2, "pad_token_id": _FIRST_SPECIAL}
    config = published_config(name) | ids
    if "text_config" in config:
        config["text_config"] = config["text_config"] | ids
    family = config["model_type"]
    write_processor(folder, _tokenizer(), family=family, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, words of four letters that nothing is ever joined to, and the special tokens at their published ids."""
    words = ("".join(four) for four in product(ascii_lowercase, repeat=4))
    return byte_tokenizer(islice(words, _FIRST_SPECIAL - NUM_BYTES), special=_SPECIAL, max_length=32_768)


def drawn_tensors(shape: ModelShape, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name of transformers' parameter, tensor on the device) of the whole model; a tied head is left out."""
    in_module = family_of(shape).module("parameters").module_name
    for name, size in _sizes(shape).items():
        yield in_module(name), _draw(name, size, dtype)


@torch.no_grad()
def draw_into(model: nn.Module, shape: ModelShape) -> None:
    """The same weights into a policy; what pads it is zero."""
    sizes, here, dtype = _sizes(shape), layout(), next(model.parameters()).dtype

    def read(name: str, index: Index) -> Tensor:
        return _draw(name, sizes[name], dtype)[index]

    for part in held_parameters(model, shape, here.tensor_size).values():
        fill_shard(part.entry, part.tensor.detach(), here.tensor_rank, read)


def _sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {source.name: source.shape for entry in parameter_table(shape).values() for source in entry.sources}


def _draw(name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(size) == 1 and name.endswith("weight"):
        return torch.ones(size, dtype=dtype, device=device())
    generator = torch.Generator(device()).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(size, dtype=dtype, device=device()).normal_(0.0, STD, generator=generator)
