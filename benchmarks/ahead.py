"""A step of training with a separate vLLM engine: one step ahead of it (`train.ahead`), against waiting for it.

One rank trains, another serves, one thread each; the same prompts, lengths and settings, so both do the same work and
only when differs. Steps are timed in turns by the clock of rank 0, some of each side at a time, with the rollouts of
the first step ahead already under way: what a run has from its second step on. At best a step takes as long as the
longer of the two halves.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import write_model
from benchmarks.ours import settings
from benchmarks.rollouts import Workload, write_rows
from benchmarks.rows import Row
from megatron_papo.config import Config
from megatron_papo.data.processor import load_processor
from megatron_papo.runtime.launch import Work, launch
from megatron_papo.train import Training, open_training, train_step
from megatron_papo.train_ahead import submit_next, wait_for
from megatron_papo.train_ahead import train_step as train_step_ahead
from megatron_papo.training.engine_rank import serve, serves
from megatron_papo.training.rollouts import hand_over
from megatron_papo.training.session import open_run

WORKLOAD = Workload(300, 96, num_prompts=4, group_size=8)
QUICK_WORKLOAD = Workload(96, 16, num_prompts=2, group_size=4)
STEPS = 4
"""Number of steps of each side in a round."""
SIDES = ("ahead", "synchronous")
_MANY = 1_000_000
"""The setting `train.steps`, so large that no step is the last."""


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    workload = QUICK_WORKLOAD if quick else WORKLOAD
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        config = _settings(folder, workload)
        write_rows(folder, workload, load_processor(folder / "model", config.data))
        out = folder / "rows.json"
        args = (config, workload, rounds or (1 if quick else 5), out)
        code = launch(Work("benchmarks.ahead:on_rank", args, folder), 2)
        if code:
            raise SystemExit(code)
        return [Row(**row) for row in json.loads(out.read_text())]


def on_rank(config: Config, workload: Workload, rounds: int, out: Path) -> int:
    """Rank 0 trains and writes the rows to `out`."""
    torch.set_num_threads(1)
    if serves(config):
        return serve(config)
    with open_run(config, config.generation.num_engine_ranks) as run, open_training(run) as training:
        hand_over(run, training.generator, policy_version=0)
        steps = _Steps(training)
        for side in SIDES:
            steps.some(side)  # a warm-up
        of: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for index in range(rounds):
            for side in SIDES[:: -1 if index % 2 else 1]:
                of[side].append(steps.some(side))
    out.write_text(json.dumps([asdict(row) for row in _rows(of, workload)]))
    return 0


class _Steps:
    """Steps of either kind on one policy; each takes the next prompts of the file."""

    def __init__(self, training: Training):
        self._training, self._step = training, 0

    def some(self, side: str) -> dict[str, float]:
        """Seconds of a step, the part of them spent waiting for rollouts, and the engine's seconds for a step's
        rollouts."""
        training, clock = self._training, self._training.run.clock
        pending = submit_next(training, self._step) if side == "ahead" else None
        if pending is not None:
            _, _, pending = train_step_ahead(training, pending)
            self._step += 1
        clock.take()
        engine, start = [], time.perf_counter()
        for _ in range(STEPS):
            if pending is not None:
                _, metrics, pending = train_step_ahead(training, pending)
            else:
                _, metrics = train_step(training, self._step)
            engine.append(metrics["engine/seconds"][0])
            self._step += 1
        seconds = (time.perf_counter() - start) / STEPS
        waited = clock.take()["time/generate"] / STEPS
        if pending is not None:
            wait_for(training, pending)
            self._step += 1
            hand_over(training.run, training.generator, policy_version=self._step)
        return {"step": seconds, "waited": waited, "engine": statistics.fmean(engine)}


def _rows(of: dict[str, list[dict[str, float]]], workload: Workload) -> list[Row]:
    def median(side: str, name: str) -> float:
        return statistics.median(each[name] for each in of[side])

    def row(what: str, name: str) -> Row:
        ratio = statistics.median(own[name] / other[name] for own, other in zip(*of.values(), strict=True))
        return Row(
            f"{what}, {workload.name}: ahead / synchronous", median("ahead", name), median(SIDES[1], name), ratio, "s"
        )

    hidden = [max(0.0, 1 - each["waited"] / each["engine"]) for each in of["ahead"]]
    return [
        row("a step with a separate engine", "step"),
        row("wait for a step's rollouts", "waited"),
        row("the engine's time for a step's rollouts", "engine"),
        Row("share of the engine's time that training covers, ahead", statistics.median(hidden), 1.0,
            statistics.median(hidden), "share"),
    ]  # fmt: skip


def _settings(folder: Path, workload: Workload) -> Config:
    more: dict[str, Any] = {
        "data__train": folder / "rows.jsonl",
        "train__steps": _MANY,
        "train__prompts_per_step": workload.num_prompts,
        "train__group_size": workload.group_size,
        "train__ahead": True,
        "loss__correction": "truncated",
        "generation__engine": "vllm",
        "generation__placement": "separate",
        "generation__kv_cache_gib": 0.25,
        "generation__max_response_tokens": workload.response_tokens,
        "reward__function": "benchmarks.rollouts:share_of_even_bytes",
        "reward__accuracy_weight": 1,
        "reward__format_weight": 0,
    }
    return settings(folder, "PAPO frozen", **more)
