"""Checkpoints written in the background: exactly the state they were taken of, and what a disk's fault costs."""

from __future__ import annotations

import gc
import mmap
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_papo.checkpoint import staging, store
from megatron_papo.checkpoint.state_file import read_state_file
from megatron_papo.checkpoint.store import CheckpointStore, SaveFailed
from megatron_papo.distributed.agreement import RanksFailed
from tests.parallel.checkpoint_cases import Setup, make_source, ranks, start, train, weights
from tests.support.ranks import run_ranks
from tests.support.small_disk import fill, make_room, small_disk

LAYOUTS = {
    "one rank": ranks(1),
    "TP2": ranks(2, tensor=2),
    "PP2": ranks(2, pipeline=2),
    "DP2 split optimizer": ranks(2, distributed=True),
    "DP2 split optimizer, bf16": ranks(2, distributed=True, dtype="bfloat16"),
    "TP2 DP2": ranks(4, tensor=2),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("hf"))


@contextmanager
def _held_back() -> Iterator[None]:
    """Within it a background thread that wants to write waits: for as long the state may change under it."""
    go, write = threading.Event(), store.write_boxes

    def wait_and_write(*arguments: Any) -> None:
        go.wait()
        write(*arguments)

    store.write_boxes = wait_and_write
    try:
        yield
    finally:
        go.set()
        store.write_boxes = write


def _both_ways(source: str, setup: Setup, folder: str) -> list[float]:
    """The same states, saved while the run waits and while it goes on; twice, so that the memory is used again."""
    run = start(source, setup)
    waiting, going_on = CheckpointStore(Path(folder) / "waiting"), CheckpointStore(Path(folder) / "going on")
    waiting.save(0, run)
    going_on.save(0, run)
    logged = []
    for step in (2, 4):
        logged += train(run, range(step - 2, step))
        waiting.save(step, run)
        with _held_back():
            going_on.start(step, run)
            before = weights(run)
            logged += train(run, range(10, 12))
            assert going_on.busy
            assert any(not torch.equal(before[name], tensor) for name, tensor in weights(run).items())
        going_on.finish()
        assert not going_on.busy
    return logged


@pytest.mark.parametrize("setup", LAYOUTS.values(), ids=LAYOUTS)
def test_a_background_save_holds_the_state_it_was_taken_of_bit_for_bit(source, tmp_path, setup):
    run_ranks(_both_ways, setup["world"], str(source), setup, str(tmp_path))
    for step in ("step_00000002", "step_00000004"):
        one, other = tmp_path / "waiting" / step, tmp_path / "going on" / step
        files = sorted(path.name for path in one.iterdir())
        assert files == sorted(path.name for path in other.iterdir())
        assert len([name for name in files if name.endswith(".distcp")]) == setup["world"]
        for name in files:
            if name not in (".metadata", "state.json"):  # a random id, and the checksum of that
                assert (one / name).read_bytes() == (other / name).read_bytes(), f"{step}/{name}"
        assert _said(one) == _said(other)


def _said(folder: Path) -> dict[str, Any]:
    tree = read_state_file(folder)
    tree["checksums"].pop(".metadata")
    return {name: value for name, value in tree.items() if name != "xxh3"}


def _one_rank_cannot_write(source: str, folder: str) -> dict[str, Any]:
    """Rank 1 may write no file larger than a page while step 2 is saved."""
    run = start(source, ranks(2, tensor=2))
    said: list[str] = []
    checkpoints = CheckpointStore(folder, warn=said.append)
    checkpoints.save(1, run)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    checkpoints.start(2, run)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(path.name for path in Path(folder).iterdir())
    torch.distributed.barrier()
    with pytest.raises(SaveFailed) as error:
        checkpoints.finish()
    checkpoints.start(3, run)
    checkpoints.finish()
    latest = checkpoints.latest()
    assert latest is not None
    return {
        "error": str(error.value), "said": said, "failed": checkpoints.num_failed, "left": left, "latest": latest.name
    }  # fmt: skip


def test_every_rank_learns_of_one_ranks_fault(source, tmp_path):
    found = run_ranks(_one_rank_cannot_write, 2, str(source), str(tmp_path / "saves"))
    assert found[0] == found[1]
    reason = f"rank 1: File too large: {tmp_path}/saves/step_00000002.tmp/__1_0.distcp"
    assert found[0]["error"] == f"checkpoint of step 2 was not saved: {reason}; the last good one is step 1"
    assert found[0]["said"] == [found[0]["error"]]
    assert found[0]["failed"] == 1
    assert found[0]["left"] == ["step_00000001"], "what was written of it is gone"
    assert found[0]["latest"] == "step_00000003"


