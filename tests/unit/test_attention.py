"""Attention over packed rows against a dense mask in float64: shared prompts, windows, kernels; and the layout."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_papo.config import ConfigError
from megatron_papo.model.attention import kernels
from megatron_papo.model.attention.module import StructuredAttention
from megatron_papo.model.attention.packed_layout import build_segments
from megatron_papo.model.attention.rotary import Rotation
from megatron_papo.model.attention.varlen import check_heads
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Segment
from tests.support.tiny import tiny_config

CPU = torch.device("cpu")
SHARED = (
    Segment(11), Segment(5, 0), Segment(3, 0), Segment(1, 0), Segment(7),
    Segment(6), Segment(2, 5), Segment(2, 5), Segment(1), Segment(9, 8),
)  # fmt: skip
"""Three prompts with their responses, and one sequence alone."""
ROWS = {
    "shared prompts": (SHARED, True),
    "one group": ((Segment(40), *[Segment(8, 0)] * 4), True),
    "plain sequences": (tuple(map(Segment, (5, 5, 9, 8, 2))), True),
    "windows": (tuple(map(Segment, (4, 2, 4, 4, 3))), False),
}


def _attention() -> StructuredAttention:
    class Settings:
        attention_dropout = 0.0

    return StructuredAttention(Settings(), 1)


def _dense(q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], causal: bool) -> Tensor:
    """The row as one sequence under a T x T mask, written out."""
    owner = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor([s.length for s in segments]))
    parent = torch.tensor([-1 if s.parent is None else s.parent for s in segments])[owner]
    place = torch.arange(len(owner))
    own = owner[:, None] == owner
    seen = (own & (place[:, None] >= place)) | (parent[:, None] == owner) if causal else own
    k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, v).flatten(1)


def _draw(segments: tuple[Segment, ...], heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num = sum(segment.length for segment in segments)
    shapes = ((num, heads, 16), (num, kv_heads, 16), (num, kv_heads, 16), (num, heads * 16))
    return [torch.randn(shape, generator=generator, dtype=dtype) * 2 for shape in shapes]


@pytest.mark.parametrize("plain", [False, True], ids=["flash", "plain"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["full heads", "grouped heads"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ROWS)
def test_rows_attend_as_under_a_dense_mask(name, dtype, tolerance, heads, plain, monkeypatch):
    segments, causal = ROWS[name]
    if plain:
        monkeypatch.setattr(kernels, "_SCORES", 64)  # several slices of queries
        monkeypatch.setattr("megatron_papo.model.attention.module.attend", kernels.plain_attend)
        monkeypatch.setattr("megatron_papo.model.attention.module.attend_backward", kernels.plain_attend_backward)
    *leaves, upstream = _draw(segments, *heads, dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found = _attention()(
        *(leaf.unsqueeze(1) for leaf in leaves), packed_seq_params=build_segments(segments, causal=causal, device=CPU)
    ).squeeze(1)
    gradients = torch.autograd.grad(found, leaves, upstream)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = _dense(*exact, segments, causal)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, exact, upstream.double())):
        torch.testing.assert_close(gradient.double(), reference, atol=tolerance * 5, rtol=tolerance)


def test_rotated_queries_and_keys_turn_as_transformers_turns_them():
    """Against apply_rotary_pos_emb of transformers, forward and backward; and back again."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    segments, angles_TF = (Segment(6), Segment(3, 0)), torch.randn(9, 8, dtype=torch.float64)
    rotation = Rotation.by(angles_TF)
    *leaves, upstream = _draw(segments, 4, 4, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    layout = build_segments(segments, causal=True, device=CPU, rotation=rotation)
    found = _attention()(*(leaf.unsqueeze(1) for leaf in leaves), packed_seq_params=layout).squeeze(1)
    both = torch.cat([angles_TF, angles_TF], dim=-1)
    q, k, v = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    # transformers rotates in fp32
    expected = _dense(
        *(t.double() for t in apply_rotary_pos_emb_vision(q, k, both.cos(), both.sin())), v, segments, True
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(found, leaves, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k, v), upstream), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotation.rotate_inverse(rotation.turn(q.detach())), q.detach(), atol=1e-12, rtol=0)


