"""Where the numbers and samples of a run go: JSON lines, TensorBoard, wandb, pages of samples, the console.

RUN/metrics.jsonl is the record, one line a step; the others show the same numbers. Scores of an evaluation are in the
record of the step after which they were taken, those of the starting weights in one of step -1. A run that resumes at n
drops what it had recorded at n and later, so that every step is there once. A full disk does not end the run: what it
does not take waits in memory (outbox.py). Leaves out averaging: values arrive as they are to be shown.
Only the rank that is `enabled` writes anything.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_papo.config import ObserveConfig
from megatron_papo.files.small_files import parse_record, set_aside, write_atomically
from megatron_papo.observe.dashboard import CHARTS
from megatron_papo.observe.old_names import with_old_names
from megatron_papo.observe.outbox import Outbox
from megatron_papo.observe.samples import SampleRow, as_pil, beside_each_other, sample_page
from megatron_papo.observe.wandb_run import WandbRun
from megatron_papo.text.untrusted import LINES, as_text

_HEADLINE = {
    "loss/total": "loss",
    "reward": "reward",
    "trained/reward": "trained on",
    "reward/accuracy": "accuracy",
    "reward/format": "format",
    "perception_kl": "perception KL",
    "entropy": "entropy",
    "response_tokens": "tokens",
    "optim/grad_norm": "grad norm",
    "eval/accuracy": "[bold]held-out accuracy[/]",
}
"""The values in the console's line of a step: the metric's name, and the name that the line uses."""
_MARKDOWN = re.compile(r"[\\`*_{}\[\]()#+.!|-]")
"""Characters that Markdown takes literally after a backslash."""


def print_warning(text: str) -> None:
    """One line on stderr."""
    print(f"papo: warning: {as_text(text)}", file=sys.stderr, flush=True)


class Sinks:
    def __init__(
        self,
        observe: ObserveConfig,
        run_dir: Path,
        config_text: str,
        enabled: bool = True,
        start_step: int = 0,
        num_steps: int | None = None,
        warn: Callable[[str], None] = print_warning,
        wandb_run: WandbRun | None = None,
    ):
        """`config_text`: the resolved settings as YAML. `start_step`: the first step that this run will log.
        `wandb_run`: the run in wandb, which whoever opened it closes afterwards."""
        self._enabled, self._run_dir, self._num_steps = enabled, Path(run_dir), num_steps
        self._console = Console(highlight=False) if enabled and observe.console else None
        self._console_every = observe.console_every
        self._board: Any = None
        self._wandb = wandb_run if enabled else None
        if not enabled:
            return
        self._outbox = Outbox(warn)
        self._outbox.put(self._run_dir / "config.yaml", config_text.encode())
        start_step = start_step or -1  # where scores of the starting weights are logged
        self._metrics = keep_steps_before(self._run_dir / "metrics.jsonl", start_step, warn)
        if observe.tensorboard:
            from megatron_papo.observe.tensorboard_file import Board

            self._board = Board(self._run_dir / "tensorboard", self._outbox, start_step)
            self._board.text("config", f"```yaml\n{config_text}\n```", start_step)
            self._board.layout(CHARTS, start_step)
        self._flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of a step. Values that are not finite are kept, as the strings `nan` and `inf`."""
        if not self._enabled:
            return
        shown, values = values, with_old_names(values)
        record = {"step": step, "unix_time": round(time.time(), 3)}
        line = json.dumps({**record, **{name: _strict(value) for name, value in values.items()}}, allow_nan=False)
        self._outbox.append(self._metrics, f"{line}\n".encode())
        if self._board:
            for name, value in values.items():
                self._board.number(name, value, step)
        self._flush()
        if self._wandb:
            self._wandb.numbers(step, values)
        due = step % self._console_every == 0 or step + 1 == self._num_steps or "eval/accuracy" in values
        if self._console and due:
            self._console.print(console_line(step, shown, self._num_steps), soft_wrap=True)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> Path | None:
        """Shows some rollouts of a step; returns the page, RUN/samples/step_NNNNNN.html."""
        if not self._enabled or not rows:
            return None
        page = self._run_dir / "samples" / f"step_{step:06d}.html"
        self._outbox.put(page, sample_page(step, rows).encode())
        if self._board:
            self._board.text("samples", markdown_table(rows), step)
            for index, row in enumerate(rows):
                if row.images:
                    picture = beside_each_other([*row.images, *row.masked_images])
                    self._board.picture(f"samples/{index}", _as_array(picture), step)
        self._flush()
        if self._wandb:
            self._wandb.samples(step, rows)
        return page

    def close(self) -> None:
        if not self._enabled:
            return
        self._outbox.close()
        self._tell_wandb()

    def _flush(self) -> None:
        self._outbox.flush()
        self._tell_wandb()

    def _tell_wandb(self) -> None:
        """wandb's own process stops for good on a full disk."""
        if self._wandb:
            self._wandb.disk_is_full = self._outbox.blocked

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def keep_steps_before(path: Path, start_step: int, warn: Callable[[str], None] = print_warning) -> Path:
    """Drops records at or beyond `start_step`, and a last line that a crash cut short; returns `path`.

    A file of which nothing would remain is another run's: it is set aside as metrics.jsonl.old. One with lines that a
    disk has spoilt is kept as metrics.jsonl.damaged, and what can be read of it goes on.
    """
    if not os.path.lexists(path):
        return path
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if _step_of(line) < start_step]
    if not kept:
        set_aside(path, "old")
        return path
    if kept == lines[: len(kept)]:
        os.truncate(path, sum(map(len, kept)))  # the usual case, and a full disk allows it
        return path
    if spoilt := sum(math.isinf(_step_of(line)) for line in lines[:-1]):
        warn(f"{path}: {spoilt} lines are no records: left out, and the file kept as {set_aside(path, 'damaged').name}")
    write_atomically(path, b"".join(kept))
    return path


