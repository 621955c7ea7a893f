"""Which recomputation an update fits the device with: by arithmetic first, as `papo check` counts, then by measuring.

A mode that cannot fit is not tried, and one that may not is measured in a process of its own, so that nothing of it is
left when it runs out of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from benchmarks.gpu.apart import Rows, apart, result_apart
from benchmarks.gpu.policy import our_settings, workload
from benchmarks.gpu.rows import GIB, Options, not_measured
from megatron_papo.config import ModelConfig
from megatron_papo.costs.memory import stage_memory
from megatron_papo.distributed.accelerator import has_gpu
from megatron_papo.model.shape import ModelShape

MODES: tuple[str, ...] = get_args(ModelConfig.model_fields["recompute"].annotation)
"""The modes of the setting `model.recompute`."""
BY_CUDA = 1.5 * GIB
"""Taken by CUDA, its libraries and the allocator, which the arithmetic leaves out."""
DOUBT = 1.15
"""A mode is tried where the arithmetic says up to so many times what there is."""


def needed_bytes(folder: Path, options: Options, **settings: Any) -> int:
    """At the peak of an update of PAPO joint on one GPU, in bfloat16; `settings`: with `__` for the dot."""
    spec = "transformer_engine" if HAVE_TE and has_gpu() else "local"
    beside = {"model__spec": spec, "model__dtype": "bfloat16", "generation__engine": "transformers"}
    config = our_settings(folder, "PAPO joint", workload(options), **(beside | settings))
    (stage,) = stage_memory(config, ModelShape.from_folder(folder / "model"), 1)
    return stage.total - stage.engine


def needed_by_mode(folder: Path, options: Options, **settings: Any) -> dict[str, int]:
    """Bytes, by mode: the least recomputation, which takes most, comes first."""
    needed = {mode: needed_bytes(folder, options, model__recompute=mode, **settings) for mode in MODES}
    return dict(sorted(needed.items(), key=lambda each: -each[1]))


def device_bytes() -> int | None:
    """Memory of the GPU in bytes; None without a GPU."""
    return result_apart(torch.cuda.mem_get_info)[1] if has_gpu() else None


def cannot_fit(needed: float, has: int | None) -> str:
    """Why a measurement that needs so many bytes is not begun; empty where it may fit."""
    if has is None or needed <= DOUBT * has:
        return ""
    return f"not tried: it needs about {needed / GIB:.0f} GiB, and the GPU has {has / GIB:.0f}"


def least_that_fits(
    measure: Callable[..., Rows],
    needed: Mapping[str, int],
    has: int | None,
    *args: Any,
    only: str | None = None,
    try_less: bool = True,
) -> Rows:
    """The rows of `measure(*args, mode)` in processes of their own; at the end the least mode that fits, and its
    result.

    Begins with the least mode that fits by arithmetic. Where that is too much, more is computed again; where it fits,
    less, for as long as that fits too and with `try_less`. `only`: this mode and no other. Without a GPU the first of
    all is taken. Raises torch.OutOfMemoryError where no mode fits.
    """
    modes = [only] if only else list(needed)
    fitting = (at for at, mode in enumerate(modes) if has is None or needed[mode] + BY_CUDA <= has)
    first = next(fitting, len(modes) - 1)
    for mode in modes[first:]:
        result = yield from _unless_too_much(measure, args, mode, needed, has)
        if result is not None:
            break
    else:
        raise torch.OutOfMemoryError("with every recomputation")
    for less in reversed(modes[:first]) if try_less and mode == modes[first] else ():
        reason = cannot_fit(needed[less], has)
        if reason:
            yield not_measured(f"recompute {less}", reason)
            break
        better = yield from _unless_too_much(measure, args, less, needed, has)
        if better is None:
            break
        mode, result = less, better
    return mode, result


def _unless_too_much(
    measure: Callable[..., Rows], args: tuple[Any, ...], mode: str, needed: Mapping[str, int], has: int | None
) -> Rows:
    """None, with a row that says so, where that runs out of memory."""
    try:
        return (yield from apart(measure, *args, mode))
    except torch.OutOfMemoryError:
        beside = "" if has is None else f"; by arithmetic {needed[mode] / GIB:.1f} of {has / GIB:.1f} GiB"
        yield not_measured(f"recompute {mode}", f"out of memory{beside}")
        return None
