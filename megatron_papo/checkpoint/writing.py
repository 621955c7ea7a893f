"""Boxes of tensors to files: Megatron's checkpoint format through torch's own writer, within this process.

Megatron's own strategy starts a manager process for its asynchronous writers, which imports the main module again, and
needs psutil; what it asks of all ranks goes through the group of the training, which a background thread must not use.
torch checks that the boxes of all ranks cover every tensor exactly once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from megatron_papo.checkpoint.faults import RanksFailed, fault_of

Boxes = dict[str, Any]
"""What torch's writer takes: a name of the checkpoint → this rank's boxes of it, or pickled bytes."""


def own_boxes(tree: Mapping[str, ShardedBase]) -> dict[str, ShardedBase]:
    """Those that this rank writes; the others repeat what another rank writes."""
    return {name: part for name, part in tree.items() if is_main_replica(part.replica_id)}


def to_boxes(own: Mapping[str, ShardedBase]) -> Boxes:
    """Objects are pickled here; tensors are referred to."""
    common = ShardedObject("common_state", {}, (1,), (0,), replica_id=dist.get_rank())  # Megatron's reader wants one
    by_key: dict[str, list[ShardedBase]] = {}
    for part in (*own.values(), *own_boxes({"": common}).values()):
        by_key.setdefault(part.unique_key if isinstance(part, ShardedObject) else part.key, []).append(part)
    return mcore_to_pyt_state_dict(by_key, False)


@torch.no_grad()
def write_boxes(folder: Path, boxes: Boxes, group: dist.ProcessGroup) -> None:
    """Writes the boxes of all ranks of `group` into the empty `folder`, forced to disk. Raises `RanksFailed`."""
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        torch.distributed.checkpoint.save(boxes, storage_writer=_Writer(folder), planner=planner, process_group=group)
    except CheckpointException as error:
        raise RanksFailed([fault_of(rank, reason) for rank, (reason, _) in error.failures.items()]) from None


def write_format(folder: Path) -> None:
    """The file by which Megatron-Core knows the format; one rank writes it."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _Writer(torch.distributed.checkpoint.FileSystemWriter):
    def __init__(self, folder: Path):
        # nothing is copied ahead: what is written is in host memory already
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.fs = _Disk()


class _Disk(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        """Raises the file's first error, with its name, when the block is over."""
        stream = _Stream(Path(path), mode)
        try:
            yield stream
        except OSError as error:  # of forcing it to disk
            stream.note(error)
        finally:
            stream.close()
        if stream.error is not None:
            raise stream.error


class _Stream(io.RawIOBase):
    """A file that takes everything and keeps its first error: torch's serializer, written in C++, hides an error of
    its file behind one of its own, and may end the process on the way."""

    def __init__(self, path: Path, mode: str):
        self.error: OSError | None = None
        self._path, self._position = path, 0
        self._file = path.open(mode)

    def note(self, error: OSError) -> None:
        self.error = self.error or OSError(error.errno, error.strerror, str(self._path))

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.note(error)
        self._position += size
        return size

    def flush(self) -> None:
        if self.error is None and not self._file.closed:
            try:
                self._file.flush()
            except OSError as error:
                self.note(error)

    def tell(self) -> int:
        return self._position

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self.flush()
        with suppress(OSError):  # noted above, and raised again with what is still in its buffer
            self._file.close()
        super().close()
