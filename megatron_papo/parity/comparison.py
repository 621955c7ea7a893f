"""Compares readings: one finding for each part and pair of parties, the worst over the prompts. Pure torch.

Token ids and position ids are counted where they differ. Pixels and angles: the largest difference. Image features and
hidden states: of every token the root mean square of the difference over that of the values, their mean and the
largest; the scale is each token's own, since a few tokens of a trained model have values a thousand times those of
others. Log-probs: the mean over all response tokens of all prompts, and the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_papo.generation.readings import Precision, Reading
from megatron_papo.model.observed import ANGLES, KINDS, LOGPROBS, PIXELS, POSITION_IDS, TOKEN_IDS, kind_of, number_of
from megatron_papo.parity.limits import Limits, coarser

HUGGINGFACE, TRAINER, ENGINE = "Hugging Face", "trainer", "engine"
PAIRS = ((TRAINER, HUGGINGFACE), (ENGINE, HUGGINGFACE), (ENGINE, TRAINER))
"""(the party under suspicion, the party it is compared with), in the order in which they are named."""


@dataclass(frozen=True)
class Case:
    """What each party computed for one prompt."""

    prompt_id: str
    readings: Mapping[str, Reading]
    """What each party computed, by the party's name."""


@dataclass(frozen=True)
class Finding:
    """How far two parties are apart on one part."""

    part: str
    party: str
    other: str
    difference: float
    unit: str
    limit: float
    prompt_id: str = ""
    """The prompt in which the difference is largest."""
    place: int = -1
    """The token, patch or response token in it where the difference is largest, counted among the kept ones."""
    rank: int = 0

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit."""
        return self.difference <= self.limit  # false for NaN

    def line(self) -> str:
        """The finding in one line."""
        size, limit = f"{self.difference:.2g}{self.unit}", f"limit {self.limit:g}"
        if self.passed:
            return f"{self.part}: {self.party} and {self.other} are {size} apart ({limit})"
        return f"{self.part}: {self.party} departs from {self.other} by {size} ({limit})"


def compare(cases: Sequence[Case], precisions: Mapping[str, Precision], limits: Limits, rank: int) -> list[Finding]:
    """Findings in the order in which a model computes the parts; a part is compared where both parties have it."""
    findings = []
    for part in sorted({name for case in cases for each in case.readings.values() for name in each.parts}, key=_order):
        for party, other in PAIRS:
            sides = [
                (case.prompt_id, case.readings[party].parts[part], case.readings[other].parts[part])
                for case in cases
                if all(name in case.readings and part in case.readings[name].parts for name in (party, other))
            ]
            if sides:
                precision = coarser(precisions[party], precisions[other])
                for unit, limit, differences in _measure(part, sides, precision, limits):
                    findings.append(
                        Finding(part, party, other, differences[0], unit, limit, *differences[1:], rank=rank)
                    )
    return findings


def first_departure(findings: Sequence[Finding]) -> Finding | None:
    """The finding of the first part that departs and of the first pair that does; the worst of several ranks."""
    failed = [finding for finding in findings if not finding.passed]
    return min(failed, key=_first, default=None)


def _first(finding: Finding) -> tuple[tuple[int, int], int, float]:
    size = finding.difference if finding.difference == finding.difference else math.inf
    return _order(finding.part), PAIRS.index((finding.party, finding.other)), -size


def _order(part: str) -> tuple[int, int]:
    return KINDS.index(kind_of(part)), number_of(part)


Side = tuple[str, Tensor, Tensor]
"""(prompt, one party's values, the other's)."""
Worst = tuple[float, str, int]
"""(difference, prompt, place)."""
Measure = Callable[[Tensor, Tensor], Tensor]
"""From two parties' values to one number a token."""


def _measure(
    part: str, sides: Sequence[Side], precision: Precision, limits: Limits
) -> Iterator[tuple[str, float, Worst]]:
    """(unit, limit, worst difference) for each measure of the part."""
    misshapen = next((prompt_id for prompt_id, one, other in sides if one.shape != other.shape), None)
    if misshapen is not None:
        yield " (of another length)", 0.0, (math.inf, misshapen, -1)
    elif part in (TOKEN_IDS, POSITION_IDS):
        yield " places", 0.0, _counted(sides)
    elif part in (PIXELS, ANGLES):
        limit = min(limits.of_values(part, one, other) for _, one, other in sides)
        yield "", limit, _largest(sides, lambda one, other: (one - other).abs().amax(-1))
    elif part == LOGPROBS:
        yield from _mean_and_largest(
            sides, lambda one, other: (one - other).abs(), " nats", limits.of_logprobs(precision)
        )
    else:
        yield from _mean_and_largest(sides, _relative, " of its rms", limits.of_layers(precision))


def _mean_and_largest(
    sides: Sequence[Side], measure: Measure, unit: str, limits: tuple[float, float]
) -> Iterator[tuple[str, float, Worst]]:
    mean = float(torch.cat([measure(one.float(), other.float()) for _, one, other in sides]).mean())
    worst = _largest(sides, measure)
    yield f"{unit} on average", limits[0], (mean, *worst[1:])
    yield f"{unit} at most", limits[1], worst


def _counted(sides: Sequence[Side]) -> Worst:
    """How many places differ over all prompts, and the first of them."""
    total, where = 0, ("", -1)
    for prompt_id, one, other in sides:
        differs_T = (one != other).flatten(1).any(1) if one.dim() > 1 else one != other
        if total == 0 and differs_T.any():
            where = prompt_id, int(differs_T.nonzero()[0])
        total += int(differs_T.sum())
    return float(total), *where


def _largest(sides: Sequence[Side], measure: Measure) -> Worst:
    worst: Worst = (-1.0, "", -1)
    for prompt_id, one, other in sides:
        values_T = measure(one.float(), other.float())
        values_T = values_T.nan_to_num(math.inf, math.inf, math.inf)
        place = int(values_T.argmax())
        if values_T[place] > worst[0]:
            worst = float(values_T[place]), prompt_id, place
    return worst


def _relative(one_TH: Tensor, other_TH: Tensor) -> Tensor:
    """[T] root mean square of a token's difference over that of its values; 1 stands for that of a token of zeros."""
    size_T = other_TH.pow(2).mean(-1).sqrt()
    return (one_TH - other_TH).pow(2).mean(-1).sqrt() / torch.where(size_T > 0, size_T, 1.0)
