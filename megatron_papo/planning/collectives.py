"""Seconds of exchanges between ranks: rings for what is large, trees for what is small (Thakur et al. 2005).

A ring of n ranks moves (n - 1) / n of the bytes through each; its latency is hidden in chunks but for a tree's depth
between nodes. Ranks of one group that share a node's network share it evenly, which a rate per GPU already says.
"""

from __future__ import annotations

import math

from megatron_papo.costs.hardware import Cluster
from megatron_papo.planning.assumptions import Assumptions


def gather_s(num_bytes: float, ranks: int, cluster: Cluster, assumed: Assumptions, stride: int = 1) -> float:
    """Seconds of an all-gather to `num_bytes` on every rank, or of a reduce-scatter from them. The ranks of the group
    stand `stride` apart."""
    if ranks == 1:
        return 0.0
    return (ranks - 1) / ranks * num_bytes / _rate(ranks, stride, cluster, assumed) + _latency(
        ranks, stride, cluster, assumed
    )


def all_reduce_s(num_bytes: float, ranks: int, cluster: Cluster, assumed: Assumptions, stride: int = 1) -> float:
    """Seconds of an all-reduce of `num_bytes` on every rank."""
    return 2 * gather_s(num_bytes, ranks, cluster, assumed, stride)


def along_s(num_bytes: float, ranks: int, cluster: Cluster, assumed: Assumptions, stride: int) -> float:
    """Seconds to send from one rank of a group to the next or, in pieces, to all of it, at the rate of the slowest
    step, which leaves the node where the group does."""
    if ranks == 1:
        return 0.0
    return num_bytes / _rate(ranks, stride, cluster, assumed) + _latency(ranks, stride, cluster, assumed)


def _rate(ranks: int, stride: int, cluster: Cluster, assumed: Assumptions) -> float:
    """Bytes per second of one rank."""
    within = ranks * stride <= cluster.gpus_per_node
    return cluster.rate_gb_s(ranks, stride) * 1e9 * (assumed.link if within else assumed.network)


def _latency(ranks: int, stride: int, cluster: Cluster, assumed: Assumptions) -> float:
    nodes = max(1, math.ceil(ranks * stride / cluster.gpus_per_node))
    return assumed.latency_s + assumed.network_latency_s * math.log2(nodes)
