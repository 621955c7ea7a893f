"""FP8 training: rounding of matrix products, its emulation without Transformer Engine, the switch, what is padded."""
