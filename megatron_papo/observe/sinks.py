"""Where the numbers and samples of a run go: JSON lines, TensorBoard, wandb, pages of samples, the console.

RUN/metrics.jsonl is the record, one line a step; the others show the same numbers. A run that resumes at step n
drops what it had recorded at n and later, so that every step stands once. Leaves out averaging: values arrive as they
are to be shown. Only the rank that is `enabled` writes anything.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_papo.config import ObserveConfig
from megatron_papo.observe.samples import SampleRow, as_pil, beside_each_other, sample_page

_HEADLINE = {
    "loss/total": "loss",
    "reward": "reward",
    "reward/accuracy": "accuracy",
    "reward/format": "format",
    "perception_kl": "perception KL",
    "entropy": "entropy",
    "response_tokens": "tokens",
    "optim/grad_norm": "grad norm",
    "eval/accuracy": "[bold]held-out accuracy[/]",
}
"""What the console's line of a step shows of the values, and how it calls them."""


class Sinks:
    def __init__(
        self,
        observe: ObserveConfig,
        run_dir: Path,
        config_text: str,
        enabled: bool = True,
        start_step: int = 0,
        num_steps: int | None = None,
    ):
        """`config_text`: the resolved settings as YAML. `start_step`: the first step that this run will log."""
        self._enabled, self._run_dir, self._num_steps = enabled, Path(run_dir), num_steps
        self._console = Console(highlight=False) if enabled and observe.console else None
        self._console_every = observe.console_every
        self._board: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "config.yaml").write_text(config_text)
        self._metrics = keep_steps_before(self._run_dir / "metrics.jsonl", start_step).open("a")
        if observe.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=start_step)
            self._board.add_text("config", f"```yaml\n{config_text}\n```", start_step)
        if observe.wandb != "off":
            self._wandb = _open_wandb(observe, self._run_dir, config_text)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of a step. Values that are not finite are kept, as the strings `nan` and `inf`."""
        if not self._enabled:
            return
        record = {"step": step, "unix_time": round(time.time(), 3)}
        line = json.dumps({**record, **{name: _strict(value) for name, value in values.items()}}, allow_nan=False)
        self._metrics.write(line + "\n")
        self._metrics.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({"step": step, **values})
        due = step % self._console_every == 0 or step + 1 == self._num_steps or "eval/accuracy" in values
        if self._console and due:
            self._console.print(console_line(step, values, self._num_steps), soft_wrap=True)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> Path | None:
        """Shows some rollouts of a step; returns the page written, RUN/samples/step_NNNNNN.html."""
        if not self._enabled or not rows:
            return None
        page = self._run_dir / "samples" / f"step_{step:06d}.html"
        page.parent.mkdir(exist_ok=True)
        page.write_text(sample_page(step, rows))
        if self._board:
            self._board.add_text("samples", _markdown(rows), step)
            for index, row in enumerate(rows):
                if row.images:
                    picture = beside_each_other([*row.images, *row.masked_images])
                    self._board.add_image(f"samples/{index}", _as_array(picture), step, dataformats="HWC")
        if self._wandb:
            self._wandb.log({"step": step, "samples": _wandb_table(rows)})
        return page

    def close(self) -> None:
        if not self._enabled:
            return
        self._metrics.close()
        if self._board:
            self._board.close()
        if self._wandb:
            import wandb

            self._wandb.finish()
            wandb.teardown()  # waits for its writer process: finish() offline returns before the file is written

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def keep_steps_before(path: Path, start_step: int) -> Path:
    """Drops records at or beyond `start_step`, and a last line that a crash cut short; returns `path`.

    A file of which nothing would remain is another run's: it is set aside as metrics.jsonl.old.
    """
    if not path.exists():
        return path
    kept = [line for line in path.read_text().splitlines() if _step_of(line) < start_step]
    if not kept:
        return path.rename(path.with_name(path.name + ".old")).with_name(path.name)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text("".join(line + "\n" for line in kept))
    draft.replace(path)
    return path


def console_line(step: int, values: Mapping[str, float], num_steps: int | None = None) -> str:
    """The step's few numbers that one watches, and the time it took."""
    of = f" of {num_steps}" if num_steps else ""
    parts = [f"[bold]step {step:>4}[/]{of}"]
    parts += [f"{title} [cyan]{values[name]:.3f}[/]" for name, title in _HEADLINE.items() if name in values]
    stages = {name.removeprefix("time/"): value for name, value in values.items() if name.startswith("time/")}
    if stages:
        total = sum(stages.values())
        longest = sorted(stages.items(), key=lambda stage: -stage[1])[:3]
        detail = ", ".join(f"{name} {seconds:.1f}" for name, seconds in longest)
        parts.append(f"[dim]{total:.1f} s ({detail})[/]")
    return "  ".join(parts)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def _strict(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _open_wandb(observe: ObserveConfig, run_dir: Path, config_text: str) -> Any:
    import wandb

    name_file = run_dir / "wandb_id.txt"  # the same run again after a resume
    if not name_file.exists():
        name_file.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=observe.wandb_project,
        dir=str(run_dir),
        mode="online" if observe.wandb == "online" else "offline",
        id=name_file.read_text().strip(),
        resume="allow",
        config=yaml.safe_load(config_text),
        settings=wandb.Settings(console="off", silent=observe.wandb == "offline"),
    )
    run.define_metric("*", step_metric="step")
    return run


def _wandb_table(rows: Sequence[SampleRow]) -> Any:
    import wandb

    parts = sorted({name for row in rows for name in row.reward_parts})
    table = wandb.Table(columns=["image", "masked image", "problem", "response", "answer", "reward", *parts])
    for row in rows:
        views = [wandb.Image(beside_each_other(view)) if view else None for view in (row.images, row.masked_images)]
        scores = [row.reward_parts.get(name) for name in parts]
        table.add_data(*views, row.problem, row.response, row.answer, row.reward, *scores)
    return table


def _markdown(rows: Sequence[SampleRow]) -> str:
    lines = ["| problem | response | answer | reward |", "|---|---|---|---|"]
    for row in rows:
        cells = (row.problem, row.response, row.answer, f"{row.reward:.3g}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |")
    return "\n".join(lines)


def _as_array(picture: Any) -> Any:
    import numpy

    return numpy.asarray(as_pil(picture))
