"""Statistics of rollouts as sums and counts: rewards and their parts, lengths, groups whose rollouts agree.

Means are left out: `training/recorder.py` takes them once, from the sums over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_papo.algorithm.advantages import reward_std
from megatron_papo.types import Group, Metrics


def rollout_sums(groups: Sequence[Group], merge_unit: int) -> Metrics:
    """Sums and counts over the rollouts of these groups; `merge_unit` is how many patches become one image token."""
    sums: dict[str, list[float]] = {"tokens": [], "response_tokens": [], "cut_off": []}
    sums |= {"prompt_tokens": [], "image_tokens": []}
    for group in groups:
        prompt_tokens = group.prompt.inputs.token_ids_S.numel()
        sums["prompt_tokens"].append(prompt_tokens)
        sums["image_tokens"].append(_image_tokens(group, merge_unit))
        for rollout in group.rollouts:
            sums["tokens"].append(prompt_tokens + len(rollout.response_ids))
            sums["response_tokens"].append(len(rollout.response_ids))
            sums["cut_off"].append(rollout.finish_reason == "length")
        if group.rewards:
            sums.setdefault("reward", []).extend(group.rewards)
            sums.setdefault("group/reward_std", []).append(reward_std(group.rewards))
            sums.setdefault("group/all_equal", []).append(min(group.rewards) == max(group.rewards))
        for name, values in group.reward_parts.items():
            sums.setdefault(f"reward/{name}", []).extend(values)
    return {name: (float(sum(values)), float(len(values))) for name, values in sums.items()}


def _image_tokens(group: Group, merge_unit: int) -> int:
    """How many tokens of the group's prompt stand for its images."""
    grid_thw_I3 = group.prompt.inputs.grid_thw_I3
    return 0 if grid_thw_I3 is None else int(grid_thw_I3.prod(dim=1).sum()) // merge_unit
