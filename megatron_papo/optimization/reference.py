"""The reference policy: frozen weights in host memory, swapped into the policy's own module while they are needed.

One module serves both policies; a swap exchanges one parameter after another in place. So the reference costs one copy
of the weights on the host, two transfers a step, and device memory for the largest parameter during the exchange. A run
that resumes copies its reference from the starting weights before it loads the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ReferencePolicy:
    """A copy on the host of the weights that `module` has now (this rank's shard)."""

    def __init__(self, module: nn.Module):
        self._weights = _host_copies(module)
        self._swapped = False

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Within the block `module` computes with the reference's weights; afterwards it has its own, bit for bit."""
        assert not self._swapped, "the reference is in a module already, its place taken by that module's weights"
        self._exchange(module)
        self._swapped = True
        try:
            yield
        finally:
            self._exchange(module)
            self._swapped = False

    @torch.no_grad()
    def copy_into(self, module: nn.Module) -> None:
        """Overwrites the parameters of `module` with the reference's."""
        assert not self._swapped
        for parameter, weight in zip(module.parameters(), self._weights, strict=True):
            parameter.copy_(weight)

    @torch.no_grad()
    def _exchange(self, module: nn.Module) -> None:
        """Swaps the parameters of `module` with the copies on the host, one after another."""
        for parameter, weight in zip(module.parameters(), self._weights, strict=True):
            own = parameter.clone()
            parameter.copy_(weight)
            weight.copy_(own)


def _host_copies(module: nn.Module) -> list[Tensor]:
    """Copies of the parameters of `module`, in its order, in pinned memory where there is a GPU."""
    pinned = torch.cuda.is_available()
    copies = [torch.empty(p.shape, dtype=p.dtype, device="cpu", pin_memory=pinned) for p in module.parameters()]
    for copy, parameter in zip(copies, module.parameters(), strict=True):
        copy.copy_(parameter.detach())
    return copies
