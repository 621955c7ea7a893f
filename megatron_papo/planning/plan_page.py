"""A plan for a reader: a table on the console, the same as Markdown, and the chosen layout as settings."""

from __future__ import annotations

from collections.abc import Sequence

import yaml
from rich.console import Console
from rich.table import Table

from megatron_papo.config import Config
from megatron_papo.costs import full_rows
from megatron_papo.costs.memory import GIB
from megatron_papo.costs.stages import PLANNED_STAGES, shown_stage
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.candidates import Candidate, Refused
from megatron_papo.planning.estimate import Estimate
from megatron_papo.planning.published_runs import beside_published
from megatron_papo.planning.ranking import LayoutPlan
from megatron_papo.planning.scale import ScalePoint
from megatron_papo.planning.workload import Workload
from megatron_papo.text.untrusted import as_text

_MEMORY = {
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations",
    "engine": "engine's weights", "kv": "engine's KV cache",
}  # fmt: skip
"""Parts of `Memory` and what the table calls them; the first four are those of `papo check`, which counts the engine as
a whole, by its share of the GPU."""
HEADERS = (
    "layout", "stages", "recompute", "optimizer", "engine", *(f"{shown_stage(name)} s" for name in PLANNED_STAGES),
    "step s", "tokens/s/GPU", "MFU", "bubble", *(f"{name} GiB" for name in _MEMORY.values()), "peak GiB",
)  # fmt: skip


def cells(estimate: Estimate) -> list[str]:
    """The cells of one row of the table; memory is the fullest stage's."""
    candidate, memory = estimate.candidate, estimate.fullest
    return [
        candidate.name,
        _stages(candidate),
        candidate.recompute,
        candidate.optimizer,
        f"TP{candidate.engine_tensor}",
        *(f"{estimate.seconds[name]:.1f}" for name in PLANNED_STAGES),
        f"{estimate.step_s:.1f}",
        f"{estimate.tokens_per_s:,.0f}",
        f"{estimate.mfu:.2f}",
        f"{estimate.bubble:.2f}",
        *(f"{getattr(memory, name) / GIB:.1f}" for name in _MEMORY),
        f"{estimate.peak / GIB:.1f}",
    ]


def premises(config: Config, shape: ModelShape, work: Workload) -> str:
    """What memory and seconds are counted for: they differ, since memory has to hold the fullest row and seconds are
    those of the mean one."""
    return (
        f"Memory is that of {full_rows.in_words(config, work.shares)}, as `papo check` counts it. Seconds are those of "
        f"means: prompts of {work.text_tokens:,} text and {work.image_tokens(shape):,} image tokens, responses of "
        f"{work.response_tokens:,}."
    )


def print_plan(plan: LayoutPlan, shown: Sequence[Estimate], premises: str, explain: bool) -> None:
    """`premises`: what the figures are counted for."""
    console = Console()
    console.width = max(console.width, 220)
    table = Table(*HEADERS, title="fastest first; memory of the fullest GPU")
    for estimate in shown:
        table.add_row(*cells(estimate))
    console.print(table)
    console.print(premises, highlight=False, markup=False, soft_wrap=True)
    counts = plan.counts()
    console.print(f"{counts['fit']} ways fit, {counts['too_large']} do not, {counts['refused']} layouts cannot be.")
    if explain:
        for refused in plan.reasons():
            console.print(f"  {refused.name}: {as_text(refused.reason)}", highlight=False, markup=False, soft_wrap=True)


def markdown(estimates: Sequence[Estimate]) -> str:
    lines = ["| " + " | ".join(HEADERS) + " |", "|" + "---|" * len(HEADERS)]
    lines += ["| " + " | ".join(cells(each)) + " |" for each in estimates]
    return "\n".join(lines) + "\n"


def markdown_reasons(refused: Sequence[Refused]) -> str:
    return "".join(f"- {each.name}: {each.reason}\n" for each in refused)


def overrides_yaml(estimate: Estimate, has_gib: float) -> str:
    """Settings of the chosen layout, to extend a recipe with or to merge into one."""
    tree: dict[str, dict[str, object]] = {}
    share = (estimate.fullest.engine + estimate.fullest.kv) / GIB / has_gib
    values = estimate.candidate.overrides() | {"generation.gpu_memory_fraction": round(min(share + 0.02, 0.95), 2)}
    for key, value in values.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return yaml.safe_dump(tree, sort_keys=False)


def print_published(assumed: Assumptions) -> None:
    headers = (
        "published run",
        "GPUs",
        "layout",
        "precision",
        "published TFLOP/s/GPU",
        "predicted",
        "predicted / published",
    )
    table = Table(*headers, title="published Megatron runs on H100s")
    for run, predicted in beside_published(assumed):
        least, most = run.published
        told = f"{least:.0f}" if least == most else f"{least:.0f} to {most:.0f}"
        layout = f"TP{run.tensor} PP{run.pipeline} VP{run.virtual}"
        ratio = 2 * predicted / (least + most)
        table.add_row(
            run.name, f"{run.gpus:,}", layout, "FP8" if run.fp8 else "bf16", told, f"{predicted:.0f}", f"{ratio:.2f}"
        )
    Console().print(table)


SCALE_HEADERS = (
    "GPUs", "prompts a step", "layout", "step s", *(f"{shown_stage(name)} s" for name in PLANNED_STAGES),
    "tokens/s/GPU", "of the first", "MFU", "bubble", "what breaks first",
)  # fmt: skip


def scale_cells(point: ScalePoint) -> list[str]:
    best = point.best
    if best is None:
        return [str(point.gpus), str(point.prompts), "none", *["–"] * (len(SCALE_HEADERS) - 4), point.breaks]
    return [
        f"{point.gpus:,}",
        f"{point.prompts:,}",
        f"{best.candidate.name}, {best.candidate.recompute}",
        f"{best.step_s:.1f}",
        *(f"{best.seconds[name]:.1f}" for name in PLANNED_STAGES),
        f"{best.tokens_per_s:,.0f}",
        f"{point.efficiency:.2f}",
        f"{best.mfu:.2f}",
        f"{best.bubble:.2f}",
        point.breaks,
    ]


def print_scale(points: Sequence[ScalePoint], title: str) -> None:
    console = Console()
    console.width = max(console.width, 200)
    table = Table(*SCALE_HEADERS, title=title)
    for point in points:
        table.add_row(*scale_cells(point))
    console.print(table)


def scale_markdown(points: Sequence[ScalePoint]) -> str:
    lines = ["| " + " | ".join(SCALE_HEADERS) + " |", "|" + "---|" * len(SCALE_HEADERS)]
    return "\n".join([*lines, *("| " + " | ".join(scale_cells(point)) + " |" for point in points)]) + "\n"


def _stages(candidate: Candidate) -> str:
    """The layers of each stage, equal neighbours together: `19, 20 x2, 21`."""
    runs: list[tuple[int, int]] = []
    for layers in candidate.layers:
        if runs and runs[-1][0] == layers:
            runs[-1] = layers, runs[-1][1] + 1
        else:
            runs.append((layers, 1))
    return ", ".join(f"{layers} x{times}" if times > 1 else str(layers) for layers, times in runs)
