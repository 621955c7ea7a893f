"""Which groups a step trains on: all that were drawn, or under dynamic sampling those whose rollouts disagree.

Dynamic sampling (DAPO, arXiv 2503.14476) generates in rounds until enough groups are kept. Groups stay on the rank that
generated them; ranks exchange only positions and sums. Kept groups are put in the global order of their prompts, those
beyond the number that a step needs are dropped, and the rest is cut into one chunk for each optimizer update, so that
the batch does not depend on how many ranks there are. Dropped groups still count in the sums that a step reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

from torch.distributed import ProcessGroup

from megatron_papo.algorithm.advantages import keep_group
from megatron_papo.config import Config, DynamicSamplingConfig, TrainConfig
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.optimization.pipeline import add_metrics
from megatron_papo.training.length_percentiles import length_counts
from megatron_papo.training.reward_failures import has_failed
from megatron_papo.training.rollout_metrics import rollout_sums
from megatron_papo.types import Group, Metrics


@dataclass(frozen=True)
class ChosenGroups:
    """The groups that a step has so far. A frozen value: `add` returns the next one."""

    train: TrainConfig
    merge_unit: int
    """How many patches become one image token."""
    drop_failed: bool = False
    """Whether groups for which the user's reward function failed are left out."""
    own: Mapping[int, Group] = field(default_factory=dict)
    """Kept groups that were generated on this rank, by the position of their prompt in the global order."""
    first: Group | None = None
    """The first group that this rank generated, kept or not."""
    kept: tuple[int, ...] = ()
    """Positions of the groups that were kept, over all ranks, in order; those to train on come first."""
    rounds: int = 0
    """Rounds of generation so far."""
    whole_rounds: int = 0
    """Rounds that were kept whole because none of their groups would have been kept."""
    num_drawn: int = 0
    """Prompts drawn so far, over all ranks."""
    generated: Metrics = field(default_factory=dict)
    """Sums over all rollouts so far, over all ranks."""

    @classmethod
    def of(cls, config: Config, merge_unit: int) -> Self:
        """No groups yet, of a run with these settings."""
        return cls(config.train, merge_unit, drop_failed=config.reward.on_failure == "drop_group")

    @property
    def enough(self) -> bool:
        """Whether the step has all the prompts that it trains on."""
        if not self.train.dynamic_sampling.enabled:
            return self.rounds > 0
        return len(self.kept) >= self.train.prompts_per_step

    def add(self, positions: Sequence[int], groups: Sequence[Group], data_group: ProcessGroup) -> ChosenGroups:
        """The choice after one more round, whose `groups` this rank generated for the prompts at `positions`.

        Raises ValueError where the rounds are used up and prompts are still missing, or where no group is left.
        """
        usable = {
            place: group
            for place, group in zip(positions, groups, strict=True)
            if not (self.drop_failed and has_failed(group))
        }
        own_kept = _kept(usable, self.train.dynamic_sampling)
        sums = rollout_sums(groups, self.merge_unit) | length_counts(groups)
        share = (len(groups), list(usable), list(own_kept), sums)
        all_ranks = gather_objects(share, data_group)
        kept = [place for _, _, places, _ in all_ranks for place in places]
        generated = dict(self.generated)
        for *_, sums in all_ranks:
            add_metrics(generated, sums)
        whole = not kept and self.train.dynamic_sampling.when_none_kept == "keep"
        if whole:
            own_kept, kept = usable, [place for _, places, _, _ in all_ranks for place in places]
        chosen = replace(
            self,
            own={**self.own, **own_kept},
            first=self.first or next(iter(groups), None),
            kept=tuple(sorted((*self.kept, *kept))),
            rounds=self.rounds + 1,
            whole_rounds=self.whole_rounds + whole,
            num_drawn=self.num_drawn + sum(count for count, *_ in all_ranks),
            generated=generated,
        )
        chosen._check_rounds()
        return chosen

    def by_update(self) -> list[list[Group]]:
        """This rank's groups, a list for every optimizer update; a list may be empty. There are fewer updates where
        fewer groups than updates are left."""
        chosen = self.kept[: self.train.prompts_per_step]
        updates = min(self.train.updates_per_step, len(chosen))
        bounds = [number * len(chosen) // updates for number in range(updates + 1)]
        chunks = [chosen[start:end] for start, end in pairwise(bounds)]
        return [[self.own[place] for place in chunk if place in self.own] for chunk in chunks]

    @property
    def placeholder(self) -> Group:
        """Any group of this rank, with which it computes an update at weight zero when it has no group of its own."""
        assert self.first is not None, "every rank draws a prompt in every round"
        return self.first

    @property
    def metrics(self) -> Metrics:
        """How much had to be generated; also the sums over all that was generated where not all is trained on."""
        share = (float(len(self.kept)), float(self.num_drawn))
        values: Metrics = {"sampling/rounds": (float(self.rounds), 1.0), "sampling/kept_share": share}
        if self.train.dynamic_sampling.enabled:
            values["sampling/whole_rounds"] = (float(self.whole_rounds), 1.0)
            values["sampling/prompts"] = (float(self.num_drawn), 1.0)
            values["sampling/left_over"] = (float(len(self.kept) - self.train.prompts_per_step), 1.0)
        if self.train.dynamic_sampling.enabled or self.drop_failed:
            values |= self.generated
        return values

    def _check_rounds(self) -> None:
        sampling = self.train.dynamic_sampling
        if not sampling.enabled and not self.kept:
            raise ValueError(
                "reward.on_failure=drop_group: reward.function failed for a response to every prompt of the step"
            )
        if sampling.enabled and self.rounds >= sampling.max_rounds and not self.enough:
            raise ValueError(
                f"train.dynamic_sampling: after {sampling.max_rounds} rounds, {self.num_drawn} prompts in all, only "
                f"{len(self.kept)} of {self.train.prompts_per_step} prompts had a mean accuracy between {sampling.low} "
                f"and {sampling.high}: the data is too easy or too hard for this policy"
            )


def _kept(groups: Mapping[int, Group], sampling: DynamicSamplingConfig) -> dict[int, Group]:
    """The groups of a round that are kept: all, or with dynamic sampling those whose rollouts disagree."""
    return {place: group for place, group in groups.items() if not sampling.enabled or keep_group(group, sampling)}
