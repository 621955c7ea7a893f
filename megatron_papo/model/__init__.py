"""Vision-language models under Megatron-Core: what model families share, and a package for each family.

`family.py`, `shape.py`, `published_shapes.py` and `layer_costs.py` import no torch, nor do a family's shape and costs.
"""
