"""The Triton kernels of the head against the plain torch functions, under Triton's interpreter on the CPU.

The interpreter must be chosen before Triton is imported, so the kernels run in a process of their own. What only a
GPU can show, that they compile, is in `tests/gpu`.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from megatron_papo.logprobs import torch_tile
from megatron_papo.logprobs.gradients import RowPulls
from megatron_papo.logprobs.sums import FORBIDDEN
from tests.support.interpreter import PYTHON

ROWS, WORDS, SCALE = 3, 2500, 1 / 0.7  # two whole blocks of words and a part of one
COLUMNS = torch.tensor([0, 2499, -1])


def _logits(num_views: int, apart: float) -> list[Tensor]:
    """The largest come late in one row and early in another; some words are banned, in row 2 all but one block."""
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(ROWS, WORDS, generator=generator) * 3 + torch.linspace(-5, 5, WORDS) * torch.ones(ROWS, 1)
    policy[1] = policy[1].flip(0)
    views = [policy, policy + apart * torch.randn(ROWS, WORDS, generator=generator)][:num_views]
    for view in views:
        view[:, [3, 1024]] = FORBIDDEN
        view[2, :2048] = FORBIDDEN
    return views


def _pulls(num_views: int, slope: bool) -> RowPulls:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(num_views, ROWS, generator=generator)  # noqa: E731
    return RowPulls(draw() + 15, draw(), draw(), draw() if slope else None, draw()[0] if num_views == 2 else None)


def _start_interpreter() -> None:
    """In the process of the kernels: Triton reads the variable as it is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    if Version(importlib.metadata.version("triton")) < Version("3.7"):
        _take_scalars_as_indices()


def _take_scalars_as_indices() -> None:
    """What Triton 3.7 does by itself: the interpreter of 3.6 holds a scalar as an array of one number, which NumPy
    from 2.5 on does not take for the end of a `range`."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_and_mend


def _kernels(name: str, *args) -> object:
    from megatron_papo.logprobs import triton_tile

    return getattr(triton_tile, name)(*args)


@pytest.fixture(scope="module")
def interpreter():
    context = multiprocessing.get_context("spawn")
    context.set_executable(PYTHON)
    with context.Pool(1, _start_interpreter) as pool:
        yield lambda name, *args: pool.apply(_kernels, (name, *args))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("num_views", "apart"), [(1, 0.0), (2, 1.0), (2, 1e-4)])
def test_sums_of_a_tile(interpreter, num_views: int, apart: float, entropy: bool):
    found = interpreter("tile_sums", _logits(num_views, apart), SCALE, COLUMNS, entropy)
    wide = [view.double() for view in _logits(num_views, apart)]
    expected = torch_tile.tile_sums(wide, SCALE, COLUMNS, entropy)
    torch_narrow = torch_tile.tile_sums(_logits(num_views, apart), SCALE, COLUMNS, entropy)
    for sums in (found, torch_narrow):
        for field in ("max_NR", "exp_NR", "dot_NR", "target_NR"):
            torch.testing.assert_close(getattr(sums, field).double(), getattr(expected, field), rtol=2e-6, atol=2e-6)
        assert (sums.gap_R is None) == (num_views == 1)
        if num_views == 2:  # both are sums of terms of size `apart`, of logits rounded at 1e-6
            torch.testing.assert_close(sums.gap_R.double(), expected.gap_R, rtol=1e-5, atol=1e-5 * (1 + apart))
            torch.testing.assert_close(sums.excess_R.double(), expected.excess_R, rtol=1e-5, atol=1e-5 * (1 + apart))
            torch.testing.assert_close(
                sums.rescaled(sums.max_NR.double()).kl_R, expected.kl_R, rtol=1e-2 if apart < 1 else 1e-5, atol=1e-10
            )


@pytest.mark.parametrize("slope", [False, True])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_tile(interpreter, num_views: int, slope: bool, dtype: torch.dtype):
    pulls = _pulls(num_views, slope)
    found = interpreter("tile_gradients", _logits(num_views, 0.5), SCALE, COLUMNS, pulls, dtype)
    expected = torch_tile.tile_gradients(_logits(num_views, 0.5), SCALE, COLUMNS, pulls, dtype)
    assert len(found) == num_views
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        close = 1e-5 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(mine, theirs, rtol=close, atol=1e-5)
        assert mine[:, [3, 1024]].abs().max() == 0.0
