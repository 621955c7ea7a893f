"""How many steps a run takes where its settings count passes through the data: known once the data is open.

The number takes the place of `steps` in the settings of the run, so that schedules, evaluation, checkpoints and records
read it as any other. The file RUN/steps.json keeps it for whoever looks at the run's folder without opening its data.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Literal

from megatron_papo.config import plain_tree
from megatron_papo.data.order import DataCursor
from megatron_papo.distributed.agreement import read_on_first_rank
from megatron_papo.files.small_files import write_atomically
from megatron_papo.runtime.progress import STEPS_FILE, asked_length
from megatron_papo.training.console import say
from megatron_papo.training.session import Run


def with_num_steps(run: Run, verb: Literal["train", "sft"], cursor: DataCursor) -> Run:
    """The run with the number of steps that the epochs in the section `verb` make of the order of `cursor`; the run
    itself where they are not set. Says the number once; all ranks call it."""
    config = run.config
    section = config.train if verb == "train" else config.sft
    if section.epochs is None:
        return run
    per_step = config.train.prompts_per_step if verb == "train" else config.sft.batch_size
    # of the first rank, since a sampler of the user's may say other lengths on others, which would leave the loop apart
    num_prompts = read_on_first_rank(partial(cursor.order.num_prompts, section.epochs))
    steps = max(1, -(-num_prompts // per_step))
    resolved = section.lasting(steps)
    drawn = f"{num_prompts} prompts from {cursor.num_rows} rows"
    text = f"{verb}.epochs={section.epochs:g}: {drawn} are {steps} steps of {per_step}"
    if resolved.num_steps < steps:
        text += f"; {verb}.steps={section.steps} ends the run before"
    say(run, text)
    if verb == "train":
        asked = asked_length(plain_tree(config))
        record = json.dumps({"asked": asked, "num_steps": resolved.num_steps})
        read_on_first_rank(lambda: write_atomically(run.folder / STEPS_FILE, record))
    return replace(run, config=config.model_copy(update={verb: resolved}))