def _disk_fills(source: str, folder: str, asynchronous: bool) -> list[str]:
    """What is said, and the folder's content, of saves with and without room."""
    run = start(source, ranks(2, distributed=True))
    train(run, range(1))
    seen: list[str] = []
    checkpoints = CheckpointStore(Path(folder) / "saves", keep_last=1, keep_best=False, warn=seen.append)
    first = torch.distributed.get_rank() == 0
    checkpoints.save(1, run)
    for step, room in ((2, "none"), (3, "little"), (4, "plenty")):
        torch.distributed.barrier()
        if first and room == "none":
            fill(Path(folder))
        elif first and room == "little":  # for some of the files
            make_room(Path(folder))
            fill(Path(folder), left=100_000)
        elif first:
            make_room(Path(folder))
        torch.distributed.barrier()
        checkpoints.start(step, run, background=asynchronous)
        checkpoints.wait()
        seen.append(" ".join(sorted(path.name for path in checkpoints.folder.iterdir())))
    checkpoints.finish()
    return seen


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_costs_the_checkpoints_that_found_no_room(source, tmp_path, asynchronous):
    with small_disk(tmp_path / "disk", 8) as disk:
        for seen in run_ranks(_disk_fills, 2, str(source), str(disk), asynchronous):
            assert len(seen) == 5
            for step, warning, left in ((2, *seen[:2]), (3, *seen[2:4])):
                assert warning.startswith(f"checkpoint of step {step} was not saved: rank ")
                assert ": No space left on device: " in warning and f"/saves/step_0000000{step}.tmp" in warning
                assert warning.endswith("; the last good one is step 1")
                assert left == "step_00000001"
            assert seen[4] == "step_00000004"


def _too_large_for_two(source: str, folder: str) -> list[str]:
    said: list[str] = []
    run = start(source, ranks(1))
    train(run, range(1))
    CheckpointStore(Path(folder) / "saves", warn=said.append).save(1, run)
    return said


def test_that_the_next_checkpoint_will_not_fit_is_said_before(source, tmp_path):
    with small_disk(tmp_path / "disk", 3) as disk:
        ((warning,),) = run_ranks(_too_large_for_two, 1, str(source), str(disk))
    assert warning.startswith(f"{tmp_path}/disk/saves/step_00000001 takes ") and "MB are free: too little" in warning


def _mistake(source: str, folder: str) -> str:
    """A fault of the program, not of the disk: a name of no kind that can be written."""
    run = start(source, ranks(2, tensor=2))
    checkpoints = CheckpointStore(folder)
    checkpoints.save(1, run)
    take = store.snapshot
    store.snapshot = lambda *arguments: _spoilt(take(*arguments))
    checkpoints.start(2, run)
    with pytest.raises(RanksFailed) as error:
        checkpoints.finish()
    return str(error.value)


def _spoilt(taken: store.Snapshot) -> store.Snapshot:
    name = next(name for name in taken.boxes if "word_embeddings" in name)
    return store.Snapshot({**taken.boxes, name: "no tensor at all"}, taken.facts)


def test_a_mistake_of_the_program_is_no_fault_of_the_disk(source, tmp_path):
    for message in run_ranks(_mistake, 2, str(source), str(tmp_path)):
        assert message.startswith("rank 0: AssertionError: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001"]


class _Runtime:
    """CUDA's, of which a checkpoint pins and unpins memory."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.calls: list[str] = []

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == 0 and flags == 0
        self.pinned[address] = num_bytes
        self.calls.append("pin")
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        self.calls.append("unpin")
        return 0


def _tree(num_rows: int, value: float) -> dict[str, Any]:
    tensors = {"a": torch.full((num_rows, 1025), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}
    tensors |= {"none": torch.empty(0, 4)}
    return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}


def test_what_a_checkpoint_pins_is_as_large_as_what_it_copies(monkeypatch):
    runtime = _Runtime()
    monkeypatch.setattr(staging, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    memory = staging.Staging()
    for value in (1.0, 2.0):  # the second save finds the first one's memory
        copied = memory.copy(_tree(9, value))
        assert all(bool((part.data == value).all()) for part in copied.values())
        assert copied["a"].data.untyped_storage().nbytes() == copied["a"].data.nbytes  # is written without its like
    assert runtime.calls == ["pin"]
    assert 0 <= sum(runtime.pinned.values()) - (9 * 1025 * 4 + 3 * 2) < 2 * 64
    memory.copy(_tree(5, 3.0))
    assert runtime.calls == ["pin", "unpin", "pin"] and len(runtime.pinned) == 1
    del memory, copied
    gc.collect()
    assert runtime.calls[3:] == ["unpin"]
