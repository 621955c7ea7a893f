"""Attention over a packed row of shared prompts, forward and backward: ours against other ways to compute the same.

Several prompts of 1,500 tokens, each with eight responses of uneven length, at the heads of the 3B model in bfloat16.
`ours` is StructuredAttention, which on a GPU calls variable-length flash attention twice and merges. Against it:
`dense mask` (scaled_dot_product_attention over the whole row with a mask), `prompts repeated` (one call of torch's
variable-length flash attention over every rollout with its own copy of the prompt, what a trainer without sharing
does; there is `flash_attn` too where it is installed) and `FlexAttention` (a block mask of the same structure,
compiled on a GPU). Outputs are compared with ours first. TFLOP/s are of useful FLOPs, the same for all: pairs that see
each other, backward twice the forward. The block mask is made beforehand, as are our layout's places; rows of their
own say what both take.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import in_turns, peak_row, peaks
from benchmarks.gpu.rows import GpuRow, Options, attempt, compared, not_measured, reason_of, release
from benchmarks.timing import Seconds
from megatron_papo.costs.flops import causal_pairs
from megatron_papo.distributed.accelerator import device, has_gpu, parameter_dtype
from megatron_papo.model.attention.module import StructuredAttention
from megatron_papo.model.attention.packed_layout import Segments, build_segments
from megatron_papo.types import Segment

GROUP_SIZE = 8
_CLOSE = {True: 2e-2, False: 1e-5}
"""Largest difference, relative to the largest value: in bfloat16 with a GPU, in fp32 without."""


@dataclass(frozen=True)
class Work:
    """A row, and heads as in Megatron-Core: [T, heads, D] queries, [T, key-value heads, D] keys and values."""

    num_prompts: int
    prompt_tokens: int
    response_tokens: int
    """Tokens of the longest response; lengths go down to half of it in even steps."""
    heads: int
    kv_heads: int
    head_dim: int

    @cached_property
    def responses(self) -> list[int]:
        longest = self.response_tokens
        return [longest - longest * index // (2 * GROUP_SIZE) for index in range(GROUP_SIZE)]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        row: list[Segment] = []
        for _ in range(self.num_prompts):
            parent = len(row)
            row += [Segment(self.prompt_tokens), *(Segment(length, parent) for length in self.responses)]
        return tuple(row)

    @cached_property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)

    @cached_property
    def flops(self) -> int:
        """Useful FLOPs of forward and backward."""
        pairs = causal_pairs(self.prompt_tokens) + sum(causal_pairs(n, self.prompt_tokens) for n in self.responses)
        return 3 * 4 * self.num_prompts * pairs * self.heads * self.head_dim


_TINY = (Work(2, 48, 16, 4, 2, 32), Work(3, 48, 16, 4, 2, 32))
SIZES = {
    "3b": tuple(Work(num, 1500, 1024, 16, 2, 128) for num in (1, 2, 4)),
    "4b": tuple(Work(num, 1500, 1024, 32, 8, 128) for num in (1, 2, 4)),
    "tiny": _TINY,
    "tiny-qwen3": _TINY,
}


def run(options: Options) -> Iterator[GpuRow]:
    for work in SIZES[options.shape][: 1 if options.quick else None]:
        what = f"{work.num_prompts} prompt{'s' * (work.num_prompts > 1)}, {work.num_tokens} tokens"
        yield from attempt(what, partial(_rows, options, work, what))
    for package in ("flash_attn",):
        if importlib.util.find_spec(package) is None:
            yield not_measured(f"against {package}", f"{package} is not installed")


def _rows(options: Options, work: Work, what: str) -> Iterator[GpuRow]:
    tensors = _tensors(work)
    expected = _output(_ours(work), tensors)
    sides: dict[str, Callable[[], None]] = {"ours": partial(_both_ways, _ours(work), tensors)}
    for name, make in _others().items():
        try:
            attend = make(work)
            gap = float((_output(attend, tensors) - expected).abs().max() / expected.abs().max())
            _both_ways(attend, tensors)
        except Exception as error:  # of a baseline: the others are measured
            yield not_measured(f"{what}: {name}", reason_of(error))
            release()
            continue
        if gap > _CLOSE[has_gpu()]:
            yield not_measured(f"{what}: {name}", f"differs from ours by {gap:.2g} of the largest value")
            continue
        sides[name] = partial(_both_ways, attend, tensors)
    seconds, most = in_turns(sides, options.rounds, f"attention, {what}"), peaks(sides)
    yield from _figures(work, what, seconds, most)
    yield _layout_row(work, what, options)


def _figures(work: Work, what: str, seconds: Seconds, most: dict[str, int]) -> Iterator[GpuRow]:
    yield GpuRow(f"{what}: the fastest is {seconds.fastest()}", 1e3 * seconds.median(seconds.fastest()), "ms")
    for name in list(seconds.of)[1:]:
        row = f"{what}: forward and backward, ours / {name}"
        values = 1e3 * seconds.median("ours"), 1e3 * seconds.median(name)
        yield GpuRow(row, values[0], "ms", values[1], seconds.ratio("ours", name))
        yield compared(row, *(work.flops / 1e9 / value for value in values), "TFLOP/s")
        yield peak_row(most, f"{what}: peak memory, ours / {name}", "ours", name)


def _layout_row(work: Work, what: str, options: Options) -> GpuRow:
    """A row with the time to compute the layout, which is done once per micro-batch for all layers."""
    sides = {"ours": partial(_layout, work.segments), "FlexAttention": partial(_block_mask, work)}
    seconds = in_turns(sides, options.rounds, "layout")
    own, other = (1e3 * seconds.median(side) for side in sides)
    name = f"{what}: layout, ours / block mask"
    return GpuRow(name, own, "ms", other, seconds.ratio("ours", "FlexAttention"))


Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Queries, keys, values, the gradient of the output."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""[T, heads, D], [T, key-value heads, D] twice, to [T, heads, D]."""


