"""Fixtures that several rooms of tests share, each made once a session."""

from tests.slurm_lab import slurm as slurm
