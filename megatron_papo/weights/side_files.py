"""Copies of the small files of a model folder: settings, tokenizer, chat template.

The copies go into checkpoints and exports, which people publish, and the folder may come from a stranger: a link in it
could lead to any file of this machine, such as a key or a password. So links are not followed, except in the hub's
cache, whose model folders consist of links into the `blobs` beside them. A fault in a file that every model needs is an
error; any other file with a fault is left out.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_papo.files.held_file import HeldFile, hold

_MAX_BYTES = 256 * 2**20
"""The largest file that is copied; the largest tokenizers have a tenth of it."""
_NEEDED = {
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
}  # fmt: skip


def copy(file: Path, target: Path) -> None:
    """Copies the file's bytes to `target`, or nothing where `check` gives a reason. Raises as `check`, and OSError."""
    if check(file) is not None:
        return
    with hold(file) as opened:
        if _fault(file, opened) is None:  # another file may stand there since `check`
            with opened.open() as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def check(file: Path) -> str | None:
    """The reason why the file is not copied; None where it is. Raises ValueError with it for a file that models
    need."""
    try:
        with hold(file) as opened:
            fault = _fault(file, opened)
    except OSError as error:
        fault = str(error.strerror)
    if fault is not None and file.name in _NEEDED:
        raise ValueError(f"{file}: {fault}")
    return None if fault is None else f"{file}: {fault}: left out of checkpoints and exports"


def _fault(file: Path, opened: HeldFile) -> str | None:
    folder = Path(os.path.realpath(file.parent))
    if opened.place != folder / file.name and opened.place.parent != _blobs(folder):
        return f"a link to {opened.place}; only what lies in the folder itself is copied"
    if not opened.is_file:
        return "not a regular file"
    if opened.num_bytes > _MAX_BYTES:
        return f"{opened.num_bytes} bytes, more than the {_MAX_BYTES} that such files have"
    return None


def _blobs(folder: Path) -> Path | None:
    """The folder with the bytes of a folder `models--*/snapshots/REVISION` in the hub's cache; None for other
    folders."""
    snapshots, repository = folder.parent, folder.parent.parent
    in_cache = snapshots.name == "snapshots" and repository.name.startswith("models--")
    return repository / "blobs" if in_cache else None
