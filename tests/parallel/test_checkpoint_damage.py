"""Checkpoints that a disk has damaged, and those of a stranger: refused on every rank alike, in a line, without running
anything; and another one is then read as if nothing had been tried before."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_papo.checkpoint.archive import METADATA_FILE
from megatron_papo.checkpoint.checksums import CHECKSUMS_FILE
from megatron_papo.checkpoint.opening import FORMAT_FILE, open_checkpoint
from megatron_papo.checkpoint.state import TrainState, model_tensors, read_state
from megatron_papo.checkpoint.state_file import STATE_FILE, read_state_file, write_state_tree
from megatron_papo.checkpoint.store import CheckpointStore
from megatron_papo.checkpoint.weight_loading import load_weights
from megatron_papo.conversion.checkpoint_files import CheckpointFiles
from megatron_papo.conversion.plan import Settings, make_plan, open_store
from megatron_papo.distributed.agreement import DamagedCheckpoint
from megatron_papo.model.parameter_map import parameter_table
from tests.parallel.checkpoint_cases import make_source, ranks, start, train, weights
from tests.support.ranks import run_ranks

LAYOUT = ranks(2, tensor=2, dtype="bfloat16")
SMALL_FILES = (METADATA_FILE, FORMAT_FILE, CHECKSUMS_FILE, STATE_FILE)
NO_UPDATES, OLDER, NEWEST = 0, 2, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def found(source, tmp_path_factory) -> list[dict[str, Any]]:
    """What both ranks came to, everything in one start."""
    return run_ranks(_on_ranks, 2, str(source), str(tmp_path_factory.mktemp("damaged")))


def _on_ranks(source: str, name: str) -> dict[str, Any]:
    run, folder = start(source, LAYOUT), Path(name)
    store = CheckpointStore(folder / "checkpoints", keep_last=5, source=source)
    expected = {}
    for step in (NO_UPDATES, OLDER):
        store.save(step, run)
        expected[step] = train(run, range(step, step + 2)), weights(run)
    newest = store.save(NEWEST, run)
    older = {step: newest.with_name(f"step_{step:08d}") for step in expected}
    result: dict[str, Any] = {"remarks": _remarks(newest, run), "megatron": _read_by_megatron(newest, run)}
    result["damages"] = {what: _told(newest, run) for what in _damaged(newest)}
    result["afterwards"] = {step: _afterwards(newest, older[step], run) == _plain(expected[step]) for step in expected}
    result["hostile"] = _hostile(folder, newest, run)
    return result


def _plain(numbers: tuple[list[float], dict[str, torch.Tensor]]) -> tuple[list[float], dict[str, list[float]]]:
    return numbers[0], {name: tensor.flatten().tolist() for name, tensor in numbers[1].items()}


def _told(folder: Path, run: TrainState) -> str:
    """The fault of reading it, which is the same on every rank."""
    try:
        read_state(folder, run)
        return "nothing"
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


def _damaged(folder: Path) -> Iterator[str]:
    """Every damage in turn, done and undone by rank 0; what it is."""
    rank = dist.get_rank()
    for file in sorted(folder.glob("*.distcp")) + [folder / name for name in SMALL_FILES]:
        whole = file.read_bytes()
        dist.barrier()
        for what, data in _damages(file, whole):
            if rank == 0:
                file.unlink() if data is None else file.write_bytes(data)
            dist.barrier()
            yield f"{file.name}: {what}"
            dist.barrier()
            if rank == 0:
                file.write_bytes(whole)
            dist.barrier()


def _damages(file: Path, whole: bytes) -> Iterator[tuple[str, bytes | None]]:
    yield "deleted", None
    yield "emptied", b""
    yield "cut in half", whole[: len(whole) // 2]
    yield "without its last byte", whole[:-1]
    places = [0, len(whole) - 1, *random.Random(file.name).choices(range(len(whole)), k=2)]
    if file.suffix == ".distcp":  # header, values and directory of a box in the middle
        boxes = sorted(
            (place.offset, place.length) for place in _places(file.parent) if place.relative_path == file.name
        )
        offset, length = boxes[len(boxes) // 2]
        places += [offset + 3, offset + length // 2, offset + length - 3]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        yield f"a bit at byte {place}", bytes(flipped)


def _places(folder: Path) -> list[Any]:
    return list(pickle.loads((folder / METADATA_FILE).read_bytes()).storage_data.values())


def _afterwards(newest: Path, older: Path, run: TrainState) -> Any:
    """The newest fails when most of it has been read; then the older one, and training goes on from it."""
    last = max(newest.glob("*.distcp"))
    whole = last.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        last.write_bytes(whole[:-100] + bytes(100))
    dist.barrier()
    with pytest.raises(DamagedCheckpoint):
        read_state(newest, run)
    dist.barrier()
    if dist.get_rank() == 0:
        last.write_bytes(whole)
    restored = read_state(older, run)
    return _plain((train(run, range(restored.step, restored.step + 2)), weights(run)))


def _remarks(newest: Path, run: TrainState) -> list[str]:
    """Of a whole checkpoint, of one whose tokenizer was edited, and of one that an older version wrote."""
    said: list[str] = []
    for changed in (None, "tokenizer.json", STATE_FILE):
        dist.barrier()
        if changed is not None and dist.get_rank() == 0:
            copy = newest.with_name("changed")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(newest, copy)
            (copy / changed).write_text("{}" if changed != STATE_FILE else _without_sums(copy))
        dist.barrier()
        read_state(newest if changed is None else newest.with_name("changed"), run, warn=said.append)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(newest.with_name("changed"))
    return said


def _without_sums(folder: Path) -> str:
    tree = json.loads((folder / STATE_FILE).read_text())
    (folder / CHECKSUMS_FILE).unlink()
    return json.dumps({name: value for name, value in tree.items() if name not in ("checksums", "xxh3")})


def _read_by_megatron(newest: Path, run: TrainState) -> bool:
    """Whether Megatron-Core's own reader reads what we write."""
    from megatron_papo.weights.held import held_parameters

    before = weights(run)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    tree = model_tensors(held_parameters(run.model, run.shape, 2))
    dist_checkpointing.load(dict(tree), str(newest), validate_access_integrity=False)
    after = weights(run)
    return all(torch.equal(after[name], before[name]) for name in before)


