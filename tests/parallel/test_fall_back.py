"""A run whose newest checkpoint is damaged: every rank goes on from the newest that is whole, or none does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_papo.checkpoint.store import CheckpointStore
from tests.parallel.checkpoint_cases import make_source, ranks, start, train, weights
from tests.support.ranks import run_ranks


def _spoil(file: Path, content: bytes) -> None:
    if dist.get_rank() == 0:
        file.write_bytes(content)
    dist.barrier()


def _fall_back(source: str, root: str) -> dict[str, Any]:
    said: list[str] = []
    run, folder = start(source, ranks(2, tensor=2)), Path(root)
    store = CheckpointStore(folder, keep_last=3, keep_best=False, warn=said.append)
    expected = {}
    for step in (1, 2, 3, 4):
        train(run, range(step - 1, step))
        store.save(step, run, metric=1.0 / step)
        expected[step] = weights(run)

    found: dict[str, Any] = {"said": said, "names": [], "right": []}

    def note(step: int) -> None:
        there = weights(run)
        found["right"] += [all(torch.equal(there[name], expected[step][name]) for name in there)]
        found["names"] += [sorted(path.name for path in folder.iterdir())]

    _spoil(folder / "step_00000004" / "state.json", b"\xff" * 20)
    _, restored = store.resume(run)
    note(restored.step)
    train(run, range(3, 4))
    store.save(4, run)
    tensors = (folder / "step_00000002" / "__0_0.distcp").read_bytes()
    dist.barrier()
    middle = len(tensors) // 2
    flipped = bytes([tensors[middle] ^ 1])
    _spoil(folder / "step_00000002" / "__0_0.distcp", tensors[:middle] + flipped + tensors[middle + 1 :])
    _spoil(folder / "step_00000004" / "state.json", b"")
    whole = (folder / "step_00000003" / "state.json").read_bytes()
    dist.barrier()
    _spoil(folder / "step_00000003" / "state.json", b"[]")
    with pytest.raises(ValueError) as error:
        store.resume(run)
    found["none"] = str(error.value)
    found["names"] += [sorted(path.name for path in folder.iterdir())]
    _spoil(folder / "step_00000003" / "state.json", whole)
    found["metric"] = store.best_metric()
    _, restored = store.resume(run)
    note(restored.step)
    return found


def test_the_newest_whole_checkpoint_is_resumed_and_the_damaged_are_set_aside(tmp_path):
    source = make_source(tmp_path / "hf")
    folder = tmp_path / "checkpoints"
    first, second = run_ranks(_fall_back, 2, str(source), str(folder))
    assert first["right"] == second["right"] == [True, True]
    names = [f"step_0000000{step}" for step in (2, 3, 4)]
    assert first["names"] == [
        [*names[:2], "step_00000004.damaged"],
        [*names, "step_00000004.damaged"],
        [*names[:2], "step_00000004.damaged", "step_00000004.damaged-2"],
    ]
    assert second["said"] == [], "one rank speaks"
    step_4 = folder / "step_00000004" / "state.json"
    assert first["said"][0].startswith(f"damaged checkpoint: {step_4}: not JSON: ")
    assert first["said"][0].endswith(": set aside as step_00000004.damaged; the run goes on from step_00000003")
    assert len(first["said"]) == 2 and "set aside as step_00000004.damaged-2" in first["said"][1]
    for found in (first, second):
        assert found["none"].startswith(f"run.dir: no checkpoint under {folder} is whole: ")
        assert f"{step_4}: not JSON: " in found["none"]
        assert f"{folder / 'step_00000002' / '__0_0.distcp'}: " in found["none"]
        assert found["none"].endswith("; to begin anew, take another run.dir, or checkpoint.resume=false")
        assert str(folder / "step_00000003" / "state.json") in found["none"]
        assert found["metric"] == 0.5
