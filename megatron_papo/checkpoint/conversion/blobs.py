"""One box of a checkpoint: a tensor as torch.save writes it, which is a zip archive with the values uncompressed.

The frame of bytes around the values depends on shape and dtype alone, so a box can be written without having its
values in memory, and read without unpickling them. Check sums of the archive are left out, as
`torch.serialization.set_crc32_options(False)` does: the manifest's hashes say more. torch.load loads such a box; an
unzip program would complain.
"""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class Frame:
    """What stands before and behind the values."""

    before: bytes
    behind: bytes


@functools.cache
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """Of a contiguous tensor; its memory is never touched, so its size does not matter."""
    values = torch.empty(shape, dtype=dtype)
    sink = _Sink(values.data_ptr())
    checks = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # would read the values
    try:
        torch.save(values, sink)  # type: ignore[arg-type]
    finally:
        torch.serialization.set_crc32_options(checks)
    assert sink.values_bytes == values.nbytes, "torch.save writes the storage in one piece"
    return Frame(bytes(sink.before), bytes(sink.behind))


class _Sink(io.RawIOBase):
    """Keeps what is written but the bytes at `address`."""

    def __init__(self, address: int):
        self.before, self.behind, self.values_bytes = bytearray(), bytearray(), 0
        self._address = address

    def write(self, data: Any) -> int:
        part = np.frombuffer(data, np.uint8)
        if part.ctypes.data == self._address:
            self.values_bytes += part.nbytes
        else:
            (self.behind if self.values_bytes else self.before).extend(data)
        return part.nbytes


def values_offset(blob: io.BufferedIOBase, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where the values begin in a stored box. Raises ValueError for one that is not a contiguous tensor like that."""
    try:
        archive = zipfile.ZipFile(blob)
        records = {name.partition("/")[2]: info for info in archive.infolist() if (name := info.filename)}
        pickled = _at(blob, records["data.pkl"])
        blob.seek(pickled)
        tensor = _Unpickler(io.BytesIO(blob.read(records["data.pkl"].file_size))).load()
        (_, storage, key, _, numel), start, size, stride, *_ = tensor
        values = records[f"data/{key}"]
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"not a tensor that torch.save wrote: {error}") from None
    contiguous = torch.empty(size, device="meta").stride() if size else ()
    plain = values.compress_type == zipfile.ZIP_STORED and start == 0 and tuple(stride) == tuple(contiguous)
    found = (tuple(size), _STORAGES.get(storage), values.file_size)
    if not plain or found != (shape, dtype, numel * dtype.itemsize):
        raise ValueError(f"holds {tuple(size)} of {storage}, not {shape} of {dtype}, one value after the other")
    return _at(blob, values)


def _at(blob: io.BufferedIOBase, record: zipfile.ZipInfo) -> int:
    """Behind the record's own header, whose name and padding are as long as it says."""
    blob.seek(record.header_offset)
    header = blob.read(_LOCAL_HEADER_BYTES)
    return (
        record.header_offset
        + _LOCAL_HEADER_BYTES
        + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    )


class _Unpickler(pickle.Unpickler):
    """A tensor as the arguments it would be rebuilt from; nothing is called, and no other class is known."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return name
        raise pickle.UnpicklingError(f"{module}.{name} in a tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid
