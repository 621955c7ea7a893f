"""What a data set holds, as a few letters that are the same wherever it lies, on every rank, and in every format
that keeps the types of cells (a CSV holds text alone).

Covered: the number of rows, their order, and the cells of the named columns: all of them up to 65,536 rows, of more
rows as many, evenly spread; and the pictures of 64 rows. Left out: other columns, names of columns and files, times.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT_ROWS = 65_536
_PICTURE_ROWS = 64
_ROWS_AT_ONCE = 1024


def fingerprint(parts: Iterable[bytes]) -> str:
    """16 letters; where one part ends and the next begins counts too."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def fingerprints_of_rows(
    rows: Dataset, columns: Sequence[str], images: Callable[[int], Sequence[bytes]]
) -> dict[str, str]:
    """`rows`: of the cells of `columns`; `pictures`: of what `images` gives of a row, where that is no ValueError."""
    cells = rows.select_columns(list(columns))
    if len(cells) > _TEXT_ROWS:
        cells = cells.select(_spread(len(rows), _TEXT_ROWS))
    texts = (
        json.dumps([batch[column][place] for column in columns], default=repr).encode()
        for batch in cells.iter(batch_size=_ROWS_AT_ONCE)
        for place in range(len(batch[columns[0]]))
    )
    size = str(len(rows)).encode()
    pictures = (data for row in _spread(len(rows), _PICTURE_ROWS) for data in _readable(images, row))
    return {"rows": fingerprint([size, *texts]), "pictures": fingerprint(pictures)}


def _spread(number: int, most: int) -> list[int]:
    """At most `most` of the places 0 .. number - 1, the first among them, at even distances."""
    return [number * place // most for place in range(most)] if number > most else list(range(number))


def _readable(images: Callable[[int], Sequence[bytes]], row: int) -> Sequence[bytes]:
    try:
        return images(row)
    except ValueError:  # a bad row
        return ()
