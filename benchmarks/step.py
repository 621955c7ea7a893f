"""Seconds of a whole step, generation and reward included: our `train_step` against TRL's trainer.

4 prompts x 8 rollouts from pictures on disk, sampled with transformers on both sides at temperature 1 and top_p 1,
the same reward function, then the update. TRL's side is its own `_prepare_inputs`, `training_step` and optimizer, its
rows decoded once a prompt. Random weights hardly ever end a response, so both sides sample as many tokens; rows say
how many. What the perception term adds is measured there, in the leanest step, and by the paper's recipe, with a
reference and three updates a rollout batch, which plain GRPO pays for as well; there in seconds of the clock, the next
prompts and masks prepared in a thread as in training.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import write_model
from benchmarks.ours import KINDS, settings
from benchmarks.rollouts import Workload, share_of_even_bytes, write_rows
from benchmarks.rows import Row
from benchmarks.timing import Seconds, measure
from benchmarks.trl_grpo import Trl, Variant
from megatron_papo.config import Config
from megatron_papo.data.conversation import PLACEHOLDER
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.images import decode_image
from megatron_papo.data.processor import Processor, load_processor
from megatron_papo.train import Training, open_training, train_step
from megatron_papo.training.prompt_source import prefetch_prompts
from megatron_papo.training.rollouts import hand_over
from megatron_papo.training.session import open_run

WORKLOAD = Workload(600, 64)
RECIPE: dict[str, Any] = {"loss__reference_coef": 0.01, "train__updates_per_step": 3, "data__prefetch": True}
RECIPE_WORKLOADS = (Workload(600, 64, num_prompts=6), Workload(600, 256, num_prompts=6))
QUICK_WORKLOAD = Workload(96, 16, num_prompts=2, group_size=4)
VARIANTS = (Variant(2), Variant(8))
LENGTHS_MAY_DIFFER = 0.1
"""Largest relative difference of the mean lengths: random weights end a response once in two thousand tokens."""


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    rounds = rounds or (1 if quick else 5)
    workload = QUICK_WORKLOAD if quick else WORKLOAD
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        rows = _against_trl(folder, workload, rounds)
        for one in (replace(QUICK_WORKLOAD, num_prompts=3),) if quick else RECIPE_WORKLOADS:
            rows += _by_recipe(folder, one, rounds)
        return rows


def _against_trl(folder: Path, workload: Workload, rounds: int) -> list[Row]:
    rows = write_rows(folder, workload, _processor(folder, workload))
    with _open_ours(folder, workload) as ours:
        trls = [_trl(folder, variant, workload) for variant in VARIANTS]
        sides: dict[str, Callable[[], object]] = {kind: partial(ours.step, kind) for kind in KINDS}
        steps = {f"TRL ({trl.variant.name})": _TrlSteps(trl, folder, workload, rows) for trl in trls}
        sides |= {side: trl.step for side, trl in steps.items()}
        measure(sides, 1, "warm-up")
        seconds = measure(sides, rounds, f"step, {workload.name}")
        best, tokens = min(steps, key=seconds.median), _tokens(workload)
        lengths = _lengths(ours.mean_length, steps[best].mean_length)
        of_steps = [row for kind in KINDS for row in seconds.rows(f"step: {kind} / {best}, GRPO", kind, best, tokens)]
        return [*of_steps, *_perception(seconds, f"step, {workload.name}", tokens), lengths]


def _by_recipe(folder: Path, workload: Workload, rounds: int) -> list[Row]:
    write_rows(folder, workload, _processor(folder, workload))
    with _open_ours(folder, workload, **RECIPE) as ours:
        sides: dict[str, Callable[[], object]] = {kind: partial(ours.step, kind) for kind in KINDS}
        measure(sides, 1, "warm-up")
        what = f"step by the paper's recipe, {workload.name}"
        return _perception(measure(sides, rounds, what, clock=time.perf_counter), what, _tokens(workload))


def _perception(seconds: Seconds, name: str, tokens: int) -> list[Row]:
    """What the perception term adds to a step of ours."""
    kinds = ("PAPO frozen", "PAPO joint")
    return [seconds.rows(f"{name}: {kind} / GRPO, both ours", kind, "GRPO", tokens)[1] for kind in kinds]


def _tokens(workload: Workload) -> int:
    return workload.num_prompts * workload.group_size * (workload.prompt_tokens + workload.response_tokens)


def _lengths(own: float, trl: float) -> Row:
    if abs(own - trl) > LENGTHS_MAY_DIFFER * trl:
        raise AssertionError(f"ours sampled {own:.1f} tokens a response, TRL {trl:.1f}: no fair comparison")
    return Row("step: mean length of a response, ours / TRL", own, trl, own / trl, "tokens")


class _OurSteps:
    """Runs `train_step` of every variant on one policy; each step takes the next prompts of the file."""

    def __init__(self, training: Training, folder: Path, workload: Workload, **more: Any):
        self._training = training
        dataset = PromptDataset(training.run.config.data, "train", training.run.processor)
        self._runs = {kind: replace(training.run, config=_settings(folder, kind, workload, **more)) for kind in KINDS}
        self._prompts = {kind: prefetch_prompts(run, dataset) for kind, run in self._runs.items()}
        self._lengths: list[int] = []
        self._step = 0

    def step(self, kind: str) -> None:
        self._training.run, self._training.prompts = self._runs[kind], self._prompts[kind]
        groups, _ = train_step(self._training, self._step)
        self._step += 1
        self._lengths += [len(rollout.response_ids) for group in groups for rollout in group.rollouts]

    @property
    def mean_length(self) -> float:
        return statistics.fmean(self._lengths)


class _TrlSteps:
    """Runs steps of one TRL variant; each step takes the next prompts of the same file."""

    def __init__(self, trl: Trl, folder: Path, workload: Workload, rows: list[dict[str, str]]):
        self._trl, self._folder, self._workload, self._rows = trl, folder, workload, rows
        self._place = 0

    def step(self) -> None:
        places = [(self._place + index) % len(self._rows) for index in range(self._workload.num_prompts)]
        self._place += self._workload.num_prompts
        examples = [self._example(self._rows[place]) for place in places]
        self._trl.step([example for example in examples for _ in range(self._workload.group_size)])

    def _example(self, row: dict[str, str]) -> dict[str, Any]:
        """A row in the form that TRL needs: TRL puts the picture before the text itself."""
        turn = {"role": "user", "content": row["problem"].removeprefix(PLACEHOLDER)}
        return {"prompt": [turn], "images": [decode_image((self._folder / row["images"]).read_bytes())]}

    @property
    def mean_length(self) -> float:
        """Mean length of the responses; also checks that prompts are as long as ours."""
        trainer, size = self._trl.trainer, self._workload.num_prompts * self._workload.group_size
        lengths = trainer._metrics["train"]["completions/mean_length"]
        assert trainer.state.num_input_tokens_seen == round(
            size * sum(lengths + [self._workload.prompt_tokens] * len(lengths))
        )
        return statistics.fmean(lengths)


@contextmanager
def _open_ours(folder: Path, workload: Workload, **more: Any) -> Iterator[_OurSteps]:
    with open_run(_settings(folder, "GRPO", workload, **more)) as run, open_training(run) as training:
        hand_over(run, training.generator, policy_version=0)
        yield _OurSteps(training, folder, workload, **more)


def _settings(folder: Path, kind: str, workload: Workload, **more: Any) -> Config:
    return settings(
        folder,
        kind,
        data__train=folder / "rows.jsonl",
        train__prompts_per_step=workload.num_prompts,
        train__group_size=workload.group_size,
        generation__max_response_tokens=workload.response_tokens,
        reward__function="benchmarks.rollouts:share_of_even_bytes",
        reward__accuracy_weight=1,
        reward__format_weight=0,
        **more,
    )


def _processor(folder: Path, workload: Workload) -> Processor:
    return load_processor(folder / "model", _settings(folder, "GRPO", workload).data)


def _trl(folder: Path, variant: Variant, workload: Workload) -> Trl:
    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [share_of_even_bytes(turns[0]["content"], "", "") for turns in completions]

    return Trl(
        folder,
        variant,
        batch_size=workload.num_prompts * workload.group_size,
        group_size=workload.group_size,
        reward=reward,
        max_response_tokens=workload.response_tokens,
    )
