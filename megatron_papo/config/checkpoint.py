"""The section `checkpoint`: when the run saves, what is kept, and where it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_papo.config.basics import Count, Section


class CheckpointConfig(Section):
    save_every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    """Older checkpoints are removed."""
    keep_best: bool = True
    """The one of the best held-out accuracy stays too."""
    asynchronous: bool = True
    """Write in the background while the next step runs; false: the step waits."""
    resume: bool = True
    """Go on from the newest complete checkpoint under run.dir."""
    export_at_end: bool = True
    """Write a Hugging Face folder beside the last checkpoint."""
    reference: Path | None = None
    """Weights of the reference policy (Hugging Face folder); by default a copy of the starting policy in CPU memory."""
