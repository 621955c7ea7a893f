"""All candidates of a model on a cluster, estimated and sorted: the fastest that fit, and why the rest do not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from megatron_papo.config import Config, ConfigError
from megatron_papo.costs.hardware import Cluster
from megatron_papo.costs.memory import GIB, num_parameters
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions
from megatron_papo.planning.candidates import OPTIMIZERS, RECOMPUTE, Candidate, Refused, engines_of, splits
from megatron_papo.planning.candidates import stage_layers_by_cost as by_cost
from megatron_papo.planning.compute import stage_seconds
from megatron_papo.planning.estimate import Estimate, estimate
from megatron_papo.planning.workload import Workload


@dataclass(frozen=True)
class LayoutPlan:
    """All estimates of a plan; `fitting` is sorted by seconds of a step."""

    fitting: tuple[Estimate, ...]
    too_large: tuple[Estimate, ...]
    refused: tuple[Refused, ...]

    @property
    def best(self) -> Estimate:
        return self.fitting[0]

    def best_of_each_layout(self) -> list[Estimate]:
        """The fastest of every TP x PP x DP, in order."""
        seen: dict[str, Estimate] = {}
        for entry in self.fitting:
            seen.setdefault(entry.candidate.name, entry)
        return list(seen.values())

    def every(self) -> list[Estimate]:
        """All estimates, those too that do not fit, the fastest first: the peak says by how much."""
        return sorted((*self.fitting, *self.too_large), key=lambda entry: entry.step_s)

    def reasons(self) -> list[Refused]:
        """The reason for every layout that fits in no way: the fault, or what its nearest candidate lacks."""
        fits = {entry.candidate.name for entry in self.fitting}
        nearest: dict[str, Estimate] = {}
        for entry in sorted(self.too_large, key=lambda entry: entry.peak):
            if entry.candidate.name not in fits:
                nearest.setdefault(entry.candidate.name, entry)
        return [*self.refused, *(Refused(name, entry.reason) for name, entry in nearest.items())]

    def counts(self) -> Counter[str]:
        return Counter(fit=len(self.fitting), too_large=len(self.too_large), refused=len(self.refused))


def plan(config: Config, shape: ModelShape, cluster: Cluster, assumed: Assumptions, work: Workload) -> LayoutPlan:
    """Estimates every layout with every recomputation, optimizer and engine. Raises ConfigError when the GPUs together
    cannot hold the model."""
    _must_hold(shape, cluster)
    possible, refused = splits(config, shape, cluster)
    estimates = [
        estimate(candidate, config, shape, cluster, assumed, work)
        for split in possible
        for candidate in _candidates(split, config, shape, cluster, assumed, work)
    ]
    fitting = sorted((each for each in estimates if not each.reason), key=lambda each: each.step_s)
    return LayoutPlan(tuple(fitting), tuple(each for each in estimates if each.reason), tuple(refused))


def _candidates(
    split: tuple[int, int, int],
    config: Config,
    shape: ModelShape,
    cluster: Cluster,
    assumed: Assumptions,
    work: Workload,
) -> Iterable[Candidate]:
    tensor, pipeline, data = split
    layers = _layers(split, config, shape, cluster, assumed, work)
    for recompute, optimizer, engine in product(RECOMPUTE, OPTIMIZERS, engines_of(shape, cluster)):
        yield Candidate(tensor, pipeline, data, layers, recompute, optimizer, engine)


def _layers(
    split: tuple[int, int, int],
    config: Config,
    shape: ModelShape,
    cluster: Cluster,
    assumed: Assumptions,
    work: Workload,
) -> tuple[int, ...]:
    """Layers of each stage, by what the vision tower and the head take beside a language layer."""
    tensor, pipeline, data = split
    num_layers = shape.language.num_layers
    if pipeline == 1:
        return (num_layers,)
    alone = Candidate(tensor, 1, data, (num_layers,), "none", "fp32 moments", 1).applied(config)
    rows = work.rows(shape, data, pipeline)
    size, flops = rows.size(shape), rows.flops(shape)
    whole = stage_seconds(alone, shape, cluster, assumed, flops, size)
    head = flops.head / tensor / (cluster.gpu.peaks.bfloat16 * 1e12 * assumed.matmul)
    layer = (whole.forward[0] - whole.vision - head) / num_layers
    return by_cost(num_layers, pipeline, whole.vision / layer, head / layer)


def _must_hold(shape: ModelShape, cluster: Cluster) -> None:
    needed, has = num_parameters(shape) * 2 / GIB, cluster.num_gpus * cluster.gpu.memory_gib
    if needed > has:
        raise ConfigError(
            f"cluster: {cluster.num_gpus} x {cluster.gpu.name} have {has:.0f} GiB, the weights alone take "
            f"{needed:.0f}: no layout can hold the model"
        )
