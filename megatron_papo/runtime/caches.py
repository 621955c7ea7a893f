"""Where libraries keep their caches when HOME is no folder that can be written to.

Data sets, Triton's kernels, vLLM, wandb and matplotlib each want a folder under HOME, and some end the program without
one. Compute nodes may have no HOME, or one that is read-only. Leaves out what is downloaded from the hub, and the
hub's token: these may lie in a HOME that can be read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

_VARIABLES = {
    "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "VLLM_CACHE_ROOT": "vllm",
    "VLLM_CONFIG_ROOT": "vllm_config",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb_config",
    "WANDB_DATA_DIR": "wandb_data",
}
"""The variable that each library reads, and the folder that it gets; a variable that is set already stays as it is."""


@contextmanager
def caches_that_can_be_written(environ: MutableMapping[str, str]) -> Iterator[Path | None]:
    """A context with a new temporary folder for the libraries' caches, which is removed at the end; None if HOME can be
    written to."""
    if _can_be_written(Path(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else _home() / ".cache"):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="papo_caches_", ignore_cleanup_errors=True) as folder:
        ours = {name: f"{folder}/{below}" for name, below in _VARIABLES.items() if name not in environ}
        environ.update(ours)
        try:
            yield Path(folder)
        finally:
            for name in ours:
                del environ[name]


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # neither HOME nor an entry of this user
        return Path("/nonexistent")


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
