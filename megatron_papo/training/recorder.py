"""What a run records: one line of numbers for each step, made of sums over all ranks, and tables of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType

from PIL import Image

from megatron_papo.config import Config, dump_config
from megatron_papo.costs.hardware import peak_tflops
from megatron_papo.costs.stages import STEP_STAGES
from megatron_papo.distributed.accelerator import device_name, parameter_dtype
from megatron_papo.distributed.exchange import gather_objects, sum_metrics
from megatron_papo.distributed.layout import Layout
from megatron_papo.generation.engine_images import pictures
from megatron_papo.model.shape import ModelShape
from megatron_papo.observe.samples import SampleRow
from megatron_papo.observe.sinks import Sinks
from megatron_papo.training.console import warn
from megatron_papo.training.length_percentiles import length_counts, split_lengths
from megatron_papo.training.own_metrics import OwnMetrics
from megatron_papo.training.rollout_metrics import rollout_sums
from megatron_papo.training.session import Run
from megatron_papo.types import Group, Metrics

StepPlanner = Callable[[Config, ModelShape, str | None, int], Callable[[Mapping[str, float]], dict[str, float]]]
"""Makes the function that predicts a step for one run: from its settings, the model's shape, CUDA's name of the GPU
(None: no GPU) and the number of trainer ranks. That function takes the metrics of a measured step and returns the
metrics `planned/...`. The command line hands `planning.measured_run.step_planner` over: training imports no planner."""


class Recorder:
    """Logs steps from `first_step` on to every sink of `run.folder`. All ranks call it; the writer writes."""

    def __init__(self, run: Run, first_step: int, num_steps: int, planner: StepPlanner | None = None):
        """`planner`: predicts each step, whose record then has the prediction beside what was measured."""
        config = run.config
        self._run, self._num_steps = run, num_steps
        dtype = str(parameter_dtype(config.model.dtype)).removeprefix("torch.")
        self._peak = config.observe.peak_tflops or peak_tflops(device_name(), dtype)
        self._fp8_peak = peak_tflops(device_name(), "fp8")
        self._plan = planner(config, run.shape, device_name(), run.layout.world_size) if planner else None
        self._own_metrics = OwnMetrics(run)
        self._sinks = Sinks(
            config.observe,
            run.folder,
            dump_config(config),
            enabled=run.is_writer,
            start_step=first_step,
            num_steps=num_steps,
            warn=partial(warn, run),
            wandb_run=run.wandb_run,
        )

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._sinks.close()

    def record_start(self, scores: dict[str, float]) -> None:
        """Records an evaluation of the starting weights. The record of a step has the scores after that step, so these
        are in the record of step -1."""
        times, memory = _split(self._run.clock.take())
        values = {f"eval/{name}": value for name, value in scores.items()}
        self._sinks.log(-1, values | times | _max_over_ranks(memory, self._run.layout))

    def record(self, step: int, groups: Sequence[Group], metrics: Metrics, scores: dict[str, float]) -> None:
        """Records one step: means of the loss's sums, of rewards and lengths over all ranks, seconds and peak memory of
        each stage, the model's FLOPs, and the scores of an evaluation where there was one.

        `groups` are those that were trained on. Where `metrics` has the sums over everything that was generated, the
        names of the sums over `groups` begin with `trained/`.
        """
        own = self._own_metrics.of_step(groups, step)
        times, memory = _split(self._run.clock.take())
        work = {name: (float(value), 1.0) for name, value in self._run.meter.take().items()}
        prefix = "trained/" if "tokens" in metrics else ""
        trained = rollout_sums(groups, self._run.shape.vision.merge_unit) | length_counts(groups)
        sums = metrics | sum_metrics({f"{prefix}{name}": value for name, value in trained.items()} | work | own)
        sums, lengths = split_lengths(sums)
        sums.pop("trained/tokens", None)
        totals = {name: sums.pop(name)[0] for name in ("tokens", *work)}
        values = {name: total / count for name, (total, count) in sums.items() if count}
        if "perception_kl_squared" in values:
            values["perception_kl_variance"] = values.pop("perception_kl_squared") - values["perception_kl"] ** 2
        values |= lengths | {name: total for name, total in totals.items() if name.startswith("flops/")}
        values |= self._speeds(totals, times) | times | _max_over_ranks(memory, self._run.layout)
        values |= {f"eval/{name}": value for name, value in scores.items()}
        values |= {name: float(count) for name, count in self._run.counts.items()}
        values |= {"ranks": float(self._run.layout.world_size)}
        values |= self._plan(values) if self._plan else {}
        self._sinks.log(step, values)
        every = self._run.config.observe.samples_every
        if every and (step % every == 0 or step + 1 == self._num_steps):
            self._sinks.samples(step, self._samples(groups))

    def _speeds(self, totals: dict[str, float], times: dict[str, float]) -> dict[str, float]:
        """`time/step`, the seconds of all stages of the step. Over these, `tokens_per_s` of the rollouts, each with its
        prompt, the same for each GPU (those of separate engines count too), and `tokens_computed_per_s` of the rows of
        updates, in which rollouts may share a prompt. `tflops_per_gpu` and `mfu` of `update`: of
        the peak in the model's dtype also where products are in FP8, so that both kinds of run compare; `mfu_fp8` is of
        FP8's peak then, a share that no model reaches, for attention and the head are not in FP8."""
        seconds = sum(times.get(f"time/{stage}", 0.0) for stage in STEP_STAGES)
        tflops = totals["update_flops"] / times["time/update"] / self._run.layout.world_size / 1e12
        num_gpus = self._run.layout.world_size + self._run.config.generation.num_engine_ranks
        values = {
            "time/step": seconds,
            "tokens_per_s": totals["tokens"] / seconds,
            "tokens_per_s_per_gpu": totals["tokens"] / seconds / num_gpus,
            "tokens_computed_per_s": totals["update_tokens"] / seconds,
            "tflops_per_gpu": tflops,
        }
        fp8 = self._run.policy.fp8
        peaks = {"mfu": self._peak, "mfu_fp8": self._fp8_peak if fp8.allowed and fp8.settings.update else None}
        return values | {name: tflops / peak for name, peak in peaks.items() if peak}

    def _samples(self, groups: Sequence[Group]) -> list[SampleRow]:
        if not self._run.is_writer:
            return []
        chosen = groups[: self._run.config.observe.samples]
        return [_sample(self._run, group) for group in chosen]


