"""Commands that are killed at moments of chance end as if they had not been; a damaged newest checkpoint is noticed,
named, and the one before it used where anything is missing.

The slow cases kill and damage much; those of every commit are few, of the same kinds and seeded. To see the counts:

    pytest -m slow -s tests/system/test_chaos.py
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_papo.config import dump_config
from tests.support import commands
from tests.support.chaos import DAMAGES, KILLS, Damage, Kill, kill_everything, kill_the_launcher, killed_at
from tests.support.inputs import FOR_VLLM
from tests.support.tiny_run import metrics, tiny_run

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
NEEDS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
STEPS = 6
TRAINED = {"train__steps": STEPS, "checkpoint__save_every": 1, "checkpoint__keep_last": 3, "loss__entropy_coef": 0.03}
AHEAD = {
    **TRAINED,
    "generation__engine": "vllm",
    "generation__placement": "separate",
    "generation__kv_cache_gib": 0.05,
    "train__ahead": True,
    "loss__correction": "truncated",
    "run__heartbeat_s": 0.5,
}
MODEL = FOR_VLLM


@dataclass(frozen=True)
class Work:
    """A command that is started again until it has ended well, and what it leaves behind."""

    words: tuple[object, ...]
    result: Callable[[], Any]
    vllm: bool = False
    kills: tuple[Kill, ...] = KILLS

    def begin(self, log: Path) -> commands.Command:
        return commands.begin(*self.words, log=log, vllm=self.vllm)


def _verb(verb: str, inputs: Path, folder: Path, result: Callable[[Path], Any], **settings: Any) -> Work:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(tiny_run(inputs, folder / "run", **settings)))
    words = ("-m", "megatron_papo.cli", verb, folder / "config.yaml")
    return Work(words, lambda: result(folder / "run"), vllm=settings.get("generation__engine") == "vllm")


def _curve(run_dir: Path) -> str:
    """Without what an engine measures of itself, which no checkpoint keeps."""
    return json.dumps([{n: v for n, v in line.items() if not n.startswith("engine/")} for line in metrics(run_dir)])


def _last_scores(run_dir: Path) -> str:
    """Every line is whole; a run that was killed after its line has left one more, of the same scores."""
    (scores,) = {json.dumps(json.loads(line)) for line in (run_dir / "eval.jsonl").read_text().splitlines()}
    return scores


def _train(inputs: Path, folder: Path) -> Work:
    return _verb("train", inputs, folder, _curve, parallel__tensor=2, **TRAINED)


def _ahead(inputs: Path, folder: Path) -> Work:
    """Not its engine alone: what is lost of a step ahead is made again with newer weights (docs/separate.md)."""
    work = _verb("train", inputs, folder, _curve, **AHEAD)
    return replace(work, kills=(kill_everything, kill_the_launcher))


def _sft(inputs: Path, folder: Path) -> Work:
    settings = {"sft__steps": STEPS, "sft__batch_size": 4, "checkpoint__save_every": 1}
    return _verb("sft", inputs, folder, _curve, **settings)


def _eval(inputs: Path, folder: Path) -> Work:
    return _verb("eval", inputs, folder, _last_scores, data__eval=inputs / "rows.jsonl", eval__samples=4)


def _to_megatron(inputs: Path, folder: Path) -> Work:
    return _conversion("hf-to-megatron", inputs / "model", folder)


def _to_hugging_face(inputs: Path, folder: Path) -> Work:
    checkpoint = inputs / "converted"
    if not checkpoint.exists():
        done = commands.run(TOOL, "hf-to-megatron", inputs / "model", checkpoint)
        assert done.returncode == 0, done.stderr
    return _conversion("megatron-to-hf", checkpoint, folder)


def _conversion(direction: str, source: Path, folder: Path) -> Work:
    folder.mkdir(parents=True)
    target = folder / "target"
    words = (TOOL, direction, source, target, "--file-gb", "0.0001", "--workers", "2")
    return Work(words, lambda: _content(target))


def _content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _timed(work: Work, log: Path) -> float:
    """Runs it to its end, undisturbed; its seconds, without those of the server that it is forked from."""
    commands.papo("--help", vllm=work.vllm)
    start = time.monotonic()
    assert work.begin(log).wait(timeout=300) == 0, log.read_text()
    return time.monotonic() - start


SLOW = pytest.mark.slow


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("make", "kills", "seed"),
    [
        pytest.param(_to_megatron, 2, 0, id="to Megatron"),
        pytest.param(_train, 12, 1, id="train, often", marks=SLOW),
        pytest.param(_ahead, 12, 2, id="ahead, often", marks=[SLOW, NEEDS_VLLM]),
        pytest.param(_sft, 12, 3, id="sft, often", marks=SLOW),
        pytest.param(_eval, 12, 4, id="eval, often", marks=SLOW),
        pytest.param(_to_megatron, 12, 5, id="to Megatron, often", marks=SLOW),
        pytest.param(_to_hugging_face, 12, 6, id="to Hugging Face, often", marks=SLOW),
    ],
)
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(inputs, tmp_path, request, make, kills, seed):
    """The same line or file bit for bit, and no process outlives a kill."""
    moments = random.Random(seed)
    undisturbed = make(inputs, tmp_path / "undisturbed")
    lasts_s = _timed(undisturbed, tmp_path / "undisturbed.log")
    wanted, struck, ended = undisturbed.result(), Counter(), 0
    work = make(inputs, tmp_path / "killed_0")
    while struck.total() < kills or not ended:
        enough = struck.total() >= kills
        log = tmp_path / f"{struck.total()}_{ended}.log"
        command, kill = work.begin(log), work.kills[struck.total() % len(work.kills)]
        if killed_at(command, 300 if enough else moments.uniform(0.0, lasts_s), kill, moments):
            struck[kill.__name__] += 1
            continue
        assert command.poll() == 0, log.read_text()
        assert work.result() == wanted
        ended += 1
        work = make(inputs, tmp_path / f"killed_{ended}")
    print(f"{request.node.callspec.id}: {ended} ended as undisturbed after {struck.total()} kills: {dict(struck)}")


@dataclass(frozen=True)
class Saved:
    """A run of two steps, each with a checkpoint, and the curve of three."""

    run_dir: Path
    inputs: Path
    curve: str

    @property
    def newest(self) -> Path:
        return self.run_dir / "checkpoints" / "step_00000002"


@pytest.fixture(scope="module")
def saved(inputs, tmp_path_factory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    undisturbed = _two_ranks(inputs, folder / "undisturbed", 3)
    _timed(undisturbed, folder / "undisturbed.log")
    shutil.copytree(folder / "undisturbed/run", folder / "run")
    shutil.rmtree(folder / "run/checkpoints/step_00000003")
    return Saved(folder / "run", inputs, undisturbed.result())


def _two_ranks(inputs: Path, folder: Path, steps: int) -> Work:
    return _verb("train", inputs, folder, _curve, parallel__tensor=2, **TRAINED | {"train__steps": steps})


def _resumed(saved: Saved, folder: Path, file: str, damage: Damage, moments: random.Random) -> str:
    """What is wrong with the run that goes on after `damage` of one file of its newest checkpoint; empty: nothing."""
    work = _two_ranks(saved.inputs, folder, 3)
    shutil.copytree(saved.run_dir, folder / "run")
    newest = folder / "run/checkpoints/step_00000002"
    damage.do(newest / file, moments)
    log = folder / "resumed.log"
    if code := work.begin(log).wait(timeout=300):
        return f"exit code {code}: {log.read_text()}"
    said = [line for line in log.read_text().splitlines() if line.startswith("papo: ")]
    if not any(line.startswith("papo: warning: ") and str(newest / file) in line for line in said):
        return f"unnoticed: {said}"
    used = newest if _is_side_file(file) else newest.with_name("step_00000001")
    if not any(line.startswith(f"papo: resumed from {used}, step ") for line in said):
        return f"{used.name} was not used: {said}"
    return "" if work.result() == saved.curve else "another curve"


def _is_side_file(file: str) -> bool:
    """A copy of the Hugging Face folder's: a run reads its own of `model.path`, and goes on from the checkpoint."""
    return not file.endswith(".distcp") and file not in (".metadata", "metadata.json", "checksums.json", "state.json")