class _Payload:
    """What a stranger puts into a pickle: touches `marker` wherever that is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.marker}",)


def _with_metadata(folder: Path, payload: _Payload) -> None:
    (folder / METADATA_FILE).write_bytes(pickle.dumps(payload))


def _with_object(prefix: str) -> Callable[[Path, _Payload], None]:
    """In place of every object of that name, in a file of its own."""

    def change(folder: Path, payload: _Payload) -> None:
        blob = io.BytesIO()
        torch.save([payload], blob)
        (folder / "__9_0.distcp").write_bytes(blob.getvalue())
        metadata = pickle.loads((folder / METADATA_FILE).read_bytes())
        for index in [index for index in metadata.storage_data if index.fqn.startswith(prefix)]:
            place = metadata.storage_data[MetadataIndex(index.fqn)]
            place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(blob.getvalue())
        (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))

    return change


HOSTILE: dict[str, Callable[[Path, _Payload], None]] = {
    "metadata": _with_metadata, "rng": _with_object("rng/"), "common_state": _with_object("common_state/"),
}  # fmt: skip
NEVER_READ = {"rng": ("read_state",), "common_state": ()}
"""By whom these objects are read at all: the others load the rest, which is whole."""


def _hostile(folder: Path, newest: Path, run: TrainState) -> dict[tuple[str, str], tuple[str, bool]]:
    """(what is hostile, who reads it) -> what it said, and whether the payload ran."""
    table = parameter_table(run.shape)
    readers: dict[str, Callable[[Path], Any]] = {
        "read_state": lambda path: read_state(path, run),
        "load_weights": lambda path: load_weights(run.model, run.shape, path),  # eval, score, serve, certify
        "open_checkpoint": open_checkpoint,
        "CheckpointFiles": lambda path: CheckpointFiles.read(path, table),
        "open_store": lambda path: open_store(path, run.shape),  # verify
        "make_plan": lambda path: make_plan("megatron-to-hf", path, folder / "out.tmp", Settings(), None),
    }
    found = {}
    for what, change in HOSTILE.items():
        path, marker = folder / what, folder / f"{what} ran"
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copytree(newest, path)
            change(path, _Payload(marker))
            state = read_state_file(path)
            write_state_tree(path, {key: value for key, value in state.items() if key not in ("checksums", "xxh3")})
            _forget_box_sums(path)
        for reader, read in readers.items():
            dist.barrier()
            found[what, reader] = _said(lambda: read(path)), marker.exists()  # noqa: B023 - called here
    return found | _in_a_huggingface_folder(folder, run)


def _forget_box_sums(folder: Path) -> None:
    """An enemy would write them anew; here the folder is one of an older version."""
    (folder / STATE_FILE).write_text(_without_sums(folder))


def _in_a_huggingface_folder(folder: Path, run: TrainState) -> dict[tuple[str, str], tuple[str, bool]]:
    """Published weights with what makes a folder a checkpoint beside them."""
    from megatron_papo.weights.transfer import write_hf

    path, marker = folder / "published", folder / "published ran"
    write_hf(run.model, run.shape, path, folder / "metadata")
    if dist.get_rank() == 0:
        shutil.copyfile(folder / "metadata" / STATE_FILE, path / STATE_FILE)
        _with_metadata(path, _Payload(marker))
    dist.barrier()
    readers: dict[str, Callable[[], Any]] = {
        "load_weights": lambda: load_weights(run.model, run.shape, path),
        "open_store": lambda: open_store(path, run.shape),
    }
    return {("published", reader): (_said(read), marker.exists()) for reader, read in readers.items()}


def _said(read: Callable[[], Any]) -> str:
    try:
        read()
        return ""
    except ValueError as error:
        return str(error)


def test_every_damage_is_noticed_and_named_on_every_rank(found):
    damages = [each["damages"] for each in found]
    assert damages[0] == damages[1], "every rank says the same"
    for what, told in damages[0].items():
        file = what.partition(":")[0]
        kind = "ValueError" if what == f"{STATE_FILE}: deleted" else "DamagedCheckpoint"  # no checkpoint is there then
        assert told.startswith(f"{kind}: ") and f"step_00000004/{file}: " in told, (what, told)
        assert len(told.splitlines()) == 1, (what, told)
    assert len(damages[0]) == 2 * 11 + 4 * 8


def test_another_checkpoint_is_read_after_one_that_was_damaged(found):
    for each in found:
        assert each["afterwards"] == {NO_UPDATES: True, OLDER: True}


def test_what_is_no_reason_to_refuse_a_checkpoint_is_said_once(found):
    edited, older = found[0]["remarks"]
    assert edited.endswith("tokenizer.json: not what was written: its checksum differs; resuming does not need it")
    assert older.endswith("has no checksums: written by an older version; damage would not be noticed")
    assert found[1]["remarks"] == [], "rank 0 alone says it"


def test_megatrons_own_reader_reads_our_checkpoints(found):
    assert all(each["megatron"] for each in found)


def test_nothing_of_a_strangers_checkpoint_runs(found):
    for each in found:
        for (what, reader), (said, ran) in each["hostile"].items():
            assert not ran, f"{what} ran in {reader}"
            if what == "metadata":
                assert ".metadata: not the metadata of a checkpoint: " in said and "posix.system" in said, (
                    reader,
                    said,
                )
            elif reader in NEVER_READ.get(what, ()):
                assert "__9_0.distcp: rng/shard_" in said and "not plain tensors" in said, (reader, said)
            else:
                assert said == "", (what, reader, said)
            assert len(said.splitlines()) <= 1
