"""Opens what `data.train` or `data.eval` names, with the `datasets` library, pictures left undecoded.

The library would open whatever file a row names, in any format and of any size: what it could decode, at whatever
depth of a column, it is told to leave. Data sets that come as a program it has refused since version 4.

A file (parquet, JSON lines, CSV, Arrow), a pattern of files, a folder saved by `datasets`, a folder of pictures with a
metadata file, any other folder that `datasets` recognises, or a name on the hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_papo.data.image_files import ImageFiles

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Source:
    rows: Dataset
    images: ImageFiles
    """The files that paths of pictures may name; relative ones start at the folder of the rows."""


def open_source(name: str, split: str, key: str, image_roots: Sequence[Path] = ()) -> Source:
    """Opens `name`; `key` is the setting it came from, for messages; `image_roots` as in the settings.

    Raises ValueError.
    """
    for root in image_roots:
        if not root.is_dir():
            raise ValueError(f"data.image_roots: {root} is no folder")
    try:
        rows, folder = _open(name, split)
    except Exception as error:  # the library raises a different type for each builder
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{key}: cannot read {name} (split {split}): {reason[0]}") from error
    if not len(rows):
        raise ValueError(f"{key}: {name} (split {split}) has no rows")
    return Source(_undecoded(rows), ImageFiles(folder or Path(), [*_folders(folder), *image_roots]))


def _folders(folder: Path | None) -> list[Path]:
    """Where pictures of a data set lie: beside its rows, or where the library puts what it fetched or unpacked."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    if folder is None:
        return [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]
    return [folder, Path(config.EXTRACTED_DATASETS_PATH)]


def _open(name: str, split: str) -> tuple[Dataset, Path | None]:
    import datasets  # slow to import

    datasets.disable_progress_bars()  # every rank would show its own
    path = Path(name)
    if path.is_file() or any(letter in name for letter in "*?"):
        if path.suffix not in _BUILDERS:
            raise ValueError(f"unknown kind of file, know {', '.join(_BUILDERS)}")
        return datasets.load_dataset(_BUILDERS[path.suffix], data_files={split: name}, split=split), path.parent
    if not path.is_dir():
        if path.suffix in _BUILDERS or path.is_absolute():
            raise FileNotFoundError("no such file or folder")
        return datasets.load_dataset(name, split=split), None
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = datasets.load_from_disk(name)
        if isinstance(saved, dict):
            if split not in saved:
                raise ValueError(f"no split {split}, has {', '.join(saved)}")
            saved = saved[split]
        return saved, path
    if _is_picture_folder(path):
        return datasets.load_dataset("imagefolder", data_dir=name, split=split), path
    return datasets.load_dataset(name, split=split), path


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
