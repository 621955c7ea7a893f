"""Vision-language models under Megatron-Core: what model families share, and a package for each family.

`family.py` and `shape.py` import no torch; the rest is imported where it is used.
"""
