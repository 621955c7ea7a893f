"""The layout against everything that it has to fit: number of ranks, batch, engines, the model's shape, FP8, memory.

Each function returns a line a fault, beginning with the path of the setting to change. The rules of the shape itself
stand in `model/shape.py`, those of memory in `costs/memory.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_papo.config import Config, ConfigError
from megatron_papo.costs.hardware import GPUS
from megatron_papo.costs.memory import memory_faults, memory_warnings
from megatron_papo.distributed.rank_arithmetic import data_ranks, fault_of_ranks, model_ranks_in_words
from megatron_papo.model.fp8.multiples import token_multiple
from megatron_papo.model.layer_costs import key_width_on_rank, language_layer
from megatron_papo.model.shape import ModelShape, check_layout, faults_of_engine, padded


def faults_of_layout(verb: str, config: Config, shape: ModelShape | None, num_ranks: int) -> list[str]:
    """What `num_ranks` ranks of the whole run cannot do with a model of `shape`: heads, layers, prompts, memory."""
    trainer = num_ranks - num_engine_ranks(verb, config)
    faults = faults_of_ranks(verb, config, num_ranks)
    if fault_of_ranks(config.parallel, trainer):
        return faults or [f"parallel: {fault_of_ranks(config.parallel, num_ranks)}"]
    if shape is None:
        return faults
    faults += faults_of_engine(config, shape) if verb in ("train", "certify", "eval") else []
    try:
        check_layout(config, shape, trainer)
    except ConfigError as error:
        return [*str(error).splitlines(), *faults]
    faults += faults_of_fp8(config, shape)
    if not config.cluster.gpus_per_node:
        return faults
    return [*faults, *_fp8_of_gpus(config), *memory_faults(config, shape, trainer)]


def warnings_of_layout(config: Config, shape: ModelShape | None, num_ranks: int) -> list[str]:
    """What is allowed and slow, or may not fit."""
    cluster, warnings = config.cluster, []
    each = cluster.num_ranks // cluster.nodes
    for key, size in (("parallel.tensor", config.parallel.tensor), ("generation.tensor", config.generation.tensor)):
        if cluster.nodes > 1 and each % size:
            warnings.append(f"{key}: groups of {size} ranks lie across nodes of {each}: their exchanges leave NVLink")
    if shape is not None and cluster.gpus_per_node:
        warnings += memory_warnings(config, shape, num_ranks)
    return warnings


def num_engine_ranks(verb: str, config: Config) -> int:
    """The number of ranks of the whole run that belong to separate engines, which only a verb that generates has."""
    return config.generation.num_engine_ranks if verb in ("train", "certify", "eval") else 0


def faults_of_ranks(verb: str, config: Config, num_ranks: int) -> list[str]:
    """One line a fault, beginning with the key's path: what `num_ranks` ranks of the whole run cannot share out."""
    parallel, train, generation = config.parallel, config.train, config.generation
    num_engines = num_engine_ranks(verb, config)
    trainer = num_ranks - num_engines
    if num_engines and fault_of_ranks(parallel, trainer):
        return [
            f"generation.engines: {num_ranks} ranks less {generation.engines} engines of "
            f"generation.tensor={generation.tensor} leave {max(trainer, 0)}, which is no multiple of "
            f"{model_ranks_in_words(parallel)}"
        ]
    num_data = data_ranks(parallel, trainer)
    ranks = (
        f"fewer than the {num_data} data-parallel ranks "
        f"({trainer} ranks, parallel.tensor={parallel.tensor}, parallel.pipeline={parallel.pipeline})"
    )
    faults = []
    prompts = train.prompts_per_step // train.updates_per_step
    if verb == "train" and prompts < num_data:
        faults.append(
            f"train.prompts_per_step: {train.prompts_per_step} with train.updates_per_step={train.updates_per_step} "
            f"leaves an update {prompts} prompts, {ranks}"
        )
    if verb == "train" and train.prompts_per_round < num_data:
        faults.append(f"train.dynamic_sampling.prompts_per_round: {train.prompts_per_round} prompts are {ranks}")
    if verb == "sft" and config.sft.batch_size < num_data:
        faults.append(f"sft.batch_size: {config.sft.batch_size} rows are {ranks}")
    colocated = verb in ("train", "certify", "eval") and generation.engine == "vllm" and not num_engines
    if colocated and num_ranks % generation.tensor:
        faults.append(f"generation.tensor: {generation.tensor} does not divide the {num_ranks} ranks")
    if num_engines and num_data < generation.engines:
        faults.append(
            f"generation.engines: {generation.engines} engines for {num_data} data-parallel ranks: "
            f"each of these asks one engine, so {generation.engines - num_data} would be idle"
        )
    return faults


