"""The run in wandb, online or in files under run.dir, with numbers and tables of samples.

wandb's own process writes its files, and stops for good when a disk is full. So while the outbox finds the disk full
nothing is handed to wandb; afterwards the same run is opened anew, and what waited follows. Lost is what that process
had not yet written when the disk filled: RUN/metrics.jsonl has it.
"""

from __future__ import annotations

import re
import sys
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import wandb
import yaml

from megatron_papo.config import ObserveConfig
from megatron_papo.files.small_files import write_atomically
from megatron_papo.observe.outbox import Outbox
from megatron_papo.observe.samples import SampleRow, beside_each_other
from megatron_papo.text.secret_values import text_without_secrets
from megatron_papo.text.untrusted import LINES, as_text

_MAX_WAITING = 10_000


class WandbRun:
    def __init__(
        self, observe: ObserveConfig, run_dir: Path, config_text: str, outbox: Outbox, warn: Callable[[str], None]
    ):
        self._observe, self._run_dir, self._config_text = observe, run_dir, config_text
        self._outbox, self._warn = outbox, warn
        self._run: Any = None
        self._waiting: deque[Callable[[], dict[str, Any]]] = deque(maxlen=_MAX_WAITING)
        self._hand_over()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._waiting.append(lambda: {"step": step, **values})
        self._hand_over()

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._waiting.append(lambda: {"step": step, "samples": _table(rows)})
        self._hand_over()

    def close(self) -> None:
        self._hand_over()
        self._finish()
        wandb.teardown()  # waits for its writer process: finish() offline returns before the file is written
        if self._waiting:
            self._warn(f"wandb: the last {len(self._waiting)} records could not be written")

    def _hand_over(self) -> None:
        if self._outbox.blocked:
            self._finish()
            return
        try:
            self._run = self._run or self._open()
            while self._waiting:
                self._run.log(self._waiting[0]())
                self._waiting.popleft()
        except OSError as error:  # pictures and tables are written by this process
            self._warn(f"wandb: {error}")
            self._finish()

    def _finish(self) -> None:
        if self._run is not None:
            with suppress(OSError):
                self._run.finish()
            self._run = None

    def _open(self) -> Any:
        command = " ".join(sys.argv)
        run = wandb.init(
            project=self._observe.wandb_project,
            dir=str(self._run_dir),
            mode="online" if self._observe.wandb == "online" else "offline",
            id=self._id(),
            resume="allow",
            config=yaml.safe_load(self._config_text),
            settings=wandb.Settings(
                console="off",
                silent=self._observe.wandb == "offline",
                x_disable_meta=text_without_secrets(command) != command,  # which holds the command as it was given
            ),
        )
        run.define_metric("*", step_metric="step")
        return run

    def _id(self) -> str:
        """The run's id in wandb, the same after a resume; a new one, with a warning, if its file holds none any
        more."""
        name_file = self._run_dir / "wandb_id.txt"
        if name_file.exists():
            kept = name_file.read_bytes().decode(errors="replace").strip()
            if re.fullmatch(r"[\w-]{1,64}", kept, re.ASCII):
                return kept
            self._warn(f"{name_file}: holds no id: wandb shows what follows as another run")
        fresh = uuid.uuid4().hex[:12]
        write_atomically(name_file, fresh)
        return fresh


def _table(rows: Sequence[SampleRow]) -> wandb.Table:
    parts = sorted({name for row in rows for name in row.reward_parts})
    table = wandb.Table(columns=["image", "masked image", "problem", "response", "answer", "reward", *parts])
    for row in rows:
        views = [wandb.Image(beside_each_other(view)) if view else None for view in (row.images, row.masked_images)]
        scores = [row.reward_parts.get(name) for name in parts]
        texts = [as_text(text, LINES) for text in (row.problem, row.response, row.answer)]
        table.add_data(*views, *texts, row.reward, *scores)
    return table
