"""The tokenizer and image processor of a model folder, which is not trusted: read without code of its own, from files
that end, with patches of a size that pictures have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_papo.config import DataConfig
from megatron_papo.files.held_file import read_small

_READ_WHOLE = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_MAX_FILE_BYTES = 256 * 2**20
"""The largest tokenizers have a tenth of it."""
THINK_TAGS = ("<think>", "</think>")
"""Around what a model writes before its answer."""
_MAX_PATCH = 256
"""Pixels along an edge; a larger one would enlarge every picture to it."""


def read_processor(folder: Path) -> Any:
    """transformers' processor. Raises ValueError naming the folder and what it lacks, in one line."""
    from transformers import AutoProcessor  # slow to import

    if not folder.is_dir():
        raise ValueError(f"model.path: {folder} is no folder")
    _check_files(folder)
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(f"model.path: {folder} has neither preprocessor_config.json nor processor_config.json")
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any type, by what transformers stumbles over
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"model.path: cannot load the processor of {folder}: {reason[0]}") from error
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise ValueError(f"model.path: the processor of {folder} has no {part.replace('_', ' ')}")
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        size = getattr(processor.image_processor, name, None)
        if type(size) is not int or not 1 <= size <= _MAX_PATCH:
            raise ValueError(f"model.path: the image processor of {folder} has {name} {str(size)[:40]}")
    processor.chat_template = processor.tokenizer.chat_template = default_template(processor, folder)
    return processor


def default_template(processor: Any, folder: Path) -> str:
    """The folder's chat template; of several with names the one that is called default, which transformers takes too.

    Raises ValueError where there is none.
    """
    template = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(template, dict) and template:
        if "default" not in template:
            names = ", ".join(sorted(map(str, template)))[:80]
            raise ValueError(
                f"model.path: {folder} has chat templates by name, {names}, and none that is named default"
            )
        template = template["default"]
    if not template or not isinstance(template, str):
        raise ValueError(f"model.path: {folder} has no chat template")
    return template


def text_tokenizer(tokenizer: Any, template: str) -> Any:
    """The tokenizer that makes token ids of prompts and answers: the folder's own, but without tokens for the think
    tags where the chat template never writes these.

    Checkpoints that do not think by themselves may share their vocabulary with others that do: their tokens of the tags
    were never trained, and a prompt that asks for the tags would show the model nothing. Without these tokens the tags
    are plain text, as in a vocabulary that does not have them.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    if any(tag in template for tag in THINK_TAGS) or added.isdisjoint(THINK_TAGS):
        return tokenizer
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in THINK_TAGS]
    backend = Tokenizer.from_str(json.dumps(tree))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map)


def pixel_bounds(image_processor: Any, folder: Path, data: DataConfig) -> tuple[int, int]:
    """The areas between which pictures are brought: of `data`, else the folder's own as transformers has them.

    Raises ValueError where there are none, or the smaller exceeds the larger.
    """
    size, bounds, origin = image_processor.size, [], []
    for key, given, edge in (
        ("min_pixels", data.min_pixels, "shortest_edge"),
        ("max_pixels", data.max_pixels, "longest_edge"),
    ):
        value: Any = given if given is not None or edge not in size else size[edge]
        if type(value) is not int or value < 1:
            where = f"model.path: the image processor of {folder}"
            raise ValueError(f"{where} names no area for data.{key}: its size is {str(size)[:80]}")
        bounds.append(value)
        origin.append(f"data.{key}={value}" if given is not None else f"the {value} of {folder}'s image processor")
    least, most = bounds
    if least > most:
        raise ValueError(f"data.min_pixels: {origin[0]} exceeds {origin[1]}, data.max_pixels")
    return least, most


def _check_files(folder: Path) -> None:
    """Raises ValueError for a pipe, a device or a file of gigabytes among those that the libraries read whole."""
    for file in (*folder.iterdir(), *folder.glob("additional_chat_templates/*")):
        if file.suffix in _READ_WHOLE and (not file.is_file() or file.stat().st_size > _MAX_FILE_BYTES):
            raise ValueError(f"model.path: {file}: not a regular file of at most {_MAX_FILE_BYTES} bytes")


def listed_ends(file: Path) -> list[int]:
    """Tokens that end a response by generation_config.json; none without one."""
    if not file.exists():
        return []
    try:
        tree = json.loads(read_small(file, _MAX_FILE_BYTES))
        listed = tree.get("eos_token_id")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{file}: not settings of generation: {error}") from None
    ends = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise ValueError(f"{file}: eos_token_id: is {str(listed)[:80]}, not ids of tokens")
    return ends
