"""The optimizers of a GPU machine, saved and resumed: each goes on bit for bit, and counts its steps on.

On the CPU, with the stand-ins of `tests/support/gpu_optimizers.py`; `tests/gpu/test_optimizer.py` is the same on a GPU.
"""

from __future__ import annotations

import ast
import importlib.util
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_papo.checkpoint.optimizer_state import MOMENTS, allocate, slots, step_count
from megatron_papo.checkpoint.state import TrainState, read_state
from megatron_papo.checkpoint.store import CheckpointStore
from megatron_papo.preflight.tested_versions import versions
from megatron_papo.weights.held import held_parameters
from tests.parallel.checkpoint_cases import SHAPE, VISION, build, ranks, settings_of, train, weights
from tests.support import gpu_optimizers
from tests.support.ranks import run_ranks
from tests.support.tiny import make_tiny_folder

LAYOUT = ranks(1, dtype="bfloat16", distributed=True)
KINDS = {
    "TE": (True, []),
    "TE, moments in bf16": (True, ["optim.precision_aware=true"]),
    "TE, half on the host": (True, ["optim.offload_fraction=0.5"]),
    "torch": (False, []),
    "torch, as without a GPU": (False, []),
    "torch, half on the host": (False, ["optim.offload_fraction=0.5"]),
}
"""Whether Transformer Engine is there, and settings."""
READ_BY_ALL = "TE"
FIRST, LAST = 3, 6


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("optimizers")
    model = make_tiny_folder(folder / "hf", **SHAPE | {"layers": 1, "vision_depth": 1}, **VISION)
    return run_ranks(_all_kinds, 1, str(model), str(folder))[0]


def _all_kinds(source: str, folder: str) -> dict[str, Any]:
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.optimization import optimizer

    adapt_megatron()
    initialize(settings_of(LAYOUT).parallel)
    found = {}
    for kind in KINDS:
        has_gpu = mock.Mock(return_value="without a GPU" not in kind)
        patches = mock.patch.multiple(optimizer, has_gpu=has_gpu, share_of_cores=lambda: 2)
        with patches, gpu_optimizers.a_host_beside_it():
            found[kind] = _resumed(source, Path(folder) / kind, kind)
    return found


def _resumed(source: str, folder: Path, kind: str) -> dict[str, Any]:
    """Three updates, a checkpoint, three more; the same from the checkpoint; and from that of another optimizer."""
    run = _fresh(source, kind)
    train(run, range(FIRST))
    CheckpointStore(folder).save(FIRST, run)
    result = {"expected": _go_on(run)}
    for name, written in (("resumed", folder), ("from another", folder.parent / READ_BY_ALL)):
        again = _fresh(source, kind)
        if name == "resumed":  # as after a checkpoint that was damaged: over any values
            read_state(CheckpointStore(written).latest(), again)  # type: ignore[arg-type]
            train(again, range(1))
        restored = read_state(CheckpointStore(written).latest(), again)  # type: ignore[arg-type]
        assert restored.step == FIRST and step_count(again.optimizer.megatron) == FIRST  # type: ignore[union-attr]
        result[name] = _go_on(again)
    return result


def _fresh(source: str, kind: str) -> TrainState:
    has_engine, settings = KINDS[kind]
    with ExitStack() as stack:
        if has_engine:
            stack.enter_context(gpu_optimizers.transformer_engine())
        return build(source, settings_of(LAYOUT, *settings))


def _go_on(run: TrainState) -> dict[str, Any]:
    """Three updates: what every Adam has counted after each, which Adams these are, weights and states at the end."""
    megatron = run.optimizer.megatron  # type: ignore[union-attr]
    counts, threads = [], set()
    for adam in _adams(megatron):
        adam.register_step_pre_hook(lambda *_: threads.add(torch.get_num_threads()))
    for step in range(FIRST, LAST):
        train(run, range(step, step + 1))
        counts.append(sorted(_counts(megatron)))
        assert torch.get_num_threads() == 1
    assert step_count(megatron) == LAST
    states = {}
    for slot in slots(megatron, held_parameters(run.model, run.shape, 1)):
        kept = {name: slot.state[name].clone() for name in MOMENTS}
        states[slot.name] = {name: tensor.as_subclass(torch.Tensor) for name, tensor in kept.items()}
        states[slot.name] |= {"main": slot.main.detach().clone().as_subclass(torch.Tensor)}
    kinds = sorted({f"{_name(adam)} on {place}" for adam in _adams(megatron) for place in _places(adam)})
    return {"counts": counts, "threads": threads, "adams": kinds, "weights": weights(run), "states": states}


