"""Statistics of rollouts as sums and counts: rewards and their parts, lengths, groups whose rollouts agree.

Means are left out: `training/recorder.py` takes them once, from the sums over all ranks. Where prompts name their
source, the statistics of each source stand beside those of all as `source/<name>/<statistic>`; a rank that has no row
of a source has no such names, and sums over ranks are made by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from megatron_papo.algorithm.advantages import reward_std
from megatron_papo.types import Group, Metrics

Values = Mapping[str, Iterable[float]]
_NO_NAME = re.compile(r"[^\w.-]+")


def rollout_sums(groups: Sequence[Group], merge_unit: int) -> Metrics:
    """Sums and counts over the rollouts of these groups; `merge_unit` is how many patches become one image token."""
    sums: dict[str, list[float]] = {"tokens": [], "response_tokens": [], "cut_off": []}
    sums |= {"prompt_tokens": [], "image_tokens": []}
    for group in groups:
        prompt_tokens = group.prompt.inputs.token_ids_S.numel()
        sums["prompt_tokens"].append(prompt_tokens)
        sums["image_tokens"].append(_image_tokens(group, merge_unit))
        sums["tokens"] += [prompt_tokens + len(rollout.response_ids) for rollout in group.rollouts]
        for name, values in _learning(group).items():
            sums.setdefault(name, []).extend(values)
    return sum_and_count(sums) | sums_by_source(groups, _of_a_source)


def sums_by_source(groups: Sequence[Group], statistics_of: Callable[[Group], Values]) -> Metrics:
    """Sums and counts of `statistics_of` each group that names its source, as `source/<name>/<statistic>`."""
    sums: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        if group.prompt.source:
            for name, values in statistics_of(group).items():
                sums[f"{source_prefix(group.prompt.source)}{name}"].extend(values)
    return sum_and_count(sums)


def source_prefix(source: str) -> str:
    """The beginning of the names of a source's metrics; what no name of a metric may hold becomes `_`."""
    return f"source/{_NO_NAME.sub('_', source)}/"


def sum_and_count(values: Values) -> Metrics:
    """The sum of the values of each name, with their number."""
    listed = {name: list(numbers) for name, numbers in values.items()}
    return {name: (float(sum(numbers)), float(len(numbers))) for name, numbers in listed.items()}


def _learning(group: Group) -> dict[str, list[float]]:
    """What says how the policy does on the prompt of a group, under the names of the metrics."""
    values: dict[str, list[float]] = {
        "response_tokens": [len(rollout.response_ids) for rollout in group.rollouts],
        "cut_off": [rollout.finish_reason == "length" for rollout in group.rollouts],
    }
    if group.rewards:
        values["reward"] = list(group.rewards)
        values["group/reward_std"] = [reward_std(group.rewards)]
        values["group/all_equal"] = [min(group.rewards) == max(group.rewards)]
    return values | {f"reward/{name}": list(parts) for name, parts in group.reward_parts.items()}


def _of_a_source(group: Group) -> dict[str, list[float]]:
    """The same, and whether the prompt was too easy or too hard: sources are weighed against each other by this."""
    values = _learning(group)
    if accuracy := group.reward_parts.get("accuracy"):
        values["group/all_right"] = [min(accuracy) >= 1]
        values["group/all_wrong"] = [max(accuracy) <= 0]
    return values


def _image_tokens(group: Group, merge_unit: int) -> int:
    """How many tokens of the group's prompt stand for its images."""
    grid_thw_I3 = group.prompt.inputs.grid_thw_I3
    return 0 if grid_thw_I3 is None else int(grid_thw_I3.prod(dim=1).sum()) // merge_unit
