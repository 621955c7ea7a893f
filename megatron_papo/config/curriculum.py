"""The entries of `data.curriculum`: parts of a run, each of which draws from some of the rows."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_papo.config.basics import Count, Section
from megatron_papo.config.data_sources import Filter


class StageConfig(Section):
    filter: Filter = None
    """Which rows the stage draws from, in the forms of the filter of an entry of data.train; null: all of them."""
    epochs: Count | None = None
    """Passes through these rows, after which the next stage begins."""
    steps: Count | None = None
    """In place of epochs: the stage lasts as many prompts as so many steps train on (train.prompts_per_step,
    sft.batch_size)."""


def fault_of_stages(stages: Sequence[StageConfig]) -> str | None:
    """What is wrong with the lengths of the stages; None where nothing is."""
    for number, stage in enumerate(stages):
        if number < len(stages) - 1 and (stage.epochs is None) == (stage.steps is None):
            return f"data.curriculum[{number}]: needs epochs or steps, one of the two; the last stage alone has neither"
        if number == len(stages) - 1 and (stage.epochs is not None or stage.steps is not None):
            return (
                f"data.curriculum[{number}]: the last stage goes on to the end of the run: give it no epochs or steps"
            )
    return None
