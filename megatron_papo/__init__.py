"""Perception-aware reinforcement learning of vision-language models on Megatron-Core.

`train.py` is the place to begin to read; docs/design.md says what each room is for.
"""
