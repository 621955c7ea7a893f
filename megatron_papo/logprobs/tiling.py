"""Tiles of rows by words, and their matrix products: summed in fp32 or wider, with no temporary larger than a tile.

Only one tile of the logits is in memory at a time, so its size bounds the head's memory. Words are the outer loop: a
block of the weight is read once for all rows, and its gradient is complete before the next block begins. Leaves out:
what is done to a tile's logits. Suffixes: C rows of a tile, W its words, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_papo.logprobs.sums import FORBIDDEN
from megatron_papo.types import to_device

CPU_TILE, CUDA_TILE = (1024, 1024), (8192, 8192)
"""Rows and words of a tile. On the CPU it is 4 MiB of fp32, which stays in cache and multiplies as fast as larger ones;
on a GPU it is 256 MiB, so that the time to launch the small kernels for a row's sums does not matter."""


def tile_of(device: torch.device, num_rows: int) -> tuple[int, int]:
    """Rows and words of a tile. Fewer rows leave space for more words, up to four times as many."""
    rows, words = CUDA_TILE if device.type == "cuda" else CPU_TILE
    if num_rows >= rows:
        return rows, words
    return max(num_rows, 1), min(rows * words // max(num_rows, 1) // 256 * 256, 4 * words)


def blocks(total: int, largest: int) -> Iterator[slice]:
    """Cuts 0..total into the fewest blocks of at most `largest`: about equal, and multiples of 16 where possible."""
    even = -(-total // max(1, -(-total // largest)))
    size = max(1, min(largest, -(-even // 16) * 16))
    return (slice(first, min(first + size, total)) for first in range(0, total, size))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values of `dtype`: fp32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def operand(tensor: Tensor) -> Tensor:
    """The tensor as it enters a product: widened on the CPU; on a GPU bf16 stays, and only the sum is fp32."""
    return tensor if tensor.is_cuda else tensor.to(wide(tensor.dtype))


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The product a @ b, written to `out`, which is fp32 or wider."""
    if a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Adds a @ b to `total`, which is fp32 or wider. With `first` the product replaces what `total` was."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))


@dataclass(frozen=True)
class Task:
    """This rank's part of the vocabulary, and what to compute from it."""

    group: dist.ProcessGroup | None
    start: int
    num_words: int
    """Words of the shard without padding; padding is never multiplied."""
    banned: tuple[int, ...]
    """Places of banned words in the shard."""
    temperature: float
    entropy: bool
    kl: bool
    tile: tuple[int, int]

    @property
    def scale(self) -> float:
        """The factor of logits, by which they are divided by the temperature."""
        return 1 / self.temperature


@dataclass(frozen=True)
class Tile:
    """A block of the logits, and what they were computed from."""

    rows: slice
    words: slice
    views: tuple[int, ...]
    is_first_of_words: bool
    logits: list[Tensor]
    """[C, W] for each of `views`, not yet divided by the temperature, in memory that the next tile overwrites."""
    hidden: list[Tensor]
    weight_WH: Tensor
    columns_C: Tensor
    """Place of each row's target in the tile, -1 when it is not in this tile."""


def tiles(
    task: Task, passes: Sequence[tuple[int, ...]], hidden: Sequence[Tensor], weight_VH: Tensor, target_ids_R: Tensor
) -> Iterator[Tile]:
    """Every tile of every pass. A pass is a tuple of the views whose logits are needed together."""
    num_rows, (most_rows, most_words) = len(target_ids_R), task.tile
    size = min(most_rows, num_rows) * min(most_words, task.num_words)
    memory = [weight_VH.new_empty(size, dtype=wide(weight_VH.dtype)) for _ in range(max(map(len, passes)))]
    for words in blocks(task.num_words, most_words):
        weight_WH = operand(weight_VH[words])
        banned = [word - words.start for word in task.banned if words.start <= word < words.stop]
        banned_W = to_device(torch.tensor(banned, dtype=torch.int64), weight_VH.device) if banned else None
        first = True
        for views in passes:
            for rows in blocks(num_rows, most_rows):
                states = [operand(hidden[view][rows]) for view in views]
                outs = [one[: len(h) * len(weight_WH)].view(len(h), -1) for one, h in zip(memory, states)]
                logits = [product(h, weight_WH.T, out) for h, out in zip(states, outs)]
                if banned_W is not None:
                    for logits_CW in logits:
                        logits_CW.index_fill_(1, banned_W, FORBIDDEN * task.temperature)
                place_C = target_ids_R[rows] - (task.start + words.start)
                columns_C = place_C.where((place_C >= 0) & (place_C < len(weight_WH)), -1)
                yield Tile(rows, words, views, first, logits, states, weight_WH, columns_C)
                first = False
