"""state.json, which says what a checkpoint folder is: known without importing Megatron-Core."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_papo.checkpoint.faults import DamagedCheckpoint

FORMAT = 1
STATE_FILE = "state.json"
_KEYS = {
    "format": int, "step": int, "serial": int, "layout": dict, "optimizer_step": int, "schedule_steps": int,
    "random_states": bool, "cursor": dict, "config": dict,
}  # fmt: skip


def is_checkpoint(folder: Path | str) -> bool:
    return (Path(folder) / STATE_FILE).is_file()


def read_state_file(folder: Path | str) -> dict[str, Any]:
    """The parsed state.json. Raises ValueError naming the file when there is none or it is of another format, and
    DamagedCheckpoint when it is not what any version writes."""
    file = Path(folder) / STATE_FILE
    try:
        tree = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file: not a checkpoint of this package") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{file}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DamagedCheckpoint(f"{file}: not JSON of a checkpoint: {type(tree).__name__}")
    if tree.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{file}: format {tree.get('format')!r}, this version reads {FORMAT}")
    wrong = [key for key, kind in _KEYS.items() if not isinstance(tree.get(key), kind)]
    if wrong:
        raise DamagedCheckpoint(f"{file}: without {', '.join(wrong)}")
    return tree
