"""What touches the package wandb: opening a run, and ending its process. It may be broken, absent or without a network.

Nothing here is bounded in time or catches an error: that is wandb_run.py's part. wandb is imported on first use, since
a package that cannot be imported must not end a run either.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from megatron_papo.config import ObserveConfig, RunConfig
from megatron_papo.observe.dashboard import CHARTS, best_of
from megatron_papo.observe.samples import SampleRow, beside_each_other
from megatron_papo.text.secret_values import text_without_secrets
from megatron_papo.text.untrusted import LINES, as_text

INIT_S = 20.0
"""Seconds that wandb tries to reach its server before a run."""


def open_wandb(observe: ObserveConfig, run: RunConfig, config_text: str, identifier: str, *, online: bool) -> Any:
    """The run with this id in wandb, a new one or one that goes on; raises whatever wandb raises."""
    import wandb

    command = " ".join(sys.argv)
    settings = {
        "console": "off",
        "silent": True,
        "init_timeout": INIT_S,
        "x_disable_meta": text_without_secrets(command) != command,  # which holds the command as it was given
    }
    with _no_questions():
        opened = wandb.init(
            entity=observe.wandb_entity,
            project=observe.wandb_project,
            name=run.name,
            tags=list(observe.wandb_tags) or None,
            dir=str(run.dir),
            mode="online" if online else "offline",
            id=identifier,
            resume="allow",
            config=yaml.safe_load(text_without_secrets(config_text)),
            allow_val_change=True,  # of a run that goes on with other settings
            settings=wandb.Settings(**settings),
        )
    opened.define_metric("*", step_metric="step")
    for chart in CHARTS:
        for metric in chart.metrics:
            opened.define_metric(metric, step_metric="step", summary=best_of(chart))
    return opened


def end_wandb() -> None:
    """Waits until wandb's own process has written what it was given, and ends it: `finish` offline returns before."""
    import wandb

    wandb.teardown()


def kill_wandb() -> None:
    """Kills wandb's own process, which hangs: nothing of this process then waits for it any more."""
    for pid in _children():
        with suppress(OSError):
            if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def sample_table(rows: Sequence[SampleRow]) -> Any:
    """The rollouts with their pictures as a table of wandb."""
    import wandb

    parts = sorted({name for row in rows for name in row.reward_parts})
    table = wandb.Table(columns=["image", "masked image", "problem", "response", "answer", "reward", *parts])
    for row in rows:
        views = [wandb.Image(beside_each_other(view)) if view else None for view in (row.images, row.masked_images)]
        scores = [row.reward_parts.get(name) for name in parts]
        texts = [as_text(text, LINES) for text in (row.problem, row.response, row.answer)]
        table.add_data(*views, *texts, row.reward, *scores)
    return table


def _children() -> list[int]:
    """The processes that threads of this one have started."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


@contextmanager
def _no_questions() -> Iterator[None]:
    """wandb asks for a key at the terminal where it finds none, and would wait for the answer; without a terminal it
    says that there is none."""
    terminal = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal
