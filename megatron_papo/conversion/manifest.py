"""manifest.json in a converted folder: a hash of every tensor, in the source and in the target.

direction, package, hash, plan       what was done by which version; plan: the fingerprint of source and settings
source: name -> shape, dtype, hash, cast_hash     cast_hash: the same values in the target's dtype
target: name -> shape, dtype, hash                Hugging Face names on one side, Megatron's on the other
casts: from, to, exact, how, values_changed       none where the target has the source's dtype
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_papo.conversion.journal import JournalEntry
from megatron_papo.conversion.plan import ConversionPlan
from megatron_papo.conversion.stores import num_values
from megatron_papo.conversion.stream import HASH, exact
from megatron_papo.files.json_keys import read_json
from megatron_papo.model.parameter_map import ParameterEntry

MANIFEST_FILE = "manifest.json"
FORMAT = 1


def names(entry: ParameterEntry, huggingface: bool) -> list[tuple[str, tuple[int, ...]]]:
    """The name and shape of each tensor of a parameter: its Hugging Face tensors, or the one of a checkpoint."""
    return [(source.name, source.shape) for source in entry.sources] if huggingface else [(entry.name, entry.shape)]


def manifest_tree(plan: ConversionPlan, records: Mapping[str, JournalEntry]) -> dict[str, Any]:
    """The content of manifest.json, from the journal entries of all parameters by Megatron name."""
    from_hf = plan.direction == "hf-to-megatron"
    source: dict[str, Any] = {}
    target: dict[str, Any] = {}
    casts: dict[tuple[str, str], dict[str, Any]] = {}
    for name, entry in plan.table.items():
        record, before, after = records[name], plan.source.dtype(entry), plan.target.dtype(entry)
        for (tensor, shape), digest, cast in zip(names(entry, from_hf), record.source, record.cast, strict=True):
            source[tensor] = {"shape": shape, "dtype": dtype_name(before), "hash": digest, "cast_hash": cast}
        for (tensor, shape), digest in zip(names(entry, not from_hf), record.target, strict=True):
            target[tensor] = {"shape": shape, "dtype": dtype_name(after), "hash": digest}
        if before != after:
            key = (dtype_name(before), dtype_name(after))
            how = "every value kept" if exact(before, after) else "to nearest, ties to even"
            fresh = {"exact": exact(before, after), "how": how, "values": 0, "values_changed": 0}
            facts = casts.setdefault(key, fresh)
            facts["values"] += num_values(entry)
            facts["values_changed"] += record.changed
    return {
        "format": FORMAT, "package": f"megatron_papo {version('megatron_papo')}", "direction": plan.direction,
        "hash": HASH, "plan": plan.fingerprint, "casts": [{"from": a, "to": b, **casts[a, b]} for a, b in casts],
        "source": source, "target": target,
    }  # fmt: skip


def write_manifest(folder: Path, tree: Mapping[str, Any]) -> None:
    """Writes manifest.json into `folder`."""
    (folder / MANIFEST_FILE).write_text(json.dumps(tree, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of manifest.json. Raises ValueError naming the file if it is missing, broken or of another format."""
    file = folder / MANIFEST_FILE
    tree = read_json(file)
    known = ("hf-to-megatron", "megatron-to-hf")
    if tree.get("format") != FORMAT or tree.get("direction") not in known or tree.get("hash") != HASH:
        raise ValueError(f"{file}: not a manifest that this version writes")
    return tree


def dtype_name(dtype: torch.dtype) -> str:
    """The name that torch gives a dtype, without `torch.`."""
    return str(dtype).removeprefix("torch.")