def _tensors(work: Work) -> Tensors:
    generator = torch.Generator(device()).manual_seed(0)
    q, k, v, grad = (
        torch.randn(work.num_tokens, heads, work.head_dim, generator=generator, device=device()).to(
            parameter_dtype("auto")
        )
        for heads in (work.heads, work.kv_heads, work.kv_heads, work.heads)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _output(attend: Attend, tensors: Tensors) -> Tensor:
    with torch.no_grad():
        return attend(*tensors[:3]).float()


def _both_ways(attend: Attend, tensors: Tensors) -> None:
    for leaf in tensors[:3]:
        leaf.grad = None
    attend(*tensors[:3]).backward(tensors[3])


def _others() -> dict[str, Callable[[Work], Attend]]:
    others: dict[str, Callable[[Work], Attend]] = {
        "dense mask": _dense, "prompts repeated": _repeated, "FlexAttention": _flex,
    }  # fmt: skip
    if importlib.util.find_spec("flash_attn") is not None:
        others["prompts repeated, flash_attn"] = _flash_attn
    return others


def _layout(segments: tuple[Segment, ...]) -> Segments:
    return build_segments(segments, causal=True, device=device())


def _ours(work: Work, segments: tuple[Segment, ...] | None = None) -> Attend:
    layout = _layout(segments or work.segments)
    module = StructuredAttention(SimpleNamespace(attention_dropout=0.0), 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = (tensor.unsqueeze(1) for tensor in (q, k, v))
        return module(*row, packed_seq_params=layout).view_as(q)

    return attend


def _dense(work: Work) -> Attend:
    places = torch.arange(work.num_tokens, device=device())
    mask = _sees(work)(None, None, places[:, None], places)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (tensor.repeat_interleave(work.heads // work.kv_heads, 1) for tensor in (k, v))
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)

    return attend


def _repeated(work: Work) -> Attend:
    """Without a parent in any segment ours is one call of the kernel, over sequences as they are."""
    places, first = _repeated_places(work), _first_copies(work)
    attend_all = _ours(work, tuple(Segment(length) for length in _repeated_lengths(work)))
    return lambda q, k, v: attend_all(q[places], k[places], v[places])[first]


def _flash_attn(work: Work) -> Attend:
    from flash_attn import flash_attn_varlen_func

    lengths = _repeated_lengths(work)
    starts = torch.tensor([0, *lengths], device=device()).cumsum(0).to(torch.int32)
    places, first = _repeated_places(work), _first_copies(work)
    bounds: dict[str, Any] = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    bounds |= {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    return lambda q, k, v: flash_attn_varlen_func(q[places], k[places], v[places], **bounds, causal=True)[first]


def _repeated_lengths(work: Work) -> list[int]:
    return [work.prompt_tokens + length for _ in range(work.num_prompts) for length in work.responses]


def _spans(work: Work) -> Iterator[tuple[int, int, int]]:
    """For each response the first place of its prompt, its own first place, and the place behind its end."""
    prompt = begin = 0
    for segment in work.segments:
        if segment.parent is None:
            prompt = begin
        else:
            yield prompt, begin, begin + segment.length
        begin += segment.length


def _repeated_places(work: Work) -> Tensor:
    """Places in the row of every rollout's tokens, its prompt before it."""
    parts = [(range(prompt, prompt + work.prompt_tokens), range(begin, end)) for prompt, begin, end in _spans(work)]
    return torch.tensor([place for both in parts for part in both for place in part], device=device())


def _first_copies(work: Work) -> Tensor:
    """[T]: where each place of the row lies among the repeated ones, of a prompt's the first."""
    first: dict[int, int] = {}
    for index, place in enumerate(_repeated_places(work).tolist()):
        first.setdefault(place, index)
    return torch.tensor([first[place] for place in range(work.num_tokens)], device=device())


def _flex(work: Work) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    attend_flex: Any = torch.compile(flex_attention, dynamic=False) if has_gpu() else flex_attention
    mask = _block_mask(work)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None].contiguous() for tensor in (q, k, v))
        return attend_flex(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def _block_mask(work: Work) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    make: Any = torch.compile(create_block_mask) if has_gpu() else create_block_mask
    return make(_sees(work), None, None, work.num_tokens, work.num_tokens, device=str(device()))


def _sees(work: Work) -> Callable[..., Tensor]:
    """Whether a query's place sees a key's: its own segment's up to itself, and its prompt's."""
    lengths = torch.tensor([segment.length for segment in work.segments], device=device())
    parents = [index if segment.parent is None else segment.parent for index, segment in enumerate(work.segments)]
    segment_T = torch.arange(len(lengths), device=device()).repeat_interleave(lengths)
    parent_T = torch.tensor(parents, device=device()).repeat_interleave(lengths)

    def sees(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
        own, parent = segment_T[query] == segment_T[key], parent_T[query] == segment_T[key]
        return (query >= key) & (own | parent)

    return sees
