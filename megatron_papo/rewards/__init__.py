"""Answer → float: accuracy, format and length of responses, pure and time-limited; a user's own function of them."""

from megatron_papo.rewards.rewarder import Rewarder
from megatron_papo.rewards.rows import RewardRow

__all__ = ["RewardRow", "Rewarder"]
