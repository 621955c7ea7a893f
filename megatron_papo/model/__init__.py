"""Qwen2.5-VL under Megatron-Core. `shape.py` imports no torch; the rest is imported where it is used."""