def _one_of_each(saved: Saved) -> list[tuple[str, Damage]]:
    """A few files, each damaged in another way."""
    (tensors, *_) = sorted(file.name for file in saved.newest.glob("*.distcp"))
    files = (tensors, "state.json")
    return list(zip(files, DAMAGES[1::-1], strict=True))


def _every(saved: Saved) -> list[tuple[str, Damage]]:
    """Every file in every way; a bit of it flipped in three places."""
    files = sorted(file.name for file in saved.newest.iterdir())
    again = [damage for damage in DAMAGES if damage.name == "flipped"] * 2
    return [(file, damage) for file in files for damage in (*DAMAGES, *again)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("choose", [_one_of_each, pytest.param(_every, marks=SLOW)])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(saved, tmp_path, choose):
    moments, wrong = random.Random(7), {}
    damages = choose(saved)
    for number, (file, damage) in enumerate(damages):
        if found := _resumed(saved, tmp_path / str(number), file, damage, moments):
            wrong[f"{number}: {file} {damage.name}"] = found
        shutil.rmtree(tmp_path / str(number))
    print(f"damages: {len(damages)}, of them noticed, named and survived: {len(damages) - len(wrong)}")
    assert not wrong, "\n".join(f"{which}: {what}" for which, what in wrong.items())
