"""Attention over packed rows and over the windows of a vision tower, by parts that are merged; no T x T mask."""
