"""Log-probs, entropy and exact KL of response tokens from hidden states and one rank's shard of the vocabulary.

`head.py` has the public function and its backward. `tiling.py` cuts rows and words into tiles and multiplies matrices.
`sums.py` has the sums over words for each row, `gradients.py` what backward does with them. `torch_tile.py` and
`triton_tile.py` compute the sums and the gradient of a tile, on any device and on CUDA. A word is a token of the
vocabulary.
"""

from megatron_papo.logprobs.head import HeadValues, check_targets, vocab_parallel_head
from megatron_papo.logprobs.sums import FORBIDDEN

__all__ = ["FORBIDDEN", "HeadValues", "check_targets", "vocab_parallel_head"]
