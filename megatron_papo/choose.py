"""Which groups a step trains on: all that were drawn, or under dynamic sampling those whose rollouts disagree.

Groups stay on the rank that generated them; only positions travel. Kept groups are put in the global order of their
prompts and cut into one chunk an optimizer update, so that the batch does not depend on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.distributed import ProcessGroup

from megatron_papo.advantages import keep_group
from megatron_papo.config import TrainConfig
from megatron_papo.parallel import gather_objects
from megatron_papo.types import Group, Metrics


@dataclass(frozen=True)
class ChosenGroups:
    train: TrainConfig
    own: Mapping[int, Group] = field(default_factory=dict)
    """Kept groups that were generated on this rank, by the position of their prompt in the global order."""
    first: Group | None = None
    kept: tuple[int, ...] = ()
    """Positions of the groups to train on, over all ranks, in order."""
    rounds: int = 0
    num_drawn: int = 0
    """Prompts drawn so far, over all ranks."""

    @property
    def enough(self) -> bool:
        return len(self.kept) >= self.train.prompts_per_step

    def add(self, positions: Sequence[int], groups: Sequence[Group], data_group: ProcessGroup) -> ChosenGroups:
        """With one more round of generation; ValueError when the rounds are used up and prompts are still missing."""
        sampling = self.train.dynamic_sampling
        new = dict(zip(positions, groups, strict=True))
        good = {place: group for place, group in new.items() if not sampling.enabled or keep_group(group, sampling)}
        everywhere = gather_objects((list(good), len(new)), data_group)
        kept = tuple(sorted((*self.kept, *(place for places, _ in everywhere for place in places))))
        if sampling.enabled and self.rounds + 1 >= sampling.max_rounds and len(kept) < self.train.prompts_per_step:
            raise ValueError(
                f"train.dynamic_sampling: after {sampling.max_rounds} rounds only {len(kept)} of "
                f"{self.train.prompts_per_step} prompts had a mean accuracy between {sampling.low} and "
                f"{sampling.high}: the data is too easy or too hard for this policy"
            )
        return replace(
            self,
            own={**self.own, **good},
            first=self.first or groups[0],
            kept=kept,
            rounds=self.rounds + 1,
            num_drawn=self.num_drawn + sum(num for _, num in everywhere),
        )

    def by_update(self) -> list[list[Group]]:
        """This rank's groups of every optimizer update; a list may be empty."""
        chosen, updates = self.kept[: self.train.prompts_per_step], self.train.updates_per_step
        size = len(chosen) // updates
        chunks = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        return [[self.own[place] for place in chunk if place in self.own] for chunk in chunks]

    @property
    def spare(self) -> Group:
        """Any group of this rank: what it goes through the motions with when an update has none of its own."""
        assert self.first is not None, "every rank draws a prompt for every update"
        return self.first

    @property
    def metrics(self) -> Metrics:
        """How much had to be generated."""
        share = (float(len(self.kept)), float(self.num_drawn))
        return {"sampling/rounds": (float(self.rounds), 1.0), "sampling/kept_share": share}