def test_finite_differences_through_a_shared_prompt():
    segments = (Segment(3), Segment(2, 0), Segment(1, 0))
    *leaves, _ = _draw(segments, 2, 1, torch.float64)
    layout = build_segments(segments, causal=True, device=CPU)
    attention = _attention()

    def function(*rows: Tensor) -> Tensor:
        return attention(*(row.unsqueeze(1) for row in rows), packed_seq_params=layout)

    assert torch.autograd.gradcheck(function, [leaf[..., :4].clone().requires_grad_() for leaf in leaves])


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.num = max(self.num, tensor.numel())
        return result


def test_a_long_row_never_makes_a_square():
    segments = (Segment(3000), *[Segment(250, 0)] * 4)
    *leaves, upstream = _draw(segments, 4, 2, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    layout = build_segments(segments, causal=True, device=CPU)
    with _Largest() as largest:
        found = _attention()(*(leaf.unsqueeze(1) for leaf in leaves), packed_seq_params=layout)
        found.squeeze(1).backward(upstream)
    assert largest.num == 4000 * 4 * 16  # queries of the row


def test_blocks_are_views_where_they_can_be_and_padded_little():
    def blocks(*lengths: int, causal: bool = True) -> list[tuple]:
        laid_out = build_segments(tuple(map(Segment, lengths)), causal=causal, device=CPU)
        return [
            (
                block.size,
                block.places if isinstance(block.places, slice) else block.places.tolist(),
                0 if block.padded is None else int(block.padded.sum()),
            )
            for block in laid_out.blocks
        ]

    assert blocks(5, 5, 5) == [((3, 5), slice(0, 15), 0)]
    assert blocks(7, 2, 2) == [((1, 7), slice(0, 7), 0), ((2, 2), slice(7, 11), 0)]
    # 20 and 19 share a batch, the shorter one padded by its last token; 2 is too short for it
    assert blocks(2, 20, 19) == [((2, 20), [*range(2, 41), 40], 1), ((1, 2), slice(0, 2), 0)]
    assert blocks(4, 2, 4, causal=False) == [((2, 4), [0, 1, 2, 3, 6, 7, 8, 9], 0), ((1, 2), slice(4, 6), 0)]
    # a long prompt of its own leaves room for loose batches, a row of short responses alone does not
    assert [size for size, *_ in blocks(900, 10, 9, 8, 7)] == [(1, 900), (4, 10)]
    assert [size for size, *_ in blocks(10, 9, 8, 7)] == [(2, 10), (1, 8), (1, 7)]


@pytest.mark.parametrize("seed", range(20))
def test_padding_is_at_most_a_twentieth(seed):
    lengths = torch.randint(1, 300, (24,), generator=torch.Generator().manual_seed(seed)).tolist()
    laid_out = build_segments(tuple(map(Segment, lengths)), causal=True, device=CPU)
    assert sum(rows * length for rows, length in (block.size for block in laid_out.blocks)) <= 1.05 * sum(lengths)


def test_responses_of_a_prompt_make_one_run_whoever_stands_between():
    def prefixes(*segments: Segment) -> list[tuple]:
        return list(build_segments(segments, causal=True, device=CPU).prefixes)

    assert prefixes(Segment(4), Segment(2, 0), Segment(3, 0)) == [(slice(4, 9), slice(0, 4))]
    assert prefixes(Segment(4), Segment(2, 0), Segment(5), Segment(3, 0)) == [
        (slice(4, 6), slice(0, 4)),
        (slice(11, 14), slice(0, 4)),
    ]


def test_the_plan_of_a_variable_length_kernel():
    from megatron_papo.model.attention.varlen import VarlenPlan

    layout = build_segments(SHARED, causal=True, device=CPU)
    plan = VarlenPlan.of([s.length for s in SHARED], layout.prefixes, True, CPU)
    assert plan.segments.starts.tolist() == [0, 11, 16, 19, 20, 27, 33, 35, 37, 38, 47] and plan.segments.longest == 11
    assert plan.queries.starts.tolist() == [0, 9, 13, 22] and plan.keys.starts.tolist() == [0, 11, 17, 18]
    assert plan.query_index.tolist() == [*range(11, 20), *range(33, 37), *range(38, 47)]
    assert plan.key_index.tolist() == [*range(11), *range(27, 33), 37]


def test_variable_length_kernels_are_called_as_torch_declares_them():
    """On tensors without values: shapes alone. Their numbers are compared in tests/gpu."""
    from megatron_papo.model.attention.varlen import VarlenPlan, varlen_attend, varlen_attend_backward

    layout = build_segments(SHARED, causal=True, device=CPU)
    with torch.device("meta"):
        plan = VarlenPlan.of([s.length for s in SHARED], layout.prefixes, True, torch.device("meta"))
        q, k, v = torch.empty(47, 6, 16), torch.empty(47, 2, 16), torch.empty(47, 2, 16)
        out, lse = varlen_attend(q, k, v, plan, 0.25)
        grads = varlen_attend_backward(torch.empty(47, 6, 16), q, k, v, out, lse, plan, 0.25)
    assert (out.shape, lse.shape) == (q.shape, (6, 47))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def _kernel(q: Tensor, k: Tensor, v: Tensor, queries, keys, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What the variable-length kernel is defined to do, sequence by sequence."""
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
    for own, seen in zip(_spans(queries), _spans(keys), strict=True):
        found = kernels.plain_attend(*_rows((q, own), (k, seen), (v, seen)), causal=causal, scale=scale)
        out[own], lse[:, own] = found[0][0].transpose(0, 1), found[1][0]
    return out, lse


def _kernel_backward(grad, q, k, v, out, lse, queries, keys, causal: bool, scale: float) -> tuple[Tensor, ...]:
    grads = tuple(torch.zeros_like(tensor) for tensor in (q, k, v))
    for own, seen in zip(_spans(queries), _spans(keys), strict=True):
        sides = _rows((grad, own), (q, own), (k, seen), (v, seen), (out, own))
        parts = kernels.plain_attend_backward(*sides, lse[None, :, own], causal=causal, scale=scale)
        for whole, part, places in zip(grads, parts, (own, seen, seen)):
            whole[places] += part[0].transpose(0, 1)
    return grads


def _spans(lengths) -> list[slice]:
    starts = lengths.starts.tolist()
    return [slice(*span) for span in pairwise(starts)]


def _rows(*parts: tuple[Tensor, slice]) -> list[Tensor]:
    return [tensor[places].transpose(0, 1)[None] for tensor, places in parts]


def test_the_path_of_variable_length_kernels_equals_that_of_blocks(monkeypatch):
    """With the kernel, which is CUDA's alone, replaced by its definition: plan, gathering and merging are the real."""
    from megatron_papo.model.attention import varlen as varlen
    from megatron_papo.model.attention.module import attend_blocks, attend_blocks_backward

    monkeypatch.setattr(varlen, "_forward", _kernel)
    monkeypatch.setattr(varlen, "_backward", _kernel_backward)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(47, heads, 16, generator=generator) for heads in (6, 2, 2, 6))
    layout = build_segments(SHARED, causal=True, device=CPU)
    plan = varlen.VarlenPlan.of([s.length for s in SHARED], layout.prefixes, True, CPU)
    out, lse = varlen.varlen_attend(q, k, v, plan, 0.25)
    expected, expected_lse = attend_blocks(q, k, v, layout, 0.25)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse.T, expected_lse)
    grads = varlen.varlen_attend_backward(grad, q, k, v, out, lse, plan, 0.25)
    torch.testing.assert_close(
        grads, attend_blocks_backward(grad, q, k, v, expected, expected_lse, layout, 0.25), rtol=1e-4, atol=1e-5
    )


def _of_heads(language: int, vision: int) -> ModelShape:
    config = tiny_config("qwen3_vl", hidden=128, heads=2, head_dim=language, vision_hidden=2 * vision, vision_heads=2)
    return ModelShape.from_dict(config.to_dict())


def test_heads_that_flash_attention_does_not_take_are_refused_in_half_precision():
    for vision in (64, 72, 80):  # the published towers
        check_heads(_of_heads(128, vision), torch.bfloat16)
    for shape, said in ((_of_heads(128, 60), "vision tower have 60"), (_of_heads(264, 64), "language model have 264")):
        check_heads(shape, torch.float32)
        with pytest.raises(ConfigError, match=rf"model\.dtype: heads of the {said} values; .* needs float32"):
            check_heads(shape, torch.bfloat16)
