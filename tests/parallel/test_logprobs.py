"""The vocabulary-parallel head against torch's own log_softmax in fp64, at one rank and on gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_papo.logprobs import vocab_parallel_kl, vocab_parallel_logprobs
from tests.ranks import run_ranks

ROWS, HIDDEN, VOCAB, PADDED = 7, 5, 22, 24
BANNED = (3, 9, 21)
TEMPERATURE = 0.7
TARGETS = torch.tensor([0, 20, 7, 8, 11, 12, 16])  # every shard of two and of three ranks holds some
OPTIONS = {"vocab_size": VOCAB, "banned_ids": BANNED, "temperature": TEMPERATURE, "chunk": 3}


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, masked hidden, weight (its padding rows large, so that reading them would show), three upstream rows."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, masked, weight, upstream = draw(ROWS, HIDDEN), draw(ROWS, HIDDEN), draw(PADDED, HIDDEN), draw(3, ROWS)
    weight[VOCAB:] = 50.0
    return hidden, masked, weight, upstream


def _allowed_logprobs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch: log_softmax over the allowed words only, and where each word went."""
    allowed = [word for word in range(VOCAB) if word not in BANNED]
    column = torch.full((PADDED,), -1)
    column[allowed] = torch.arange(len(allowed))
    return torch.log_softmax(hidden @ weight[allowed].T / TEMPERATURE, -1), column


def _expected(hidden: Tensor, masked: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logp, column = _allowed_logprobs(hidden, weight)
    logq, _ = _allowed_logprobs(masked, weight)
    logprobs = logp.gather(1, column[TARGETS][:, None])[:, 0]
    return logprobs, -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - logq)).sum(-1)


def _ours(
    hidden: Tensor, masked: Tensor, weight: Tensor, group: dist.ProcessGroup | None = None, start: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, weight, TARGETS, group=group, vocab_start=start, entropy=True, **OPTIONS
    )
    kl = vocab_parallel_kl(hidden, masked, weight, group=group, vocab_start=start, **OPTIONS)
    assert entropy is not None
    return logprobs, entropy, kl


def _values_and_gradients(function, *extra) -> tuple[list[Tensor], list[Tensor]]:
    *inputs, upstream = _inputs()
    weight = inputs[2]
    if extra:
        size = PADDED // dist.get_world_size()
        inputs[2] = weight[extra[1] : extra[1] + size].clone()
    leaves = [tensor.requires_grad_() for tensor in inputs]
    values = function(*leaves, *extra)
    sum((value * row).sum() for value, row in zip(values, upstream)).backward()
    return [value.detach() for value in values], [leaf.grad for leaf in leaves]


def _on_a_rank() -> tuple[list[Tensor], list[Tensor]]:
    dist.init_process_group("gloo")
    start = dist.get_rank() * PADDED // dist.get_world_size()
    values, (hidden, masked, weight) = _values_and_gradients(_ours, dist.group.WORLD, start)
    for partial in (hidden, masked):  # as copy_to_tensor_model_parallel_region's backward does
        dist.all_reduce(partial)
    return values, [hidden, masked, weight]


def _close(ours: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_one_rank_equals_log_softmax_over_the_allowed_words():
    values, gradients = _values_and_gradients(_ours)
    expected_values, expected_gradients = _values_and_gradients(_expected)
    _close(values, expected_values)
    _close(gradients, expected_gradients)
    assert gradients[2][[*BANNED, *range(VOCAB, PADDED)]].abs().max() == 0.0


def test_finite_differences_of_logprob_entropy_and_kl():
    *inputs, _ = _inputs()
    leaves = tuple(tensor.requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(_ours, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3])
def test_vocabulary_shards_give_the_single_rank_values_and_gradients(world_size: int):
    expected_values, (hidden, masked, weight) = _values_and_gradients(_expected)
    found = run_ranks(_on_a_rank, world_size)
    for rank, (values, gradients) in enumerate(found):
        shard = weight.chunk(world_size)[rank]
        _close(values, expected_values)
        _close(gradients, [hidden, masked, shard])
        assert all(torch.equal(mine, first) for mine, first in zip(values, found[0][0]))


def test_fp32_and_bf16_inputs_give_fp32_nats():
    *inputs, _ = _inputs()
    for dtype in (torch.float32, torch.bfloat16):
        narrow = [tensor.to(dtype) for tensor in inputs]
        values = _ours(*narrow)
        exact = _expected(*(tensor.double() for tensor in narrow))
        for value, expected in zip(values, exact):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


def test_entropy_alone_is_left_out_and_gradient_still_holds():
    hidden, _, weight, upstream = _inputs()
    results = []
    for entropy in (True, False):
        leaf = hidden.clone().requires_grad_()
        logprobs, found = vocab_parallel_logprobs(
            leaf, weight, TARGETS, group=None, vocab_start=0, entropy=entropy, **OPTIONS
        )
        (logprobs * upstream[0]).sum().backward()
        results.append((logprobs.detach(), leaf.grad))
        assert (found is None) == (not entropy)
    _close(list(results[0]), list(results[1]))


def test_extreme_logits_stay_finite():
    hidden, masked, weight, _ = _inputs()
    values = [value.float() for value in (hidden * 1e4, masked * -1e4, weight)]
    leaves = [value.requires_grad_() for value in values]
    outputs = _ours(*leaves)
    sum(output.sum() for output in outputs).backward()
    assert all(torch.isfinite(tensor).all() for tensor in (*outputs, *(leaf.grad for leaf in leaves)))
    assert (outputs[1] >= 0).all() and (outputs[2] >= 0).all()


def test_no_rows():
    hidden, masked, weight, _ = _inputs()
    leaf = weight.clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden[:0], leaf, TARGETS[:0], group=None, vocab_start=0, entropy=True, **OPTIONS
    )
    assert logprobs.shape == entropy.shape == (0,)
    (
        logprobs.sum() + vocab_parallel_kl(hidden[:0], masked[:0], leaf, group=None, vocab_start=0, **OPTIONS).sum()
    ).backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("word", [3, 22, -1])
def test_a_target_that_cannot_be_said_is_named(word: int):
    hidden, _, weight, _ = _inputs()
    targets = TARGETS.clone()
    targets[2] = word
    with pytest.raises(ValueError, match=rf"\[{word}\].*vocabulary of 22"):
        vocab_parallel_logprobs(hidden, weight, targets, group=None, vocab_start=0, entropy=False, **OPTIONS)
