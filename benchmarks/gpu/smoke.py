"""Whether Transformer Engine's and vLLM's kernels compute on this machine what float64 does, a piece at a time.

The pieces are those of `tools/gpu_trial/smoke_te.py` and `smoke_vllm.py`. What does not compute here explains much of
what comes after, so it comes first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from benchmarks.gpu.rows import NEEDS_GPU, GpuRow, Options, compared, not_measured, reason_of, show_failure
from megatron_papo.distributed.accelerator import has_gpu
from tools.gpu_trial import smoke_te, smoke_vllm
from tools.gpu_trial.pieces import Pieces

FAILED_PIECES = "pieces that do not compute"


def run(options: Options) -> Iterator[GpuRow]:
    del options
    num_failed = 0
    for library, package, make in (
        ("Transformer Engine", "transformer_engine", smoke_te.pieces),
        ("vLLM", "vllm", smoke_vllm.pieces),
    ):
        if importlib.util.find_spec(package) is None:
            yield not_measured(library, f"{library} is not installed")
        elif package == "transformer_engine" and not has_gpu():
            yield not_measured(library, NEEDS_GPU)
        else:
            num_failed += yield from _rows(library, make)
    yield GpuRow(FAILED_PIECES, float(num_failed), "pieces")


def _rows(library: str, make: Callable[[], Pieces]) -> Iterator[GpuRow]:
    """Returns how many failed; a library that cannot be imported is one."""
    num_failed = 0
    try:
        pieces = make()
    except Exception as error:
        show_failure(error)
        yield not_measured(library, reason_of(error))
        return 1
    for name, piece in pieces.items():
        try:
            result = piece()
        except Exception as error:  # the others are still worth knowing
            show_failure(error)
            num_failed += 1
            yield not_measured(f"{library}: {name}", reason_of(error))
        else:
            yield compared(f"{library}: {name}: gap / allowed", result.value, result.limit, "relative")
    return num_failed