def _split(readings: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The clock's readings in seconds, and those in GiB (`memory_gib/...`)."""
    memory = {name: value for name, value in readings.items() if name.startswith("memory_gib/")}
    return {name: value for name, value in readings.items() if name not in memory}, memory


def _max_over_ranks(values: dict[str, float], layout: Layout) -> dict[str, float]:
    """The largest of each value on any rank of the world; all ranks call it."""
    for group in (layout.model_group, layout.data_group):
        shares = gather_objects(values, group)
        values = {name: max(share.get(name, 0.0) for share in shares) for name in sorted(set().union(*shares))}
    return values


def _sample(run: Run, group: Group) -> SampleRow:
    """A line of the sample table: always the first rollout of the group, so that no sample is picked."""
    rollout, prompt = group.rollouts[0], group.prompt
    masked: tuple[Image.Image, ...] = ()
    if prompt.masked_pixel_values_PD is not None:
        grid_thw_I3 = prompt.inputs.grid_thw_I3
        assert grid_thw_I3 is not None
        masked = tuple(pictures(prompt.masked_pixel_values_PD, grid_thw_I3, run.processor.image_processor))
    return SampleRow(
        problem=prompt.problem,
        answer=" or ".join(prompt.answers),
        response=run.processor.response_prefix + rollout.text,  # as it was rewarded
        images=prompt.images,
        masked_images=masked,
        reward=group.rewards[0] if group.rewards else 0.0,
        reward_parts={name: values[0] for name, values in group.reward_parts.items()},
        source=prompt.source,
    )