def console_line(step: int, values: Mapping[str, float], num_steps: int | None = None) -> str:
    """The most important numbers of a step and its time, as one line. Step -1: the weights before the first step."""
    of = f" of {num_steps}" if num_steps else ""
    parts = [f"[bold]step {step:>4}[/]{of}" if step >= 0 else "[bold]before step 0[/]"]
    parts += [f"{title} [cyan]{values[name]:.3f}[/]" for name, title in _HEADLINE.items() if name in values]
    parts += _by_source(values)
    stages = {name.removeprefix("time/"): value for name, value in values.items() if name.startswith("time/")}
    stages = {name: value for name, value in stages.items() if "/" not in name and name != "step"}  # part of these
    if stages:
        total = sum(stages.values())
        longest = sorted(stages.items(), key=lambda stage: -stage[1])[:3]
        detail = ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest)
        parts.append(f"[dim]{total:.1f} s ({detail})[/]")
    return "  ".join(parts)


def _by_source(values: Mapping[str, float]) -> list[str]:
    """The held-out accuracy of each source, where there are several."""
    found = (re.fullmatch(r"eval/source/([\w.-]+)/accuracy", name) for name in values)
    return [f"[dim]{match[1]}[/] [cyan]{values[match[0]]:.3f}[/]" for match in found if match]


def _step_of(line: bytes) -> float:
    """The step of a record; infinite if the line is no record of a step."""
    record = parse_record(line) if line.endswith(b"\n") else None
    step = None if record is None else record.get("step")
    return step if isinstance(step, int) else math.inf


def _strict(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def markdown_table(rows: Sequence[SampleRow]) -> str:
    lines = ["| problem | response | answer | reward |", "|---|---|---|---|"]
    for row in rows:
        cells = (*map(_as_markdown, (row.problem, row.response, row.answer)), f"{row.reward:.3g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _as_markdown(text: str) -> str:
    """A cell that shows `text`: neither HTML nor a picture or link of Markdown, which a page would fetch."""
    plain = _MARKDOWN.sub(r"\\\g<0>", escape(as_text(text, LINES), quote=False))
    return plain.replace("\n", "<br>")


def _as_array(picture: Any) -> Any:
    import numpy

    return numpy.asarray(as_pil(picture))
