"""What a container of a job has to see, from the settings: every folder that a run reads or writes, at the same path.

Folders that are only read are mounted read-only. The launcher adds the project and the working folder
(`slurm/launch.sh`), and `cluster.mounts` what else a user wants; these come first, and what lies in them needs no mount
of its own. Leaves out names on the hub, whose files come into `run.cache_dir`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from megatron_papo.config import Config, ConfigError

_PATTERN = re.compile(r"[*?\[]")
_HUB_FOLDER = re.compile(r"(?:models|datasets)--.+")
"""A repository's folder in the hub's cache, within which the files of a snapshot are links."""


@dataclass(frozen=True)
class Mount:
    """A folder of the host that the container sees at the same path."""

    folder: Path
    writes: bool
    key: str
    """The setting that names it."""

    def __str__(self) -> str:
        return f"{self.folder}:{self.folder}{'' if self.writes else ':ro'}"


def container_mounts(config: Config, home: Path, work_dir: Path) -> list[str]:
    """All mounts but those of `home`, the project, and `work_dir`, where relative paths begin; as srun and apptainer
    take them, HOST:CONTAINER or HOST:CONTAINER:ro. Raises ConfigError for a path that cannot be written so."""
    own = [mount.split(":")[:2] for mount in config.cluster.mounts]
    seen = [Path(pair[-1]) for pair in own]
    standing = [home, work_dir, *seen]
    found = [Mount(_absolute(work_dir, path), writes, key) for key, path, writes in _paths(config)]
    found += [Mount(folder, False, mount.key) for mount in found if not mount.writes for folder in _behind(mount)]
    chosen: dict[Path, Mount] = {}
    for mount in sorted(found, key=lambda mount: (len(mount.folder.parts), not mount.writes)):
        around = [each for each in chosen.values() if mount.folder.is_relative_to(each.folder)]
        if any(mount.folder.is_relative_to(folder) for folder in standing):
            continue
        if not any(each.writes or not mount.writes for each in around):
            chosen[mount.folder] = mount
    for mount in chosen.values():
        if re.search("[,:]", str(mount.folder)):
            raise ConfigError(f"{mount.key}: {mount.folder}: a container's mounts are told apart by , and :")
    return [*map(str, chosen.values()), *config.cluster.mounts]


def _paths(config: Config) -> Iterator[tuple[str, PurePath | str, bool]]:
    """Key, path, and whether the run writes there."""
    writes = {"run.dir": config.run.dir, "run.cache_dir": config.run.cache_dir, "run.tmp_dir": config.run.tmp_dir}
    for key, folder in writes.items():
        if folder is not None:
            yield key, folder, True
    reads = {
        "model.path": config.model.path,
        "model.checkpoint": config.model.checkpoint,
        "checkpoint.reference": config.checkpoint.reference,
    }
    for key, folder in reads.items():
        if folder is not None:
            yield key, folder, False
    for root in config.data.image_roots:
        yield "data.image_roots", root, False
    if config.observe.calibration is not None:
        yield "observe.calibration", config.observe.calibration.parent, False
    for key, sources in (("data.train", config.data.sources("train")), ("data.eval", config.data.sources("eval"))):
        for source in sources:
            if source.path is not None and (found := _folder_of(source.path)):
                yield key, found, False


def _folder_of(name: str) -> str:
    """The folder that a data set's files and the pictures beside them lie in; empty for a name that is none here."""
    if "://" in name:
        return ""
    before = name[: found.start()] if (found := _PATTERN.search(name)) else name
    if found or os.path.isfile(before):
        return os.path.dirname(before) or "."
    return before if os.path.isdir(before) else ""


def _absolute(work_dir: Path, path: PurePath | str) -> Path:
    return Path(os.path.normpath(work_dir / path))


def _behind(mount: Mount) -> Iterator[Path]:
    """Folders that links in `mount` lead to: a repository in the hub's cache, and where single files lie."""
    real = mount.folder.resolve()
    for folder in (mount.folder, *mount.folder.parents, real, *real.parents):
        if _HUB_FOLDER.fullmatch(folder.name):
            yield folder
    try:
        entries = [entry for entry in os.scandir(mount.folder) if entry.is_symlink()]
    except OSError:
        return
    for entry in entries:
        target = Path(entry.path).resolve()
        yield target if target.is_dir() else target.parent
