"""Warnings of Megatron-Core that a user can do nothing about, left out of what a run prints.

`papo doctor` says once what is not installed and what that costs.
"""

from __future__ import annotations

import logging
import warnings


def quieten_megatron() -> None:
    """From now on this process leaves these warnings out: Megatron-Core's remarks on its own experimental parts and on
    what is not installed, and what its distributed optimizer says to its own authors."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)
    ddp = logging.getLogger("megatron.core.distributed.distributed_data_parallel")
    ddp.addFilter(lambda record: "full_param_layout not provided" not in record.getMessage())
    deprecated = r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    # Megatron's own lines cause this one too, but without a GPU it is our adaptation that makes the call
    not_a_leaf = r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"
    warnings.filterwarnings("ignore", message=not_a_leaf, module=r"megatron_papo\.distributed\.accelerator")
