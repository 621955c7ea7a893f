"""Training in FP8: how operands are rounded, linear layers that emulate it, the switch by pass, padding, counters."""
