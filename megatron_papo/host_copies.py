"""Copies from the host to a GPU that make nobody wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. To a GPU it goes by way of pinned memory: from any other the host would wait until the
    GPU has done all that it was given. The pinned copy may go out of scope at once, since torch gives its pinned memory
    to nobody before copies from it are done."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
