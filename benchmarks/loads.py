"""What checksums cost a load: one checkpoint read with its checksums, and as one of an older version that has none.

Both lie in the page cache, on the same pages, so nothing hides behind a disk. The weights alone are also read by
Megatron-Core's own reader, which takes no checksums. Part of `save.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from benchmarks.ours import Ours
from benchmarks.rows import Row
from benchmarks.timing import measure
from megatron_papo.checkpoint.checksums import CHECKSUMS_FILE
from megatron_papo.checkpoint.state import TrainState, model_tensors, read_state
from megatron_papo.checkpoint.state_file import STATE_FILE
from megatron_papo.weights.held import held_parameters


def load_rows(what: str, ours: Ours, checkpoint: Path, rounds: int) -> list[Row]:
    """Rows of the seconds of each load, in processor seconds of this rank; all ranks must call this."""
    older = checkpoint.with_name("older")
    if dist.get_rank() == 0:
        _without_checksums(checkpoint, older)
    dist.barrier()
    run = ours.run
    whole = TrainState(run.policy, run.shape, ours.optimizer)
    weights = TrainState(run.policy, run.shape)
    tree = model_tensors(held_parameters(run.policy, run.shape, run.layout.tensor_size))
    sides = {
        "with": lambda: read_state(checkpoint, whole),
        "without": lambda: read_state(older, whole, warn=lambda text: None),
        "weights": lambda: read_state(checkpoint, weights),
        "Megatron's": lambda: dist_checkpointing.load(dict(tree), str(checkpoint), validate_access_integrity=False),
    }
    for load in sides.values():
        load()
    seconds = measure(sides, rounds, what if dist.get_rank() == 0 else None)
    return [
        Row(f"{what}: {name}", seconds.median(side), seconds.median(baseline), seconds.ratio(side, baseline), "s")
        for name, side, baseline in (
            ("loading a checkpoint, with checksums / without", "with", "without"),
            ("loading its weights alone, with checksums / Megatron's reader", "weights", "Megatron's"),
        )
    ]


def _without_checksums(checkpoint: Path, older: Path) -> None:
    shutil.copytree(checkpoint, older, copy_function=os.link)
    tree = json.loads((checkpoint / STATE_FILE).read_text())
    (older / STATE_FILE).unlink()
    (older / CHECKSUMS_FILE).unlink()
    kept = {name: value for name, value in tree.items() if name not in ("checksums", "xxh3")}
    (older / STATE_FILE).write_text(json.dumps(kept))
