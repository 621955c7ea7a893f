"""The checkpoints of a run: a folder a step, the last few and the best kept; whole or not there at all.

A process killed at any moment leaves the last good checkpoint: a folder is written under another name, forced to
disk, then renamed (atomic.py). What a killed process left behind is cleared at the next save.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_papo.checkpoint.atomic import publish, recover, remove
from megatron_papo.checkpoint.folders import copy_side_files
from megatron_papo.checkpoint.state import Restored, TrainState, is_checkpoint, read_state, read_state_file, write_state
from megatron_papo.parallel import layout

_PATTERN = "step_*"


class CheckpointStore:
    """Checkpoints under `folder`, all ranks calling together.

    `keep_last` newest ones stay and, with `keep_best`, the one of the highest metric. Files of the Hugging Face folder
    `source` (config, tokenizer, processor) go into each, so that it can be used alone.
    """

    def __init__(
        self, folder: Path | str, keep_last: int = 2, keep_best: bool = True, source: Path | str | None = None
    ):
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.source = None if source is None else Path(source)

    def save(self, step: int, state: TrainState, metric: float | None = None) -> Path:
        """Writes `state` as `step_<step>` and returns that folder, which exists on return. `metric`: higher is better.

        An older checkpoint of the same step is replaced.
        """
        final = self.folder / f"step_{step:08d}"
        partial = final.with_name(f"{final.name}.tmp")
        first = layout().rank == 0
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            recover(self.folder, _PATTERN)
            partial.mkdir()
        dist.barrier()
        write_state(partial, step, state, metric=metric, serial=self._next_serial() if first else 0)
        dist.barrier()  # rank 0 publishes what every rank has written
        if first:
            if self.source is not None:
                copy_side_files(self.source, partial)
            publish(partial, final)
            self._retire()
        dist.barrier()
        return final

    def load(self, path: Path | str, state: TrainState) -> Restored:
        """Fills `state` from the checkpoint at `path`, whatever layout wrote it. Raises ValueError as `read_state`."""
        return read_state(path, state)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, the same on every rank; None when there is none."""
        return self._agreed(lambda found: found[-1][0] if found else None)

    def best(self) -> Path | None:
        """The checkpoint of the highest metric among those kept; the newest of equals."""
        return self._agreed(lambda found: _best(found))

    def _agreed(self, choose: Any) -> Path | None:
        """Rank 0 looks, and every rank hears: another node's view of a shared disk may lag."""
        if not dist.is_initialized():
            return choose(self._whole())
        choice = [choose(self._whole()) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(choice, src=0)
        return choice[0]

    def _whole(self) -> list[tuple[Path, dict[str, Any]]]:
        """Whole checkpoints with their state files, in the order they were written."""
        found = []
        for path in self.folder.glob(_PATTERN):
            waiting = path.suffix == ".old" and not path.with_suffix("").exists()  # killed while being replaced
            if (path.suffix == "" or waiting) and is_checkpoint(path):
                found.append((path, read_state_file(path)))
        return sorted(found, key=lambda item: item[1]["serial"])

    def _next_serial(self) -> int:
        """Steps do not order checkpoints when a run starts afresh in an old folder; this does."""
        return max((state["serial"] for _, state in self._whole()), default=0) + 1

    def _retire(self) -> None:
        found = self._whole()
        keep = {path for path, _ in found[-self.keep_last :]}
        if self.keep_best and (best := _best(found)) is not None:
            keep.add(best)
        for path, _ in found:
            if path not in keep:
                remove(path)


def _best(found: list[tuple[Path, dict[str, Any]]]) -> Path | None:
    rated = [(path, state) for path, state in found if state.get("metric") is not None]
    return max(rated, key=lambda item: (item[1]["metric"], item[1]["serial"]))[0] if rated else None
