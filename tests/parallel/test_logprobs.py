"""The vocabulary-parallel head against torch's own log_softmax in fp64, at one rank and on gloo ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_papo.logprobs import HeadValues, check_targets, vocab_parallel_head
from megatron_papo.logprobs.tiling import CPU_TILE, blocks, tile_of
from tests.support.ranks import run_ranks

ROWS, HIDDEN, VOCAB = 7, 5, 22
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Case:
    padded: int
    banned: tuple[int, ...]
    targets: tuple[int, ...]


SPREAD = Case(24, (3, 9, 21), (0, 20, 7, 8, 11, 12, 16))  # every shard of two and of three ranks holds some targets
PADDING_ALONE = Case(36, (3, 9, 21), (0, 20, 7, 8, 11, 12, 16))  # the third of three ranks holds no word
BANNED_ALONE = Case(24, (3, *range(8, 22)), (0, 1, 7, 2, 4, 5, 6))  # the later ranks hold banned words and padding


def _inputs(case: Case = SPREAD) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, masked hidden, weight (its padding rows large, so that reading them would show), five upstream rows."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, masked, weight = draw(ROWS, HIDDEN), draw(ROWS, HIDDEN), draw(case.padded, HIDDEN)
    weight[VOCAB:] = 50.0
    return hidden, masked, weight, draw(5, ROWS)


def _expected(hidden: Tensor, masked: Tensor, weight: Tensor, case: Case = SPREAD) -> HeadValues:
    """Plain torch: log_softmax over the allowed words only."""
    allowed = [word for word in range(VOCAB) if word not in case.banned]
    column = torch.full((case.padded,), -1)
    column[allowed] = torch.arange(len(allowed))
    logp, logq = (torch.log_softmax(view @ weight[allowed].T / TEMPERATURE, -1) for view in (hidden, masked))
    of_target = [logs.gather(1, column[list(case.targets)][:, None])[:, 0] for logs in (logp, logq)]
    entropy = [-(logs.exp() * logs).sum(-1) for logs in (logp, logq)]
    return HeadValues(of_target[0], entropy[0], of_target[1], entropy[1], (logp.exp() * (logp - logq)).sum(-1))


def _ours(
    hidden: Tensor, masked: Tensor | None, weight: Tensor, case: Case = SPREAD, *,
    group: dist.ProcessGroup | None = None, start: int = 0, entropy: bool = True, kl: bool = True,
    tile: tuple[int, int] | None = (3, 5),
) -> HeadValues:  # fmt: skip
    targets = torch.tensor(case.targets[: len(hidden)], dtype=torch.int64)
    return vocab_parallel_head(
        hidden, masked, weight, targets, group=group, vocab_start=start, vocab_size=VOCAB, banned_ids=case.banned,
        temperature=TEMPERATURE, entropy=entropy, kl=kl, tile=tile,
    )  # fmt: skip


def _values_and_gradients(function, case: Case = SPREAD, **options) -> tuple[list[Tensor], list[Tensor]]:
    *inputs, upstream = _inputs(case)
    if "group" in options:
        size, start = case.padded // dist.get_world_size(), options["start"]
        inputs[2] = inputs[2][start : start + size].clone()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    values = function(*leaves, case, **options)
    sum((value * row).sum() for value, row in zip(values, upstream)).backward()
    return [value.detach() for value in values], [leaf.grad for leaf in leaves]


def _on_a_rank(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    dist.init_process_group("gloo")
    start = dist.get_rank() * case.padded // dist.get_world_size()
    values, (hidden, masked, weight) = _values_and_gradients(_ours, case, group=dist.group.WORLD, start=start)
    for partial in (hidden, masked):  # as copy_to_tensor_model_parallel_region's backward does
        dist.all_reduce(partial)
    return values, [hidden, masked, weight]


def _close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [(3, 5), (7, 22), (2, 7), (1, 1), (100, 3), None])
@pytest.mark.parametrize("case", [SPREAD, PADDING_ALONE, BANNED_ALONE])
def test_one_rank_equals_log_softmax_over_the_allowed_words(case: Case, tile: tuple[int, int] | None):
    values, gradients = _values_and_gradients(_ours, case, tile=tile)
    expected_values, expected_gradients = _values_and_gradients(_expected, case)
    _close(values, expected_values)
    _close(gradients, expected_gradients)
    assert gradients[2][[*case.banned, *range(VOCAB, case.padded)]].abs().max() == 0.0


@pytest.mark.parametrize("case", [SPREAD, PADDING_ALONE, BANNED_ALONE])
@pytest.mark.parametrize("world_size", [2, 3])
def test_vocabulary_shards_give_the_single_rank_values_and_gradients(world_size: int, case: Case):
    expected_values, (hidden, masked, weight) = _values_and_gradients(_expected, case)
    found = run_ranks(_on_a_rank, world_size, case)
    for rank, (values, gradients) in enumerate(found):
        shard = weight.chunk(world_size)[rank]
        _close(values, expected_values)
        _close(gradients, [hidden, masked, shard])
        assert all(torch.equal(mine, first) for mine, first in zip(values, found[0][0]))


def test_finite_differences_of_every_output():
    *inputs, _ = _inputs()
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(lambda *leaves: tuple(_ours(*leaves)), leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("output", range(5))
@pytest.mark.parametrize(("entropy", "kl", "two"), [(True, True, True), (True, False, True), (False, False, False)])
def test_each_output_alone_and_what_is_not_asked_for(output: int, entropy: bool, kl: bool, two: bool):
    *inputs, upstream = _inputs()
    mine, theirs = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    value = _ours(mine[0], mine[1] if two else None, mine[2], entropy=entropy, kl=kl)[output]
    if not (True, entropy, two, two and entropy, kl)[output]:
        assert value is None
        return
    expected = _expected(*theirs)[output]
    (value * upstream[output]).sum().backward()
    (expected * upstream[output]).sum().backward()
    _close([value.detach()], [expected.detach()])
    for leaf, reference in zip(mine, theirs):
        nothing = torch.zeros_like(leaf)
        _close([nothing if leaf.grad is None else leaf.grad], [nothing if reference.grad is None else reference.grad])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_inputs_give_fp32_nats_and_gradients_of_their_own_dtype(dtype: torch.dtype):
    *inputs, upstream = _inputs()
    narrow = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in narrow]
    values, expected = _ours(*narrow), _expected(*exact)
    for found in (values, expected):
        sum((value * row).sum() for value, row in zip(found, upstream)).backward()
    for value, reference in zip(values, expected):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), reference, rtol=2e-6, atol=2e-6)
    for leaf, reference in zip(narrow, exact):
        assert leaf.grad.dtype == dtype
        # one rounding to bf16 at the very end: half a unit of its 8 bits
        close = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=close, atol=1e-5)


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-5])
def test_kl_of_nearly_equal_views_keeps_its_digits_in_fp32(apart: float):
    generator = torch.Generator().manual_seed(1)
    hidden, moved, weight = (torch.randn(*shape, generator=generator) for shape in ((7, 32), (7, 32), (500, 32)))
    masked = hidden + apart * moved
    values = vocab_parallel_head(
        hidden, masked, weight, torch.zeros(7, dtype=torch.int64), group=None, vocab_start=0, vocab_size=500,
        banned_ids=(3,), temperature=1.0, entropy=True, kl=True, tile=(4, 64),
    )  # fmt: skip
    banned = torch.tensor([3])
    logp, logq = (torch.log_softmax((v.double() @ weight.double().T).index_fill(1, banned, -1e30), -1)
                  for v in (hidden, masked))  # fmt: skip
    expected = (logp.exp() * (logp - logq)).sum(-1)
    # logits of size 30 are rounded at 2e-6, so their differences, of size `apart`, at 2e-6 / apart of themselves
    torch.testing.assert_close(values.kl_R.double(), expected, rtol=1e-5 + 4e-6 / apart, atol=0)
    torch.testing.assert_close(values.entropy_R.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)


def test_views_far_apart_and_extreme_logits_stay_finite_and_exact():
    *inputs, _ = _inputs()
    hidden, masked, weight = (value.float() for value in inputs)
    leaves = [value.requires_grad_() for value in (hidden * 1e4, masked * -1e4, weight)]
    values = _ours(*leaves)
    expected = _expected(*(leaf.detach().double() for leaf in leaves))
    sum(value.sum() for value in values).backward()
    assert all(torch.isfinite(tensor).all() for tensor in (*values, *(leaf.grad for leaf in leaves)))
    assert min(value.min() for value in (values.entropy_R, values.masked_entropy_R, values.kl_R)) >= 0
    torch.testing.assert_close(values.kl_R.double(), expected.kl_R, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl", [True, False])
def test_no_rows(kl: bool):
    hidden, masked, weight, _ = _inputs()
    leaf = weight.clone().requires_grad_()
    values = _ours(hidden[:0], masked[:0], leaf, kl=kl)
    assert all(value.shape == (0,) for value in values if value is not None)
    sum(value.sum() for value in values if value is not None).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_nothing_is_kept_or_computed_for_what_needs_no_gradient():
    *inputs, upstream = _inputs()
    _, expected = _values_and_gradients(_expected)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.no_grad():
        assert all(value.grad_fn is None for value in _ours(*leaves))
    for frozen in range(3):
        mine = [leaf.detach().requires_grad_(place != frozen) for place, leaf in enumerate(leaves)]
        sum((value * row).sum() for value, row in zip(_ours(*mine), upstream)).backward()
        assert mine[frozen].grad is None
        others = [place for place in range(3) if place != frozen]
        _close([mine[place].grad for place in others], [expected[place] for place in others])


class _Largest(TorchDispatchMode):
    """Remembers the most elements that the memory behind an operation's result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def _largest(rows: int, vocab: int) -> int:
    hidden, masked = (torch.randn(rows, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(vocab, 16, requires_grad=True)
    targets = torch.arange(rows)
    with _Largest() as largest:
        values = vocab_parallel_head(
            hidden, masked, weight, targets, group=None, vocab_start=0, vocab_size=vocab, banned_ids=(vocab - 1,),
            temperature=0.9, entropy=True, kl=True,
        )  # fmt: skip
        sum(value.sum() for value in values).backward()
    return largest.elements


def test_no_tensor_is_larger_than_a_tile_or_an_input():
    tile = CPU_TILE[0] * CPU_TILE[1]
    assert tile > 20_000 * 16
    assert tile * 0.9 < _largest(2048, 20_000) <= tile
    assert _largest(700, 20_000) <= tile


def test_blocks_cover_everything_once_and_are_about_equal():
    for total in (0, 1, 15, 16, 100, 1024, 1025, 151_936):
        for largest in (1, 3, 16, 100, 1024):
            cut = list(blocks(total, largest))
            assert [place for one in cut for place in range(one.start, one.stop)] == list(range(total))
            assert len(cut) == -(-total // largest)
            assert all(0 < one.stop - one.start <= largest for one in cut)


def test_a_tile_is_bounded_whatever_the_number_of_rows():
    for rows in (0, 1, 100, 512, 1023, 1024, 100_000):
        for device in ("cpu", "cuda"):
            height, width = tile_of(torch.device(device), rows)
            assert height <= max(rows, 1) and height * width <= (2**20 if device == "cpu" else 2**26)


@pytest.mark.parametrize("word", [3, 22, -1])
def test_a_target_that_cannot_be_said_is_named(word: int):
    with pytest.raises(ValueError, match=rf"\[{word}\].*vocabulary of 22"):
        check_targets(torch.tensor((0, 20, word, 8, 11, 12, 16)), 22, SPREAD.banned)
