"""The best layout of ever more nodes: with the same batch (strong scaling) and with one that grows with them (weak)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_papo.config import Config
from megatron_papo.costs.hardware import Cluster, Gpu
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.estimate import Estimate
from megatron_papo.planning.ranking import plan
from megatron_papo.planning.workload import Workload


@dataclass(frozen=True)
class ScalePoint:
    """The best layout of one number of GPUs."""

    gpus: int
    prompts: int
    """Prompts per step."""
    best: Estimate | None
    efficiency: float
    """Tokens per second and GPU as a share of the first point's; 0 where nothing fits."""
    breaks: str
    """The stage that costs most of what exceeds the ideal line, or why nothing fits."""


def scale(
    config: Config,
    shape: ModelShape,
    gpu: Gpu,
    nodes: Sequence[int],
    assumed: Assumptions,
    lengths: Mapping[str, int | None],
    *,
    weak: bool,
) -> list[ScalePoint]:
    """The best layout of each number of nodes; `lengths`: text_tokens, image_tokens and response_tokens of
    `Workload.of`."""
    points: list[ScalePoint] = []
    for num in nodes:
        prompts = config.train.prompts_per_step * num // nodes[0] if weak else config.train.prompts_per_step
        train = config.train.model_copy(update={"prompts_per_step": prompts})
        grown, cluster = config.model_copy(update={"train": train}), Cluster(gpu, num)
        work = Workload.of(
            grown,
            shape,
            text_tokens=lengths["text_tokens"] or 0,
            image_tokens=lengths["image_tokens"] or 0,
            response_tokens=lengths["response_tokens"],
        )
        layouts = plan(grown, shape, cluster, assumed, work)
        best = layouts.fitting[0] if layouts.fitting else None
        first = points[0].best if points else best
        efficiency = best.tokens_per_s / first.tokens_per_s if best and first else 0.0
        breaks = layouts.reasons()[-1].reason if best is None else _breaks(best, first, num / nodes[0], weak)
        points.append(ScalePoint(cluster.num_gpus, prompts, best, efficiency, breaks))
    return points


def _breaks(best: Estimate, first: Estimate | None, times: float, weak: bool) -> str:
    """The stage that exceeds the ideal line most; with the pipeline's bubble where the stage is one that has it."""
    ideal = 1.0 if weak else 1 / times
    if first is None or best is first or best.step_s <= first.step_s * ideal:
        return ""
    extra = {name: best.seconds[name] - first.seconds[name] * ideal for name in best.seconds if "/" not in name}
    name = max(extra, key=lambda name: extra[name])
    told = f"{name}: {best.seconds[name]:.1f} s, {first.seconds[name] * ideal:.1f} on the ideal line"
    if name not in ("update", "score"):
        return told
    gradients = best.seconds["update/gradients"]
    return f"{told} (bubble {best.bubble:.2f} with {best.num_rows} rows a rank, gradients {gradients:.1f} s)"
