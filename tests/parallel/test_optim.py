"""Learning rates per part, weight decay, warm-up and freezing, as Megatron's optimizer ends up with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_papo.config import load_config
from tests.support.ranks import run_ranks
from tests.support.tiny import make_tiny_folder


def _groups(folder: Path, overrides: list[str]) -> tuple[dict[str, tuple[float, float]], list[float]]:
    """name of parameter -> (rate, weight decay) after the warm-up; and the rates of the first updates."""
    from megatron_papo.distributed.accelerator import adapt_megatron, seed_all
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import build_policy
    from megatron_papo.model.shape import ModelShape
    from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy

    config = load_config(None, [f"model.path={folder}", "model.dtype=float32", "model.random_init=true", *overrides])
    adapt_megatron()
    initialize(config.parallel)
    seed_all(0)
    policy = wrap_policy(build_policy(config, ModelShape.from_folder(folder)), config)
    optimizer = build_optimizer(policy, config, num_updates=10)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.main_grad.fill_(0.1)
    rates = [optimizer.step()["lr"] for _ in range(4)]
    names = {id(parameter): name.removeprefix("module.") for name, parameter in policy.named_parameters()}
    found = {}
    for group in optimizer.megatron.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    return found, rates


def _skipped(folder: Path, overrides: list[str]) -> tuple[list[float], list[bool], str]:
    """`skipped` of five updates, whether each moved the weights, and the reason to stop. Rank 0's gradient is not
    finite in the third and fourth, in one element of one weight."""
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize, layout
    from megatron_papo.model.policy import build_policy
    from megatron_papo.model.shape import ModelShape
    from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy

    config = load_config(None, [f"model.path={folder}", "model.dtype=float32", "model.random_init=true", *overrides])
    adapt_megatron()
    initialize(config.parallel)
    policy = wrap_policy(build_policy(config, ModelShape.from_folder(folder)), config)
    optimizer = build_optimizer(policy, config, num_updates=10)
    skipped, moved = [], []
    for update in range(5):
        optimizer.zero_grad()
        for parameter in policy.parameters():
            parameter.main_grad.fill_(0.1)
        if update in (2, 3) and layout().rank == 0:
            next(policy.parameters()).main_grad.view(-1)[3] = (torch.nan, torch.inf)[update - 2]
        policy.finish_grad_sync()
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        skipped.append(optimizer.step()["skipped"])
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, policy.parameters())))
    return skipped, moved, optimizer.guard.reason_to_stop


def _shares(cores: list[set[int]]) -> int:
    from megatron_papo.distributed.exchange import share_of_cores

    torch.distributed.init_process_group("gloo")
    with mock.patch("os.sched_getaffinity", return_value=cores[torch.distributed.get_rank()]):
        return share_of_cores()


@pytest.mark.parametrize(
    ("cores", "shares"),
    [
        ([set(range(16))] * 3, [5, 5, 5]),  # torchrun: every rank may run everywhere
        ([{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9}], [4, 4, 2]),  # Slurm: every rank has its own
        ([{0, 1, 2}, {2, 3}, {4}], [2, 1, 1]),
    ],
)
def test_a_rank_takes_its_share_of_the_cores(cores, shares):
    assert run_ranks(_shares, 3, cores) == shares


def _norms(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Of random gradients: the norm by Megatron and by an update, by Megatron once more after the update has clipped
    them, and how often the update has read a value from the device."""
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize, layout
    from megatron_papo.model.policy import build_policy
    from megatron_papo.model.shape import ModelShape
    from megatron_papo.optimization import optimizer

    config = load_config(None, [f"model.path={folder}", "model.random_init=true", "optim.clip_grad=0.5", *overrides])
    adapt_megatron()
    initialize(config.parallel)
    policy = optimizer.wrap_policy(build_policy(config, ModelShape.from_folder(folder)), config)
    with mock.patch.object(optimizer, "has_gpu", lambda: True):  # the fused Adam, as there
        optimizer = optimizer.build_optimizer(policy, config, num_updates=10)
    generator = torch.Generator().manual_seed(layout().rank)
    for parameter in policy.parameters():
        parameter.main_grad.normal_(generator=generator)
    policy.finish_grad_sync()
    optimizer.megatron.prepare_grads()
    found = {"megatron": float(optimizer.megatron.get_grad_norm())}
    with _Reads() as reads:
        found["update"] = optimizer.step()["grad_norm"]
    return found | {"clipped": float(optimizer.megatron.get_grad_norm()), "reads": reads.count}


