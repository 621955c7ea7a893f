"""What an update should take on H100s, by arithmetic: the figures that a first run on GPUs is held against.

    python tools/predict_update.py            3B on one GPU, 7B on eight, 72B on 64; every recomputation and optimizer
    python tools/predict_update.py --frozen   with rows of one view, the masked one scored beforehand
    python tools/predict_update.py --model Qwen3-VL-4B Qwen3-VL-8B Qwen3-VL-32B

Memory is counted as `megatron_papo.costs.memory` does (traced in tests/cuda), seconds as the planner does, whose shares
of a GPU's peaks are assumptions until a run calibrates them. Rows are full: prompts of 1,500 tokens with eight
responses of 835, 16,360 tokens in both views of a joint row. Beside what is counted the planner keeps 6 GiB for CUDA,
NCCL and what the allocator loses. No engine is beside the trainer. Of the update's time the optimizer's step is a part.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

from rich.console import Console
from rich.table import Table

from megatron_papo.config import Config, load_config
from megatron_papo.costs.hardware import GPUS
from megatron_papo.costs.memory import GIB, RESERVE_BYTES
from megatron_papo.model.published_shapes import shape_named
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.candidates import OPTIMIZERS, RECOMPUTE
from megatron_papo.planning.estimate import Estimate
from megatron_papo.planning.measured_run import planned

PROMPT, IMAGE, RESPONSE, GROUP = 1500, 1156, 835, 8
ROWS = 4
"""Number of rows of an update on each data-parallel rank, for each of its pipeline stages."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "Qwen2.5-VL-3B": (1, {}),
    "Qwen2.5-VL-7B": (8, {"parallel.tensor": 2, "parallel.sequence": True}),
    "Qwen2.5-VL-72B": (64, {"parallel.tensor": 8, "parallel.pipeline": 4, "parallel.sequence": True}),
    "Qwen3-VL-4B": (1, {}),
    "Qwen3-VL-8B": (8, {"parallel.tensor": 2, "parallel.sequence": True}),
    "Qwen3-VL-32B": (32, {"parallel.tensor": 8, "parallel.sequence": True}),
}
"""Ranks, and how they share the model, by published name; the rest is data parallelism."""
USUAL = tuple(name for name in LAYOUTS if name.startswith("Qwen2.5"))
"""What is predicted where no model is named."""


def main() -> int:
    arguments = _arguments()
    frozen = arguments.frozen
    has = GPUS["H100"].memory_gib - RESERVE_BYTES / GIB
    columns = ("model", "optimizer", "recompute", "states", "activations", f"all, of {has:.1f}", "update", "MFU")
    table = Table(*columns, title=f"An update of {ROWS} rows a pipeline stage on H100s; GiB, seconds, % of bf16's peak")
    for name in arguments.model:
        ranks, layout = LAYOUTS[name]
        for optimizer in OPTIMIZERS:
            for recompute in RECOMPUTE:
                estimate = predicted(name, ranks, layout, optimizer, recompute, frozen)
                table.add_row(
                    f"{name.rpartition('-')[2]}, {estimate.candidate.name}",
                    optimizer,
                    recompute,
                    *_cells(estimate, has),
                )
    Console(width=120).print(table)
    return 0


def predicted(
    name: str, ranks: int, layout: dict[str, Any], optimizer: str, recompute: str, frozen: bool = False
) -> Estimate:
    config = settings(ranks, layout, optimizer, recompute, frozen)
    lengths = {"prompt_tokens": PROMPT, "image_tokens": IMAGE, "response_tokens": RESPONSE}
    return planned(config, shape_named(name), GPUS["H100"], ranks, Assumptions(), lengths)


def settings(ranks: int, layout: dict[str, Any], optimizer: str, recompute: str, frozen: bool) -> Config:
    pipeline = layout.get("parallel.pipeline", 1)
    data = ranks // (layout.get("parallel.tensor", 1) * pipeline)
    wanted = layout | {f"optim.{key}": value for key, value in OPTIMIZERS[optimizer].items()}
    wanted |= {
        "model.dtype": "bfloat16",
        "model.spec": "local",
        "model.recompute": recompute,
        "perception.masked_branch": "frozen" if frozen else "joint",
        "parallel.distributed_optimizer": True,
        "train.prompts_per_step": ROWS * pipeline * data,
        "train.group_size": GROUP,
        "train.updates_per_step": 1,
        "train.tokens_per_micro_batch": (1 if frozen else 2) * (PROMPT + GROUP * RESPONSE),
        "generation.max_response_tokens": RESPONSE,
        "generation.placement": "separate",
        "generation.engine": "vllm",
        "cluster.nodes": max(1, ranks // 8),
    }
    return load_config(None, [f"{key}={value}" for key, value in wanted.items()])


def _cells(estimate: Estimate, has: float) -> list[str]:
    fullest = estimate.fullest
    states, whole = (fullest.training - fullest.activations) / GIB, fullest.training / GIB
    fits = f"{whole:.1f}" if whole <= has else f"{whole:.1f}, too much"
    seconds, mfu = estimate.seconds["update"], estimate.mfu
    return [f"{states:.1f}", f"{fullest.activations / GIB:.1f}", fits, f"{seconds:.2f}", f"{100 * mfu:.0f}"]


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=USUAL, choices=LAYOUTS, help="published models")
    parser.add_argument("--frozen", action="store_true", help="rows of one view")
    return parser.parse_args()


if __name__ == "__main__":
    from megatron_papo.runtime.process import command

    sys.exit(command(main))
