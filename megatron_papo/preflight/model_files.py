"""The files of the model folder: weights whole and in place, tokenizer, chat template, image processor.

A model that was downloaded in part is told before ranks start, by names and sizes: of each file of weights the header
is read, which says how long the file has to be. What the files hold is for the ranks to see (`weights/first_look.py`,
`data/processor_files.py`). Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_papo.config import Config
from megatron_papo.files.json_keys import read_json, shown
from megatron_papo.model.family import families, family_named, family_of
from megatron_papo.model.published_shapes import hub_name
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.weight_files import weight_files

_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_TEMPLATE_KEY = "chat_template"
_MAX_HEADER_BYTES = 100 * 2**20
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def faults_of_model_files(verb: str, config: Config) -> Iterator[str]:
    """A line a fault of the folders that the settings take weights and processor from; none for a folder that is not
    there, which `fault_of_missing_model` names."""
    model, reference = config.model, config.checkpoint.reference
    folder = model.path or model.checkpoint
    if folder is not None and folder.is_dir():
        yield from _processor_faults("model.path" if model.path else "model.checkpoint", folder)
    if model.path is not None and model.path.is_dir() and model.checkpoint is None and not model.random_init:
        yield from _weight_faults("model.path", model.path)
    if verb == "train" and config.loss.reference_coef > 0 and reference is not None and reference.is_dir():
        yield from _weight_faults("checkpoint.reference", reference)


def fault_of_processor(config: Config, shape: ModelShape) -> str | None:
    """Why the processor in the model folder belongs to another model than config.json: another family's class, or
    patches of another size than the vision tower takes. None where it does not, as far as its files tell."""
    folder = config.model.path or config.model.checkpoint
    if folder is None:
        return None
    key = "model.path" if config.model.path else "model.checkpoint"
    settings = {file: _settings(file) for name in _PROCESSORS if (file := folder / name).exists()}
    own = family_of(shape).module("shape").PROCESSOR
    for file, tree in settings.items():
        if (named := tree.get("processor_class", own)) != own and (other := _family_with(named)):
            return (
                f"{key}: {file}: processor_class: is {named}, of {other}; config.json is of {shape.model_type}, whose "
                f"folders name {own}"
            )
    # transformers reads the part of processor_config.json, and the other file only where that has none
    parts = [(file, tree["image_processor"]) for file, tree in settings.items() if "image_processor" in tree]
    for file, tree in (parts or list(settings.items()))[:1]:
        for name, theirs in shape.vision.patch_sizes.items():
            if isinstance(tree, dict) and tree.get(name, theirs) != theirs:
                return f"{key}: {file}: {name}: is {shown(tree[name])}, the vision tower of config.json takes {theirs}"
    return None


def _family_with(processor: Any) -> str | None:
    """The known family whose folders name this class of processor."""
    return next((name for name in families() if processor == family_named(name).module("shape").PROCESSOR), None)


def _settings(file: Path) -> dict[str, Any]:
    """A file of settings; none of one that cannot be read, which the ranks will name."""
    try:
        return read_json(file)
    except (ValueError, OSError):
        return {}


def fault_of_missing_model(config: Config) -> str | None:
    """What to do about a `model.path` that is not there, in one line: how to download it where its name may be one of
    the hub. None where something is there."""
    path = config.model.path
    if path is None or os.path.lexists(path):
        return None
    name = hub_name(str(path)) or str(path)
    if not _HUB_NAME.fullmatch(name):
        return f"model.path: {path}: no such folder"
    folder = path.name
    return (
        f"model.path: {path}: no such folder, and a name of the hub is not downloaded by itself: "
        f"`hf download {name} --local-dir {folder}`, then model.path={folder}"
    )


def _processor_faults(key: str, folder: Path) -> Iterator[str]:
    def lacks(names: tuple[str, ...]) -> bool:
        return not any((folder / name).exists() for name in names)

    for names, what in ((_TOKENIZERS, "a tokenizer"), (_PROCESSORS, "an image processor")):
        if lacks(names):
            yield f"{key}: {folder}: lacks {what}: none of {', '.join(names)}"
    if lacks(_TEMPLATES) and not any(_has_template(folder / name) for name in ("tokenizer_config.json", *_PROCESSORS)):
        yield f"{key}: {folder}: lacks a chat template: neither {_TEMPLATES[0]} nor the key in tokenizer_config.json"


def _has_template(file: Path) -> bool:
    """Whether the settings file has a chat template; True for one that cannot be read, which the ranks will name."""
    if not file.exists():
        return False
    try:
        return bool(read_json(file).get(_TEMPLATE_KEY))
    except (ValueError, OSError):
        return True


def _weight_faults(key: str, folder: Path) -> Iterator[str]:
    try:
        found = weight_files(folder)
    except (ValueError, OSError) as error:
        yield f"{key}: {error}"
        return
    for file in found.files:
        try:
            fault = _fault_of_length(file)
        except OSError as error:
            fault = str(error.strerror)
        if fault is not None:
            yield f"{key}: {file}: {fault}"


def _fault_of_length(file: Path) -> str | None:
    """Why a safetensors file is not whole: it ends before or behind the last tensor that its header tells of."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        beginning = opened.read(8)
        length = int.from_bytes(beginning, "little")
        if len(beginning) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            pointer = beginning.startswith(b"version ")
            also = ": a pointer of git-lfs, without the file itself (`git lfs pull`)" if pointer else ""
            return f"no whole safetensors file: {size:,} bytes{also}"
        text = opened.read(length)
    try:
        tensors = json.loads(text)
        ends = [facts["data_offsets"][1] for name, facts in tensors.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "its header is not readable: download it again"
    return None if size == needed else f"has {size:,} bytes where its header tells of {needed:,}: download it again"
