"""Padding for FP8 changes nothing: more of it or none, every maximum, log-prob and gradient is the same.

Run as training runs, on gloo ranks, FP8 emulated in all layers and in the vision tower, for each family. Rows of
prompts with images, and of the second family one without, are scored and differentiated three times: with the padding
that emulation can do without left out (only what sequence parallelism needs), with what the recipe asks for, and to a
fixed length.

Everything is compared for equality. Float32 sums differ in their last bit with the number of rows that a library's
kernel is given, and such a bit can turn a value to the next 8-bit float: products and sums are taken in float64 here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_papo.model.shape import ModelShape
from tests.parallel.model_cases import CASES, SECOND_CASES, write_case
from tests.support.layouts import layout
from tests.support.ranks import run_ranks

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
LAYOUTS = ("TP1", "TP2", "TP2 SP", "TP2 SP, full recompute")
MODELS = {case.family: case for case in (CASES[0], SECOND_CASES[0])}
CASES_OF_EVERY_COMMIT = {
    "qwen2_5_vl": {
        "TP1": RECIPES,
        "TP2": ("delayed",),
        "TP2 SP": RECIPES,
        "TP2 SP, full recompute": ("tensorwise", "mxfp8"),
    },
    "qwen3_vl": {"TP1": ("delayed",), "TP2": (), "TP2 SP": ("tensorwise",), "TP2 SP, full recompute": ()},
}
"""The rest is slow: sequence parallelism pads by more than tensor parallelism alone does."""
LENGTHS = {"none": "none", "the recipe's": None, "512 tokens": 512}


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Path]:
    """A folder of each family."""
    folders = {family: tmp_path_factory.mktemp(family) for family in MODELS}
    for family, folder in folders.items():
        write_case(MODELS[family], folder)
    return folders


def _num_layers(folder: Path) -> tuple[int, int]:
    """Of the language model and of the tower."""
    shape = ModelShape.from_folder(folder)
    return shape.language.num_layers, shape.vision.num_layers


def _cases() -> list[Any]:
    """`delayed` is refused with full recomputation: see test_delayed_with_full_recompute_is_refused."""
    return [
        pytest.param(family, each, recipe, marks=() if recipe in often[each] else pytest.mark.slow)
        for family, often in CASES_OF_EVERY_COMMIT.items()
        for each in LAYOUTS
        for recipe in RECIPES
        if recipe != "delayed" or "full" not in each
    ]


@pytest.mark.parametrize(("family", "name", "recipe"), _cases())
def test_padding_changes_nothing(family, name, recipe, cases):
    ranks, sequence_parallel, case = layout(name), "SP" in name, cases[family]
    num_layers = sum(_num_layers(case))
    overrides = (*ranks.overrides, f"fp8.recipe={recipe}", "fp8.first_layers=0", "fp8.last_layers=0", "fp8.vision=true")
    ranks = run_ranks(run_lengths, ranks.num_ranks, case, overrides)
    for rank in ranks:
        for length, found in enumerate(rank) if sequence_parallel else ():
            # a rank's share of the tokens ends elsewhere with more padding: the maximum is that over all shares
            for what in ("forward", "backward"):
                shares = [other[length][what] for other in ranks]
                found[what] = {name: torch.stack([share[name] for share in shares]).amax(0) for name in found[what]}
        least, *others = rank
        assert len(least["forward"]) == num_layers * 4  # qkv, proj, fc1, fc2 of both stacks
        assert least["forward"].keys() == least["backward"].keys()
        for other in others:
            assert len(other["padding"]) >= num_layers * 4 and not any(other["padding"])
            assert other["num_padding"] > least["num_padding"]
            for what in ("logprobs", "forward", "backward", "gradients"):
                assert other[what].keys() == least[what].keys()
                for name, expected in least[what].items():
                    gap = (other[what][name] - expected).abs().max()
                    # of a weight that ranks with a share of the tokens each add up, cut elsewhere: last bits
                    whole = name.endswith("bias") or any(each in name for each in ("norm", "patch_embed", "position"))
                    shared = what == "gradients" and sequence_parallel and whole
                    assert gap <= (2.0**-20 * expected.abs().max() if shared else 0.0), (what, name, gap)


def run_lengths(folder: Path, overrides: tuple[str, ...]) -> list[dict]:
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    config = load_config(None, ("model.dtype=float32", *overrides))
    initialize(config.parallel)
    return [_run(config, folder, length) for length in LENGTHS.values()]


def _run(config, folder: Path, length) -> dict:
    from megatron_papo.model import language
    from megatron_papo.model.fp8 import multiples
    from megatron_papo.model.policy import HeadRequest, build_policy
    from megatron_papo.optimization.optimizer import wrap_policy
    from megatron_papo.optimization.pipeline import run_schedule
    from megatron_papo.weights.transfer import read_hf

    shape = ModelShape.from_folder(folder)
    policy = build_policy(config, shape)
    read_hf(policy, shape, folder)
    multiple_of = multiples.token_multiple
    try:
        if length == "none":  # emulation computes any number of tokens
            language.token_multiple = multiples.token_multiple = lambda _, ranks: multiple_of("off", ranks)
        else:
            policy.language.row_length = length
        model = wrap_policy(policy, config)
        rows = torch.load(folder / "rows.pt", weights_only=False)
        forward, backward, padding = _maxima(policy, sequence_parallel=config.parallel.sequence)
        logprobs: dict[str, torch.Tensor] = {}

        def loss(outputs, row):
            logprobs[str(len(logprobs))] = outputs.policy_logprobs_R.detach().clone()
            return (outputs.policy_logprobs_R * row.weights_R).sum(), {}

        with policy.fp8.updating(), DoubleSums():
            num_padding = policy.language.num_padding(rows[0].num_tokens)
            run_schedule(model, rows, HeadRequest(), loss)
    finally:
        language.token_multiple = multiples.token_multiple = multiple_of
    gradients = {name: weight.main_grad.clone() for name, weight in policy.named_parameters()}
    return {
        "num_padding": num_padding, "logprobs": logprobs, "forward": forward, "backward": backward,
        "gradients": gradients, "padding": padding,
    }  # fmt: skip


class DoubleSums(TorchDispatchMode):
    """Matrix products and sums in float64, back as what they were; in backward too."""

    SUMS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.sum)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        wanted = function.overloadpacket in self.SUMS and args[0].dtype == torch.float32
        if not wanted or "out" in keywords:  # the head's: it reads no padding
            return function(*args, **keywords)
        doubles = [value.double() if isinstance(value, torch.Tensor) else value for value in args]
        return function(*doubles, **keywords).float()


def _maxima(policy, sequence_parallel: bool) -> tuple[dict, dict, list[float]]:
    """Filled during the passes: of every rounded linear the maxima of its inputs and of its gradients, and what they
    have in places of padding where the linear sees the whole row."""
    forward: dict[str, torch.Tensor] = {}
    backward: dict[str, torch.Tensor] = {}
    padding: list[float] = []
    num_padding = {"language": 0, "vision": 0}  # of the row that is under way

    def note(into, name, values, whole):
        into[name] = torch.cat([into.get(name, torch.zeros(0)), values.detach().abs().max().reshape(1)])
        num = num_padding[name.split(".")[0]]
        if num and whole:
            padding.append(values[-num:].abs().max().item())

    for stack in num_padding:
        layers = getattr(policy, stack).decoder.layers
        layers[0].register_forward_pre_hook(
            lambda _, __, keywords, stack=stack: num_padding.update({stack: keywords["packed_seq_params"].num_padding}),
            with_kwargs=True,
        )
    for name, linear in policy.fp8.linears.items():
        gathers = name.endswith(("qkv", "fc1"))  # under sequence parallelism the others give away shares
        into, out = not (sequence_parallel and gathers), not sequence_parallel or gathers
        linear.register_forward_pre_hook(lambda _, inputs, n=name, w=into: note(forward, n, inputs[0], w))
        linear.register_full_backward_hook(lambda _, __, grads, n=name, w=out: note(backward, n, grads[0], w))
    return forward, backward, padding


@pytest.mark.parametrize("family", MODELS)
def test_plain_sequence_parallel_padding_is_left_out_too(family, cases):
    """Without FP8: hidden states at padded places are zero, behind every layer of both stacks."""
    found = run_ranks(hidden_at_padding, 4, cases[family], ("parallel.tensor=4", "parallel.sequence=true"))
    states = [state for rank in found for state in rank]
    rows = torch.load(cases[family] / "rows.pt", weights_only=False)
    patches = [int(row.grid_thw_I3.prod(1).sum()) for row in rows if row.pixel_values]
    padded = [sum(num % 4 > 0 for num in (row.num_tokens for row in rows)), sum(num % 16 > 0 for num in patches)]
    assert min(padded) > 0
    assert len(states) == sum(layers * rows for layers, rows in zip(_num_layers(cases[family]), padded))
    assert all(state == 0.0 for state in states)


def hidden_at_padding(folder: Path, overrides: tuple[str, ...]) -> list[float]:
    """On the last tensor rank, where padding lies: the largest magnitude there behind every layer."""
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import HeadRequest, build_policy
    from megatron_papo.optimization.pipeline import score
    from megatron_papo.weights.transfer import read_hf

    adapt_megatron()
    config = load_config(None, ("model.dtype=float32", *overrides))
    here = initialize(config.parallel)
    shape = ModelShape.from_folder(folder)
    policy = build_policy(config, shape)
    read_hf(policy, shape, folder)
    found: list[float] = []

    def note(layer, inputs, keywords, outputs):
        num_padding = keywords["packed_seq_params"].num_padding
        if num_padding and here.tensor_rank == here.tensor_size - 1:
            found.append(outputs[0][-num_padding:].abs().max().item())

    for block in (policy.language.decoder, policy.vision.decoder):
        for layer in block.layers:
            layer.register_forward_hook(note, with_kwargs=True)
    score(policy, torch.load(folder / "rows.pt", weights_only=False), HeadRequest())
    return found


@pytest.mark.parametrize("recompute", ["mlp", "full"])
def test_delayed_with_full_recompute_is_refused(cases, recompute):
    overrides = ("fp8.recipe=delayed", "fp8.first_layers=0", "fp8.last_layers=0", f"model.recompute={recompute}")
    with pytest.raises(Exception, match=rf"model.recompute: {recompute} computes a layer again"):
        run_ranks(run_lengths, 1, cases["qwen2_5_vl"], overrides)
