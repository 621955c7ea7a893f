"""One box of a checkpoint: a tensor as torch.save writes it, which is a zip archive with the values uncompressed.

The bytes around the values depend on shape and dtype alone. So a box can be written without having its values in
memory, and its values can be found without unpickling anything. The zip archive's own checksums are left out, as
`torch.serialization.set_crc32_options(False)` does: checksums.json protects more. torch.load loads such a box; an
unzip program would complain.
"""

from __future__ import annotations

import functools
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_papo.checkpoint.archive.pickle_reading import line_of, read_pickle

_CLASSES = frozenset({("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")})
_STORAGES = {
    ("torch", "FloatStorage"): torch.float32, ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "HalfStorage"): torch.float16,
}  # fmt: skip
_LOCAL_HEADER_BYTES = 30
_MOST_PICKLED = 2**16
"""The most bytes that are read of the description of a tensor; a few hundred are usual."""


@dataclass(frozen=True)
class Frame:
    """The bytes of a box before its values and behind them."""

    before: bytes
    behind: bytes


@functools.cache
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """The frame of a contiguous tensor. No values are read or written, so the size of the tensor does not matter."""
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
    """A file that keeps what is written to it, except the bytes that lie at `address` in memory: the values."""

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


def values_offset(blob: io.RawIOBase, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The byte of a box at which its values begin.

    Raises ValueError unless the box is a contiguous tensor of `shape` and `dtype`, and OSError for what cannot be read.
    """
    try:
        archive = zipfile.ZipFile(blob)  # type: ignore[arg-type]
        records = {name.partition("/")[2]: info for info in archive.infolist() if (name := info.filename)}
        pickled = records["data.pkl"]
        blob.seek(_data_start(blob, pickled))
        tensor = _described(blob.read(min(pickled.file_size, _MOST_PICKLED)) or b"")
        (_, stored, key, _, numel), start, size, stride, *_ = tensor.arguments
        values = records[f"data/{key}"]
        begin, plain = _data_start(blob, values), values.compress_type == zipfile.ZIP_STORED
        if begin + values.file_size > blob.seek(0, io.SEEK_END):
            raise ValueError("its values end behind it")
    except OSError:
        raise
    except Exception as error:  # a stranger's bytes may fail anywhere
        raise ValueError(f"not a tensor that torch.save wrote: {line_of(error)}") from None
    described = (size, stored, numel, values.file_size)
    same = described == (shape, dtype, math.prod(shape), math.prod(shape) * dtype.itemsize)
    if not (same and plain and start == 0 and _is_contiguous(shape, stride)):
        raise ValueError(f"is not {shape} of {dtype}, one value after the other")
    return begin


@functools.lru_cache(maxsize=1024)
def _described(pickled: bytes) -> Any:
    """The description of a tensor; cached, for tensors of one shape are described by the same bytes."""
    return read_pickle(pickled, _CLASSES, _STORAGES, storages=True)


def _is_contiguous(shape: tuple[int, ...], stride: Any) -> bool:
    """Whether the values of such a tensor lie one after the other. The stride of an axis of size 1 does not matter."""
    if not isinstance(stride, tuple) or len(stride) != len(shape):
        return False
    return all(length == 1 or stride[axis] == math.prod(shape[axis + 1 :]) for axis, length in enumerate(shape))


class BytesFile(io.RawIOBase):
    """A read-only file object of `size` bytes over `read(offset, length)`: bytes in memory, or a part of a file."""

    def __init__(self, size: int, read: Callable[[int, int], bytes | memoryview]):
        self._size, self._read, self._place = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, self._size)[whence])
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        data = self._read(self._place, max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def _data_start(blob: io.RawIOBase, record: zipfile.ZipInfo) -> int:
    """Where the data of a zip record begin: behind its header, which gives the lengths of its name and padding."""
    blob.seek(record.header_offset)
    header = blob.read(_LOCAL_HEADER_BYTES) or b""
    if len(header) < _LOCAL_HEADER_BYTES:
        raise ValueError("cut short")
    return (
        record.header_offset
        + _LOCAL_HEADER_BYTES
        + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    )
