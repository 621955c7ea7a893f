"""A checkpoint's small files: pickles are data, nothing leaves the folder, and every byte that changed is noticed."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import megatron_papo.checkpoint.archive
from megatron_papo.checkpoint.archive import METADATA_FILE, parse_metadata, values_offset
from megatron_papo.checkpoint.archive.pickle_reading import read_pickle
from megatron_papo.checkpoint.checksums import CHECKSUMS_FILE, read_box_sums, sum_of, write_box_sums
from megatron_papo.checkpoint.opening import FORMAT_FILE, open_checkpoint
from megatron_papo.checkpoint.state_file import STATE_FILE, names_checkpoint, read_state_file, write_state_tree
from megatron_papo.conversion.checkpoint_files import state_tree
from megatron_papo.distributed.agreement import DamagedCheckpoint

SMALL_FILES = (METADATA_FILE, FORMAT_FILE, CHECKSUMS_FILE, STATE_FILE)


def _metadata(file: Any = "__0_0.distcp", sizes: tuple[int, ...] = (2, 3), offset: Any = 0) -> Metadata:
    start = torch.Size((0, 0))
    tensor = TensorStorageMetadata(
        TensorProperties(torch.bfloat16), torch.Size((2, 3)), [ChunkStorageMetadata(start, torch.Size(sizes))]
    )
    places = {
        MetadataIndex("weight", start, 0): _StorageInfo(file, offset, 100),
        MetadataIndex("rng"): _StorageInfo(file, 0, 9),
    }
    return Metadata({"weight": tensor, "rng": BytesStorageMetadata()}, storage_data=places)


def _checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / METADATA_FILE).write_bytes(pickle.dumps(_metadata()))
    (folder / FORMAT_FILE).write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "__0_0.distcp").write_bytes(bytes(100))
    (folder / "config.json").write_text("{}")
    write_box_sums(folder, {"__0_0.distcp": [(0, 100, sum_of(bytes(100)))]})
    write_state_tree(folder, {**state_tree(), "metric": 0.1 + 0.2, "cursor": {"a": [1.5e-9, "\u00e9"]}})
    return folder


def test_pickles_and_archives_are_read_in_one_place_alone():
    """Whoever else needs torch's formats imports `checkpoint.archive`; no other module unpickles anything."""
    inner = re.compile(r"^\s*(import pickle|from pickle import|.*checkpoint\.archive\.)", re.MULTILINE)
    archive = Path(megatron_papo.checkpoint.archive.__file__).parent
    package = archive.parents[1]
    users = {str(file.relative_to(package)) for file in package.rglob("*.py") if inner.search(file.read_text())}
    assert users == {
        f"checkpoint/archive/{name}.py" for name in ("__init__", "metadata", "pickle_reading", "stored_tensor")
    }
    loads = [file.name for file in package.rglob("*.py") if "torch.load(" in file.read_text()]
    assert loads == ["box_reading.py"], "tensors in plain containers alone, weights_only"


def test_what_torch_lists_is_read_back(tmp_path):
    opened = open_checkpoint(_checkpoint(tmp_path / "c"))
    expected = _metadata()
    assert opened.metadata.state_dict_metadata == expected.state_dict_metadata
    assert opened.metadata.storage_data == expected.storage_data
    assert opened.saved["metric"] == 0.1 + 0.2 and opened.saved["cursor"] == {"a": [1.5e-9, "\u00e9"]}
    assert opened.remarks() == []
    opened.check_box("weight", "__0_0.distcp", 0, 100, sum_of(bytes(100)))
    for changed in (
        ("__0_0.distcp", 0, 100, sum_of(b"")),
        ("__0_0.distcp", 0, 99, sum_of(bytes(100))),
        ("x", 0, 1, ""),
    ):
        with pytest.raises(DamagedCheckpoint, match="weight: not what was written"):
            opened.check_box("weight", *changed)


@pytest.mark.parametrize("name", SMALL_FILES)
def test_a_bit_anywhere_in_a_small_file_is_noticed(tmp_path, name):
    file = _checkpoint(tmp_path / "c") / name
    whole = file.read_bytes()
    for place in random.Random(name).sample(range(len(whole)), k=40):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        file.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint, match=f"{re.escape(name)}: ") as error:
            open_checkpoint(file.parent)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("key", [*state_tree(), "metric"])
def test_a_state_file_without_a_key_or_with_another_type_is_named(tmp_path, key):
    file = tmp_path / STATE_FILE
    for change in ({}, {key: "text"}):
        tree = {**state_tree(), "metric": None}
        tree.pop(key)
        file.write_text(json.dumps({**tree, **change}))  # as an older version wrote it, without checksums
        if key == "metric" and not change:
            continue
        with pytest.raises(ValueError, match=f"{STATE_FILE}: {key}"):
            read_state_file(tmp_path)
    for data in (b"\xff", b"[1]", b"{", b"[" * 100_000):
        file.write_bytes(data)
        with pytest.raises(DamagedCheckpoint, match=f"{STATE_FILE}: "):
            read_state_file(tmp_path)


