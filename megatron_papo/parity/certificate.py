"""A certificate: the findings of all ranks with their verdict, a summary in lines, and everything as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_papo.generation.readings import Precision
from megatron_papo.model.observed import KINDS, LOGPROBS, kind_of
from megatron_papo.parity.comparison import ENGINE, HUGGINGFACE, PAIRS, TRAINER, Case, Finding, first_departure


@dataclass(frozen=True)
class Sides:
    """Who was compared, and how each party computes."""

    precisions: Mapping[str, Precision]
    """Party -> what it computes in."""
    engine: str
    layout: Mapping[str, Any]
    huggingface_weights: str
    """Where transformers had its weights from: `model.path`, or the trainer's."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Party -> why it was left out."""

    def with_huggingface(self, precision: Precision) -> Sides:
        """The same, where Hugging Face computes in `precision`."""
        return replace(self, precisions={**self.precisions, HUGGINGFACE: precision})

    def without_huggingface(self, reason: str) -> Sides:
        """The same, where Hugging Face is left out for `reason`."""
        return replace(self, missing={**self.missing, HUGGINGFACE: reason})


@dataclass(frozen=True)
class Tokens:
    """The response to one prompt, token by token."""

    prompt_id: str
    tokens: Sequence[str]
    logprobs: Mapping[str, Sequence[float]]
    """Party -> log-prob of each token, in nats."""


@dataclass(frozen=True)
class Certificate:
    """The comparison of all parties after `step` optimizer steps."""

    step: int
    at_start: bool
    """Whether it was made before the run's first step."""
    findings: Sequence[Finding]
    """The worst of any rank for each part, pair of parties and unit, in the order in which a model computes parts."""
    not_looked_at: Mapping[str, Mapping[str, str]]
    """Kind of part -> party -> why."""
    responses: Sequence[Tokens]
    """The responses of the engine of the rank that writes."""
    sides: Sides

    @classmethod
    def of(
        cls,
        *,
        step: int,
        at_start: bool,
        findings: Sequence[Finding],
        cases: Sequence[Case],
        responses: Sequence[Sequence[str]],
        sides: Sides,
    ) -> Certificate:
        """From the findings of all ranks, each rank's in the same order, and this rank's cases."""
        worst: dict[tuple[str, str, str, str], Finding] = {}
        for finding in findings:
            key = finding.part, finding.party, finding.other, finding.unit
            if key not in worst or not finding.difference <= worst[key].difference:
                worst[key] = finding
        tokens = [
            Tokens(
                case.prompt_id, words, {party: read.parts[LOGPROBS].tolist() for party, read in case.readings.items()}
            )
            for case, words in zip(cases, responses, strict=True)
        ]
        return cls(step, at_start, list(worst.values()), _not_looked_at(cases, sides), tokens, sides)

    @property
    def departure(self) -> Finding | None:
        """The first part that departs; None when all parties agree."""
        return first_departure(self.findings)

    @property
    def verdict(self) -> str:
        """Whether all parties agree, or which part departs first; one line."""
        departure = self.departure
        if departure is None:
            parties, parts = self.parties, {finding.part for finding in self.findings}
            return f"certificate: {', '.join(parties[:-1])} and {parties[-1]} agree on {len(parts)} parts"
        several = self.sides.layout.get("ranks", 1) > 1
        return f"certificate: {departure.line()}" + (f", rank {departure.rank}" if several else "")

    @property
    def parties(self) -> list[str]:
        """The parties that were compared."""
        compared = {name for finding in self.findings for name in (finding.party, finding.other)}
        return [party for party in (HUGGINGFACE, TRAINER, ENGINE) if party in compared]

    def logprobs_gap(self) -> dict[str, float]:
        """The difference between engine and trainer in nats: its `mean` over tokens, and its `max`."""
        return {
            "mean" if finding.unit.endswith("average") else "max": finding.difference
            for finding in self.findings
            if (finding.part, finding.party, finding.other) == (LOGPROBS, *PAIRS[-1])
        }

    def summary(self) -> list[str]:
        """One line for each kind of part: the finding that is closest to its limit, or why it was not looked at."""
        lines = []
        for kind in KINDS:
            own = [finding for finding in self.findings if kind_of(finding.part) == kind]
            for reason in sorted({f"{party}: {why}" for party, why in self.not_looked_at.get(kind, {}).items()}):
                lines.append(f"{kind}: not looked at: {reason}")
            if own:
                worst = next((each for each in own if not each.passed), max(own, key=_share))
                lines.append(f"{'ok  ' if worst.passed else 'FAIL'} {worst.line()}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Everything, in values that JSON has."""
        tree = {
            "step": self.step,
            "at_start": self.at_start,
            "passed": self.departure is None,
            "verdict": self.verdict,
            "sides": asdict(self.sides),
            "findings": [asdict(finding) | {"passed": finding.passed} for finding in self.findings],
            "not_looked_at": {kind: dict(why) for kind, why in self.not_looked_at.items()},
            "responses": [asdict(tokens) for tokens in self.responses],
        }
        return _plain(tree)


def _not_looked_at(cases: Sequence[Case], sides: Sides) -> dict[str, dict[str, str]]:
    """Of the kinds that any party has: the model of a run need not have all."""
    present = {kind_of(part) for case in cases for reading in case.readings.values() for part in reading.parts}
    reasons: dict[str, dict[str, str]] = {}
    for case in cases:
        for party, reading in case.readings.items():
            for kind, why in reading.missing.items():
                reasons.setdefault(kind, {})[party] = why
    for party, why in sides.missing.items():
        for kind in KINDS:
            reasons.setdefault(kind, {})[party] = why
    return {kind: reasons[kind] for kind in KINDS if kind in reasons and kind in present}


def _share(finding: Finding) -> float:
    return finding.difference / finding.limit if finding.limit else finding.difference


def _plain(value: Any) -> Any:
    """The value with text in place of numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
