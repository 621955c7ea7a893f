"""What a training run draws its prompts from, and how it has their rollouts sampled."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_papo.config import Config
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.draw import draw_prompts
from megatron_papo.data.masking import Masks
from megatron_papo.data.order import DataCursor
from megatron_papo.data.prefetch import Prefetch
from megatron_papo.data.processor import load_processor
from megatron_papo.data.settings_order import first_cursor
from megatron_papo.generation import Sampling
from megatron_papo.training.checkpoints import Checkpoints
from megatron_papo.training.console import say, say_what_is_read
from megatron_papo.training.run_length import with_num_steps
from megatron_papo.training.session import Run


def open_training_rows(run: Run) -> tuple[Run, PromptDataset, DataCursor]:
    """`data.train` and the beginning of its order, and the run with the number of steps that may follow from them.

    Where a thread reads ahead the data set has a processor of its own: generation and evaluation use the run's
    tokenizer at the same time, and a tokenizer does not bear two threads.
    """
    config = run.config
    processor = load_processor(run.processor.folder, config.data) if config.data.prefetch else run.processor
    dataset = PromptDataset(config.data, "train", processor)
    say_what_is_read(run, dataset)
    cursor = first_cursor(config.data, dataset, config.run.seed, config.train.prompts_per_step)
    return with_num_steps(run, "train", cursor), dataset, cursor


def resumed_cursor(run: Run, checkpoints: Checkpoints, cursor: DataCursor, state: dict[str, Any]) -> DataCursor:
    """The place at which a run goes on that has loaded the cursor's `state` of a checkpoint; says where that is in data
    that has changed since."""
    cursor = cursor.load_state_dict(state, other_data=checkpoints.data_changed)
    if checkpoints.data_changed:
        sizes = f"{state['num_rows']} rows before, {cursor.num_rows} now"
        say(run, f"data.train: {sizes}; after {cursor.position} prompts the run goes on at {cursor.where()}")
    return cursor


def prefetch_prompts(run: Run, dataset: PromptDataset) -> Prefetch:
    """The run's endless sequence of draws from `dataset`, with masked views where the loss reads them."""
    config, train = run.config, run.config.train
    draw = partial(
        draw_prompts,
        dataset,
        num_prompts=train.prompts_per_round,
        updates_per_step=train.updates_per_step if train.prompts_per_round == train.prompts_per_step else 1,
        data_rank=run.layout.data_rank,
        data_size=run.layout.data_size,
        masks=Masks(config.perception.mask, config.run.seed) if config.reads_masked_view else None,
    )
    return Prefetch(draw, num_steps=train.num_steps, ahead=config.data.prefetch)


def sampling_of(config: Config) -> Sampling:
    """How the rollouts of training are sampled."""
    generation = config.generation
    return Sampling(
        group_size=config.train.group_size,
        temperature=generation.temperature,
        top_p=generation.top_p,
        top_k=generation.top_k,
        max_response_tokens=generation.max_response_tokens,
        seed=config.run.seed,
        ignore_eos=generation.ignore_eos,
    )
