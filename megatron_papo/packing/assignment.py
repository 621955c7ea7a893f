"""Assigns rollouts to rows under a budget of tokens, so that rows and ranks have about equal cost.

A piece is a prompt with some rollouts of its group: the whole group when it fits the budget, else one of as few parts
as are needed. Pieces are spread over rows, and groups over data-parallel ranks, by their cost (FLOPs, attention
included), so that pipeline slots take equal time and no rank waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_papo.types import Group

Cost = Callable[[int, Sequence[int], Sequence[tuple[int, int, int]]], float]
"""(tokens of the prompt, tokens of each response, image grids in patches) -> the cost of one view of them."""

_ENOUGH = 0.01
"""Groups are moved between ranks while a move reduces the highest cost by more than this share of the mean cost."""


@dataclass(frozen=True)
class GroupPart:
    """A piece: a prompt with some rollouts of its group."""

    group: Group
    rollouts: tuple[int, ...]
    """Places of these rollouts within the group, ascending."""
    num_views: int
    """1, or 2 where the row also has the masked view."""

    @property
    def response_lengths(self) -> tuple[int, ...]:
        """Tokens of each response."""
        return tuple(len(self.group.rollouts[index].response_ids) for index in self.rollouts)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the responses, in all views."""
        return self.num_views * (self.group.prompt.inputs.token_ids_S.numel() + sum(self.response_lengths))

    @property
    def least_tokens(self) -> int:
        """Tokens of the prompt and its longest response alone, in all views: no piece of this group can have fewer."""
        return self.num_views * (self.group.prompt.inputs.token_ids_S.numel() + max(self.response_lengths))

    def cost(self, cost: Cost) -> float:
        """The cost of all views of this piece."""
        inputs = self.group.prompt.inputs
        grids = [] if inputs.grid_thw_I3 is None else [(t, h, w) for t, h, w in inputs.grid_thw_I3.tolist()]
        return self.num_views * cost(inputs.token_ids_S.numel(), self.response_lengths, grids)


def whole(group: Group, joint: bool) -> GroupPart:
    """The group as one piece, of any length. `joint`: rows have the masked view too, for prompts with an image."""
    return GroupPart(group, tuple(range(len(group.rollouts))), 2 if joint and group.prompt.has_image else 1)


def split(piece: GroupPart, budget: int, longest: int) -> list[GroupPart]:
    """The piece in as few pieces of at most `budget` tokens as possible, with about equal numbers of response tokens.

    Where the prompt and its longest response have more, but at most `longest` tokens, the budget is what they have.
    Raises ValueError, with the numbers, where they have more than that.
    """
    if piece.num_tokens <= budget:
        return [piece]
    if piece.least_tokens > max(budget, longest):
        raise ValueError(f"{too_long_in_words(piece)}, more than train.tokens_per_micro_batch={budget}")
    prompt, lengths = piece.group.prompt.inputs.token_ids_S.numel(), piece.response_lengths
    bins = spread(lengths, lengths, max(budget, piece.least_tokens) // piece.num_views - prompt)
    return [
        GroupPart(piece.group, tuple(piece.rollouts[index] for index in sorted(part)), piece.num_views) for part in bins
    ]


def too_long_in_words(piece: GroupPart) -> str:
    """The prompt of a piece with its longest response, and how many tokens they have."""
    prompt, response = piece.group.prompt, max(piece.response_lengths)
    views = " in two views" if piece.num_views == 2 else ""
    num_prompt = prompt.inputs.token_ids_S.numel()
    return f"prompt {prompt.id}: its {num_prompt} tokens with a response of {response}{views} are {piece.least_tokens}"


def rows_of(pieces: Sequence[GroupPart], costs: Sequence[float], budget: int, least_rows: int = 1) -> list[list[int]]:
    """The indices of the pieces in each row: rows of at most `budget` tokens and about equal cost as `spread` makes
    them, and a row of its own for each piece that has more."""
    sizes = [piece.num_tokens for piece in pieces]
    long = [index for index, size in enumerate(sizes) if size > budget]
    short = [index for index, size in enumerate(sizes) if size <= budget]
    if not short:
        return [[index] for index in long]
    rows = spread([sizes[index] for index in short], [costs[index] for index in short], budget, least_rows - len(long))
    return sorted([*([short[place] for place in row] for row in rows), *([index] for index in long)])


def spread(sizes: Sequence[int], costs: Sequence[float], room: int, least: int = 1) -> list[list[int]]:
    """The indices of the items in each bin, in the order of the bins' first items. Bins have a size of at most `room`
    and about equal cost. There are at most as many as first fit needs, but at least `least`, if there are so many
    items."""
    fitted = _first_fit(sizes, room)
    fewest = max(-(-sum(sizes) // room), min(least, len(sizes)))
    for num in range(fewest, max(fewest, len(fitted)) + 1):
        even = _longest_first(sizes, costs, room, num)
        if even is not None:
            return sorted(even)
    return sorted(fitted)


def _first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """The indices in each bin when items, the largest first, go into the first bin with enough room."""
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
    """The indices in each of `num` bins when items, the costliest first, go into the cheapest bin with enough room;
    None when there is no such bin."""
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
    """The move of a group from one data-parallel rank to another."""

    source: int
    place: int
    """Place of the group among the groups of its rank."""
    target: int


def balance(costs: Sequence[Sequence[float]]) -> list[Move]:
    """Moves that make the costs of ranks about equal, given the costs of each rank's groups. They are few, since a
    group's pixels are moved with it.

    The rank of the highest cost gives a group to that of the lowest, or swaps one with it, as long as that helps.
    """
    owned = [[(cost, rank, place) for place, cost in enumerate(own)] for rank, own in enumerate(costs)]
    mean = sum(map(sum, costs)) / len(costs)
    while True:
        load = [sum(cost for cost, *_ in own) for own in owned]
        heavy, light = load.index(max(load)), load.index(min(load))
        options = [(given, back) for given in owned[heavy] for back in [None, *owned[light]]]

        def longest(option: tuple, load: Sequence[float] = load, heavy: int = heavy, light: int = light) -> float:
            given, back = option
            shift = given[0] - (back[0] if back else 0.0)
            return max(load[heavy] - shift, load[light] + shift)

        best = min(options, key=longest, default=None)
        if best is None or load[heavy] - longest(best) <= _ENOUGH * mean:
            break
        given, back = best
        owned[heavy].remove(given)
        owned[light].append(given)
        if back:
            owned[light].remove(back)
            owned[heavy].append(back)
    return [
        Move(source, place, target)
        for target, own in enumerate(owned)
        for _, source, place in sorted(own, key=lambda item: item[1:])
        if source != target
    ]
