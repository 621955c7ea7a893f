"""Packing: makes rows of groups of rollouts, under a budget of tokens and balanced by cost."""

from megatron_papo.packing.assignment import Cost, Move, balance, too_long_in_words, whole
from megatron_papo.packing.loss_weights import Totals, sum_totals, token_totals
from megatron_papo.packing.rows import Positions, pack, supervised_group
from megatron_papo.packing.views import empty_like, joint_row, masked_row

__all__ = [
    "Cost", "Move", "Positions", "Totals", "balance", "empty_like", "joint_row", "masked_row", "pack", "sum_totals",
    "supervised_group", "token_totals", "too_long_in_words", "whole",
]  # fmt: skip
