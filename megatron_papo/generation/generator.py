"""The `Generator` protocol, which every engine implements. Each engine has a folder and inherits from no other;
`build_generator` chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_papo.generation.readings import Probe
from megatron_papo.types import Group, Metrics, Prompt

Report = Callable[[int, int], None]
"""Called while generating, with this rank's rollouts done so far and their total."""


@dataclass(frozen=True)
class Sampling:
    """How one call of `generate` draws tokens. Random numbers depend on `seed` and on each prompt's visit."""

    group_size: int
    temperature: float
    """0 is greedy: the likeliest token, its log-prob that of temperature 1 without top-k and top-p."""
    top_p: float
    top_k: int
    """0: no limit."""
    max_response_tokens: int
    seed: int
    masked: bool = False
    """Answer from the masked view of the images."""
    ignore_eos: bool = False
    """Every response has `max_response_tokens` tokens, whatever they are."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]")
        if self.top_k < 0 or self.group_size < 1 or self.max_response_tokens < 1:
            raise ValueError(f"top_k, group_size or max_response_tokens out of range: {self}")


class EngineLost(RuntimeError):
    """An engine died while it generated; raised on every rank of the world alike. `restart` makes a new one."""


class Generator(Protocol):
    """An engine on every rank. The ranks of a model-parallel group call each method together."""

    policy_version: int | None
    """Version of the weights in the engine; None before the first hand-over, after a restart, and while the engine has
    forgotten its weights."""
    forgotten_version: int | None
    """Version of the weights that the engine dropped when it went to sleep and that must be handed over again. None
    while it has weights, and if it never had any."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """`sampling.group_size` rollouts of each prompt, in the order of `prompts`.

        All ranks of a model-parallel group pass the same prompts and get the same groups. A rollout depends on
        (seed, the prompt's visit and id, its index in the group) and the weights alone, not on what else is generated.
        Raises EngineLost when the engine died.
        """
        ...

    def load_weights(self, named_tensors: Iterator[tuple[str, Tensor]], policy_version: int) -> None:
        """Takes over a whole model, one full tensor at a time.

        Names are those of the parameters in transformers' model of the family (`MODEL_CLASS` of its
        `transformers_classes`), not those of the published files; a tied head is left out. Every rank consumes the
        iterator to its end and in order: drawing from it may be a collective. Raises ValueError naming tensors that
        are missing, unknown or misshapen.
        """
        ...

    def probe(self, prompt: Prompt, sampling: Sampling) -> Probe:
        """Answers `prompt` once, by itself, and shows what the engine computed meanwhile, as far as it can be seen.

        The answer is the first rollout that `generate` would give; nothing that the engine keeps of other prompts is
        used, and nothing of this one is kept. All ranks call it together, the ranks of one engine with the same
        prompt. An engine in other processes shows the log-probs alone. Raises EngineLost as `generate` does.
        """
        ...

    def restart(self) -> None:
        """Starts the engine anew after EngineLost; it has no weights until the next `load_weights`. All ranks call."""
        ...

    def take_metrics(self) -> Metrics:
        """What this rank's engine measured since the last call, to be summed over ranks."""
        ...

    def close(self) -> None:
        """Ends the engine and frees what it holds."""
        ...
