"""What a checkpoint folder holds, in the format of megatron.core.dist_checkpointing (box_writing.py, box_reading.py).

    .metadata, *.distcp, metadata.json   tensors: weights, Adam's moments, fp32 master copies, random number states
    checksums.json                       the checksum of every box of a tensor (checksums.py)
    state.json                           step, metric, data cursor, settings, the layout that wrote it; other checksums
    config.json, tokenizer...            the Hugging Face folder's files beside its weights

Tensors are stored whole and unpadded under their Megatron names (sharding.py): any layout loads what any other wrote.
Random number states belong to ranks, so they are restored on the same layout only. Saving has two parts: `snapshot`
takes the state of this moment, and store.py writes what it returns, possibly later.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_papo.checkpoint import optimizer_state
from megatron_papo.checkpoint.archive import COMMON_STATE
from megatron_papo.checkpoint.box_reading import check_object, read_boxes
from megatron_papo.checkpoint.box_writing import Boxes, own_boxes, to_boxes
from megatron_papo.checkpoint.opening import Opened, open_checkpoint
from megatron_papo.checkpoint.random_states import random_states, read_random_states, set_random_states
from megatron_papo.checkpoint.sharding import sharded_tensors
from megatron_papo.checkpoint.staging import Staging
from megatron_papo.checkpoint.state_file import FORMAT, write_state_tree
from megatron_papo.distributed.agreement import read_together
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.distributed.layout import layout, world_group
from megatron_papo.model.shape import ModelShape
from megatron_papo.optimization.optimizer import Optimizer
from megatron_papo.weights.held import HeldParameter, held_parameters
from megatron_papo.weights.weight_files import MAX_SHOWN_FAULTS

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint saves and restores. `cursor` (the place in the data) and `config` are plain JSON trees."""

    model: nn.Module
    shape: ModelShape
    optimizer: Optimizer | None = None
    """None where only weights are saved and restored."""
    cursor: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    saves_moments: bool = True
    """False: what is saved has the place in the optimizer's schedule, and none of its tensors."""


@dataclass(frozen=True)
class Restored:
    """What a loaded checkpoint says beside the tensors, which are in the model and the optimizer."""

    step: int
    metric: float | None
    cursor: dict[str, Any]
    config: dict[str, Any]
    lacks_moments: bool
    """Whether updates had been made, and the checkpoint was saved without the optimizer's state."""


@dataclass(frozen=True)
class Snapshot:
    """This rank's part of a checkpoint that is to be written."""

    boxes: Boxes
    facts: dict[str, Any]
    """The content of state.json, to which the store adds what it alone knows."""


def snapshot(step: int, state: TrainState, staging: Staging | None) -> Snapshot:
    """The state as it is now, copied to `staging`. All ranks call it together.

    Without `staging` the boxes are the state's own tensors, which have to be written before any of them changes.
    """
    held = held_parameters(state.model, state.shape, layout().tensor_size)
    tree = {**model_tensors(held), "rng": random_states()}
    counts = {"optimizer_step": 0, "schedule_steps": 0}
    if state.optimizer is not None:
        megatron = state.optimizer.megatron
        steps = gather_objects(optimizer_state.step_count(megatron), world_group())
        counts = {"optimizer_step": max(steps), "schedule_steps": state.optimizer.schedule.num_steps}
        if not state.saves_moments:
            counts["optimizer_step"] = 0  # a reader leaves the optimizer as before its first update
        if counts["optimizer_step"]:
            tree |= _optimizer_tensors(state.optimizer, held, None)
    own = own_boxes(tree)
    boxes = to_boxes(own if staging is None else staging.copy(own))
    plain = json.loads(json.dumps({"cursor": state.cursor, "config": state.config}))  # a copy
    return Snapshot(boxes, {"step": step, **counts, "random_states": True, **plain})


def write_state_file(folder: Path, *, step: int, **rest: Any) -> None:
    """Writes state.json, the last file of a checkpoint, which has the checksums of the others."""
    write_state_tree(folder, {"format": FORMAT, "step": step, "layout": _layout_sizes(), **rest})


