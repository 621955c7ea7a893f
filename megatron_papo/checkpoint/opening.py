"""Opens a checkpoint: its small files, read and checked, say what it is, where each box lies, and its checksums.

One process can call this without others, and without Megatron-Core: the converter opens checkpoints too. Boxes are read
elsewhere (box_reading.py, conversion/checkpoint_files.py), and compared there by `Opened.check_box`.
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
"""The file by which Megatron-Core recognizes the format."""
_OWN_FILES = (METADATA_FILE, FORMAT_FILE, CHECKSUMS_FILE)


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose small files were read and are as they were written."""

    folder: Path
    saved: dict[str, Any]
    """The content of state.json."""
    metadata: Metadata
    box_sums: Mapping[tuple[str, int], tuple[int, str]] | None
    """Length and checksum of each box, by file and offset; None for a checkpoint of an older version."""

    def check_box(self, name: str, file: str, offset: int, length: int, digest: str) -> None:
        """Raises DamagedCheckpoint unless `digest` is the checksum of this box of the tensor `name`."""
        if self.box_sums is not None and self.box_sums.get((file, offset)) != (length, digest):
            raise DamagedCheckpoint(f"{self.folder / file}: {name}: {DIFFERS}")

    def remarks(self) -> list[str]:
        """A line for each fault that is no reason to refuse the checkpoint: that it has no checksums, or that a file of
        the Hugging Face folder (config, tokenizer) has changed. Reads these files."""
        sums = self.saved.get("checksums")
        if sums is None:
            return [f"{self.folder} has no checksums: written by an older version; damage would not be noticed"]
        remarks = []
        for name in sums:
            try:
                if name not in _OWN_FILES:
                    read_checked(self.folder, name, sums)
            except DamagedCheckpoint as error:
                remarks.append(f"{error}; resuming does not need it")
        return remarks


def open_checkpoint(folder: Path | str) -> Opened:
    """Reads and checks the small files of the checkpoint in `folder`.

    Raises DamagedCheckpoint, a line naming the file, for what cannot be read or is not as it was written, and
    ValueError for a folder that is no checkpoint of this version.
    """
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
    """A file may be a link to another name in the folder, but not to a file outside of it."""
    file = folder / name
    if file.is_symlink() and file.resolve().parent != folder.resolve():
        raise DamagedCheckpoint(f"{file}: a link to what is outside of the folder")
