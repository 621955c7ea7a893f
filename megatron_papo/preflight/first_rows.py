"""The first rows of local data files: a question about a video is told before any rank starts.

A few rows of each file are read, without the `datasets` library, which takes seconds to import: enough for a data set
of videos, which has one in every row. A file that is not read here, or that cannot be, is for the ranks, which also
find a video further on and name its row.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_papo.config import ColumnsConfig, DataConfig, SourceConfig
from megatron_papo.files.data_suffixes import BUILDERS
from megatron_papo.files.video_cells import ONLY_PICTURES, video_column, video_in_question

_NUM_ROWS = 8
_NUM_FILES = 8
_MOST_NAMES = 10_000
"""Of a folder, which may hold all pictures too; names behind them are not looked at."""
_MOST_LETTERS = 2**22
"""Of a file of JSON; rows behind them are not looked at."""
_BETWEEN_ROWS = re.compile(r"[\s\[,]*")


def fault_of_videos(key: str, source: SourceConfig, data: DataConfig) -> str | None:
    """The first row with a video among the first of each file that an entry `key` of data.train or data.eval names;
    None where none is found, and where the settings may leave such rows out."""
    chosen = source.filter is not None or bool(data.curriculum) or data.sampler is not None
    if source.path is None or chosen or data.on_bad_row == "skip":
        return None
    columns = data.columns_of(source)[1]
    for file in _files(source.path, source.split or "train"):
        for number, cells in enumerate(_rows(file, columns)):
            if where := video_column(cells, columns.images) or video_in_question(cells.get(columns.problem)):
                return f"{key}: {file}: row {number}: video ({where}: {ONLY_PICTURES})"
    return None


def _files(name: str, split: str) -> list[Path]:
    """The files of rows that the name stands for; of a folder those that name the split, where any does."""
    path = Path(name)
    if os.path.isdir(name):  # Path.is_dir raises OSError for a name that is too long
        found = sorted(file for file in islice(path.rglob("*"), _MOST_NAMES) if file.suffix in BUILDERS)
        found = [file for file in found if split in str(file.relative_to(path))] or found
    elif os.path.exists(name):
        found = [path]
    else:
        found = [Path(file) for file in sorted(glob.glob(name, recursive=True))]
    return [file for file in found if file.is_file()][:_NUM_FILES]


def _rows(file: Path, columns: ColumnsConfig) -> list[dict[str, Any]]:
    """The first rows of a file; none where it is not read."""
    readers = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if file.suffix not in readers:
        return []
    try:
        return [row for row in islice(readers[file.suffix](file, columns), _NUM_ROWS) if isinstance(row, dict)]
    except (OSError, ValueError, RecursionError, ImportError, csv.Error):
        return []


def _json(file: Path, columns: ColumnsConfig) -> Iterator[Any]:
    """A row a line, or one list of all rows; ends at what is no JSON."""
    decoder, place = json.JSONDecoder(), 0
    with file.open(encoding="utf-8-sig") as opened:
        text = opened.read(_MOST_LETTERS)
    while (match := _BETWEEN_ROWS.match(text, place)) and match.end() < len(text):
        try:
            row, place = decoder.raw_decode(text, match.end())
        except ValueError:
            return
        yield row


def _csv(file: Path, columns: ColumnsConfig) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines)


def _parquet(file: Path, columns: ColumnsConfig) -> Iterator[Any]:
    """Rows without their pictures, which are most of a file, but for the names of files."""
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_string

    with ParquetFile(file) as table:
        wanted = [field.name for field in table.schema_arrow if field.name != columns.images or is_string(field.type)]
        for batch in table.iter_batches(batch_size=_NUM_ROWS, columns=wanted):
            yield from batch.to_pylist()
