"""Files of rows: which of them a name stands for, and one table of all, with the `datasets` library.

The library takes every name for a pattern, so a path that is there is escaped, and so is the part of a pattern that is
there: `data [v2]/*.jsonl` is a pattern in a folder with brackets. Text stays as it was written: cells of a CSV are
text, and strings of JSON lines that look like dates are not made dates.

Files of one table must have the same columns: the library fills a column that a later file lacks with nothing, so that
half of a data set would be trained on without its pictures.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_papo.files.data_suffixes import BUILDERS
from megatron_papo.text.untrusted import shortened

if TYPE_CHECKING:
    from datasets import Dataset, Features

_MAGIC = "*?["


def is_pattern(name: str) -> bool:
    """Whether a name stands for files that its wildcards match: nothing has that very name."""
    return any(letter in name for letter in _MAGIC) and not Path(name).exists()


def files_of_pattern(pattern: str) -> tuple[list[str], Path]:
    """The files that match, as absolute paths in order, and their folder; of several folders, where the pattern begins.

    Raises FileNotFoundError when there is none.
    """
    from datasets.data_files import resolve_pattern

    folder, rest = Path("/") if Path(pattern).is_absolute() else Path(), list(Path(pattern).parts)
    while len(rest) > 1 and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    try:
        files = resolve_pattern("/".join((escaped(folder), *rest)), "")
    except FileNotFoundError:
        raise FileNotFoundError("no file matches") from None
    folders = {Path(file).parent for file in files}
    return files, folders.pop() if len(folders) == 1 else folder


def files_of_folder(folder: Path, split: str) -> list[str]:
    """The files of a split as the library tells splits apart, by the names of files and folders.

    Raises ValueError when there is no such split, OSError when there are no files.
    """
    from datasets.data_files import get_data_patterns, resolve_pattern

    patterns = get_data_patterns(escaped(folder))
    if split not in patterns:
        raise ValueError(f"no split {split}, has {', '.join(map(str, patterns))}")
    files: list[str] = []
    for pattern in patterns[split]:
        with suppress(FileNotFoundError):  # one of several ways to name a split
            files += resolve_pattern(f"{escaped(folder)}/{pattern}", "")
    return list(dict.fromkeys(files))


def escaped(path: Path | str) -> str:
    """The absolute path as a pattern that means it alone."""
    return glob.escape(str(Path(path).absolute()))


def load_files(files: Sequence[str], split: str) -> Dataset:
    """The rows of all files, in order. Raises ValueError that names the file and the column where they do not fit."""
    kinds = {BUILDERS.get(Path(file).suffix): file for file in files}
    if None in kinds:
        which = f"{kinds[None]}: " if len(files) > 1 else ""
        raise ValueError(f"{which}unknown kind of file, know {', '.join(BUILDERS)}")
    if len(kinds) > 1:
        raise ValueError(f"files of several kinds: {', '.join(kinds.values())}")
    kind = str(next(iter(kinds)))
    try:
        return load(kind, split, data_files={split: list(map(escaped, files))}, **_as_text(kind, files[0]))
    except Exception:  # of a different type for each builder
        if len(files) > 1 and (fault := _fault_of(files, split)):
            raise ValueError(fault) from None
        raise


def load_folder(folder: Path, split: str) -> tuple[Dataset, list[str]]:
    """What the library makes of a folder, and its files of rows as far as they are known: not where the folder has a
    page that may say itself which they are. Raises ValueError as `load_files`."""
    files: list[str] = []
    with suppress(ValueError, OSError):  # no files, a slice of a split
        if not any((folder / page).exists() for page in ("README.md", ".huggingface.yaml")):
            files = [file for file in files_of_folder(folder, split) if Path(file).suffix in BUILDERS]
    if files and all(Path(file).suffix == ".csv" for file in files):
        return load_files(files, split), files  # as text
    try:
        rows = load(str(folder), split)
        return rows, [file for file in files if BUILDERS[Path(file).suffix] == rows.info.builder_name]
    except Exception:
        if len(files) > 1 and (fault := _fault_of(files, split)):
            raise ValueError(fault) from None
        raise


def load(name: str, split: str, **more: Any) -> Dataset:
    """`load_dataset`, with strings of JSON that it takes for dates left as they are."""
    from datasets import load_dataset

    rows = load_dataset(name, split=split, **more)
    if rows.info.builder_name == "json" and (features := _without_times(rows.features)) != rows.features:
        return load_dataset(name, split=split, **more, features=features)
    return rows


def missing_columns(files: Sequence[str], columns: Iterable[str]) -> str | None:
    """Names the first of several files that lacks one of `columns`, and that column; None where each has all."""
    for file in files if len(files) > 1 else ():
        has = _columns_of(file, set(columns))
        for column in columns:
            if has is not None and column not in has:
                return f"{file} has no column {column!r}, other files have"
    return None


def first_line(error: BaseException) -> str:
    """Why something was not read, shortly."""
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    return shortened(reason[0], 300)


def _as_text(kind: str, file: str) -> dict[str, Any]:
    """What keeps the reader of CSV from making 007 a number and None a gap."""
    if kind != "csv":
        return {}
    import pandas
    from datasets import Features, Value

    names = pandas.read_csv(file, nrows=0).columns
    return {"features": Features({name: Value("string") for name in names}), "keep_default_na": False}


def _without_times(features: Features) -> Features:
    """The same, with columns that hold dates read as JSON, whose strings are strings."""
    from datasets import Features, Json

    return Features({name: Json() if "timestamp" in str(kind) else kind for name, kind in features.items()})


def _columns_of(file: str, wanted: set[str]) -> set[str] | None:
    """Columns of a file, of JSON lines as many of `wanted` as any line has; None where reading all rows tells."""
    kind = Path(file).suffix
    if kind == ".parquet":
        from pyarrow.parquet import read_schema

        return set(read_schema(file).names)
    if kind != ".jsonl":
        return None
    columns: set[str] = set()
    with open(file, encoding="utf-8-sig") as lines:
        for line in lines:
            try:
                columns |= set(json.loads(line)) if line.strip() else set()
            except (ValueError, TypeError):  # one list of all rows, written over several lines
                return None
            if wanted <= columns:
                break
    return columns


def _fault_of(files: Sequence[str], split: str) -> str | None:
    """The first file that is not read by itself, or whose columns are not those of the first one."""
    first: Features | None = None
    for file in files:
        try:
            features = load_files([file], split).features
        except Exception as error:
            return f"{file}: {first_line(error)}"
        if first is None:
            first = features
        elif fault := _difference(files[0], first, file, features):
            return fault
    return None


def _difference(first_file: str, first: Features, file: str, features: Features) -> str | None:
    for column in islice({**first, **features}, 10_000):
        if column not in features:
            return f"{file} has no column {column!r}, {first_file} has"
        if column not in first:
            return f"{file} has a column {column!r}, {first_file} has none"
        if features[column] != first[column]:
            held, other = shortened(_words(features[column])), shortened(_words(first[column]))
            return f"column {column!r} of {file} holds {held}, that of {first_file} {other}"
    return None


def _words(feature: Any) -> str:
    if isinstance(feature, dict):
        return "dicts"
    if hasattr(feature, "feature"):
        return f"lists of {_words(feature.feature)}"
    return str(getattr(feature, "dtype", None) or type(feature).__name__)
