"""Files of a Hugging Face folder: safetensors read slice by slice, and written so that a folder appears whole.

Knows tensors by their published names and the files beside them; knows nothing of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_papo.checkpoint import side_files
from megatron_papo.checkpoint.atomic import publish
from megatron_papo.checkpoint.names import parameter_table, published_name
from megatron_papo.checkpoint.slices import Index
from megatron_papo.files import make_way
from megatron_papo.model.json_keys import read_json, shown, shown_name
from megatron_papo.model.shape import ModelShape

INDEX_FILE = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
_SIDE_FILES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_NOT_SIDE_FILES = ("*.index.json", "state.json", "metadata.json", "checksums.json", "manifest.json")
"""The weights' own, a checkpoint's own, and what a conversion says of the folder it wrote."""
MAX_SHOWN_FAULTS = 10


class HuggingFaceReader:
    """The tensors of a folder by published name, read slice by slice. Use it as a context.

    Raises ValueError naming the file for a folder without safetensors and for a file that is missing or broken.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._stack = ExitStack()
        self._places: dict[str, tuple[Path, Any]] = {}

    def __enter__(self) -> HuggingFaceReader:
        weights, homes = weight_files(self.folder), Homes()
        with ExitStack() as stack:
            for file in weights.files:
                try:
                    handle = stack.enter_context(safe_open(file, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"{file}: not a whole safetensors file: {error}") from None
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    homes.add(name, file, weights.index)
                    self._places[published_name(name)] = (file, handle.get_slice(name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._places.clear()
        self._stack.close()

    def shapes(self) -> dict[str, tuple[Path, tuple[int, ...]]]:
        """name -> (file, shape) of every tensor."""
        return {name: (file, tuple(part.get_shape())) for name, (file, part) in self._places.items()}

    def read(self, name: str, index: Index) -> Tensor:
        """`tensor[index]` of one tensor, its ranges along the leading axes; no other bytes are read."""
        return self._places[name][1][index]

    def dtype(self, name: str) -> torch.dtype:
        return self.read(name, (slice(0, 1),)).dtype

    def check(self, shape: ModelShape) -> None:
        """Raises ValueError with a line for each missing, extra or misshapen tensor."""
        check_tensors(self.folder, self.shapes(), shape, weight_files(self.folder).index)


@dataclass(frozen=True)
class WeightFiles:
    files: list[Path]
    index: dict[str, str]
    """tensor -> file, as the index says; empty without one."""


def weight_files(folder: Path) -> WeightFiles:
    """The safetensors files of a folder; a link is followed to wherever the file lies, as the hub's cache has them.

    Raises ValueError naming those that the index names and that are not there, or are no regular files beside it.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder}: holds no *.safetensors")
        return WeightFiles(_regular(files), {})
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: not an index of safetensors files")
    for tensor, name in weight_map.items():
        # `.name` would forget a folder, and what lies in another folder is another file of that name
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {shown_name(tensor)}: said to lie in {shown(name)}, which is no *.safetensors file beside "
                "the index"
            )
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{index}: names files that are not there: {', '.join(missing[:MAX_SHOWN_FAULTS])}")
    return WeightFiles(_regular([folder / name for name in names]), weight_map)


def _regular(files: list[Path]) -> list[Path]:
    """Raises ValueError for a pipe or a device, at which a reader would wait."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: not a regular file")
    return files


class Homes:
    """Which file each tensor lies in, as the files are opened one after the other."""

    def __init__(self) -> None:
        self._files: dict[str, Path] = {}

    def add(self, name: str, file: Path, index: Mapping[str, str]) -> None:
        """Raises ValueError where it lies in a second place, or elsewhere than the index says: which one holds?"""
        if index.get(name, file.name) != file.name:
            raise ValueError(f"{file}: {shown_name(name)}: lies here, but in {index[name]} by {INDEX_FILE}")
        published = published_name(name)
        if published in self._files:
            raise ValueError(f"{file}: {shown_name(name)}: lies in {self._files[published].name} already")
        self._files[published] = file


def check_tensors(
    folder: Path, found: Mapping[str, tuple[Path, tuple[int, ...]]], shape: ModelShape, index: Mapping[str, str]
) -> None:
    """Raises ValueError with a line for each tensor of the model that is missing, extra or misshapen in `found`."""
    expected = {s.name: s.shape for entry in parameter_table(shape).values() for s in entry.sources}
    places = {published_name(name): folder / file for name, file in index.items()}
    faults = [f"{places.get(name, folder)}: {name} {expected[name]}: missing" for name in expected if name not in found]
    for name, (file, size) in sorted(found.items()):
        if name in expected and size != expected[name]:
            faults.append(f"{file}: {name}: expected shape {expected[name]}, found {size}")
        # a tied head is the word embedding once more; transformers ignores it too
        elif name not in expected and not (name == "lm_head.weight" and shape.tie_word_embeddings):
            faults.append(f"{file}: {shown_name(name)} {size}: no such tensor in the model that config.json describes")
    raise_faults(faults)


def raise_faults(faults: list[str]) -> None:
    """Raises ValueError with the first of `faults`, a line each, if there are any."""
    if faults:
        more = [f"... and {len(faults) - MAX_SHOWN_FAULTS} more"] if len(faults) > MAX_SHOWN_FAULTS else []
        raise ValueError("\n".join(faults[:MAX_SHOWN_FAULTS] + more))


def write_folder(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, source: Path, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """The named tensors as a Hugging Face folder, in files of at most `max_file_bytes` (but one tensor at least).

    Config, tokenizer, processor and chat template are copied from `source`. The folder appears whole or not at all.
    """
    partial = folder.with_name(f"{folder.name}.tmp")
    make_way(partial)
    partial.mkdir(parents=True)
    dtype = _write_tensors(tensors, partial, max_file_bytes)
    copy_side_files(source, partial)
    set_dtype(partial / "config.json", dtype)
    publish(partial, folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Everything of a Hugging Face folder, or of one within a checkpoint, but its weights.

    Raises ValueError when `source` has no config.json, and as `side_files.copy`.
    """
    for file in list_side_files(source):
        side_files.copy(file, target / file.name)


def check_side_files(source: Path) -> list[str]:
    """Why which files will not be copied, a line each, before a run counts on it. Raises as `copy_side_files`."""
    return [reason for file in list_side_files(source) if (reason := side_files.check(file))]


def list_side_files(source: Path) -> list[Path]:
    """Raises ValueError when there is no config.json."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source}: no config.json")
    others = {file for pattern in _NOT_SIDE_FILES for file in source.glob(pattern)}
    return [file for file in sorted(source.iterdir()) if file.suffix in _SIDE_FILES and file not in others]


def _write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path, max_bytes: int) -> torch.dtype:
    """Writes the safetensors files and, when they are several, their index; the dtype of the tensors."""
    files: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > max_bytes:
            files.append(_write_file(waiting, folder, len(files)))
            waiting, size = {}, 0
        waiting[name] = tensor.detach().cpu().contiguous()
        size, total, dtype = size + tensor.nbytes, total + tensor.nbytes, tensor.dtype
    files.append(_write_file(waiting, folder, len(files)))
    final = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    if len(files) == 1:
        final = ["model.safetensors"]
    for number, name in enumerate(final):
        (folder / _numbered(number)).rename(folder / name)
    if len(files) > 1:
        weight_map = {tensor: file for file, names in zip(final, files) for tensor in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return dtype


def _numbered(number: int) -> str:
    return f"part-{number}.safetensors"


def _write_file(tensors: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    save_file(tensors, folder / _numbered(number), metadata={"format": "pt"})
    return list(tensors)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """transformers loads in the dtype that the config names, so it must name the one that was written."""
    tree = read_json(config)
    tree["dtype"] = str(dtype).removeprefix("torch.")
    tree.pop("torch_dtype", None)
    for section in ("text_config", "vision_config"):
        for key in ("dtype", "torch_dtype"):
            if isinstance(tree.get(section), dict) and key in tree[section]:
                tree[section][key] = tree["dtype"]
    config.write_text(json.dumps(tree, indent=2) + "\n")
