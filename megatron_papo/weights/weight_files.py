"""Finds the files with the weights of a Hugging Face folder: those that transformers reads, and no others.

These are `model.safetensors` where it exists, whatever lies beside it; otherwise the files that the index names.
Weights under any other name are refused: transformers would not read them, so nobody has ever tried them. Opens no
weights and imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_papo.files.json_keys import read_json, shown, shown_name

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
MAX_SHOWN_FAULTS = 10


@dataclass(frozen=True)
class WeightFiles:
    """The files with the weights of a folder."""

    files: list[Path]
    index: dict[str, str]
    """Name of a tensor -> name of its file, by the index; empty where there is no index or it is not read."""
    left_out: list[str]
    """Names of files beside them that look like weights and are not read."""

    def note(self) -> str | None:
        """One line that says which files are left out; None where there are none."""
        if not self.left_out:
            return None
        read = INDEX_FILE if self.index else f"{WEIGHTS_FILE} alone"
        return f"{self.files[0].parent}: {_listed(self.left_out)}: not read; weights are those of {read}"


def holds_weights(folder: Path | str) -> bool:
    """Whether transformers finds weights in safetensors files in this folder."""
    return any((Path(folder) / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def weight_files(folder: Path) -> WeightFiles:
    """The safetensors files of a folder. Links are followed to any place, since the hub's cache consists of them.

    Raises ValueError for a folder in which transformers finds none, and for files of the index that do not exist or are
    no regular files beside it.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if (folder / _ADAPTER).exists():
        raise ValueError(
            f"{folder / _ADAPTER}: an adapter, which transformers adds where it can: merge it, or take it out"
        )
    if single.exists():
        return WeightFiles(_regular([single]), {}, _others(folder, {WEIGHTS_FILE}))
    if not index.exists():
        others = _others(folder, set())
        there = f"; {_listed(others)} would not be read by transformers" if others else ""
        raise ValueError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{there}")
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{index}: names files that are not there: {', '.join(missing[:MAX_SHOWN_FAULTS])}")
    return WeightFiles(_regular([folder / name for name in names]), weight_map, _others(folder, {INDEX_FILE, *names}))


def _weight_map(index: Path) -> dict[str, str]:
    tree = read_json(index)
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: not an index of safetensors files")
    if not isinstance(tree.get("metadata"), dict):
        raise ValueError(f"{index}: has no metadata, without which transformers does not read it")
    for tensor, name in weight_map.items():
        # a file in another folder is not the file of that name beside the index
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {shown_name(tensor)}: said to lie in {shown(name)}, which is no *.safetensors file beside "
                "the index"
            )
    return weight_map


def _others(folder: Path, read: set[str]) -> list[str]:
    names = (file.name for pattern in ("*.safetensors", "*.safetensors.index.json") for file in folder.glob(pattern))
    return sorted(name for name in names if name not in read)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown_name, names[:3])) + more


def _regular(files: list[Path]) -> list[Path]:
    """The files themselves. Raises ValueError for a pipe or a device, from which reading could wait for ever."""
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: not a regular file")
    return files