def faults_of_fp8(config: Config, shape: ModelShape) -> list[str]:
    """One line a fault, beginning with the key's path: what of `fp8` a model of `shape` in this layout cannot do."""
    if not config.fp8.enabled:
        return []
    return [*_fp8_layers(config, shape.language.num_layers), *_fp8_widths(config, shape), *_fp8_tokens(config)]


def _fp8_layers(config: Config, num_layers: int) -> Iterator[str]:
    fp8, spec = config.fp8, config.model.spec
    if fp8.first_layers + fp8.last_layers >= num_layers:
        yield (
            f"fp8.first_layers: {fp8.first_layers} and fp8.last_layers={fp8.last_layers} leave none of the model's "
            f"{num_layers} layers"
        )
    most = num_layers // config.parallel.pipeline
    for key, number in (("first_layers", fp8.first_layers), ("last_layers", fp8.last_layers)):
        if spec != "local" and number > most:
            yield f"fp8.{key}: {number} is more than the {most} layers of a pipeline stage, which Megatron-Core allows"


def _fp8_widths(config: Config, shape: ModelShape) -> Iterator[str]:
    """The widths that a tensor rank's products reduce over, in one of the three products of a linear layer, against
    whole rows of 16 bytes or whole blocks of mxfp8. Blocks of 128 may end early."""
    tensor, text = config.parallel.tensor, shape.language
    unit = 32 if config.fp8.recipe == "mxfp8" else 16
    layer = language_layer(shape)
    queries = layer.query_width // tensor
    widths = {
        "hidden_size": text.hidden_size,
        "attention heads": queries,
        "queries, keys and values": queries + 2 * key_width_on_rank(layer, tensor),
        "intermediate_size": padded(text.intermediate_size, tensor) // tensor,
    }
    if config.fp8.vision:
        tower = shape.vision
        widths |= {
            "hidden_size of the vision tower": tower.hidden_size,
            "attention heads of the vision tower": tower.hidden_size // tensor,
            "intermediate_size of the vision tower": padded(tower.intermediate_size, tensor) // tensor,
        }
    for name, width in widths.items():
        if width % unit:
            yield f"fp8.recipe: {config.fp8.recipe}: {name} is {width} on a tensor rank, no multiple of {unit}"


def _fp8_tokens(config: Config) -> Iterator[str]:
    budget = config.train.tokens_per_micro_batch
    multiple = token_multiple(config.fp8.recipe, config.parallel.tensor if config.parallel.sequence else 1)
    if config.train.fixed_rows and budget % multiple:
        recipe = f"fp8.recipe={config.fp8.recipe}"
        yield f"train.tokens_per_micro_batch: {budget} is no multiple of {multiple}, which {recipe} needs"


def _fp8_of_gpus(config: Config) -> Iterator[str]:
    """A fault where the kind of GPU that the section cluster names does not compute the recipe; a kind whose recipes
    the table of GPUs does not list is left to the ranks."""
    recipe, gpu = config.fp8.recipe, config.cluster.gpu
    known = GPUS[gpu].fp8_recipes if gpu in GPUS else None
    if config.fp8.enabled and known is not None and recipe not in known:
        yield f"fp8.recipe: {recipe} is none of what {gpu} computes: {', '.join(known) or 'no FP8 at all'}"