def _adams(megatron: Any) -> list[Any]:
    return [part for member in megatron.chained_optimizers for part in _parts(member.optimizer)]


def _parts(adam: Any) -> list[Any]:
    return getattr(adam, "sub_optimizers", [adam])


def _name(adam: Any) -> str:
    fused = isinstance(adam, torch.optim.AdamW) and all(group["fused"] for group in adam.param_groups)
    return "fused " * fused + type(adam).__name__


def _places(adam: Any) -> set[str]:
    parameters = [parameter for group in adam.param_groups for parameter in group["params"]]
    return {"the host" if isinstance(each, gpu_optimizers.HostTensor) else "the GPU" for each in parameters}


def _counts(megatron: Any) -> set[int]:
    """Where each kind of Adam reads how many updates there were."""
    found = set()
    for adam in _adams(megatron):
        if isinstance(adam, gpu_optimizers.FusedAdam):
            found |= {group["step"] for group in adam.param_groups}
        else:
            found |= {int(state["step"]) for state in adam.state.values()}
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_optimizer_goes_on_as_if_it_had_not_stopped(found, kind):
    expected, resumed = found[kind]["expected"], found[kind]["resumed"]
    assert expected["counts"] == resumed["counts"] == [[4], [5], [6]]
    _assert_the_same(resumed["weights"], expected["weights"])
    for name, state in expected["states"].items():
        _assert_the_same(resumed["states"][name], state)


def _assert_the_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_optimizers_were_those_that_are_meant(found):
    assert {kind: found[kind]["expected"]["adams"] for kind in KINDS} == {
        "TE": ["FusedAdam on the GPU"],
        "TE, moments in bf16": ["FusedAdam on the GPU"],
        "TE, half on the host": ["FusedAdam on the GPU", "fused AdamW on the host"],
        "torch": ["fused AdamW on the GPU"],
        "torch, as without a GPU": ["AdamW on the GPU"],
        "torch, half on the host": ["fused AdamW on the GPU", "fused AdamW on the host"],
    }
    for kind in KINDS:
        assert found[kind]["expected"]["threads"] == ({2} if "on the host" in kind else {1})
    moments = {state["exp_avg"].dtype for state in found["TE, moments in bf16"]["expected"]["states"].values()}
    assert moments == {torch.bfloat16}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != READ_BY_ALL])
def test_a_checkpoint_of_one_optimizer_goes_on_in_another(found, kind):
    expected, other = found[READ_BY_ALL]["expected"], found[kind]["from another"]
    assert other["counts"] == [[4], [5], [6]]
    for name, tensor in expected["weights"].items():
        # bf16 weights round the masters, moments in bf16 round more
        tolerance = {"rtol": 2**-6, "atol": 1e-3} if "moments" in kind else {"rtol": 2**-7, "atol": 1e-5}
        torch.testing.assert_close(other["weights"][name].to(tensor.dtype), tensor, **tolerance, msg=f"{kind}: {name}")


def _signatures(path: Path) -> dict[str, str]:
    """The arguments of the methods of `FusedAdam` that Megatron-Core and `checkpoint/optimizer_state.py` call."""
    (adam,) = (
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "FusedAdam"
    )
    found = {node.name: node.args for node in adam.body if isinstance(node, ast.FunctionDef)}
    names = ("__init__", "initialize_state", "step")
    return {name: _without_types(found[name]) for name in names}


def _without_types(arguments: ast.arguments) -> str:
    for argument in (*arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    return ast.unparse(arguments)


def test_the_stand_in_is_called_as_transformer_engines_adam():
    pinned = versions("cuda")["transformer-engine"]
    assert pinned == gpu_optimizers.TE_VERSION, "compare the stand-in with the new version's source"
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        pytest.skip(f"Transformer Engine is not installed: the signatures are those of {gpu_optimizers.TE_VERSION}")
    theirs = Path(spec.origin).parent / "pytorch" / "optimizers" / "fused_adam.py"
    assert _signatures(Path(gpu_optimizers.__file__)) == _signatures(theirs)


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (None, "cpu")])
def test_the_fused_kernel_finds_the_step_beside_its_parameter(fused, place):
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))  # a device that is not the host
    adam = torch.optim.AdamW([{"params": [parameter], "fused": fused}])

    def make_moments(*_: Any) -> None:
        adam.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}

    config = SimpleNamespace(use_precision_aware_optimizer=False)
    allocate(SimpleNamespace(optimizer=adam, config=config, init_state_fn=make_moments), 3)  # type: ignore[arg-type]
    assert adam.state[parameter]["step"].device.type == place
