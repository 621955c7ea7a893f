"""Attention over packed rows and over the windows of a vision tower, block by block and without any T x T mask."""
