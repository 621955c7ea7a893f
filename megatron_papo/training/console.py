"""The lines that a run prints, each once for the whole run: notices, warnings, what was left out, scores as a table."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

from megatron_papo.data.bad_rows import BadRows
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.optimization.gradient_guard import UpdateGuard
from megatron_papo.text.untrusted import as_text
from megatron_papo.training.session import Run

_SCORES = ("accuracy", "format", "masked_accuracy", "gap", "perception_kl", "response_tokens")
"""The scores of an evaluation, in the order of the table's lines."""


def warn_of_bad_rows(run: Run, bad_rows: BadRows, which: str) -> None:
    """Warns of every row of `data.{which}` that a rank has just left out, and counts all of them; all ranks call it."""
    told = [bad.named_by(f"data.{which}") for bad in bad_rows.take_new()]
    shares = gather_objects((told, bad_rows.counts), run.layout.data_group)
    new = sorted({text for texts, _ in shares for text in texts})
    for text in new:
        warn(run, f"{text}: left out")
    if new:
        counts = sum((Counter(counts) for _, counts in shares), Counter())
        warn(
            run,
            f"data.{which}: left out so far: " + ", ".join(f"{reason} {num}" for reason, num in sorted(counts.items())),
        )


def warn_of_skipped_updates(run: Run, guard: UpdateGuard) -> None:
    """Warns of every update that has been skipped since the last call."""
    for reason in guard.take_skipped():
        warn(run, f"an update was skipped: {reason}")


def warn_of_missing_images(run: Run, dataset: PromptDataset, *, perception: bool = False) -> None:
    """Warns where the data set has no column of images although no setting says so; with `perception` (the loss has
    perception terms) wherever rows are read without images."""
    if run.is_writer and (perception or dataset.lacks_image_column) and (why := dataset.without_pictures()):
        effect = "the perception terms have nothing to work on" if perception else "rows are read without pictures"
        warn(run, f"data.{dataset.which}: {why}: {effect}")


def print_scores(scores: dict[str, float]) -> None:
    """Prints the scores of an evaluation as a table."""
    table = Table("score", "value")
    for name in _SCORES:
        if name in scores:
            table.add_row(name, f"{scores[name]:.3f}")
    Console().print(table)


def say(run: Run, text: str) -> None:
    """Prints one line, once for the whole run."""
    if run.is_writer:
        print(f"papo: {as_text(text)}", flush=True)


def warn(run: Run, text: str) -> None:
    """Prints one line as a warning to stderr, once for the whole run."""
    if run.is_writer:
        print(f"papo: warning: {as_text(text)}", file=sys.stderr, flush=True)
