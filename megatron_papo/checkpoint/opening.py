"""A checkpoint's small files, read and checked: what it says of itself, where which box lies, its checksums.

Not collective, and nothing of Megatron-Core: the converter opens checkpoints too. Boxes are read elsewhere (reading.py,
conversion/checkpoint_files.py), and checked there by `Opened.check_box`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_papo.checkpoint.archive import METADATA_FILE, parse_metadata
from megatron_papo.checkpoint.checksums import CHECKSUMS_FILE, DIFFERS, read_box_sums, read_checked
from megatron_papo.checkpoint.state_file import read_state_file
from megatron_papo.distributed.agreement import DamagedCheckpoint

FORMAT_FILE = "metadata.json"
"""By which Megatron-Core knows the format."""
_OWN_FILES = (METADATA_FILE, FORMAT_FILE, CHECKSUMS_FILE)


@dataclass(frozen=True)
class Opened:
    folder: Path
    saved: dict[str, Any]
    """state.json."""
    metadata: Metadata
    box_sums: Mapping[tuple[str, int], tuple[int, str]] | None
    """(file, offset) -> length and checksum; None: of an older version."""

    def check_box(self, name: str, file: str, offset: int, length: int, found: str) -> None:
        """Raises DamagedCheckpoint unless `found` is the sum of the box of the tensor `name`."""
        if self.box_sums is not None and self.box_sums.get((file, offset)) != (length, found):
            raise DamagedCheckpoint(f"{self.folder / file}: {name}: {DIFFERS}")

    def remarks(self) -> list[str]:
        """A line each for what is no reason to refuse the checkpoint: without checksums, or a file of the Hugging Face
        folder's (config, tokenizer) that has changed. Reads these files."""
        sums = self.saved.get("checksums")
        if sums is None:
            return [f"{self.folder} has no checksums: written by an older version; damage would not be noticed"]
        found = []
        for name in sums:
            try:
                if name not in _OWN_FILES:
                    read_checked(self.folder, name, sums)
            except DamagedCheckpoint as error:
                found.append(f"{error}; resuming does not need it")
        return found


def open_checkpoint(folder: Path | str) -> Opened:
    """Raises DamagedCheckpoint, a line naming the file, for what cannot be read or is not as it was written, and
    ValueError for a folder that is no checkpoint of this version."""
    folder = Path(folder)
    saved = read_state_file(folder)
    sums = saved.get("checksums")
    box_sums = None if sums is None else read_box_sums(folder, sums)
    data = read_checked(folder, METADATA_FILE, sums)
    read_checked(folder, FORMAT_FILE, sums)
    metadata = parse_metadata(data, folder / METADATA_FILE)
    for file in {place.relative_path for place in metadata.storage_data.values()}:
        _check_inside(folder, file)
    return Opened(folder, saved, metadata, box_sums)


def _check_inside(folder: Path, name: str) -> None:
    """A link may give a file another place, but in the folder."""
    file = folder / name
    if file.is_symlink() and file.resolve().parent != folder.resolve():
        raise DamagedCheckpoint(f"{file}: a link to what is outside of the folder")
