"""Where libraries keep their caches and temporary files, and whether they may ask a network.

Data sets, Triton's kernels, vLLM, wandb and matplotlib each want a folder under HOME, and some end the program without
one. Compute nodes may have no HOME, one that is read-only, or one that is small. `run.cache_dir`, `run.tmp_dir` and
`run.offline` are turned into the variables that the libraries read, in every process of the command line, before one of
them is imported. HF_HOME stays as it is, for the hub's token lies there.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from megatron_papo.config import ConfigError, RunConfig

_PER_NODE = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "VLLM_CACHE_ROOT": "vllm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
}
"""The variable that each library reads, and the folder that it gets: kernels, which a machine compiles for itself."""
_OF_ALL = {
    "HF_DATASETS_CACHE": "datasets",
    "HF_MODULES_CACHE": "modules",
    "VLLM_CONFIG_ROOT": "vllm_config",
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb_config",
    "WANDB_DATA_DIR": "wandb_data",
}
"""What machines may share."""
_DOWNLOADED = {"HF_HUB_CACHE": "hub", "HF_XET_CACHE": "xet", "HF_ASSETS_CACHE": "assets"}
"""What comes from the hub, which may lie in a HOME that can be read."""
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "VLLM_NO_USAGE_STATS": "1",
}


def use_own_folders(run: RunConfig, environ: MutableMapping[str, str]) -> None:
    """Sets what the settings say. Of `run.cache_dir` a variable that is set already stays as it is. Raises ConfigError
    for a `run.tmp_dir` that can neither be there nor be made."""
    if run.cache_dir is not None:
        folder = Path(os.path.abspath(run.cache_dir))
        for name, below in {**_DOWNLOADED, **_OF_ALL}.items():
            environ.setdefault(name, str(folder / below))
        for name, below in _PER_NODE.items():
            environ.setdefault(name, str(folder / "nodes" / socket.gethostname() / below))
    if run.offline:
        environ.update(_OFFLINE)
    if run.tmp_dir is not None:
        folder = Path(os.path.abspath(run.tmp_dir))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.tmp_dir: {folder}: {error.strerror}") from None
        environ["TMPDIR"] = str(folder)
        tempfile.tempdir = None  # what was found before the setting was known


@contextmanager
def caches_that_can_be_written(environ: MutableMapping[str, str]) -> Iterator[Path | None]:
    """A context with a new temporary folder for the libraries' caches, which is removed at the end; None if HOME can be
    written to."""
    variables = {**_OF_ALL, **_PER_NODE}
    if variables.keys() <= environ.keys() or _can_be_written(
        Path(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else _home() / ".cache"
    ):
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="papo_caches_", ignore_cleanup_errors=True) as folder:
        ours = {name: f"{folder}/{below}" for name, below in variables.items() if name not in environ}
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
