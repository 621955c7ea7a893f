"""Which rollouts lie in which row: under a budget of tokens, rows and ranks of equal cost.

A piece is a prompt with some of its group's rollouts: the whole group when it fits the budget, else as few parts as it
takes. Pieces are spread over rows, and groups over data-parallel ranks, by their cost (FLOPs, attention included), so
that pipeline slots last equally long and no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_papo.types import Group

Cost = Callable[[int, Sequence[int], Sequence[tuple[int, int, int]]], float]
"""(tokens of the prompt, tokens of each response, image grids in patches) to what one view of them costs."""

_ENOUGH = 0.01
"""Groups are moved between ranks while that shortens the longest by this share of the mean."""


@dataclass(frozen=True)
class GroupPart:
    group: Group
    rollouts: tuple[int, ...]
    """Places within the group, ascending."""
    num_views: int
    """2 where the row holds the masked view too."""

    @property
    def response_lengths(self) -> tuple[int, ...]:
        return tuple(len(self.group.rollouts[index].response_ids) for index in self.rollouts)

    @property
    def num_tokens(self) -> int:
        return self.num_views * (self.group.prompt.inputs.token_ids_S.numel() + sum(self.response_lengths))

    def cost(self, cost: Cost) -> float:
        inputs = self.group.prompt.inputs
        grids = [] if inputs.grid_thw_I3 is None else [(t, h, w) for t, h, w in inputs.grid_thw_I3.tolist()]
        return self.num_views * cost(inputs.token_ids_S.numel(), self.response_lengths, grids)


def whole(group: Group, joint: bool) -> GroupPart:
    """The group as one piece, however long it is."""
    return GroupPart(group, tuple(range(len(group.rollouts))), 2 if joint and group.prompt.has_image else 1)


def split(piece: GroupPart, budget: int) -> list[GroupPart]:
    """As few pieces of at most `budget` tokens as it takes, their responses of about equal length in all.

    Raises ValueError, with the numbers, when the prompt and its longest response alone do not fit.
    """
    if piece.num_tokens <= budget:
        return [piece]
    prompt, lengths = piece.group.prompt.inputs.token_ids_S.numel(), piece.response_lengths
    room, views = budget // piece.num_views - prompt, " in two views" if piece.num_views == 2 else ""
    if max(lengths) > room:
        raise ValueError(
            f"prompt {piece.group.prompt.id}: its {prompt} tokens with a response of {max(lengths)}{views} are "
            f"{piece.num_views * (prompt + max(lengths))}, more than train.tokens_per_micro_batch={budget}"
        )
    bins = spread(lengths, lengths, room)
    return [
        GroupPart(piece.group, tuple(piece.rollouts[index] for index in sorted(part)), piece.num_views) for part in bins
    ]


def spread(sizes: Sequence[int], costs: Sequence[float], room: int, least: int = 1) -> list[list[int]]:
    """Indices by bin: bins of at most `room` in size, as few as first fit needs but at least `least` (as far as there
    are items), of about equal cost; in the order of their first items."""
    fitted = _first_fit(sizes, room)
    fewest = max(-(-sum(sizes) // room), min(least, len(sizes)))
    for num in range(fewest, max(fewest, len(fitted)) + 1):
        even = _longest_first(sizes, costs, room, num)
        if even is not None:
            return sorted(even)
    return sorted(fitted)


def _first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Largest first, each into the first bin with room."""
    bins: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        place = next((place for place, free in enumerate(left) if free >= sizes[index]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            left.append(room)
        bins[place].append(index)
        left[place] -= sizes[index]
    return [sorted(part) for part in bins]


def _longest_first(sizes: Sequence[int], costs: Sequence[float], room: int, num: int) -> list[list[int]] | None:
    """`num` bins, the costliest item first into the cheapest bin with room; None when one finds no room."""
    bins: list[list[int]] = [[] for _ in range(num)]
    left, load = [room] * num, [0.0] * num
    for index in sorted(range(len(sizes)), key=lambda index: -costs[index]):
        places = [place for place in range(num) if left[place] >= sizes[index]]
        if not places:
            return None
        place = min(places, key=lambda place: load[place])
        bins[place].append(index)
        left[place] -= sizes[index]
        load[place] += costs[index]
    return [sorted(part) for part in bins if part]


class Move(NamedTuple):
    """A group goes from one data-parallel rank to another."""

    source: int
    place: int
    """Among the groups of its rank."""
    target: int


def balance(costs: Sequence[Sequence[float]]) -> list[Move]:
    """Moves that even out the ranks, given what each rank's groups cost; few, since a group brings its pixels along.

    The heaviest rank gives a group to the lightest, or swaps one, as long as that helps.
    """
    held = [[(cost, rank, place) for place, cost in enumerate(own)] for rank, own in enumerate(costs)]
    mean = sum(map(sum, costs)) / len(costs)
    while True:
        load = [sum(cost for cost, *_ in own) for own in held]
        heavy, light = load.index(max(load)), load.index(min(load))
        options = [(given, back) for given in held[heavy] for back in [None, *held[light]]]

        def longest(option: tuple, load: Sequence[float] = load, heavy: int = heavy, light: int = light) -> float:
            given, back = option
            shift = given[0] - (back[0] if back else 0.0)
            return max(load[heavy] - shift, load[light] + shift)

        best = min(options, key=longest, default=None)
        if best is None or load[heavy] - longest(best) <= _ENOUGH * mean:
            break
        given, back = best
        held[heavy].remove(given)
        held[light].append(given)
        if back:
            held[light].remove(back)
            held[heavy].append(back)
    return [
        Move(source, place, target)
        for target, own in enumerate(held)
        for _, source, place in sorted(own, key=lambda item: item[1:])
        if source != target
    ]
