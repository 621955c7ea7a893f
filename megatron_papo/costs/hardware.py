"""The table of GPUs by their data sheets, and clusters of them. What of a peak is reached stands in
`planning/assumptions.py`.

Sources: NVIDIA's data sheets of A100 (SXM, 80 and 40 GB), H100 (SXM and PCIe), H200 (SXM and NVL) and HGX B200, which
print the bfloat16 of all but A100, and FP8, with sparsity, twice what stands here. Rates are those of one direction:
NVLink's sheets add up both. The network is what such nodes are sold with: a 200 Gb/s (A100) or 400 Gb/s adapter for
each GPU.

Memory is what `nvidia-smi` states, the upper bound of what a process can have (CUDA gives 0.3 to 0.7 GiB less: 79.1 of
an H100, 178.4 of a B200). A100 and H100: github.com/modal-labs/modal-client/pull/2797; B200 as CUDA sees it:
github.com/pytorch/ao/pull/4002; the others are nvidia-smi's lines on HGX machines.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIB_PER_GIB = 1024
_HOPPER_RECIPES = ("tensorwise", "delayed", "blockwise")


@dataclass(frozen=True)
class Peaks:
    """Peak rates in TFLOPS without sparsity."""

    bfloat16: float
    """The rate of the tensor cores."""
    float32: float
    """Without TF32, as torch computes by default."""
    fp8: float | None
    """None: the GPU has no FP8."""


@dataclass(frozen=True)
class Gpu:
    name: str
    """As the setting `cluster.gpu` names it."""
    device_name: str
    """How the name begins that CUDA gives to a GPU with these peaks."""
    peaks: Peaks
    memory_gib: float
    memory_gb_s: float
    """Rate of its own memory."""
    link_gb_s: float
    """Rate of NVLink, one direction, to all other GPUs of the node together."""
    network_gb_s: float
    """Rate of its share of the node's network, one direction."""
    host_gb_s: float
    """Rate of PCIe, one direction."""
    fp8_recipes: tuple[str, ...] | None = ()
    """Values of `fp8.recipe` that it computes; None: not listed, left to the ranks to find out."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", "NVIDIA A100", Peaks(312.0, 19.5, None), 40960 / _MIB_PER_GIB, 1555.0, 300.0, 25.0, 32.0),
        Gpu("A100", "NVIDIA A100", Peaks(312.0, 19.5, None), 81920 / _MIB_PER_GIB, 2039.0, 300.0, 25.0, 32.0),
        Gpu(
            "H100", "NVIDIA H100 80GB HBM3", Peaks(989.5, 67.0, 1979.0), 81559 / _MIB_PER_GIB, 3350.0, 450.0, 50.0,
            64.0, _HOPPER_RECIPES,
        ),
        Gpu(
            "H200", "NVIDIA H200", Peaks(989.5, 67.0, 1979.0), 143771 / _MIB_PER_GIB, 4800.0, 450.0, 50.0,
            64.0, _HOPPER_RECIPES,
        ),
        Gpu("B200", "NVIDIA B200", Peaks(2250.0, 75.0, 4500.0), 183359 / _MIB_PER_GIB, 8000.0, 900.0, 50.0, 64.0, None),
    )
}  # fmt: skip
"""By name: SXM modules, A100 of 80 GB and of 40 GB, H100 of 80 GB, H200 of 141 GB, B200 of 180 GB."""

_OTHER_PEAKS = {
    "NVIDIA H100 PCIe": Peaks(756.5, 51.0, 1513.0),
    "NVIDIA H200 NVL": Peaks(835.5, 60.0, 1670.5),
}
"""Peaks of GPUs that are no SXM modules, by how CUDA's name begins."""

CPU = Gpu("CPU", "", Peaks(0.05, 0.05, None), 8.0, 8.0, 1.5, 1.5, 8.0)
"""One core of a server and gloo over loopback, about: for the figures of runs without GPUs, which are there to be
calibrated. float32 stands where the others have bfloat16."""

DEVICES = GPUS | {CPU.name: CPU}
"""All that the planner plans for."""


def gpu_of(device_name: str | None) -> Gpu | None:
    """The GPU that the planner takes for one that CUDA gives this name: the module of the same generation. None: a CPU
    core; None is returned for a GPU that the table does not have."""
    if device_name is None:
        return CPU
    return next((gpu for name, gpu in GPUS.items() if device_name.startswith(f"NVIDIA {name}")), None)


def peak_tflops(device_name: str | None, dtype: str) -> float | None:
    """The peak of a GPU by the name that CUDA gives it, in `bfloat16`, `float32` or `fp8`; None where it is not known,
    as of a slice of one (MIG) and of a CPU, and where the GPU has no FP8."""
    if device_name is None or " MIG " in device_name:
        return None
    by_name = _OTHER_PEAKS | {gpu.device_name: gpu.peaks for gpu in GPUS.values()}
    peaks = next((peaks for beginning, peaks in by_name.items() if device_name.startswith(beginning)), None)
    if peaks is None:
        return None
    return {"bfloat16": peaks.bfloat16, "float32": peaks.float32, "fp8": peaks.fp8}[dtype]


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    nodes: int
    gpus_per_node: int = 8

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def rate_gb_s(self, ranks: int, stride: int = 1) -> float:
        """The rate of one rank in a group of `ranks` ranks that stand `stride` apart: NVLink's where the group lies
        within a node, else the network's."""
        within = ranks * stride <= self.gpus_per_node
        return self.gpu.link_gb_s if within else self.gpu.network_gb_s
