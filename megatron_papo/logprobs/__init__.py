"""Log-probs, entropy and exact KL of response tokens from hidden states and one rank's shard of the vocabulary.

`head.py` has the one public function and its backward; `tiling.py` cuts rows and words into tiles and multiplies;
`sums.py` holds what is summed over words for each row, `gradients.py` the way back; `torch_tile.py` and
`triton_tile.py` do the same two things to a tile, on any device and on CUDA.
"""

from megatron_papo.logprobs.head import HeadValues, check_targets, vocab_parallel_head
from megatron_papo.logprobs.sums import FORBIDDEN

__all__ = ["FORBIDDEN", "HeadValues", "check_targets", "vocab_parallel_head"]
