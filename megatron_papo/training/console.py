"""The lines that a run prints, each once for the whole run: notices, warnings, what was left out, scores as a table."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.table import Table

from megatron_papo.data.bad_rows import BadRows
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import world_group
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
    """Warns of each source that has no column of images although no setting says so; with `perception` (the loss has
    perception terms) also where no row of any source has an image."""
    if not run.is_writer:
        return
    if perception and (why := dataset.without_pictures()):
        warn(run, f"data.{dataset.which}: {why}: the perception terms have nothing to work on")
        return
    for source in dataset.sources:
        if source.lacks_image_column:
            warn(run, f"{source.key}: {source.without_pictures()}: rows are read without pictures")


def print_scores(scores: dict[str, float]) -> None:
    """Prints the scores of an evaluation as a table, with a column for each source where there are several."""
    sources = sorted({name.split("/")[1] for name in scores if name.startswith("source/")})
    table = Table("score", *(["all", *sources] if sources else ["value"]))
    for name in _SCORES:
        if name in scores:
            keys = [name, *(f"source/{source}/{name}" for source in sources)]
            table.add_row(name, *(f"{scores[key]:.3f}" if key in scores else "" for key in keys))
    Console().print(table)


def say_what_is_read(run: Run, dataset: PromptDataset) -> None:
    """Says how many rows each filter has left; all ranks call it.

    Raises ValueError where a function of the user's own has given the ranks different rows: they would train on
    something else than what their positions say.
    """
    shares = gather_objects([source.sample() for source in dataset.sources], world_group())
    for place, source in enumerate(dataset.sources):
        if rank := next((rank for rank, share in enumerate(shares) if share[place] != shares[0][place]), 0):
            sizes = f"{shares[0][place][0]} rows on rank 0, {shares[rank][place][0]} on rank {rank}"
            raise ValueError(
                f"{source.key}: {source.origin} does not have the same rows on every rank ({sizes}): a function must "
                "give every rank the same"
            )
        if source.config.filter is not None:
            say(
                run,
                f"{source.key}: {source.origin}: {len(source)} of {source.num_rows_unfiltered} rows pass the filter",
            )


def say(run: Run, text: str) -> None:
    """Prints one line, once for the whole run."""
    if run.is_writer:
        print(f"papo: {as_text(text)}", flush=True)


def warn(run: Run, text: str) -> None:
    """Prints one line as a warning to stderr, once for the whole run."""
    if run.is_writer:
        print(f"papo: warning: {as_text(text)}", file=sys.stderr, flush=True)
