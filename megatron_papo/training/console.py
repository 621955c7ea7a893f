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


def name_bad_rows(run: Run, bad_rows: BadRows, which: str) -> None:
    """A line for every row that any rank has just left out, and how many there are by now; all ranks call it."""
    shares = gather_objects(([str(bad) for bad in bad_rows.take_new()], bad_rows.counts), run.layout.data_group)
    new = sorted({text for texts, _ in shares for text in texts})
    for text in new:
        warn(run, f"data.{which}: {text}: left out")
    if new:
        counts = sum((Counter(counts) for _, counts in shares), Counter())
        warn(
            run,
            f"data.{which}: left out so far: " + ", ".join(f"{reason} {num}" for reason, num in sorted(counts.items())),
        )


def name_skipped(run: Run, guard: UpdateGuard) -> None:
    """A line for every update that has just been skipped."""
    for reason in guard.take_skipped():
        warn(run, f"an update was skipped: {reason}")


def name_missing_pictures(run: Run, dataset: PromptDataset, *, perception: bool = False) -> None:
    """A line where rows are read without pictures and nobody has said that this is meant, and where the perception
    terms, if there are any, will find none to read."""
    if run.is_writer and (perception or dataset.lacks_image_column) and (why := dataset.without_pictures()):
        so = "the perception terms have nothing to work on" if perception else "rows are read without pictures"
        warn(run, f"data.{dataset.which}: {why}: {so}")


def print_scores(scores: dict[str, float]) -> None:
    """An evaluation as a table on the console."""
    table = Table("score", "value")
    for name in _SCORES:
        if name in scores:
            table.add_row(name, f"{scores[name]:.3f}")
    Console().print(table)


def say(run: Run, text: str) -> None:
    """One line on the console, once for the whole run."""
    if run.is_writer:
        print(f"papo: {as_text(text)}", flush=True)


def warn(run: Run, text: str) -> None:
    if run.is_writer:
        print(f"papo: warning: {as_text(text)}", file=sys.stderr, flush=True)
