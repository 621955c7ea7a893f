"""Image files that rows of a data set name: read only where the user has put pictures.

A data set is not trusted: its rows may name any file of this machine, by an absolute path, `..`, a link or an address.
A path counts as where it really leads, and that must be a regular file in the data set's own folder or in one of
`data.image_roots`. What is checked is the file that is then read (`files/held_file.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_papo.files.held_file import HeldFile, hold
from megatron_papo.text.untrusted import shortened

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:")


class BadImage(ValueError):
    """An image that is not read or not decoded. `reason` is one of a few, for counting; the text says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class ImageFiles:
    """The files under `folders`; relative paths start at `start`."""

    def __init__(self, start: Path, folders: Sequence[Path]) -> None:
        self._start = start
        self._folders = [Path(os.path.realpath(folder)) for folder in folders]

    def read(self, name: str, max_bytes: int) -> bytes:
        """The bytes of one file. Raises BadImage."""
        if _ADDRESS.match(name):
            raise BadImage("image is an address", f"{shortened(name)}: only files of this machine are read")
        path, told = self._start / name, str(self._start / shortened(name))
        try:
            with hold(path) as held:
                self._check(told, held, max_bytes)
                with held.open() as file:
                    data = file.read(max_bytes + 1)
        except BadImage:
            raise
        except OSError as error:
            raise BadImage("image file missing", f"{told}: {error.strerror}") from None
        except ValueError as error:  # a zero byte, half a surrogate
            raise BadImage("image file missing", f"{shortened(name)!r}: {error}") from None
        check_size(told, len(data), max_bytes)  # it may have grown
        return data

    def _check(self, told: str, held: HeldFile, max_bytes: int) -> None:
        if not any(held.place.is_relative_to(folder) for folder in self._folders):
            raise BadImage(
                "image outside the data set",
                f"{told}: lies at {shortened(held.place, 120)}; "
                "data.image_roots names more folders whose images may be read",
            )
        if not held.is_file:
            raise BadImage("image is no file", f"{told}: not a regular file")
        check_size(told, held.num_bytes, max_bytes)


def check_size(what: str, num_bytes: int, max_bytes: int) -> None:
    """Raises BadImage for more bytes than the pixels that are allowed can take."""
    if num_bytes > max_bytes:
        raise BadImage("image too large", f"{what}: {num_bytes} bytes, data.max_image_pixels allows {max_bytes}")
