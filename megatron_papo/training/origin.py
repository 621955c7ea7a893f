"""What a run is made from: fingerprints of its data and its model, kept in every checkpoint and compared on resuming.

Only what is read counts: paths may change, and copies may take the place of originals. With other rows, another order
of them, another tokenizer, chat template or image processor the second half of a run would be another run, so that is
refused; rows and their order may change by `data.on_change=continue`. A change of what the run no longer reads, or of
what may have been repaired, is a warning. Settings that differ are listed.
Checkpoints that were written before origins were kept have nothing to compare. Held-out data is left out, since no step
depends on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_papo.checkpoint.weight_fingerprint import fingerprint_of_weights
from megatron_papo.config import Config, plain_tree
from megatron_papo.config.data_sources import described_sources
from megatron_papo.config.derived import model_folder, weights_folder
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.fingerprint import fingerprint
from megatron_papo.data.order import DataCursor, plain_order
from megatron_papo.data.processor import Processor
from megatron_papo.distributed.agreement import fail_together, read_on_first_rank
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import world_group
from megatron_papo.training.session import Run

Origin = Mapping[str, str]
"""Part of the data or the model, a key of `_NOUNS` -> its fingerprint; plain JSON."""

_NOUNS = {
    "rows": "rows",
    "pictures": "pictures",
    "order": "an order of rows",
    "tokenizer": "a tokenizer",
    "template": "a chat template",
    "image processor": "an image processor",
    "weights": "weights",
}
_IMAGE_SETTINGS = (
    "patch_size", "temporal_patch_size", "merge_size", "do_resize", "resample", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip
_OF_DATA = ("rows", "pictures", "order")
"""What `data.on_change` is about."""
_OF_ORDER = (
    "data.train", "data.shuffle", "data.order_by", "data.order_descending", "data.sampler", "data.curriculum",
    "run.seed", "train.prompts_per_step", "sft.batch_size",
)  # fmt: skip
"""Settings that the order of rows follows from, beside the rows themselves."""
_MACHINE_SETTINGS = ("run.dir", "cluster.", "observe.", "data.train", "model.path", "model.checkpoint")
"""Settings whose changes are not listed: where a run lies, and what is compared by its content."""
_MOST_LISTED = 12
"""How many changed settings are listed at most."""
_LONGEST_VALUE = 40
"""How many letters of a changed value are shown at most."""


def origin_of(run: Run, dataset: PromptDataset, cursor: DataCursor, *columns: str) -> Origin:
    """The origin of a run that draws from `dataset` in the order of `cursor`, and also reads `columns` of it; all ranks
    call it, one reads.

    Raises ValueError, on every rank alike, for what cannot be read, and where ranks do not find the same order.
    """
    origin: Origin = read_on_first_rank(partial(_read, run, dataset, columns))
    order = fail_together(world_group(), cursor.order_fingerprint)
    if len(set(gather_objects(order, world_group()))) > 1:
        raise ValueError("data: ranks find different orders of the rows: data.sampler must give the same on each")
    return {**origin, "order": order}


def _read(run: Run, dataset: PromptDataset, columns: tuple[str, ...]) -> Origin:
    origin = {**dataset.fingerprints(columns), **_processor_fingerprints(run.processor)}
    model = run.config.model
    if model.checkpoint is not None or not model.random_init:
        origin["weights"] = fingerprint_of_weights(weights_folder(run.config))
    return origin


def _processor_fingerprints(processor: Processor) -> dict[str, str]:
    vocabulary = json.dumps([sorted(processor.tokenizer.get_vocab().items()), list(processor.eos_ids)])
    images = [(name, getattr(processor.image_processor, name, None)) for name in _IMAGE_SETTINGS]
    return {
        "tokenizer": fingerprint([vocabulary.encode()]),
        "template": fingerprint([processor.template.encode("utf-8", "surrogatepass")]),
        "image processor": fingerprint([json.dumps(images, default=int).encode()]),
    }


def compare_origins(folder: Path, saved: Mapping[str, Any], origin: Origin, config: Config) -> list[str]:
    """The warnings to print before a run of `origin` goes on from the checkpoint `folder`, whose state file is `saved`.

    Raises ValueError, with a line for each part, where the run must not go on.
    """
    reads_weights = config.loss.reference_coef > 0 and config.checkpoint.reference is None
    faults, warnings = [], []
    changed = changed_parts(saved["cursor"], origin)
    if "rows" in changed and not _changes(saved["config"], config, _OF_ORDER[1:]):
        changed = [part for part in changed if part != "order"]  # which then follows from the rows
    for part in changed:
        change = _describe_change(part, saved, config)
        if part == "pictures":
            warnings.append(f"{change}: it goes on with these")
        elif part in _OF_DATA and config.data.on_change == "continue":
            drawn = saved["cursor"]["cursor"]["position"]
            warnings.append(f"{change}: it goes on with what is there now, of which {drawn} prompts count as drawn")
        elif part == "weights" and not (saved["cursor"].get("verb") == "train" and reads_weights):
            warnings.append(f"{change}: it goes on with those of {folder}")
        else:
            of_reference = ", of which the reference policy is made" if part == "weights" else ""
            or_go_on = ", or data.on_change=continue, which goes on with these" if part in _OF_DATA else ""
            faults.append(
                f"{change}{of_reference}; take another run.dir (model.checkpoint={folder} begins with its weights)"
                f"{or_go_on}"
            )
    if faults:
        raise ValueError("\n".join(faults))
    return warnings


def changed_parts(cursor: Mapping[str, Any], origin: Origin) -> list[str]:
    """The parts of `origin` that differ from those in the state that a checkpoint keeps."""
    before = dict(kept_origin(cursor))
    if "cursor" in cursor:  # there were plain orders alone before origins kept theirs
        before.setdefault("order", plain_order(cursor["cursor"]["shuffle"]))
    return [part for part in origin if before.get(part, origin[part]) != origin[part]]


def data_changed(cursor: Mapping[str, Any], origin: Origin) -> bool:
    """Whether rows or their order differ from those in the state `cursor` that a checkpoint keeps."""
    return any(part in ("rows", "order") for part in changed_parts(cursor, origin))


def carried_origin(cursor: Mapping[str, Any], origin: Origin, config: Config) -> Origin:
    """What later checkpoints of a run keep that is resumed from `cursor`: what the run began with is not replaced, but
    by data that it was allowed to go on with."""
    allowed = _OF_DATA if config.data.on_change == "continue" else ()
    return {**origin, **{part: value for part, value in kept_origin(cursor).items() if part not in allowed}}


def kept_origin(cursor: Mapping[str, Any]) -> Origin:
    """The origin in the state that a checkpoint keeps; empty where the checkpoint was written before origins were."""
    kept = cursor.get("origin")
    return kept if isinstance(kept, dict) else {}


def _describe_change(part: str, saved: Mapping[str, Any], config: Config) -> str:
    """The sentence that names the setting, the part that differs, and where the run read it when it began."""
    before = saved["config"]
    if part == "order":
        why = _changes(before, config, _OF_ORDER) or "with the same settings: a sampler or a column gives another"
        return f"data: another order of rows than when this run began ({why})"
    if part in ("rows", "pictures"):
        key, was = "data.train", described_sources(before["data"]["train"])
        now = described_sources(plain_tree(config)["data"]["train"])
    else:
        model = before["model"]
        key, was, now = "model.path", model["path"] or model["checkpoint"], str(model_folder(config))
    then = "when this run began" if was == now else f"{was}, with which this run began"
    return f"{key}: {now} has {_other(part)} than {then}"


def _other(part: str) -> str:
    noun = _NOUNS[part]
    return f"another {noun.partition(' ')[2]}" if noun.startswith(("a ", "an ")) else f"other {noun}"


def changed_settings(before: Mapping[str, Any], config: Config) -> str:
    """The settings that differ from those a checkpoint was made with, as `key was -> is`; empty where none does."""
    return _changes(before, config)


def _changes(before: Mapping[str, Any], config: Config, keys: Sequence[str] = ()) -> str:
    """The settings that differ, of `keys` or else of all but those of the machine."""
    was, now = dict(_flat(before)), dict(_flat(plain_tree(config)))
    wanted = [key for key in now if key in was and not key.startswith(_MACHINE_SETTINGS)]
    if keys:
        wanted = [key for key in was | now if key.partition("[")[0] in keys]
    changed = [
        f"{key} {_short(was.get(key))} -> {_short(now.get(key))}" for key in wanted if was.get(key) != now.get(key)
    ]
    more = [f"and {len(changed) - _MOST_LISTED} more"] if len(changed) > _MOST_LISTED else []
    return ", ".join(changed[:_MOST_LISTED] + more)


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested settings with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            yield from _flat({f"{key}[{place}]": entry for place, entry in enumerate(value)}, path)
        else:
            yield f"{path}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
