"""Every layout that a model allows on a cluster, and why the others are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_papo.config import Config, ConfigError
from megatron_papo.costs.hardware import Cluster
from megatron_papo.model.shape import ModelShape, check_layout

RECOMPUTE = ("none", "selective", "mlp", "full")
"""The values of `model.recompute` in the order of what they cost; each keeps less than the one before it."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fp32 moments": {},
    "bf16 moments": {"precision_aware": True},
    "half offloaded": {"offload_fraction": 0.5},
}


@dataclass(frozen=True)
class Candidate:
    """One layout with its settings for memory and its engines: what the planner estimates."""

    tensor: int
    pipeline: int
    data: int
    layers: tuple[int, ...]
    """Language layers of each stage."""
    recompute: str
    optimizer: str
    engine_tensor: int

    @property
    def name(self) -> str:
        return f"TP{self.tensor} PP{self.pipeline} DP{self.data}"

    def overrides(self) -> dict[str, Any]:
        """The settings that give a run this layout."""
        settings = {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.sequence": self.tensor > 1,
            "parallel.pipeline_layers": list(self.layers) if self.pipeline > 1 else None,
            "parallel.distributed_optimizer": True,
            "model.recompute": self.recompute,
            "generation.tensor": self.engine_tensor,
        }
        return settings | {f"optim.{key}": value for key, value in OPTIMIZERS[self.optimizer].items()}

    def applied(self, config: Config) -> Config:
        """`config` with these settings; not checked again, for there are thousands."""
        sections: dict[str, dict[str, Any]] = {}
        for key, value in self.overrides().items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        return config.model_copy(
            update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
        )


@dataclass(frozen=True)
class Refused:
    """A layout that is impossible, whatever its memory, and the reason."""

    name: str
    reason: str


def splits(config: Config, shape: ModelShape, cluster: Cluster) -> tuple[list[tuple[int, int, int]], list[Refused]]:
    """(tensor, pipeline, data) that the model allows on all GPUs of the cluster, and those that it does not."""
    possible, refused = [], []
    for tensor in _divisors(cluster.num_gpus):
        for pipeline in _divisors(cluster.num_gpus // tensor):
            data = cluster.num_gpus // tensor // pipeline
            reason = _fault(config, shape, cluster, tensor, pipeline, data)
            if reason:
                refused.append(Refused(f"TP{tensor} PP{pipeline} DP{data}", reason))
            else:
                possible.append((tensor, pipeline, data))
    return possible, refused


def stage_layers_by_cost(num_layers: int, pipeline: int, before: float, after: float) -> tuple[int, ...]:
    """Layers of each stage such that stages take about equally long: the first also does the work of `before` layers
    (the vision tower), the last of `after` (the head). Every stage has at least one."""
    share = (num_layers + before + after) / pipeline
    extra = [before, *[0.0] * (pipeline - 2), after] if pipeline > 1 else [0.0]
    layers = [1] * pipeline
    for _ in range(num_layers - pipeline):  # the next layer goes where least is done
        stage = min(range(pipeline), key=lambda stage: (layers[stage] + extra[stage], -stage))
        layers[stage] += 1
    assert sum(layers) == num_layers and share > 0
    return tuple(layers)


def engines_of(shape: ModelShape, cluster: Cluster) -> Iterator[int]:
    """The possible tensor ranks of an engine: within a node, and such that they divide the heads."""
    for size in _divisors(cluster.gpus_per_node):
        if shape.language.num_heads % size == 0 and shape.vision.num_heads % size == 0:
            yield size


def _fault(config: Config, shape: ModelShape, cluster: Cluster, tensor: int, pipeline: int, data: int) -> str:
    if tensor > cluster.gpus_per_node:
        return f"tensor ranks beyond the {cluster.gpus_per_node} of a node: every layer would wait for the network"
    prompts = config.train.prompts_per_step // config.train.updates_per_step
    if data > prompts:
        return f"an update has {prompts} prompts, fewer than the {data} data-parallel ranks"
    parallel = config.parallel.model_copy(
        update={"tensor": tensor, "pipeline": pipeline, "sequence": tensor > 1, "pipeline_layers": None}
    )
    # the shape is of the model that is planned for, whatever folder the settings name
    model = config.model.model_copy(update={"path": None, "checkpoint": None})
    try:
        check_layout(config.model_copy(update={"parallel": parallel, "model": model}), shape)
    except ConfigError as error:
        return str(error).splitlines()[0].partition(": ")[2]
    return ""


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
