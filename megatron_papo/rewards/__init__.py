"""Answer → float: accuracy, format and length of responses, pure and time-limited."""

from megatron_papo.rewards.rewarder import Rewarder

__all__ = ["Rewarder"]
