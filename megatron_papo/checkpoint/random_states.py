"""The states of this rank's random number generators, as an object in a checkpoint that consists of uint8 tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_papo.checkpoint.box_reading import read_object
from megatron_papo.checkpoint.opening import Opened
from megatron_papo.distributed.agreement import DamagedCheckpoint
from megatron_papo.distributed.layout import layout


def random_states() -> ShardedObject:
    """The states as they are now."""
    states = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    own = layout()
    return ShardedObject("rng", states, (own.world_size,), (own.rank,))


def read_random_states(opened: Opened) -> Mapping[str, Any]:
    """The stored states of this rank. Raises DamagedCheckpoint for what its generators would not accept."""
    own = random_states()
    states = read_object(opened, own)
    try:
        pairs = [(states[name], own.data[name]) for name in ("torch", "cuda") if name in own.data and name in states]
        fits = "torch" in states and all(part.shape == like.shape for part, like in pairs)
        parts = [*(part for part, _ in pairs), *states["tracker"].values()]
        fits = fits and all(part.dtype == torch.uint8 for part in parts)
    except (TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise DamagedCheckpoint(f"{opened.folder}: {own.unique_key}: not the states of random number generators")
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Sets this rank's random number generators to `states`."""
    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
