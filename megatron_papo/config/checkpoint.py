"""The section `checkpoint`: when a run saves, what is kept, and what it starts again from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_papo.config.basics import Count, Section


class CheckpointConfig(Section):
    save_every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    """Number of newest checkpoints that are kept; older ones are removed."""
    keep_best: bool = True
    """Whether the checkpoint of the best held-out accuracy is kept too."""
    asynchronous: bool = True
    """Whether checkpoints are written in the background while the next step runs; false: the step waits."""
    resume: bool = True
    """Whether a run goes on from the newest complete checkpoint under run.dir."""
    export_at_end: bool = True
    """Whether a Hugging Face folder is written beside the last checkpoint."""
    reference: Path | None = None
    """Hugging Face folder with the weights of the reference policy; null: a copy of the starting policy in CPU
    memory."""
