"""`papo export`: a checkpoint of a run as a Hugging Face folder, which may then go to the hub.

The checkpoint is named by its own folder or by the run's: of a run it is the newest whole one, the best one, or that of
a step. A folder that is a Hugging Face folder already is not converted. Everything that can be refused, the hub's token
included, is refused before the conversion begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_papo.checkpoint.state_file import is_checkpoint
from megatron_papo.checkpoint.survey import survey
from megatron_papo.conversion.run_conversion import ConversionRequest, run_conversion
from megatron_papo.text.untrusted import as_text
from megatron_papo.weights.weight_files import holds_weights

_MEMORY_BYTES = 2 * 2**30
"""Most memory that a worker of the conversion takes."""


@dataclass(frozen=True)
class ExportRequest:
    """The arguments of `papo export`."""

    source: Path
    """A run's folder, a checkpoint in it, or a Hugging Face folder."""
    out: Path | None = None
    """The folder to write; None: beside the checkpoints of the run, RUN/exports/step_<step>."""
    best: bool = False
    """Of a run: whether the checkpoint of the best held-out accuracy is meant, and not the newest."""
    step: int | None = None
    """Of a run: the number of steps that are done in the checkpoint that is meant."""
    dtype: str | None = None
    """`float32` or `bfloat16`; None: the checkpoint's own."""
    workers: int = 1
    push: str | None = None
    """Name of the repository on the hub; None: nothing is uploaded."""
    public: bool = False
    """Whether a repository that the upload makes can be seen by everyone."""


def export(request: ExportRequest) -> int:
    """Writes the folder, and uploads it where that is asked for; the exit code. Raises ValueError and OSError for what
    cannot be read, written or reached."""
    source = request.source
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder")
    if request.push is not None:
        from megatron_papo.conversion.hub import check_access  # needs the hub's client, which is slow to import

        check_access(request.push)
    if holds_weights(source):
        folder = _as_it_is(request)
    else:
        checkpoint = _checkpoint(request)
        folder = request.out or _place_beside(checkpoint)
        arguments = ConversionRequest("megatron-to-hf", checkpoint, folder, _MEMORY_BYTES, dtype=request.dtype)
        if code := run_conversion(arguments, request.workers):
            return code
    if request.push is not None:
        from megatron_papo.conversion.hub import upload

        print(f"papo: uploading {as_text(folder)}", flush=True)
        address = upload(folder, request.push, private=not request.public)
        print(f"papo: uploaded to {as_text(address)}")
    return 0


def _as_it_is(request: ExportRequest) -> Path:
    """The Hugging Face folder that was named, for the upload alone."""
    refused = {"--out": request.out, "--dtype": request.dtype, "--step": request.step, "--best": request.best or None}
    given = [option for option, value in refused.items() if value is not None]
    if given:
        raise ValueError(f"{given[0]}: {request.source} is a Hugging Face folder already")
    if request.push is None:
        raise ValueError(f"{request.source} is a Hugging Face folder already: nothing to write without --push")
    return request.source


def _checkpoint(request: ExportRequest) -> Path:
    """The checkpoint that is meant."""
    source, chosen = request.source, request.best or request.step is not None
    if is_checkpoint(source):
        if chosen:
            raise ValueError(f"--best, --step: {source} is one checkpoint; they choose among those of a run's folder")
        return source
    found = survey(source / "checkpoints")
    if not found.whole:
        damaged = "; ".join(found.damaged.values())
        raise ValueError(f"{source}: {damaged or 'neither a checkpoint nor the folder of a run that has one'}")
    if request.step is not None:
        for folder, state in reversed(found.whole):
            if state["step"] == request.step:
                return folder
        steps = ", ".join(str(state["step"]) for _, state in found.whole)
        raise ValueError(f"--step: {source} has no checkpoint of step {request.step}, has {steps}")
    listed = found.best() if request.best else found.newest()
    if listed is None:
        raise ValueError(f"--best: no checkpoint of {source} has a held-out accuracy")
    return listed[0]


def _place_beside(checkpoint: Path) -> Path:
    """Where a run itself would write it."""
    if checkpoint.parent.name != "checkpoints":  # a name within the folder where the shell is
        checkpoint = checkpoint.absolute()
    if checkpoint.parent.name != "checkpoints":
        raise ValueError(f"--out: say where to write: {checkpoint} is not in the folder `checkpoints` of a run")
    folder = checkpoint.parent.parent / "exports" / checkpoint.name
    folder.parent.mkdir(exist_ok=True)
    return folder
