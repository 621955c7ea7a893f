"""What a run is made from: fingerprints of its data and its model, kept in every checkpoint and compared on resuming.

Paths may change and copies may take the place of originals: what counts is what is read. Other rows, another tokenizer,
chat template or image processor would make of the second half of a run another run, so it is refused; what the run
reads no more, or may have been mended, is warned of. Settings that differ are listed. Checkpoints from before this was
kept have nothing to compare. Left out: held-out data, which no step depends on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_papo.checkpoint.weight_fingerprint import fingerprint_of_weights
from megatron_papo.config import Config, plain_tree
from megatron_papo.config.derived import model_folder, weights_folder
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.fingerprint import fingerprint
from megatron_papo.data.processor import Processor
from megatron_papo.distributed.agreement import agreed
from megatron_papo.training.session import Run

Origin = Mapping[str, str]
"""part -> fingerprint; plain JSON."""

_NOUNS = {
    "rows": "rows",
    "pictures": "pictures",
    "tokenizer": "a tokenizer",
    "template": "a chat template",
    "image processor": "an image processor",
    "weights": "weights",
}
_IMAGE_SETTINGS = (
    "patch_size", "temporal_patch_size", "merge_size", "do_resize", "resample", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip
_OF_THE_MACHINE = ("run.dir", "cluster.", "observe.", "data.train", "model.path", "model.checkpoint")
"""Settings of which no change is told: where a run lies, and what is compared by its content."""
_MOST_TOLD = 12
_LONGEST_VALUE = 40


def origin_of(run: Run, dataset: PromptDataset, *columns: str) -> Origin:
    """Of a run that trains on `dataset`, of which it also reads `columns`; read on one rank, known on all.

    Raises ValueError, on every rank alike, for what cannot be read.
    """
    found: Origin = agreed(partial(_read, run, dataset, columns))
    return found


def _read(run: Run, dataset: PromptDataset, columns: tuple[str, ...]) -> Origin:
    found = {**dataset.fingerprints(columns), **_of_processor(run.processor)}
    model = run.config.model
    if model.checkpoint is not None or not model.random_init:
        found["weights"] = fingerprint_of_weights(weights_folder(run.config))
    return found


def _of_processor(processor: Processor) -> dict[str, str]:
    words = json.dumps([sorted(processor.tokenizer.get_vocab().items()), list(processor.eos_ids)])
    images = [(name, getattr(processor.image_processor, name, None)) for name in _IMAGE_SETTINGS]
    return {
        "tokenizer": fingerprint([words.encode()]),
        "template": fingerprint([processor.template.encode("utf-8", "surrogatepass")]),
        "image processor": fingerprint([json.dumps(images, default=int).encode()]),
    }


def compare_origins(folder: Path, saved: Mapping[str, Any], origin: Origin, config: Config) -> list[str]:
    """What to warn of before the run goes on from the checkpoint `folder`, whose state file is `saved`.

    Raises ValueError, with a line for each part, for what it must not go on with.
    """
    before = kept_origin(saved["cursor"])
    reads_weights = config.loss.reference_coef > 0 and config.checkpoint.reference is None
    faults, warnings = [], []
    for part in (part for part in origin if before.get(part, origin[part]) != origin[part]):
        told = _told(part, saved["config"], config)
        if part == "pictures":
            warnings.append(f"{told}: it goes on with these")
        elif part == "weights" and not (saved["cursor"].get("verb") == "train" and reads_weights):
            warnings.append(f"{told}: it goes on with those of {folder}")
        else:
            of_reference = ", of which the reference policy is made" if part == "weights" else ""
            faults.append(
                f"{told}{of_reference}; take another run.dir (model.checkpoint={folder} begins with its weights)"
            )
    if faults:
        raise ValueError("\n".join(faults))
    return warnings


def kept_origin(cursor: Mapping[str, Any]) -> Origin:
    """Of the state that a checkpoint keeps; empty where it is from before origins were kept."""
    kept = cursor.get("origin")
    return kept if isinstance(kept, dict) else {}


def _told(part: str, before: Mapping[str, Any], config: Config) -> str:
    """Which part is another, of what, and what it was of."""
    if part in ("rows", "pictures"):
        key, was, now = "data.train", before["data"]["train"], str(config.data.train)
    else:
        model = before["model"]
        key, was, now = "model.path", model["path"] or model["checkpoint"], str(model_folder(config))
    then = "when this run began" if was == now else f"{was}, with which this run began"
    return f"{key}: {now} has {_other(part)} than {then}"


def _other(part: str) -> str:
    noun = _NOUNS[part]
    return f"another {noun.partition(' ')[2]}" if noun.startswith(("a ", "an ")) else f"other {noun}"


def changed_settings(before: Mapping[str, Any], config: Config) -> str:
    """The settings that a checkpoint was made with and that are others now, as `key was -> is`; empty when none is."""
    was, now = dict(_flat(before)), dict(_flat(plain_tree(config)))
    changed = [
        f"{key} {_short(was[key])} -> {_short(now[key])}"
        for key in now
        if key in was and was[key] != now[key] and not key.startswith(_OF_THE_MACHINE)
    ]
    more = [f"and {len(changed) - _MOST_TOLD} more"] if len(changed) > _MOST_TOLD else []
    return ", ".join(changed[:_MOST_TOLD] + more)


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "..."
