"""What the planner takes for granted beside data sheets, each with its ground; `--calibrate` fits some to a run.

A share is of the data sheet's rate. The best seen on an H100: 790 of 989.5 TFLOP/s for a bf16 product of 8192 x 8192 x
8192, 3.0 of 3.35 TB/s for a copy. The shares of products and of hidden exchanges are those that come nearest to four
published figures of Megatron (`published_runs.py`), within 8 %.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_papo.files.small_files import read_object


@dataclass(frozen=True)
class Assumptions:
    """Shares of the rates in data sheets, latencies and fitted factors."""

    matmul: float = 0.62
    """Share of the peak in bf16 products of the layers, with what clocks lose under load."""
    fp8_matmul: float = 0.6
    """Share of FP8's peak, rounding included."""
    attention: float = 0.45
    """Share of the bf16 peak in variable-length flash attention, forward and backward together."""
    memory: float = 0.85
    """Share of the memory's rate in element-wise kernels, the optimizer and decoding."""
    link: float = 0.75
    """Share of NVLink's rate in collectives within a node."""
    network: float = 0.8
    """Share of the network's rate in collectives between nodes."""
    hidden_tensor: float = 0.5
    """Share of tensor-parallel exchanges that computation hides with parallel.overlap_tensor."""
    hidden_data: float = 0.9
    """Share of the exchange of gradients and weights that computation hides with parallel.overlap_data."""
    latency_s: float = 12e-6
    """Seconds of one collective on a node, its launch included."""
    network_latency_s: float = 8e-6
    """Seconds of one hop between nodes: a tree of n nodes has log2(n)."""
    layer_launch_s: float = 60e-6
    """Host time of a layer's kernels without CUDA graphs, forward; computation shorter than this does not count."""
    row_spread: float = 0.05
    """By how much a row's cost may differ from the mean after balancing: what ranks wait for each other."""
    decode_launch_s: float = 1.5e-3
    """Seconds of one decoding pass beside what memory and links take: scheduler, sampling, graph launch."""
    length_tail: float = 2.5
    """Passes of decoding over the mean length: the longest response of a batch, at most the limit."""
    handover: float = 0.5
    """Share of links' rates in the weight hand-over, the engine's loading included."""
    update_factor: float = 1.0
    """Fitted by `--calibrate`: measured over planned seconds of the updates."""
    score_factor: float = 1.0
    """The same for scoring."""
    generate_factor: float = 1.0
    """The same for generation."""
    handover_factor: float = 1.0
    """The same for the hand-over."""

    @classmethod
    def load(cls, path: Path) -> Assumptions:
        """The assumptions in a file that `save` wrote, or a person. Raises ValueError naming file and key."""
        values = read_object(path)
        known = {field.name for field in fields(cls)}
        for key, value in values.items():
            if key not in known or not isinstance(value, int | float):
                raise ValueError(f"{path}: {key}: no such assumption, or no number")
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def factor_of(stage: str) -> str:
    """The name of the assumption that a planned stage's seconds are multiplied with: `handover_factor`."""
    return f"{stage.replace('_', '')}_factor"