class _Call:
    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda marker: pickle.dumps(_Call(os.system, f"touch {marker}")),
    "eval": lambda marker: pickle.dumps(_Call(eval, f"open({str(marker)!r}, 'w')")),
    "getattr": lambda marker: pickle.dumps(_Call(getattr, "text", "upper")),
    "a file of torch": lambda marker: pickle.dumps(_Call(torch.save, 1, str(marker))),
    "an import": lambda marker: pickle.dumps(_Call(builtins.__import__, "antigravity")),
    "within the list": lambda marker: pickle.dumps(_metadata(file=_Call(os.system, f"touch {marker}"))),
    "attributes of a class": lambda marker: (
        b"ctorch\nSize\n(N}X\x0b\x00\x00\x00__getitem__cposix\nsystem\nstb."
    ),
    "a memo of gigabytes": lambda marker: b"Nr\xff\xff\xff\x7f.",
    "a text of exabytes": lambda marker: b"\x8d" + (2**60).to_bytes(8, "little") + b".",
    "an array of exabytes": lambda marker: b"\x96" + (2**60).to_bytes(8, "little") + b".",
    "lists in lists": lambda marker: b"]" * 100_000 + b"a" * 99_999 + b".",
    "nothing": lambda marker: b"",
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_pickle_says_nothing_and_does_nothing(tmp_path, what):
    marker = tmp_path / "ran"
    data = HOSTILE[what](marker)
    with pytest.raises(DamagedCheckpoint, match="not the metadata of a checkpoint: ") as error:
        parse_metadata(data, tmp_path / METADATA_FILE)
    assert not marker.exists() and len(str(error.value).splitlines()) == 1


def test_classes_of_one_pickle_are_not_those_of_the_next():
    named = frozenset({("torch", "Size")})
    first, second = (read_pickle(pickle.dumps(torch.Size((1,))), named, {}) for _ in range(2))
    assert first.arguments == second.arguments == ((1,),) and type(first) is not type(second)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"file": "../other/__0_0.distcp"}, "is no file of the folder"),
        ({"file": "/etc/passwd"}, "is no file of the folder"),
        ({"file": ".."}, "is no file of the folder"),
        ({"file": "a\nb"}, "a name of 3 characters"),
        ({"file": 7}, "int instead of a text"),
        ({"offset": -1}, "instead of a count"),
        ({"offset": 2**70}, "instead of a count"),
        ({"sizes": (2, 2)}, "do not cover it"),
        ({"sizes": (3, 2)}, "is outside of"),
        ({"sizes": (6,)}, "is outside of"),
    ],
)
def test_a_list_that_cannot_be_is_refused(tmp_path, changes, told):
    with pytest.raises(DamagedCheckpoint, match=told):
        parse_metadata(pickle.dumps(_metadata(**changes)), tmp_path / METADATA_FILE)


def test_links_lead_nowhere_else(tmp_path):
    folder, boxes = _checkpoint(tmp_path / "c"), tmp_path / "c" / "__0_0.distcp"
    boxes.rename(tmp_path / "boxes")
    boxes.symlink_to(tmp_path / "boxes")
    with pytest.raises(DamagedCheckpoint, match=r"__0_0\.distcp: a link to what is outside of the folder"):
        open_checkpoint(folder)
    (folder / STATE_FILE).unlink()
    (folder / STATE_FILE).symlink_to("/dev/zero")
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: is no file"):
        open_checkpoint(folder)


def test_published_weights_are_no_checkpoint_whatever_lies_beside_them(tmp_path):
    folder = _checkpoint(tmp_path / "c")
    assert names_checkpoint(folder)
    (folder / "model.safetensors").touch()
    assert not names_checkpoint(folder)


def test_a_list_of_checksums_that_cannot_be_is_refused(tmp_path):
    for text in ("[]", '{"boxes": {"a": [[1, 2]]}}', '{"boxes": 1}', "{"):
        (tmp_path / CHECKSUMS_FILE).write_text(text)
        with pytest.raises(DamagedCheckpoint, match=r"checksums\.json: not a list of checksums"):
            read_box_sums(tmp_path, {CHECKSUMS_FILE: sum_of(text.encode())})


def test_a_box_of_a_stranger_is_not_unpickled(tmp_path):
    file = tmp_path / "box"
    torch.save(_Call(os.system, f"touch {tmp_path / 'ran'}"), file)
    with (
        file.open("rb") as blob,
        pytest.raises(ValueError, match=r"not a tensor that torch\.save wrote: .*posix\.system"),
    ):
        values_offset(blob, (2, 3), torch.bfloat16)
    assert not (tmp_path / "ran").exists()
