"""The reference's weights in a module and out again, without memory for another copy of the model."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from megatron_papo.optimization.reference import ReferencePolicy


def _values(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def _equal(module: nn.Module, values: list[torch.Tensor]) -> bool:
    return all(torch.equal(own, value) for own, value in zip(module.parameters(), values, strict=True))


def _living_bytes() -> int:
    """Of all tensors of this process."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta
    }
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_comes_and_goes_bit_for_bit(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False)).to(dtype)
    reference, start = ReferencePolicy(module), _values(module)
    for parameter in module.parameters():
        parameter.data.normal_()
    own = _values(module)
    for _ in range(2):
        with reference.swapped_into(module):
            assert _equal(module, start) and not _equal(module, own)
        assert _equal(module, own)
    with pytest.raises(RuntimeError, match="from within"), reference.swapped_into(module):
        raise RuntimeError("from within")
    assert _equal(module, own)
    reference.copy_into(module)
    assert _equal(module, start)


def test_a_swap_holds_no_further_copy_of_the_model():
    module = nn.Linear(64, 64)
    reference = ReferencePolicy(module)
    before = _living_bytes()
    with reference.swapped_into(module):
        assert _living_bytes() == before
