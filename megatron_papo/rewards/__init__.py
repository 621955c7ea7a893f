"""Answer → float: accuracy, format and length of responses, pure and time-limited; a user's own function of them."""

from megatron_papo.rewards.reward_row import MetricRow, RewardRow
from megatron_papo.rewards.rewarder import Rewarder

__all__ = ["MetricRow", "RewardRow", "Rewarder"]
