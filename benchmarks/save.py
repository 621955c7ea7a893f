"""What checkpoints cost a run: updates with a save in the background, with a save that they wait for, and without; and
what their checksums cost a load (loads.py).

A model of 42 M parameters in fp32, half a gigabyte a checkpoint, on one rank and on two (TP 2). Every round times as
many updates on each side, in turns, by the clock; rollouts are given, so updates follow each other as closely as they
can, and there is a save every few seconds, where a run has one every few minutes. What a save costs is the difference;
`INTERVAL_S` says for which interval it is given as a share. The files go to the folder for temporary files, TMPDIR.

Leaves out the first save, which also pays for the pages of the memory that states are copied to.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.loads import load_rows
from benchmarks.models import HIDDEN, LAYERS, write_model
from benchmarks.ours import Ours, settings
from benchmarks.rollouts import Workload, make_groups
from benchmarks.rows import Row
from benchmarks.timing import measure
from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy
from megatron_papo.runtime.launch import Work, launch
from megatron_papo.training.checkpoints import Checkpoints
from megatron_papo.training.session import open_run

INTERVAL_S = 60.0
"""Seconds of training between two saves. This is short, since the default is a save every 50 steps."""
SIDES = ("no save", "background", "waiting")


@dataclass(frozen=True)
class Scale:
    hidden: int
    layers: int
    workload: Workload
    num_updates: int
    """Number of updates of a round, with one save before them."""
    rounds: int


FULL = Scale(512, 8, Workload(96, 32, num_prompts=2, group_size=4), num_updates=6, rounds=7)
QUICK = Scale(HIDDEN, LAYERS, Workload(96, 16, num_prompts=1, group_size=2), num_updates=2, rounds=1)


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    scale = QUICK if quick else FULL
    scale = replace(scale, rounds=rounds or scale.rounds)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", hidden=scale.hidden, layers=scale.layers)
        for num_ranks in (1, 2):
            out = folder / f"{num_ranks}.json"
            code = launch(Work("benchmarks.save:on_rank", (folder, scale, num_ranks, out), folder), num_ranks)
            if code:
                raise SystemExit(code)
            rows += [Row(**row) for row in json.loads(out.read_text())]
    return rows


def on_rank(folder: Path, scale: Scale, num_ranks: int, out: Path) -> None:
    """All sides on this rank among `num_ranks` tensor ranks; rank 0 writes the rows to `out`."""
    torch.set_num_threads(1)
    config = settings(folder, "GRPO", parallel__tensor=num_ranks, run__dir=folder / f"run_{num_ranks}")
    with open_run(config) as run:
        optimizer = build_optimizer(wrap_policy(run.policy, config), config, num_updates=10_000)
        ours = Ours(run, optimizer, {"GRPO": config})
        sides = {side: _Side(ours, side, scale) for side in SIDES}
        for side in sides.values():
            side.warm_up()
        shown = run.layout.rank == 0
        what = f"{num_ranks} rank{'s' * (num_ranks > 1)}"
        clock = measure(sides, scale.rounds, what if shown else None, time.perf_counter)
        num_bytes = sides["waiting"].checkpoint_bytes() / num_ranks
        loads = load_rows(what, ours, sides["waiting"].checkpoint(), scale.rounds)
        if shown:
            rows = _rows(what, clock.of, sides, num_bytes, scale) + loads
            out.write_text(json.dumps([asdict(row) for row in rows]))


def _rows(what: str, of: dict[str, list[float]], sides: dict[str, _Side], num_bytes: float, scale: Scale) -> list[Row]:
    """Rows of the delay of updates, of the speed of the copy, and of the whole cost of a save as a share of
    `INTERVAL_S`."""
    own, waiting = (statistics.median(sides[side].held_s) for side in ("background", "waiting"))
    rate, copy = num_bytes / 1e9 / own, _copy_rate()
    rows = [
        Row(f"{what}: a save of {num_bytes / 1e6:.0f} MB a rank holds up the step: background / waiting",
            own, waiting, own / waiting, "s"),
        Row(f"{what}: copy of the state / of one large tensor", rate, copy, rate / copy, "GB/s"),
    ]  # fmt: skip
    updates = f"{scale.num_updates} updates and a save"
    for side in ("background", "waiting"):
        extra = statistics.median(_differences(of, side))
        rows += [
            _beside_none(f"{what}: {updates}, {side} / without a save, by the clock", of, side),
            _beside_none(
                f"{what}: {updates}, {side} / without a save, processor time of rank 0",
                {name: each.processor_s for name, each in sides.items()},
                side,
            ),
            Row(f"{what}: training with a save every {INTERVAL_S:.0f} s, {side} / without",
                INTERVAL_S + extra, INTERVAL_S, 1 + extra / INTERVAL_S, "s"),
        ]  # fmt: skip
    return rows


def _beside_none(name: str, of: dict[str, list[float]], side: str) -> Row:
    ratio = statistics.median(own / other for own, other in zip(of[side], of["no save"], strict=True))
    return Row(name, statistics.median(of[side]), statistics.median(of["no save"]), ratio, "s")


def _differences(of: dict[str, list[float]], side: str) -> list[float]:
    return [own - other for own, other in zip(of[side], of["no save"], strict=True)]


def _copy_rate() -> float:
    """GB/s of a copy between tensors that are there already, on one thread."""
    source, target = torch.ones(2, 64 * 2**20)
    seconds = []
    for _ in range(5):
        before = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - before)
    return source.nbytes / 1e9 / statistics.median(seconds)


class _Side:
    """Calling it: a save, as this side does it, and the updates; what these did not cover of the writing counts too."""

    def __init__(self, ours: Ours, side: str, scale: Scale):
        config = ours.run.config
        self._folder = config.run.dir / side
        sections = {
            "run": config.run.model_copy(update={"dir": self._folder}),
            "checkpoint": config.checkpoint.model_copy(
                update={"save_every": 1, "keep_last": 1, "asynchronous": side == "background"}
            ),
        }
        run = replace(ours.run, config=config.model_copy(update=sections))
        self._checkpoints = Checkpoints(run, ours.optimizer, "train", {}) if side != "no save" else None
        groups = make_groups(scale.workload, run.processor)
        self._update: Callable[[], object] = partial(ours.update, "GRPO", groups)
        self._clock, self._num_updates, self._step = run.clock, scale.num_updates, 0
        self.held_s: list[float] = []
        """Seconds for which each save delayed the updates."""
        self.processor_s: list[float] = []
        """Seconds of each round."""

    def warm_up(self) -> None:
        self._update()
        self._save()
        self._finish()
        self.held_s.clear()

    def __call__(self) -> None:
        dist.barrier()
        before = time.process_time()
        self._save()
        for _ in range(self._num_updates):
            self._update()
        self._finish()
        self.processor_s.append(time.process_time() - before)

    def checkpoint(self) -> Path:
        """The newest checkpoint, the only one that stays on disk."""
        (path,) = self._folder.glob("checkpoints/step_*")
        return path

    def checkpoint_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.checkpoint().iterdir())

    def _save(self) -> None:
        if self._checkpoints is None:
            return
        self._clock.take()
        self._step += 1
        self._checkpoints.save_when_due(self._step, 10**9, {})
        self.held_s.append(self._clock.take()["time/save"])

    def _finish(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.finish()
