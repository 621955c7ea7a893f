"""state.json, which says what a checkpoint folder is: known without importing Megatron-Core or torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 1
STATE_FILE = "state.json"


def is_checkpoint(folder: Path | str) -> bool:
    return (Path(folder) / STATE_FILE).is_file()


def read_state_file(folder: Path | str) -> dict[str, Any]:
    """The parsed state.json. Raises ValueError naming the file when it is missing, broken or of another format."""
    file = Path(folder) / STATE_FILE
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file: not a checkpoint of this package") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if tree.get("format") != FORMAT:
        raise ValueError(f"{file}: format {tree.get('format')!r}, this version reads {FORMAT}")
    return tree
