"""The planner against this machine: real runs in several layouts, planned after fitting to the run on one rank.

Every layout trains the same model for the same steps through the command's own path (`train.main`), on the CPU, a rank
a process. The run on one rank calibrates (`tools/plan.py --calibrate`); then every step of every layout is planned with
its own mean lengths, and the medians of planned and measured seconds of its updates stand side by side, with the order
of the layouts by each. Two cores hold two ranks; four share them, so no layout of four is run.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import HIDDEN, LAYERS, write_model
from benchmarks.ours import settings
from benchmarks.rollouts import Workload, write_rows
from benchmarks.rows import Row
from megatron_papo.config import Config
from megatron_papo.costs.hardware import CPU
from megatron_papo.data.processor import load_processor
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.measured_run import calibrated, planned
from megatron_papo.runtime.launch import Work, launch

LAYOUTS: dict[str, dict[str, Any]] = {
    "1 rank": {},
    "TP 2": {"parallel__tensor": 2},
    "TP 2 with SP": {"parallel__tensor": 2, "parallel__sequence": True},
    "PP 2": {"parallel__pipeline": 2},
    "DP 2": {},
}
STAGE = "update"
RESPONSE_TOKENS = 24


@dataclass(frozen=True)
class Scale:
    hidden: int
    layers: int
    steps: int


FULL, QUICK = Scale(384, 8, 6), Scale(HIDDEN, LAYERS, 2)


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    scale = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", hidden=scale.hidden, layers=scale.layers)
        processor = load_processor(folder / "model", settings(folder, "GRPO").data)
        write_rows(folder, Workload(prompt_tokens=300, response_tokens=RESPONSE_TOKENS), processor)
        configs = {layout: _config(folder, layout, rounds or scale.steps) for layout in LAYOUTS}
        for layout, config in configs.items():
            ranks = 1 if layout == "1 rank" else 2
            if code := launch(Work("benchmarks.plan:on_rank", (config,), config.run.dir), ranks):
                raise SystemExit(code)
        return _rows(configs, ModelShape.from_folder(folder / "model"))


def on_rank(config: Config) -> None:
    from megatron_papo.train import main

    torch.set_num_threads(1)
    main(config)


def _config(folder: Path, layout: str, steps: int) -> Config:
    return settings(
        folder,
        "GRPO",
        run__dir=folder / layout.replace(" ", "_"),
        data__train=folder / "rows.jsonl",
        train__steps=steps,
        train__prompts_per_step=8,
        train__group_size=4,
        train__updates_per_step=1,
        generation__max_response_tokens=RESPONSE_TOKENS,
        reward__function="benchmarks.rollouts:share_of_even_bytes",
        certify__at_start=False,
        certify__after_hand_over=False,
        observe__samples_every=0,
        **LAYOUTS[layout],
    )


def _rows(configs: dict[str, Config], shape: ModelShape) -> list[Row]:
    assumed = calibrated(configs["1 rank"].run.dir, CPU)
    seconds: dict[str, tuple[float, float]] = {}
    for layout, config in configs.items():
        lines = (config.run.dir / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines][1:]  # the first step warms up
        plans = [planned(config, shape, CPU, int(each["ranks"]), assumed, each).seconds[STAGE] for each in records]
        measured = statistics.median(float(each[f"time/{STAGE}"]) for each in records)
        seconds[layout] = statistics.median(plans), measured
    rows = [
        Row(f"{layout}: seconds of an update, planned / measured", plan, measured, plan / measured, "s")
        for layout, (plan, measured) in seconds.items()
    ]
    orders = [sorted(seconds, key=lambda layout: seconds[layout][side]) for side in (0, 1)]
    agreeing = sum(
        (orders[0].index(a) < orders[0].index(b)) == (orders[1].index(a) < orders[1].index(b))
        for place, a in enumerate(LAYOUTS)
        for b in list(LAYOUTS)[place + 1 :]
    )
    pairs = len(LAYOUTS) * (len(LAYOUTS) - 1) // 2
    told = (
        f"pairs of layouts in the measured order (planned: {' < '.join(orders[0])}; measured: {' < '.join(orders[1])})"
    )
    return [*rows, Row(told, agreeing, pairs, agreeing / pairs, "pairs")]
