"""A model family that lies outside the package: the proof that a new one touches no file of megatron_papo.

It differs from the published families where they could have been taken for granted: layer norm with biases, plain MLPs
with GELU, norms of queries and keys, a head size of its own, interleaved rotary sections, patches of 8 pixels, a tower
without windows or rotary positions, positions counted otherwise, and other names of parameters. Importing it registers
it; a distribution of its own would declare an entry point.
"""

from megatron_papo.model.family import register

MODEL_TYPE = "toy_vl"

register(MODEL_TYPE, __name__)
