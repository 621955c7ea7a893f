"""What a training run draws its prompts from, and how it has their rollouts sampled."""

from __future__ import annotations

from functools import partial

from megatron_papo.config import Config
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.draw import draw_prompts
from megatron_papo.data.masking import Masks
from megatron_papo.data.prefetch import Prefetch
from megatron_papo.data.processor import load_processor
from megatron_papo.generation import Sampling
from megatron_papo.training.session import Run


def training_rows(run: Run) -> PromptDataset:
    """`data.train`. Where a thread reads ahead it has a processor of its own: generation and evaluation use the run's
    tokenizer at the same time, and a tokenizer does not bear two threads."""
    config = run.config
    processor = load_processor(run.processor.folder, config.data) if config.data.prefetch else run.processor
    return PromptDataset(config.data, "train", processor)


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
    return Prefetch(draw, num_steps=train.steps, ahead=config.data.prefetch)


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
