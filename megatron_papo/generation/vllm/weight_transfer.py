"""Weights into a running vLLM engine of the same process: a backend of vLLM's weight-transfer interface.

The trainer's tensors are already in this process, full and under transformers' names, so nothing is transferred:
`receive_weights` gives them to vLLM's loader one at a time, inside a layer-wise reload (which undoes and redoes what
the engine does to weights after loading, e.g. prepacking on the CPU). vLLM's shipped backends expect the trainer in
another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "megatron_papo"


@dataclass
class InProcessInit(WeightTransferInitInfo):
    """What both sides agree on at the start: nothing, since they are one process."""


@dataclass
class InProcessUpdate(WeightTransferUpdateInfo):
    """One tensor of a hand-over."""

    name: str
    tensor: Tensor
    """The full tensor, on the engine's device; it must not change before its layer is complete, for vLLM keeps a
    reference until then."""


class InProcessTransfer(WeightTransferEngine[InProcessInit, InProcessUpdate]):
    """Gives tensors of this process to vLLM's loader."""

    init_info_cls = InProcessInit
    update_info_cls = InProcessUpdate
    model: Any
    """The engine's model; None once the engine has ended."""

    def init_transfer_engine(self, init_info: InProcessInit) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # without the base class's synchronisation of an accelerator, which a CPU does not have
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: InProcessUpdate) -> None:
        self.model.load_weights([(update_info.name, update_info.tensor)])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    @staticmethod
    def trainer_send_weights(*_: Any, **__: Any) -> None:
        """Never called: releases before 0.32 demand it of every backend, for a trainer in another process."""
        raise NotImplementedError("the trainer is in this process: weights go by update_weights")

    def shutdown(self) -> None:
        """Lets the model go: vLLM frees the memory of a closed engine while this object is still there."""
        self.model = self._default_model = None


def register() -> None:
    """Makes the backend known to vLLM; a second call changes nothing."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, InProcessTransfer)
