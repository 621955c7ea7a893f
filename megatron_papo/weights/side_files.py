"""Copies of the small files of a model folder: settings, tokenizer, chat template.

They go into checkpoints and exports, which people publish, and the folder may be a stranger's: a link in it could lead
to any file of this machine, a key or a password. So links are left out, but for those of the hub's cache, whose model
folders are links into the `blobs` beside them. Without one of the files that make a model, nothing is copied.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_papo.files.held_file import HeldFile, hold

_MAX_BYTES = 256 * 2**20
"""The largest tokenizers have a tenth of it."""
_NEEDED = {
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
}  # fmt: skip


def copy(file: Path, target: Path) -> None:
    """The file's bytes to `target`, or nothing where `check` has a reason. Raises as `check`, and OSError."""
    if check(file) is not None:
        return
    with hold(file) as held:
        if _fault(file, held) is None:  # what was looked at may be another file by now
            with held.open() as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def check(file: Path) -> str | None:
    """Why the file is not copied; None where it is. Raises ValueError for a file that no model goes without."""
    try:
        with hold(file) as held:
            fault = _fault(file, held)
    except OSError as error:
        fault = str(error.strerror)
    if fault is not None and file.name in _NEEDED:
        raise ValueError(f"{file}: {fault}")
    return None if fault is None else f"{file}: {fault}: left out of checkpoints and exports"


def _fault(file: Path, held: HeldFile) -> str | None:
    folder = Path(os.path.realpath(file.parent))
    if held.place != folder / file.name and held.place.parent != _blobs(folder):
        return f"a link to {held.place}; only what lies in the folder itself is copied"
    if not held.is_file:
        return "not a regular file"
    if held.num_bytes > _MAX_BYTES:
        return f"{held.num_bytes} bytes, more than the {_MAX_BYTES} that such files have"
    return None


def _blobs(folder: Path) -> Path | None:
    """Where `models--*/snapshots/REVISION` of the hub's cache has its bytes; None for any other folder."""
    snapshots, repository = folder.parent, folder.parent.parent
    in_cache = snapshots.name == "snapshots" and repository.name.startswith("models--")
    return repository / "blobs" if in_cache else None
