"""GPUs and clusters by their data sheets. What of a peak is reached stands in `assumptions.py`.

Sources: NVIDIA's data sheets of A100 (SXM, 80 and 40 GB), H100 (SXM), H200 (SXM) and HGX B200, whose figures with
sparsity are halved here; memory as in `memory.GPU_MEMORY_GIB`. Rates are those of one direction: NVLink's sheets add
up both. The network is what such nodes are sold with: a 200 Gb/s (A100) or 400 Gb/s adapter for each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_papo.costs.memory import GPU_MEMORY_GIB


@dataclass(frozen=True)
class Gpu:
    name: str
    bf16_tflops: float
    """Dense, of tensor cores."""
    fp8_tflops: float | None
    """None: no FP8."""
    memory_gb_s: float
    """Of its own memory."""
    link_gb_s: float
    """NVLink, one direction, to all other GPUs of the node together."""
    network_gb_s: float
    """Of its share of the node's network, one direction."""
    host_gb_s: float
    """PCIe, one direction."""
    memory_gib: float


CPU = Gpu("CPU", 0.05, None, 8.0, 1.5, 1.5, 8.0, 8.0)
"""One core of a server and gloo over loopback, about: for the figures of runs without GPUs, which are there to be
calibrated. float32 stands where the others have bfloat16."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40GB", 312.0, None, 1555.0, 300.0, 25.0, 32.0, GPU_MEMORY_GIB["A100-40GB"]),
        Gpu("A100", 312.0, None, 2039.0, 300.0, 25.0, 32.0, GPU_MEMORY_GIB["A100"]),
        Gpu("H100", 989.5, 1979.0, 3350.0, 450.0, 50.0, 64.0, GPU_MEMORY_GIB["H100"]),
        Gpu("H200", 989.5, 1979.0, 4800.0, 450.0, 50.0, 64.0, GPU_MEMORY_GIB["H200"]),
        Gpu("B200", 2250.0, 4500.0, 8000.0, 900.0, 50.0, 64.0, GPU_MEMORY_GIB["B200"]),
        CPU,
    )
}


def gpu_of(device_name: str | None) -> Gpu | None:
    """By the name that CUDA gives it; without one a core; None for a GPU that the table does not have."""
    if device_name is None:
        return CPU
    return next(
        (gpu for name, gpu in GPUS.items() if gpu is not CPU and device_name.startswith(f"NVIDIA {name}")), None
    )


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    nodes: int
    gpus_per_node: int = 8

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def rate_gb_s(self, ranks: int, stride: int = 1) -> float:
        """Of one rank in a group of `ranks` ranks that stand `stride` apart: NVLink's where the group lies within a
        node, else the network's."""
        within = ranks * stride <= self.gpus_per_node
        return self.gpu.link_gb_s if within else self.gpu.network_gb_s
