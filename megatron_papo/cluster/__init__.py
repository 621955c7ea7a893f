"""Slurm jobs: what runs inside one, and what submits them."""
