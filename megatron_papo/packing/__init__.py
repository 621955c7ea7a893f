"""Groups of rollouts to packed rows under a budget of tokens, balanced by cost."""

from megatron_papo.packing.plan import Cost, Move, balance, whole
from megatron_papo.packing.positions import mrope_positions
from megatron_papo.packing.rows import pack, supervised_group
from megatron_papo.packing.views import empty_like, joint_row, masked_row
from megatron_papo.packing.weights import Totals, sum_totals, token_totals

__all__ = [
    "Cost", "Move", "Totals", "balance", "empty_like", "joint_row", "masked_row", "mrope_positions", "pack",
    "sum_totals", "supervised_group", "token_totals", "whole",
]  # fmt: skip
