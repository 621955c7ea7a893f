"""The reference policy: frozen weights in CPU memory, swapped into the policy's own module when they are needed.

One module serves both, so the reference costs host memory and two copies a step, no device memory. A run that
resumes captures its reference from the starting weights before it loads the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ReferencePolicy:
    """The weights of `module` as they are now (this rank's shard), kept on the host."""

    def __init__(self, module: nn.Module):
        self._weights = _host_copies(module)

    @contextmanager
    def swapped_into(self, module: nn.Module) -> Iterator[None]:
        """Within the block `module` computes with the reference's weights; its own come back bit for bit."""
        own = ReferencePolicy(module)
        self.copy_into(module)
        try:
            yield
        finally:
            own.copy_into(module)

    @torch.no_grad()
    def copy_into(self, module: nn.Module) -> None:
        """Overwrites the parameters of `module`."""
        for parameter, weight in zip(module.parameters(), self._weights, strict=True):
            parameter.copy_(weight)


def _host_copies(module: nn.Module) -> list[Tensor]:
    pinned = torch.cuda.is_available()
    copies = [torch.empty(p.shape, dtype=p.dtype, device="cpu", pin_memory=pinned) for p in module.parameters()]
    for copy, parameter in zip(copies, module.parameters(), strict=True):
        copy.copy_(parameter.detach())
    return copies
