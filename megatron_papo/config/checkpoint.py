"""The section `checkpoint`: when a run saves, what is kept, and what it starts again from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_papo.config.basics import Count, Section


class CheckpointConfig(Section):
    contents: Literal["full", "weights", "none"] = "full"
    """What is saved: `full`, all that a run needs to go on as if it had not stopped; `weights`, without the optimizer's
    state, a seventh of the size in bfloat16 and a third in float32, with which a resumed run begins with new moments of
    Adam; `none`, nothing: a run that is stopped is lost."""
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
    """Whether the Hugging Face folder RUN/export is written after the last step."""
    export_every: Annotated[int, Field(ge=0)] = 0
    """Steps between Hugging Face folders RUN/exports/step_<step>; 0: none before the end. The step waits for each."""
    keep_exports: Count | None = None
    """Number of newest folders of export_every that are kept; null: all."""
    reference: Path | None = None
    """Hugging Face folder with the weights of the reference policy; null: a copy of the starting policy in CPU
    memory."""
