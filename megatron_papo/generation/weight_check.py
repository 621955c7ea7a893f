"""Every tensor that an engine is handed, checked by its name and shape, each exactly once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megatron_papo.generation.reference_model import Shapes

_NAMED_FAULTS = 10


def checked(named_tensors: Iterator[tuple[str, Tensor]], expected: Shapes) -> Iterator[tuple[str, Tensor]]:
    """The tensors that fit; consumes `named_tensors` to its end whatever is wrong with them.

    Raises ValueError at the end, naming what is missing, unknown, repeated or misshapen: other ranks draw from the
    same collectives, so stopping half-way would leave them hanging.
    """
    faults, seen = [], set()
    for name, tensor in named_tensors:
        if name not in expected:
            faults.append(f"{name}: unknown")
        elif name in seen:
            faults.append(f"{name}: handed over twice")
        elif expected[name] != tuple(tensor.shape):
            faults.append(f"{name}: is {tuple(tensor.shape)}, expected {expected[name]}")
        else:
            yield name, tensor
        seen.add(name)
    faults += [f"{name}: missing" for name in expected if name not in seen]
    if faults:
        more = f" and {len(faults) - _NAMED_FAULTS} more" if len(faults) > _NAMED_FAULTS else ""
        raise ValueError("weights handed to the generator: " + "; ".join(faults[:_NAMED_FAULTS]) + more)
