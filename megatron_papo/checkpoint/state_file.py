"""state.json, which says what a checkpoint folder is; reading it needs no Megatron-Core.

It is written last and stands for the whole folder: `checksums` are those of the other small files (checksums.py), and
`xxh3`, its last key, is the checksum of the rest of itself. A state.json of an older version has neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_papo.checkpoint.checksums import DIFFERS, file_sums, read_small, sum_of
from megatron_papo.distributed.agreement import DamagedCheckpoint
from megatron_papo.weights.weight_files import holds_weights

FORMAT = 1
STATE_FILE = "state.json"
_OWN_SUM = "xxh3"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "format": int, "step": int, "layout": dict, "optimizer_step": int, "schedule_steps": int, "random_states": bool,
    "cursor": dict, "config": dict, "serial": int,
}  # fmt: skip


def is_checkpoint(folder: Path | str) -> bool:
    """Whether `folder`, in which only checkpoints are expected (that of a run, say), is a checkpoint."""
    return (Path(folder) / STATE_FILE).is_file()


def names_checkpoint(folder: Path | str) -> bool:
    """Whether the weights of `folder`, a checkpoint or a Hugging Face folder, are those of a checkpoint.

    A folder in which transformers finds weights is a Hugging Face folder, whatever else lies in it.
    """
    return is_checkpoint(folder) and not holds_weights(folder)


def write_state_tree(folder: Path, tree: Mapping[str, Any]) -> None:
    """Writes state.json, with the checksums of all small files that are in `folder` by now."""
    (folder / STATE_FILE).write_bytes(_render({**tree, "checksums": file_sums(folder, but=(STATE_FILE,))}))


def read_state_file(folder: Path | str) -> dict[str, Any]:
    """The content of state.json, in which every value has its type.

    Raises ValueError naming the file when it is missing or of another format, DamagedCheckpoint when it is not as it
    was written.
    """
    file = Path(folder) / STATE_FILE
    try:
        data = read_small(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file: not a checkpoint of this package") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from None
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DamagedCheckpoint(f"{file}: the top level must be a mapping, not {type(tree).__name__}")
    vouched = _OWN_SUM in tree or "checksums" in tree
    if vouched and _render({name: value for name, value in tree.items() if name != _OWN_SUM}) != data:
        raise DamagedCheckpoint(f"{file}: {DIFFERS}")
    if tree.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{file}: format {tree['format']!r}, this version reads {FORMAT}")
    _check_types(file, tree)
    return tree


def _render(tree: Mapping[str, Any]) -> bytes:
    """The bytes of the file, its own checksum last. Parsing and rendering them gives the same bytes again."""
    own = sum_of(json.dumps(tree, indent=2).encode())
    return (json.dumps({**tree, _OWN_SUM: own}, indent=2) + "\n").encode()


def _check_types(file: Path, tree: Mapping[str, Any]) -> None:
    for key, kind in _TYPES.items():
        if key not in tree:
            raise DamagedCheckpoint(f"{file}: {key}: missing")
        if not isinstance(tree[key], kind) or (kind is int and isinstance(tree[key], bool)):
            raise DamagedCheckpoint(f"{file}: {key}: is of type {type(tree[key]).__name__}")
    if not isinstance(tree.get("metric"), float | int | None):
        raise DamagedCheckpoint(f"{file}: metric: is of type {type(tree['metric']).__name__}")
    sums = tree.get("checksums", {})
    if not isinstance(sums, dict) or any("/" in name or not isinstance(each, str) for name, each in sums.items()):
        raise DamagedCheckpoint(f"{file}: checksums: is no list of files")
