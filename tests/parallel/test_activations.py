"""The count of what forward keeps for backward, against the storages that live after it, over layouts and
recomputation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_papo.config import Config
from megatron_papo.costs.activations import RowSize, saved_bytes
from tests.support.ranks import run_ranks
from tests.support.tiny_run import make_inputs, tiny_run
from tests.toy_family.folder import make_toy_folder

TOLERANCE = 0.02
RESPONSE = tuple(range(40, 90))


def _kept_by_all(models: list[list[Config]]) -> list[list[tuple[int, int]]]:
    """What `_kept_by_each` gives for the settings of each model."""
    return [_kept_by_each(configs) for configs in models]


def _kept_by_each(configs: list[Config]) -> list[tuple[int, int]]:
    """For every setting: (bytes that one forward pass of this rank left, bytes counted)."""
    from megatron_papo.checkpoint.weight_loading import load_weights
    from megatron_papo.data.dataset import PromptDataset
    from megatron_papo.model.policy import build_policy
    from megatron_papo.packing import supervised_group
    from megatron_papo.training.batching import pack_rows
    from megatron_papo.training.session import open_run

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
    """Of all storages that a forward pass made and that live after it, Megatron-Core's own buffers left out."""
    from megatron.core.parallel_state import get_global_memory_buffer
    from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

    from megatron_papo.model.policy import HeadRequest

    with _Storages() as made:
        if run.layout.pipeline_rank > 0:
            dtype = next(run.policy.parameters()).dtype
            run.policy.set_input_tensor(torch.randn(*_entry(run, row), dtype=dtype, requires_grad=True))
        outputs = run.policy(row, HeadRequest(banned_ids=run.banned_ids))
    if not run.layout.is_last_stage:
        deallocate_output_tensor(outputs, deallocate_pipeline_outputs=True)  # as when it has been sent
    return made.num_bytes(apart_from=get_global_memory_buffer().buffer.values())


class _Storages(TorchDispatchMode):
    """Of the tensors that operations made; what they only read, such as weights, left out."""

    def __init__(self) -> None:
        super().__init__()
        self._read: list[torch.UntypedStorage] = []
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [
            tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)
        ]
        self._read += [storage for storage in before if not self._is_made(storage)]
        read = {storage._cdata for storage in self._read}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in read:
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = weakref.ref(storage)
        return found

    def _is_made(self, storage: torch.UntypedStorage) -> bool:
        made = self._made.get(storage._cdata)
        return made is not None and made() is not None

    def num_bytes(self, apart_from: Iterable[torch.Tensor]) -> int:
        apart = {tensor.untyped_storage()._cdata for tensor in apart_from}
        live = (made() for key, made in self._made.items() if key not in apart)
        return sum(storage.nbytes() for storage in live if storage is not None)


def _entry(run: Any, row: Any) -> tuple[int, int, int]:
    """What the stage before sends: hidden states, and the levels of DeepStack that are still to be added."""
    tensor = run.config.parallel.tensor if run.config.parallel.sequence else 1
    image_tokens = sum(len(pixels) for pixels in row.pixel_values) // run.shape.vision.merge_unit
    num_places = -(-row.num_tokens // tensor) + run.policy.language.num_levels * -(-image_tokens // tensor)
    return num_places, 1, run.shape.language.hidden_size


WIDTHS = {
    "hidden": 256, "heads": 4, "kv_heads": 2, "layers": 4, "vision_depth": 4, "vision_hidden": 64,
    "vision_intermediate": 96,
}  # fmt: skip
"""Every width another, so that no term of the count stands in for a wrong one."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"), **WIDTHS)


@pytest.fixture(scope="module")
def deepstack_inputs(tmp_path_factory):
    """Of the family whose image tokens are added after several layers, the last of the tower among those tapped; heads
    are wider than the hidden size divided by their number."""
    widths = {**WIDTHS, "family": "qwen3_vl", "head_dim": 96, "deepstack": [0, 1, 3]}
    return make_inputs(tmp_path_factory.mktemp("deepstack"), **widths)


@pytest.fixture(scope="module")
def toy_inputs(tmp_path_factory):
    """Of the family that lies outside the package; as wide, so that what is rounded up to a block weighs little."""
    return make_inputs(tmp_path_factory.mktemp("toy"), make_toy_folder, layers=4, width=256, inner=520)


LAYOUTS: dict[str, dict[str, Any]] = {
    "TP1": {},
    "TP2": {"parallel__tensor": 2},
    "TP2+SP": {"parallel__tensor": 2, "parallel__sequence": True},
    "PP2": {"parallel__pipeline": 2},
    "TP2+SP PP2": {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2},
    "PP2, tower frozen": {
        "parallel__pipeline": 2, "model__freeze__vision": True, "model__freeze__projector": True,
    },
}  # fmt: skip
CASES = [*((layout, "bfloat16") for layout in LAYOUTS), ("TP1", "float32"), ("TP2+SP", "float32")]
OTHER_MODELS = {
    ("TP1", "bfloat16"): ("deepstack", "toy"),
    ("PP2", "bfloat16"): ("deepstack",),
    ("TP2+SP PP2", "bfloat16"): ("deepstack",),
    ("PP2, tower frozen", "bfloat16"): ("deepstack",),
    ("TP2+SP", "float32"): ("deepstack", "toy"),
}
"""The models that are measured beside the first family's, which is measured in every case."""


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_what_is_kept_is_what_is_counted(inputs, deepstack_inputs, toy_inputs, tmp_path, layout, dtype):
    others = {"deepstack": deepstack_inputs, "toy": toy_inputs}
    models = {"tiny": inputs} | {name: others[name] for name in OTHER_MODELS.get((layout, dtype), ())}
    configs = [_configs(folder, tmp_path, layout, dtype) for folder in models.values()]
    parallel = configs[0][0].parallel
    for rank, several in enumerate(run_ranks(_kept_by_all, parallel.tensor * parallel.pipeline, configs)):
        for model, settings, counts in zip(models, configs, several, strict=True):
            for config, (kept, counted) in zip(settings, counts, strict=True):
                name = f"{model} {layout} {dtype}, recompute {config.model.recompute}, rank {rank}"
                print(f"{name}: kept {kept}, counted {counted}: {counted / kept - 1:+.1%}")
                assert abs(counted / kept - 1) < TOLERANCE, name


def _configs(inputs: Path, run_dir: Path, layout: str, dtype: str) -> list[Config]:
    """Settings of a run with each kind of recomputation."""
    return [
        tiny_run(
            inputs, run_dir, model__dtype=dtype, model__recompute=recompute, train__tokens_per_micro_batch=4000,
            data__min_pixels=300**2, data__max_pixels=320**2, **LAYOUTS[layout],
        )
        for recompute in ("none", "selective", "mlp", "full")
    ]  # fmt: skip
