"""Percentiles of the lengths of a step's prompts and responses, over all ranks.

How often each length occurs travels like every metric, as a sum over ranks and rounds: `lengths/<what>/<tokens>`. A
record has the percentiles of the totals alone.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from megatron_papo.types import Group, Metrics

_LENGTHS = "lengths/"
_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


def length_counts(groups: Sequence[Group]) -> Metrics:
    """How many prompts and responses of these groups have each number of tokens."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[f"prompt_tokens/{group.prompt.inputs.token_ids_S.numel()}"] += 1
        counts.update(f"response_tokens/{len(rollout.response_ids)}" for rollout in group.rollouts)
    return {f"{_LENGTHS}{name}": (float(count), 1.0) for name, count in counts.items()}


def split_lengths(sums: Metrics) -> tuple[Metrics, dict[str, float]]:
    """The sums without those of `length_counts`, and percentiles of these: `response_tokens_p50` and so on. What stands
    before `lengths/` in a name stands before the name of the percentile: `trained/response_tokens_p50`."""
    rest: Metrics = {}
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for name, (total, count) in sums.items():
        before, mark, after = name.partition(_LENGTHS)
        if mark:
            what, _, tokens = after.rpartition("/")
            counts[before + what][int(tokens)] += round(total)
        else:
            rest[name] = total, count
    found = {
        f"{what}_{name}": _percentile(each, share)
        for what, each in counts.items()
        for name, share in _PERCENTILES.items()
    }
    return rest, found


def _percentile(counts: Mapping[int, int], share: float) -> float:
    """The smallest length such that at least `share` of all are no longer."""
    wanted, seen = math.ceil(share * sum(counts.values())), 0
    for length, count in sorted(counts.items()):
        seen += count
        if seen >= wanted:
            return float(length)
    raise AssertionError("the shares are at most 1")
