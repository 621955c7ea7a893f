"""From groups and sums to what a person reads: one record of numbers a step, sample tables, lines on the console."""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from PIL import Image
from rich.console import Console
from rich.table import Table

from megatron_papo.config import dump_config
from megatron_papo.data.dataset import BadRows
from megatron_papo.generation.pictures import pictures
from megatron_papo.observe.samples import SampleRow
from megatron_papo.observe.sinks import Sinks
from megatron_papo.parallel import gather_objects, sum_metrics
from megatron_papo.run import Run
from megatron_papo.types import Group, Metrics

_STAGES = ("draw", "generate", "reward", "advantage", "pack", "score", "update", "hand over")
"""Those of a step: what tokens per second are counted over."""
_SCORES = ("accuracy", "format", "masked_accuracy", "gap", "perception_kl", "response_tokens")


class Recorder:
    """Logs steps from `first_step` on to every sink of `run.folder`; all ranks call it, the writer writes."""

    def __init__(self, run: Run, first_step: int, num_steps: int):
        config = run.config
        self._run, self._num_steps = run, num_steps
        self._sinks = Sinks(
            config.observe,
            run.folder,
            dump_config(config),
            enabled=run.is_writer,
            start_step=first_step,
            num_steps=num_steps,
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sinks.close()

    def record(self, step: int, groups: Sequence[Group], metrics: Metrics, scores: dict[str, float]) -> None:
        """One step: means of the loss's sums, of rewards and lengths over all ranks, seconds of each stage, and the
        scores of an evaluation when there was one."""
        times = self._run.clock.take()
        sums = metrics | sum_metrics(group_sums(groups))
        values = {name: total / count for name, (total, count) in sums.items() if count}
        if "perception_kl_squared" in values:
            values["perception_kl_variance"] = values.pop("perception_kl_squared") - values["perception_kl"] ** 2
        del values["tokens"]
        values["tokens_per_s"] = sums["tokens"][0] / sum(times.get(f"time/{stage}", 0.0) for stage in _STAGES)
        values |= times | {f"eval/{name}": value for name, value in scores.items()}
        self._sinks.log(step, values)
        every = self._run.config.observe.samples_every
        if every and (step % every == 0 or step + 1 == self._num_steps):
            self._sinks.samples(step, self._samples(groups))

    def _samples(self, groups: Sequence[Group]) -> list[SampleRow]:
        if not self._run.is_writer:
            return []
        chosen = groups[: self._run.config.observe.samples]
        return [_sample(self._run, group) for group in chosen]


def group_sums(groups: Sequence[Group]) -> Metrics:
    """Sums over this rank's rollouts and groups: rewards and their parts, lengths, groups that agree."""
    sums: dict[str, list[float]] = {"tokens": [], "response_tokens": [], "cut_off": []}
    for group in groups:
        prompt_tokens = group.prompt.inputs.token_ids_S.numel()
        for rollout in group.rollouts:
            sums["tokens"].append(prompt_tokens + len(rollout.response_ids))
            sums["response_tokens"].append(len(rollout.response_ids))
            sums["cut_off"].append(rollout.finish_reason == "length")
        if group.rewards:
            sums.setdefault("reward", []).extend(group.rewards)
            sums.setdefault("group/reward_std", []).append(statistics.pstdev(group.rewards))
            sums.setdefault("group/all_equal", []).append(min(group.rewards) == max(group.rewards))
        for name, values in group.reward_parts.items():
            sums.setdefault(f"reward/{name}", []).extend(values)
    return {name: (float(sum(values)), float(len(values))) for name, values in sums.items()}


def _sample(run: Run, group: Group) -> SampleRow:
    """The first rollout of the group: nothing is picked."""
    rollout, prompt = group.rollouts[0], group.prompt
    masked: tuple[Image.Image, ...] = ()
    if prompt.masked_pixel_values_PD is not None:
        grid_thw_I3 = prompt.inputs.grid_thw_I3
        assert grid_thw_I3 is not None
        masked = tuple(pictures(prompt.masked_pixel_values_PD, grid_thw_I3, run.processor.image_processor))
    return SampleRow(
        problem=prompt.problem,
        answer=prompt.answer,
        response=rollout.text,
        images=prompt.images,
        masked_images=masked,
        reward=group.rewards[0] if group.rewards else 0.0,
        reward_parts={name: values[0] for name, values in group.reward_parts.items()},
    )


def name_bad_rows(run: Run, bad_rows: BadRows, which: str) -> None:
    """A line for every row that any rank has just left out, and how many there are by now; all ranks call it."""
    shares = gather_objects(([str(bad) for bad in bad_rows.take_new()], bad_rows.counts), run.layout.data_group)
    new = sorted({text for texts, _ in shares for text in texts})
    for text in new:
        warn(run, f"data.{which}: {text}: left out")
    if new:
        counts = sum((Counter(counts) for _, counts in shares), Counter())
        warn(
            run,
            f"data.{which}: left out so far: " + ", ".join(f"{reason} {num}" for reason, num in sorted(counts.items())),
        )


def print_scores(scores: dict[str, float]) -> None:
    """An evaluation as a table on the console."""
    table = Table("score", "value")
    for name in _SCORES:
        if name in scores:
            table.add_row(name, f"{scores[name]:.3f}")
    Console().print(table)


def say(run: Run, text: str) -> None:
    """One line on the console, once for the whole run."""
    if run.is_writer:
        print(f"papo: {text}", flush=True)


def warn(run: Run, text: str) -> None:
    if run.is_writer:
        print(f"papo: warning: {text}", file=sys.stderr, flush=True)
