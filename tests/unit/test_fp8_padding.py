"""How far rows are padded for FP8, what is refused before ranks start, and which GPU can do what."""

from __future__ import annotations

import pytest
import torch

from megatron_papo.config import ConfigError, load_config
from megatron_papo.model.fp8.multiples import row_padding, token_multiple
from megatron_papo.model.fp8.padding import zero_end
from megatron_papo.model.fp8.switch import fault_of_device
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight.layout_faults import faults_of_fp8
from tests.support.tiny import tiny_config


@pytest.mark.parametrize(
    ("recipe", "ranks", "expected"),
    [
        ("off", 1, 1), ("off", 4, 4),
        ("tensorwise", 1, 16), ("tensorwise", 2, 16), ("tensorwise", 4, 32), ("delayed", 8, 64),
        ("mxfp8", 1, 32), ("mxfp8", 2, 64), ("blockwise", 1, 128), ("blockwise", 4, 512), ("tensorwise", 3, 48),
    ],
)  # fmt: skip
def test_multiples(recipe, ranks, expected):
    assert token_multiple(recipe, ranks) == expected


def test_rows_are_padded_to_the_multiple_or_to_the_fixed_length():
    assert [row_padding(tokens, 16, None) for tokens in (1, 15, 16, 17)] == [15, 1, 0, 15]
    assert row_padding(100, 16, 128) == 28
    with pytest.raises(ValueError, match=r"129 tokens is longer than train.tokens_per_micro_batch=128"):
        row_padding(129, 16, 128)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_end_of_a_row_is_zero_on_every_share_and_takes_no_gradient(num_ranks):
    row = (torch.arange(8.0) + 1)[:, None, None].expand(8, 1, 2)
    for num_padding in range(8):
        found, grads = [], []
        for rank, share in enumerate(row.chunk(num_ranks)):
            leaf = share.clone().requires_grad_()
            zeroed = zero_end(leaf, num_padding, rank, num_ranks)
            zeroed.sum().backward()
            found.append(zeroed.detach())
            grads.append(leaf.grad)
        kept = (torch.arange(8) < 8 - num_padding).float()[:, None, None].expand(8, 1, 2)
        assert torch.equal(torch.cat(found), row * kept)
        assert torch.equal(torch.cat(grads), kept)


SHAPE = ModelShape.from_dict(tiny_config(layers=4, hidden=64).to_dict())


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["fp8.recipe=off", "fp8.first_layers=9"], None),
        (["fp8.recipe=tensorwise"], None),
        (["fp8.recipe=tensorwise", "fp8.first_layers=3"], "fp8.first_layers: 3 and fp8.last_layers=1 leave none"),
        (
            ["fp8.recipe=tensorwise", "fp8.first_layers=2", "fp8.last_layers=0", "parallel.pipeline=4"],
            "fp8.first_layers: 2 is more than the 1 layers of a pipeline stage",
        ),
        (["fp8.recipe=mxfp8", "parallel.tensor=4"], "attention heads is 16 on a tensor rank, no multiple of 32"),
        (["fp8.recipe=tensorwise", "parallel.tensor=4", "fp8.vision=true"], "vision tower is 8 on a tensor rank"),
        (
            ["fp8.recipe=blockwise", "train.fixed_rows=true", "train.tokens_per_micro_batch=200"],
            "train.tokens_per_micro_batch: 200 is no multiple of 128, which fp8.recipe=blockwise needs",
        ),
    ],
)
def test_what_is_refused_before_ranks_start(overrides, fault):
    faults = faults_of_fp8(load_config(None, overrides), SHAPE)
    assert any(fault in line for line in faults) if fault else faults == []


def test_delayed_with_layers_left_out_is_refused():
    with pytest.raises(ConfigError, match=r"fp8.first_layers=0 and fp8.last_layers=0"):
        load_config(None, ["fp8.recipe=delayed"])


@pytest.mark.parametrize(
    ("recipe", "device", "cuda", "fault"),
    [
        ("tensorwise", (9, 0), "12.4", ""),
        ("tensorwise", (8, 9), "12.4", ""),
        ("delayed", (8, 0), "12.4", "FP8 tensor cores"),
        ("mxfp8", (9, 0), "13.0", "needs Blackwell"),
        ("mxfp8", (10, 0), "13.0", ""),
        ("mxfp8", (12, 0), "13.0", "needs Blackwell"),
        ("blockwise", (9, 0), "12.9", ""),
        ("blockwise", (9, 0), "12.8", "CUDA 12.9"),
        ("blockwise", (9, 0), "13.0", ""),
        ("blockwise", (10, 0), "13.0", "needs Hopper"),
    ],
)
def test_recipes_and_gpus(recipe, device, cuda, fault):
    found = fault_of_device(recipe, *device, cuda)
    assert fault in found if fault else found == ""
