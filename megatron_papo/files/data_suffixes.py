"""The kinds of data files, by the suffix of their names. Imports nothing slow, for checks before a rank starts."""

from __future__ import annotations

BUILDERS = {
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
"""Suffix of a data file -> name of the builder of `datasets` that reads it."""
