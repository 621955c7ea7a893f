"""Writes boxes of tensors to files: Megatron's checkpoint format by torch's own writer, within this process.

Megatron's own strategy is not used. It starts a manager process for its asynchronous writers, which imports the main
module again, and needs psutil; and its ranks communicate through the group of the training, which a background thread
must not use. torch checks that the boxes of all ranks cover every tensor exactly once. The checksum of each box is
computed as it is written.
"""

from __future__ import annotations

import io
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_papo.checkpoint.archive import COMMON_STATE
from megatron_papo.checkpoint.checksums import new_sum, write_box_sums
from megatron_papo.distributed.agreement import failure, fault_of

Boxes = dict[str, Any]
"""The input of torch's writer: for each name in the checkpoint, this rank's boxes of the tensor, or pickled bytes."""


def own_boxes(tree: Mapping[str, ShardedBase]) -> dict[str, ShardedBase]:
    """The parts of `tree` that this rank writes; the other parts repeat what another rank writes."""
    return {name: part for name, part in tree.items() if is_main_replica(part.replica_id)}


def to_boxes(own: Mapping[str, ShardedBase]) -> Boxes:
    """The input of torch's writer. Objects are pickled now; tensors are referred to, not copied."""
    common = ShardedObject("common_state", {}, (1,), (0,), replica_id=dist.get_rank())
    assert common.unique_key == COMMON_STATE
    by_key: dict[str, list[ShardedBase]] = {}
    for part in (*own.values(), *own_boxes({"": common}).values()):
        by_key.setdefault(part.unique_key if isinstance(part, ShardedObject) else part.key, []).append(part)
    return mcore_to_pyt_state_dict(by_key, False)


@torch.no_grad()
def write_boxes(folder: Path, boxes: Boxes, group: dist.ProcessGroup) -> None:
    """Writes the boxes of all ranks of `group` into the empty `folder` and forces them to disk.

    All ranks of the group call it together. Raises RanksFailed on each of them when any could not write.
    """
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        torch.distributed.checkpoint.save(
            boxes, storage_writer=_BoxWriter(folder), planner=planner, process_group=group
        )
    except CheckpointException as error:
        raise failure([fault_of(rank, reason) for rank, (reason, _) in error.failures.items()]) from None


def write_format(folder: Path) -> None:
    """Writes the file by which Megatron-Core recognizes the format; one rank calls this."""
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _BoxWriter(torch.distributed.checkpoint.FileSystemWriter):
    """torch's writer, which in addition sends the checksum of each box to the coordinator, beside the box's place.

    The coordinator writes them to checksums.json.
    """

    def __init__(self, folder: Path):
        # nothing is copied ahead: what is written is in host memory already
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self.fs = self._disk = _Disk()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        summed: Future[list[WriteResult]] = Future()
        summed.set_result([self._with_sum(result) for result in super().write_data(plan, planner).wait()])
        return summed

    def _with_sum(self, result: WriteResult) -> WriteResult:
        place = result.storage_data
        length, digest = self._disk.sums[place.relative_path, place.offset]
        assert length == place.length, "torch's writer flushes behind every box"
        return replace(result, storage_data=_Summed(place, digest))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        boxes: dict[str, list[tuple[int, int, str]]] = {}
        plain = []
        for result in (result for several in results for result in several):
            place = result.storage_data.place
            boxes.setdefault(place.relative_path, []).append((place.offset, place.length, result.storage_data.digest))
            plain.append(replace(result, storage_data=place))
        super().finish(metadata, [plain])
        write_box_sums(Path(self.path), boxes)


@dataclass(frozen=True)
class _Summed:
    """The place of a box and its checksum."""

    place: _StorageInfo
    digest: str


class _Disk(FileSystem):
    """torch's access to files, which in addition collects the checksums of what is written."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, int], tuple[int, str]] = {}
        """By file and offset: length and checksum of the bytes from there to the next flush."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Generator[io.IOBase, None, None]:
        """A file to write; at the end of the `with` block its first error is raised, with its name."""
        stream = _Stream(Path(path), mode)
        try:
            yield stream
        except OSError as error:  # of forcing it to disk
            stream.note(error)
        finally:
            stream.close()
        if stream.error is not None:
            raise stream.error
        self.sums |= {(Path(path).name, offset): box for offset, box in stream.sums.items()}


class _Stream(io.RawIOBase):
    """A file whose methods do not fail: it stores its first error instead.

    torch's serializer, which is written in C++, hides an error of its file behind one of its own, and may end the
    process.
    """

    def __init__(self, path: Path, mode: str):
        self.error: OSError | None = None
        self.sums: dict[int, tuple[int, str]] = {}
        """By the offset at which a box begins: its length and checksum. A flush ends a box."""
        self._path, self._position = path, 0
        self._box_start, self._sum = 0, new_sum()
        self._file = path.open(mode)

    def note(self, error: OSError) -> None:
        """Stores the error, with the file's name, unless there was one before."""
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
        self._sum.update(data)
        return size

    def flush(self) -> None:
        if self._position > self._box_start:
            self.sums[self._box_start] = self._position - self._box_start, self._sum.hexdigest()
            self._box_start, self._sum = self._position, new_sum()
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
        with suppress(OSError):  # noted above; closing raises it again for what is still in the buffer
            self._file.close()
        super().close()
