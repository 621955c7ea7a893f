"""Checkpoints of real Megatron models and optimizers: resumed on the same and on other layouts, killed while saving."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_papo.checkpoint import store
from megatron_papo.checkpoint.state import TrainState, read_state
from megatron_papo.checkpoint.state_file import read_state_file
from megatron_papo.checkpoint.store import CheckpointStore
from megatron_papo.checkpoint.weight_loading import load_weights
from megatron_papo.files import atomic_folder
from megatron_papo.model.shape import ModelShape
from tests.parallel.checkpoint_cases import (
    SHAPE,
    VISION,
    Setup,
    build,
    make_source,
    open_groups,
    ranks,
    start,
    train,
    weights,
)
from tests.support.ranks import RankFailed, run_ranks
from tests.support.tiny import make_tiny_folder
from tests.toy_family.folder import make_toy_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def sources(source, tmp_path_factory) -> dict[str, Path]:
    """A model of each family, one of which lies outside the package, all with widths that are padded."""
    root = tmp_path_factory.mktemp("sources")
    toy = make_toy_folder(root / "toy", tie=True)
    return {"first": source, "second": make_source(root / "second", "qwen3_vl"), "toy": toy}


Trained = tuple[list[float], dict[str, torch.Tensor]]
"""What updates logged, and the weights after them."""


def _uninterrupted(sources: list[Path], setup: Setup, folder: Path) -> list[Trained]:
    """Of each source: two updates, a checkpoint in a folder of its own, three more updates."""
    config, found = open_groups(setup), []
    for number, source in enumerate(sources):
        run = build(source, config)
        train(run, range(2))
        CheckpointStore(folder / str(number), source=source).save(2, run, metric=0.5)
        found.append((train(run, range(2, 5)), weights(run)))
    return found


def _resumed(sources: list[Path], setup: Setup, folder: Path) -> list[Trained]:
    config, found = open_groups(setup), []
    for number, source in enumerate(sources):
        run, latest = build(source, config), CheckpointStore(folder / str(number)).latest()
        assert latest is not None
        restored = read_state(latest, run)
        expected = (2, 0.5, {"row": 5}, {"run": "test"})
        assert (restored.step, restored.metric, restored.cursor, restored.config) == expected
        found.append((train(run, range(2, 5)), weights(run)))
    return found


@pytest.mark.parametrize(
    ("written", "read", "models"),
    [
        (ranks(4, tensor=2, pipeline=2), [ranks(1), ranks(2, distributed=True)], ["first", "second"]),
        (ranks(1), [ranks(4, tensor=4), ranks(2, pipeline=2)], ["first"]),
        (ranks(4, tensor=2, distributed=True), [ranks(2, pipeline=2)], ["first"]),
        (ranks(2, dtype="bfloat16", distributed=True), [ranks(2, tensor=2, dtype="bfloat16")], ["first", "second"]),
        (ranks(2, tensor=2), [ranks(2, pipeline=2), ranks(3, distributed=True)], ["toy"]),
        (ranks(2, distributed=True), [ranks(2, pipeline=2)], ["first", "second"]),
    ],
    ids=["TP2xPP2", "one rank", "TP2xDP2 split", "DP2 bf16 split", "TP2, toy family", "DP2 split"],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(sources, tmp_path, written, read, models):
    folders = [sources[name] for name in models]
    expected = run_ranks(_uninterrupted, written["world"], folders, written, tmp_path)
    same = run_ranks(_resumed, written["world"], folders, written, tmp_path)
    for each in zip(expected, same, strict=True):
        for (values, wanted), (logged, resumed) in zip(*each, strict=True):
            assert logged == values, "the same layout repeats every number"
            assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)

    for other in read:
        elsewhere = run_ranks(_resumed, other["world"], folders, other, tmp_path)[0]
        for (values, wanted), (logged, resumed) in zip(expected[0], elsewhere, strict=True):
            # gradient norms and rates; random numbers belong to the layout. bf16 weights round the masters, which agree
            assert logged[::3] == pytest.approx(values[::3], rel=1e-6)
            assert logged[1::3] == values[1::3]
            tolerance = {"rtol": 1e-5, "atol": 1e-6} if other["dtype"] == "float32" else {"rtol": 2**-8, "atol": 0.0}
            for name, tensor in wanted.items():
                torch.testing.assert_close(resumed[name], tensor, **tolerance, msg=f"{name} at {other}")


PHASES = ("tensors", "state file", "published", "replacing", "retiring")


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_while_saving(source: str, folder: str, phase: str) -> None:
    """Saves step 1, trains, and dies in the given phase of the next save."""
    run = start(source, ranks(2, tensor=2))
    checkpoints = CheckpointStore(folder, keep_last=1, keep_best=False)
    checkpoints.save(1, run)
    train(run, range(1))
    if phase == "tensors":
        store.write_boxes = _die
    elif phase == "state file":
        store.write_state_file = _die
    elif phase == "published":
        store.publish = _die
    elif phase == "replacing":  # the old folder of this step has its other name already
        atomic_folder.sync = lambda path: None
        rename = Path.rename
        Path.rename = lambda self, target: _die() if self.suffix == ".tmp" else rename(self, target)
    elif phase == "retiring":  # the older checkpoint has lost its name, its files are still there
        delete = atomic_folder.shutil.rmtree
        atomic_folder.shutil.rmtree = lambda path, **options: _die() if path.exists() else delete(path, **options)
    checkpoints.start(1 if phase == "replacing" else 2, run)  # in the background
    checkpoints.finish()


def _after_the_kill(source: str, root: str) -> dict[str, tuple[int, bool, list[str]]]:
    """Of each phase: the step that a new run resumes from, whether its weights are right, and what a save leaves."""
    before = start(source, ranks(2, tensor=2))
    untrained = weights(before)
    train(before, range(1))
    expected = {1: untrained, 2: weights(before)}
    found = {}
    for phase in PHASES:
        checkpoints = CheckpointStore(Path(root) / phase, keep_last=1, keep_best=False)
        path = checkpoints.latest()
        assert path is not None
        restored = read_state(path, before)
        found_weights = weights(before)
        right = all(torch.equal(found_weights[name], expected[restored.step][name]) for name in found_weights)
        checkpoints.save(3, before)
        found[phase] = restored.step, right, sorted(file.name for file in checkpoints.folder.iterdir())
    return found


def test_a_kill_at_any_moment_leaves_the_last_good_checkpoint(source, tmp_path):
    for phase in PHASES:
        with pytest.raises(RankFailed, match="was ended by SIGKILL"):
            run_ranks(_killed_while_saving, 2, str(source), str(tmp_path / phase), phase)
        assert any(file.suffix in (".tmp", ".old") for file in (tmp_path / phase).iterdir()), "it died on the way"
    (found, _) = run_ranks(_after_the_kill, 2, str(source), str(tmp_path))
    # once step 2 has its name it is the last good one, though the older was not yet cleared away
    steps = dict.fromkeys(PHASES, 1) | {"retiring": 2}
    assert found == {phase: (steps[phase], True, ["step_00000003"]) for phase in PHASES}


def _many(source: str, folder: str) -> dict[str, Any]:
    run = start(source, ranks(1))
    checkpoints = CheckpointStore(folder, keep_last=2, keep_best=True, source=source)
    assert checkpoints.latest() is None
    for step, metric in enumerate((0.1, 0.7, 0.3, None, 0.2), start=1):
        checkpoints.save(step, run, metric)
    names = sorted(path.name for path in checkpoints.folder.iterdir())
    best, latest = checkpoints.best_metric(), checkpoints.latest()
    assert latest is not None
    checkpoints.save(1, run, 0.9)  # a fresh run in an old folder: the newest is the one written last
    again = checkpoints.latest()
    assert again is not None
    load_weights(run.model, run.shape, again)
    return {
        "names": names, "best": best, "latest": latest.name, "again": again.name,
        "weights": weights(run), "shape": ModelShape.from_folder(again) == run.shape,
    }  # fmt: skip


def test_the_last_and_the_best_are_kept(source, tmp_path):
    (found,) = run_ranks(_many, 1, str(source), str(tmp_path))
    assert found["names"] == ["step_00000002", "step_00000004", "step_00000005"]
    assert (found["best"], found["latest"], found["again"]) == (0.7, "step_00000005", "step_00000001")
    assert found["shape"], "a checkpoint holds the model's config"
    assert {"tokenizer.json", "config.json", "chat_template.jinja"} <= {
        f.name for f in (tmp_path / "step_00000001").iterdir()
    }


def _save(source: str, folder: str) -> str:
    run = start(source, ranks(2, pipeline=2))
    return str(CheckpointStore(folder).save(1, TrainState(run.model, run.shape)))


def _misfit(source: str, path: str) -> str:
    run = start(source, ranks(2, pipeline=2))
    with pytest.raises(ValueError) as error:
        read_state(path, run)
    return str(error.value)


def test_a_checkpoint_of_another_model_is_refused_by_name(source, tmp_path):
    other = make_tiny_folder(tmp_path / "other", **{**SHAPE, "layers": 4, "vocab": 300}, **VISION)
    (path, _) = run_ranks(_save, 2, str(source), str(tmp_path / "checkpoints"))
    for message in run_ranks(_misfit, 2, str(other), path):
        assert "language.embedding.word_embeddings.weight: expected shape (300, 64), found (275, 64)" in message
        assert "language.decoder.layers.3.mlp.linear_fc1.weight (256, 64): missing" in message
        assert len(message.splitlines()) == 8


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"state\.json: no such file"):
        read_state_file(tmp_path)
    (tmp_path / "state.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match=r"state\.json: format 9, this version reads 1"):
        read_state_file(tmp_path)
