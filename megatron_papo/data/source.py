"""Opens what an entry of `data.train` or `data.eval` names, with the `datasets` library, pictures left undecoded.

The library would open whatever file a row names, in any format and of any size: what it could decode, at whatever
depth of a column, it is told to leave. Data sets that come as a program it has refused since version 4.

A file (parquet, JSON lines, CSV, Arrow), a pattern of files, a folder saved by `datasets`, a folder of pictures with a
metadata file, any other folder that `datasets` recognises, a name on the hub, or a function of the user's own. A name
that is there as it is written is that file or folder, whatever `[ ]`, `?` or `*` it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_papo.config import SourceConfig
from megatron_papo.data.image_files import ImageFiles
from megatron_papo.data.row_files import (
    escaped,
    files_of_folder,
    files_of_pattern,
    first_line,
    is_pattern,
    load,
    load_files,
    load_folder,
)
from megatron_papo.data.row_function import rows_of_function
from megatron_papo.files.data_suffixes import BUILDERS

if TYPE_CHECKING:
    from datasets import Dataset

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class DataSource:
    rows: Dataset
    images: ImageFiles
    """The files that paths of pictures may name; relative ones start at the folder of the rows."""
    files: list[str]
    """Those that the rows were read from, as far as they are known."""


def open_source(source: SourceConfig, key: str, image_roots: Sequence[Path] = ()) -> DataSource:
    """Opens an entry of the setting `key`, whose split is known; `image_roots` as in the settings.

    Raises ValueError.
    """
    for root in image_roots:
        if not root.is_dir():
            raise ValueError(f"data.image_roots: {root} is no folder")
    name, split = source.origin, source.split or "train"
    folder: Path | None = None
    files: list[str] = []
    if source.function is not None:
        rows = rows_of_function(f"{key}.function", source.function, split, source.options)
    else:
        rows, folder, files = _read(name, split, key)
    if not len(rows):
        raise ValueError(f"{key}: {name} (split {split}) has no rows")
    return DataSource(_undecoded(rows), ImageFiles(folder or Path(), [*_folders(folder), *image_roots]), files)


def _read(name: str, split: str, key: str) -> tuple[Dataset, Path | None, list[str]]:
    """As `_open`; raises ValueError alone."""
    try:
        return _open(name, split)
    except Exception as error:  # the library raises a different type for each builder
        raise ValueError(f"{key}: cannot read {name} (split {split}): {first_line(error)}") from error


def _folders(folder: Path | None) -> list[Path]:
    """Where pictures of a data set lie: beside its rows, or where the library puts what it fetched or unpacked."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    if folder is None:
        return [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]
    return [folder, Path(config.EXTRACTED_DATASETS_PATH)]


def _open(name: str, split: str) -> tuple[Dataset, Path | None, list[str]]:
    """The rows, the folder where their pictures begin, and the files they were read from, if these are known."""
    import datasets  # slow to import

    datasets.disable_progress_bars()  # every rank would show its own
    path = Path(name)
    if "://" in name:
        return load(_kind_of(name), split, data_files={split: name}), None, []
    if path.is_file():
        return load_files([name], split), path.parent, [name]
    if is_pattern(name):
        files, folder = files_of_pattern(name)
        return load_files(files, split), folder, files
    if not path.is_dir():
        if path.suffix in BUILDERS or path.is_absolute():
            raise FileNotFoundError("no such file or folder")
        return load(name, split), None, []
    rows, files = _open_folder(path, split)
    return rows, path, files


def _open_folder(folder: Path, split: str) -> tuple[Dataset, list[str]]:
    """The rows and, of a folder of files of rows, these."""
    import datasets

    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, dict):
            if split not in saved:
                raise ValueError(f"no split {split}, has {', '.join(saved)}")
            saved = saved[split]
        return saved, []
    literal = escaped(folder) == str(folder.absolute())  # else the library finds nothing in it
    if _is_picture_folder(folder):
        if literal:
            return load("imagefolder", split, data_dir=str(folder)), []
        return load("imagefolder", split, data_files={split: list(map(escaped, files_of_folder(folder, split)))}), []
    if not literal:
        files = files_of_folder(folder, split)
        return load_files([file for file in files if Path(file).suffix in BUILDERS], split), files
    return load_folder(folder, split)


def _kind_of(address: str) -> str:
    suffix = Path(address).suffix
    if suffix not in BUILDERS:
        raise ValueError(f"unknown kind of file, know {', '.join(BUILDERS)}")
    return BUILDERS[suffix]


def _is_picture_folder(folder: Path) -> bool:
    files = [file for file in folder.rglob("*") if file.is_file()]
    named = any(file.name in ("metadata.jsonl", "metadata.csv", "metadata.parquet") for file in files)
    return named or (bool(files) and all(file.suffix.lower() in _PICTURES for file in files))


def _undecoded(rows: Dataset) -> Dataset:
    for column, feature in rows.features.items():
        plain = _without_decoding(feature)
        if plain != feature:
            rows = rows.cast_column(column, plain)
    return rows


def _without_decoding(feature: Any) -> Any:
    """The same feature, at every depth, with what the library would open and decode left as bytes and path."""
    from datasets import Json, LargeList, List

    if isinstance(feature, dict):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return replace(feature, feature=_without_decoding(feature.feature))
    if getattr(feature, "decode", False) and not isinstance(feature, Json):
        return replace(feature, decode=False)
    return feature