class _Reads(TorchDispatchMode):
    """Counts the values that are read from tensors: on a GPU, how often the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        ["parallel.tensor=2", "model.dtype=float32"],
        ["parallel.pipeline=2", "model.dtype=bfloat16"],
        ["parallel.distributed_optimizer=true", "model.dtype=bfloat16"],
    ],
    ids=lambda settings: settings[0],
)
def test_an_update_takes_one_norm_and_reads_one_value(folder, settings):
    found = run_ranks(_norms, 2, folder, settings)
    assert found[0] == found[1] and found[0]["reads"] == 1
    assert found[0]["update"] == pytest.approx(found[0]["megatron"], rel=1e-6) and found[0]["update"] > 10
    assert found[0]["clipped"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("layout", [["parallel.tensor=2"], ["parallel.distributed_optimizer=true"]])
def test_an_update_that_is_not_finite_on_one_rank_is_made_on_none(folder, layout):
    for skipped, moved, reason in run_ranks(_skipped, 2, folder, [*layout, "optim.max_skipped=3"]):
        assert skipped == [0, 0, 1, 1, 0] and moved == [True, True, False, False, True] and reason == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def deepstack_folder(tmp_path_factory) -> Path:
    """Of a family whose tower has several mergers, and learned position embeddings."""
    return make_tiny_folder(tmp_path_factory.mktemp("model"), family="qwen3_vl")


def test_every_merger_has_the_projectors_rate_and_freezes_with_it(deepstack_folder):
    overrides = ["optim.lr=1e-3", "optim.lr_vision=1e-4", "optim.lr_projector=5e-4", "optim.weight_decay=0.1"]
    ((groups, _),) = run_ranks(_groups, 1, deepstack_folder, overrides)
    mergers = ("vision.merger.", "vision.deepstack_mergers.0.", "vision.deepstack_mergers.1.")
    for merger in mergers:
        assert groups[merger + "linear_fc1.weight"] == pytest.approx((5e-4, 0.1))
        assert groups[merger + "linear_fc2.bias"] == groups[merger + "norm.weight"] == pytest.approx((5e-4, 0.0))
    assert groups["vision.position_embed.weight"] == groups["vision.patch_embed.weight"] == pytest.approx((1e-4, 0.1))
    assert groups["vision.patch_embed.bias"] == pytest.approx((1e-4, 0.0))
    assert groups["language.decoder.layers.0.self_attention.q_layernorm.weight"] == pytest.approx((1e-3, 0.0))

    ((groups, _),) = run_ranks(_groups, 1, deepstack_folder, ["model.freeze.vision=true"])
    assert {name for name in groups if name.startswith("vision.")} == {
        f"{merger}{part}.{kind}"
        for merger in mergers
        for part in ("norm", "linear_fc1", "linear_fc2")
        for kind in ("weight", "bias")
    }
    ((groups, _),) = run_ranks(_groups, 1, deepstack_folder, ["model.freeze.projector=true"])
    assert "vision.position_embed.weight" in groups and not [name for name in groups if name.startswith(mergers)]


def test_rates_per_part_decay_and_warm_up(folder):
    overrides = ["optim.lr=1e-3", "optim.lr_vision=1e-4", "optim.lr_projector=5e-4", "optim.warmup_steps=2"]
    ((groups, rates),) = run_ranks(_groups, 1, folder, [*overrides, "optim.weight_decay=0.1"])
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3]), "the first update is not one of rate zero"
    assert groups["language.decoder.layers.0.mlp.linear_fc1.weight"] == pytest.approx((1e-3, 0.1))
    assert groups["language.decoder.layers.0.self_attention.linear_qkv.bias"] == pytest.approx((1e-3, 0.0))
    assert groups["vision.decoder.layers.0.mlp.linear_fc1.weight"] == pytest.approx((1e-4, 0.1))
    assert groups["vision.decoder.layers.0.mlp.linear_fc1.bias"] == pytest.approx((1e-4, 0.0))
    assert groups["vision.patch_embed.weight"] == pytest.approx((1e-4, 0.1))
    assert groups["vision.merger.linear_fc1.weight"] == pytest.approx((5e-4, 0.1))
    assert groups["vision.merger.norm.weight"] == pytest.approx((5e-4, 0.0))


def test_frozen_parts_are_in_no_group(folder):
    ((groups, _),) = run_ranks(_groups, 1, folder, ["model.freeze.vision=true", "optim.schedule=linear"])
    assert groups and not [name for name in groups if name.startswith("vision.") and ".merger." not in name]
    assert [name for name in groups if name.startswith("vision.merger.")]
