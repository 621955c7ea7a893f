"""The count of what forward keeps, against the storages that autograd keeps, over layouts and recomputation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_papo.activations import RowSize, saved_bytes
from megatron_papo.config import Config
from tests.ranks import run_ranks
from tests.tiny_run import make_inputs, tiny_run

TOLERANCE = 0.15
RESPONSE = tuple(range(40, 90))


def _kept_by_each(configs: list[Config]) -> list[tuple[int, int]]:
    """For every setting: (bytes that autograd saved in one forward pass of this rank, bytes counted)."""
    from megatron_papo.checkpoint.weights import load_weights
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.model.policy import build_policy
    from megatron_papo.packing import supervised_group
    from megatron_papo.run import open_run, pack_rows

    with open_run(configs[0]) as run:
        dataset = PromptDataset(configs[0].data, "train", run.processor)
        groups = []
        for number in (0, 3, 4):
            group = supervised_group(dataset.prompt(number), RESPONSE)
            rollouts = tuple(replace(group.rollouts[0], index=index) for index in range(4))
            groups.append(replace(group, rollouts=rollouts, advantages=(0.0,) * 4))
        row, *_ = pack_rows(run, groups)
        size = RowSize(row.num_tokens, sum(len(pixels) for pixels in row.pixel_values), row.target_ids_R.numel())
        found = []
        for config in configs:
            policy = build_policy(config, run.shape)
            load_weights(policy, run.shape, config.model.path)
            counted = saved_bytes(config, run.shape, run.layout.pipeline_rank, size, fused=False)
            found.append((_kept(replace(run, policy=policy, config=config), row), counted))
        return found


def _kept(run: Any, row: Any) -> int:
    """Of all storages that are no parameter's."""
    from megatron_papo.model.policy import HeadRequest

    weights = {parameter.untyped_storage().data_ptr() for parameter in run.policy.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    if run.layout.pipeline_rank > 0:
        dtype = next(run.policy.parameters()).dtype
        run.policy.set_input_tensor(torch.randn(*_entry(run, row), dtype=dtype, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.policy(row, HeadRequest(banned_ids=run.banned_ids))
    return sum(num for num, _ in kept.values())


def _entry(run: Any, row: Any) -> tuple[int, int, int]:
    """What the stage before sends."""
    tensor = run.config.parallel.tensor if run.config.parallel.sequence else 1
    return -(-row.num_tokens // tensor), 1, run.shape.language.hidden_size


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Every width another, so that no term of the count stands in for a wrong one."""
    return make_inputs(
        tmp_path_factory.mktemp("inputs"), hidden=256, heads=4, kv_heads=2, layers=4, vision_depth=4, vision_hidden=64,
        vision_intermediate=96,
    )  # fmt: skip


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"parallel__tensor": 2},
    "TP2+SP": {"parallel__tensor": 2, "parallel__sequence": True},
    "PP2": {"parallel__pipeline": 2},
    "TP2+SP PP2": {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2},
}


@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, "bfloat16") for layout in LAYOUTS), ("TP1", "float32"), ("TP2+SP", "float32")]
)
def test_what_is_kept_is_what_is_counted(inputs, tmp_path, layout, dtype):
    configs = [
        tiny_run(
            inputs, tmp_path, model__dtype=dtype, model__recompute=recompute, train__tokens_per_micro_batch=4000,
            **LAYOUTS[layout],
        )
        for recompute in ("none", "selective", "full")
    ]  # fmt: skip
    parallel = configs[0].parallel
    for rank, found in enumerate(run_ranks(_kept_by_each, parallel.tensor * parallel.pipeline, configs)):
        for config, (kept, counted) in zip(configs, found, strict=True):
            name = f"{layout} {dtype}, recompute {config.model.recompute}, rank {rank}"
            print(f"{name}: kept {kept}, counted {counted}: {counted / kept - 1:+.1%}")
            assert abs(counted / kept - 1) < TOLERANCE, name
