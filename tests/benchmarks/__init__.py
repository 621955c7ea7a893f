"""Tests of what stands in benchmarks/: the only tests that import it."""