def read_state(folder: Path | str, state: TrainState, warn: Callable[[str], None] = _log.warning) -> Restored:
    """Fills model, optimizer and schedule of `state` from a checkpoint of any layout. All ranks call it together.

    Without an optimizer in `state`, only the weights are read. If the checkpoint has no updates in it, the optimizer is
    left as before its first update. `warn` is called, on rank 0, with faults that are no reason to refuse the
    checkpoint; by default it logs them.

    Raises, on every rank alike, DamagedCheckpoint for what cannot be read or is not what was written, after which
    tensors of `state` may have any values, and another checkpoint can be read into it; ValueError naming tensors that
    are missing or of another shape than those of `state`, and for a folder that is no checkpoint of this version.
    """
    opened = read_together(world_group(), folder, lambda: open_checkpoint(folder))
    saved, stored = opened.saved, _stored(opened)
    held = held_parameters(state.model, state.shape, layout().tensor_size)
    tree = model_tensors(held)
    if state.optimizer is not None:
        optimizer_state.clear(state.optimizer.megatron)  # a damaged checkpoint may have filled a part of it
        if saved["optimizer_step"]:
            optimizer_state.allocate(state.optimizer.megatron, saved["optimizer_step"])
            tree |= _optimizer_tensors(state.optimizer, held, stored)
    check_stored(folder, tree, stored)
    resumed = state.optimizer is not None and saved["random_states"] and saved["layout"] == _layout_sizes()
    states = read_together(world_group(), folder, lambda: _read(opened, tree, resumed))
    if layout().rank == 0:
        for remark in opened.remarks():
            warn(remark)
    if states is not None:
        set_random_states(states)
    if state.optimizer is not None:
        _restore_schedule(state.optimizer, saved)
    lacks_moments = saved["schedule_steps"] > 0 and not saved["optimizer_step"]
    return Restored(saved["step"], saved.get("metric"), saved["cursor"], saved["config"], lacks_moments)


def _read(opened: Opened, tree: dict[str, ShardedTensor], resumed: bool) -> Mapping[str, Any] | None:
    """Fills the tensors of `tree`. Padding, which is in no checkpoint, stays the zeros it was built with.

    Returns this rank's random number states if they are to be restored (`resumed`), else None.
    """
    read_boxes(opened, tree)
    if layout().rank == 0:
        check_object(opened, COMMON_STATE)
    return read_random_states(opened) if resumed else None


def _stored(opened: Opened) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint, by name."""
    described = opened.metadata.state_dict_metadata.items()
    return {name: tuple(each.size) for name, each in described if isinstance(each, TensorStorageMetadata)}


def check_stored(folder: Path | str, tree: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, on every rank, when a tensor that any rank needs is not stored or has another shape."""
    faults = set()
    for part in tree.values():
        if part.key not in stored:
            faults.add(f"{folder}: {part.key} {part.global_shape}: missing")
        elif stored[part.key] != part.global_shape:
            faults.add(f"{folder}: {part.key}: expected shape {part.global_shape}, found {stored[part.key]}")
    everywhere = sorted(set().union(*gather_objects(faults, world_group())))
    if everywhere:
        raise ValueError("\n".join(everywhere[:MAX_SHOWN_FAULTS]))


def model_tensors(held: Mapping[str, HeldParameter]) -> dict[str, ShardedTensor]:
    """The weights as boxes of stored tensors. The keys of the result are unique and have no other meaning."""
    boxes: dict[str, ShardedTensor] = {}
    for name, part in held.items():
        for box in sharded_tensors(part.entry.name, part, part.tensor.detach(), layout()):
            boxes[f"model.{name}.{len(boxes)}"] = box
    return boxes


def _optimizer_tensors(
    optimizer: Optimizer, held: Mapping[str, HeldParameter], stored: Mapping[str, tuple[int, ...]] | None
) -> dict[str, ShardedTensor]:
    """The moments and master copies as boxes of stored tensors, keyed as in `model_tensors`.

    With `stored`, the tensors of a checkpoint that is to be read, a master copy that it lacks is read from its weights.
    """
    boxes: dict[str, ShardedTensor] = {}
    for slot in optimizer_state.slots(optimizer.megatron, held):
        weight = slot.held.entry.name
        tensors = {f"optimizer.state.{moment}.{weight}": slot.state[moment] for moment in optimizer_state.MOMENTS}
        if slot.has_master:
            master = f"optimizer.state.fp32_param.{weight}"
            tensors[weight if stored is not None and master not in stored else master] = slot.main.detach()
        for key, tensor in tensors.items():
            for box in sharded_tensors(key, slot.held, tensor, layout(), slot.flat_start):
                boxes[f"optimizer.{len(boxes)}"] = box
    return boxes


def _restore_schedule(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    if not saved["optimizer_step"]:
        optimizer.megatron.reload_model_params()  # master copies were made from the weights before loading
    optimizer.schedule.num_steps = saved["schedule_steps"]
    optimizer.schedule.step(increment=0)  # sets the learning rates that the settings give for that step


def _layout_sizes() -> dict[str, int]:
    own = layout()
    return {"tensor": own.tensor_size, "pipeline": own.pipeline_size, "data": own.data_size}
