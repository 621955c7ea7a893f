"""Rounding to FP8: against values by hand, and against a slow reference that knows nothing of torch's 8-bit floats."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_papo.model.fp8.rounding import (
    E4M3,
    E5M2,
    AmaxHistory,
    Operands,
    e8m0_scale,
    float_scale,
    format_of,
    round_columns,
    round_rows,
    round_tensor,
    round_tiles,
    rounded,
)

CPU = torch.device("cpu")
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
"""Bits of mantissa, exponent of the smallest normal number, largest."""


def nearest(value: float, dtype: torch.dtype) -> float:
    """The nearest 8-bit float, ties to even, in Python's float64: the spacing at a value is a power of two."""
    mantissa_bits, least, most = FORMATS[dtype]
    if value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, least)
    spacing = 2.0 ** (exponent - mantissa_bits)
    return max(-most, min(most, round(value / spacing) * spacing))  # round() takes ties to even


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (E4M3, 1.0, 1.0),
        (E4M3, 1.06, 1.0),  # between 1 and 1.125
        (E4M3, 1.0625, 1.0),  # a tie: to the even mantissa
        (E4M3, 1.1875, 1.25),  # a tie between 1.125 and 1.25
        (E4M3, 447.0, 448.0),
        (E4M3, 500.0, 448.0),  # saturates
        (E4M3, -1e9, -448.0),
        (E4M3, 2.0**-9, 2.0**-9),  # the smallest
        (E4M3, 2.0**-10, 0.0),  # a tie with zero
        (E4M3, 1.01 * 2.0**-10, 2.0**-9),
        (E5M2, 1.1, 1.0),
        (E5M2, 1.2, 1.25),
        (E5M2, 60000.0, 57344.0),
        (E5M2, 1e9, 57344.0),
        (E5M2, 2.0**-16, 2.0**-16),
        (E5M2, 2.0**-17, 0.0),
    ],
)
def test_rounding_by_hand(dtype, value, expected):
    assert nearest(value, dtype) == expected
    assert rounded(torch.tensor(value), torch.tensor(1.0), dtype).item() == expected


def test_what_has_no_number_stays_so():
    found = rounded(torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor(1.0), E4M3)
    assert found[0].isnan() and found[1:].tolist() == [448.0, -448.0]


def test_scales_by_hand():
    amax = torch.tensor([7.0, 0.0, math.inf, math.nan, 1e-40, 448.0])
    assert float_scale(amax, E4M3).tolist() == [64.0, 1.0, 1.0, 1.0, torch.finfo(torch.float32).max, 1.0]
    assert float_scale(torch.tensor(7.0), E5M2).item() == 8192.0
    # 5 / 448 = 0.0112 lies under 2 ** -6, 7 / 448 is 2 ** -6 and is met, 7.1 / 448 is beyond it
    assert e8m0_scale(torch.tensor([5.0, 7.0, 7.1, 0.0]), E4M3).tolist() == [64.0, 64.0, 32.0, 1.0]
    assert e8m0_scale(torch.tensor(1e-45), E4M3).item() == 2.0**127  # exponents end there


def test_a_tensor_with_its_own_scale_by_hand():
    # 448 / 3.5 = 128: 128, 134.4, 448 and 0.64, of which 134.4 lies between 128 and 144, 0.64 between 0.625 and 0.6875
    found = round_tensor(torch.tensor([1.0, 1.05, -3.5, 0.005]), E4M3)
    assert found.tolist() == [1.0, 1.0, -3.5, 0.625 / 128]


def slow(values: torch.Tensor, blocks: list[list[tuple[int, int]]], scale_of, dtype: torch.dtype) -> torch.Tensor:
    """Every block, a list of places, by its own scale."""
    found = torch.zeros_like(values)
    for block in blocks:
        scale = scale_of(max(abs(values[place].item()) for place in block))
        for place in block:
            found[place] = nearest(values[place].item() * scale, dtype) / scale
    return found


def _chunks(size: int, block: int) -> list[range]:
    return [range(start, min(start + block, size)) for start in range(0, size, block)]


ROUNDERS = {
    "rows": (round_rows, lambda r, c, b: [[(i, j) for j in part] for i in range(r) for part in _chunks(c, b)]),
    "columns": (round_columns, lambda r, c, b: [[(i, j) for i in part] for j in range(c) for part in _chunks(r, b)]),
    "tiles": (
        round_tiles,
        lambda r, c, b: [[(i, j) for i in rows for j in part] for rows in _chunks(r, b) for part in _chunks(c, b)],
    ),
}
SCALES = {
    "float": (float_scale, lambda amax, most: most / amax),
    "e8m0": (e8m0_scale, lambda amax, most: 2.0 ** -math.ceil(math.log2(amax / most))),
}


@pytest.mark.parametrize("where", ROUNDERS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(8, 12), (5, 9), (3, 4)])
def test_blocks_are_those_of_the_slow_reference(where, scale, shape):
    random = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=random) * 10.0 ** torch.randint(-3, 3, shape, generator=random)
    round_blocks, places = ROUNDERS[where]
    scale_of, slow_scale = SCALES[scale]
    found = round_blocks(values, 4, scale_of, E4M3)
    expected = slow(values, places(*shape, 4), lambda amax: slow_scale(amax, 448.0), E4M3)
    # powers of two scale without rounding: equal. A float scale may differ in its last bit: float32 against float64
    torch.testing.assert_close(found, expected, rtol=0 if scale != "float" else 2.0**-22, atol=0)


def test_a_block_does_not_see_another():
    """The reason for blocks: an outlier costs its own block's small values, not the others'."""
    values = torch.full((1, 256), 1e-4)
    values[0, 200] = 100.0
    whole, blocks = round_tensor(values, E4M3), round_rows(values, 128, float_scale, E4M3)
    assert (whole[0, :128] == 0).all()  # 1e-4 x 4.48 is under half of 2 ** -9
    torch.testing.assert_close(blocks[0, :128], values[0, :128], rtol=2.0**-4, atol=0)
    assert (blocks[0, 128:200] == 0).all()


def test_delayed_scales_follow_the_maxima_before():
    history = AmaxHistory(E4M3, length=2, device=CPU)
    assert history.scale.item() == 1.0
    scales = []
    for amax in (7.0, 3.5, 1.75, 0.0, 0.0, math.inf):
        history.note(torch.tensor([amax, -amax / 2]))
        history.move_on()
        scales.append(history.scale.item())
    # the larger of the last two; two zeros, or one without a number, leave it as it is
    assert scales == [64.0, 64.0, 128.0, 256.0, 256.0, 256.0]
    assert rounded(torch.tensor(100.0), history.scale, E4M3).item() == 448.0 / 256.0  # outgrew them: saturates


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_operands_of_each_recipe(recipe):
    """Which format, and along which dimension a scale is shared."""
    values = torch.randn(256, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 256)[:, None]
    operands = Operands(recipe, 4, CPU)
    for role, hybrid in (("input", E4M3), ("weight", E4M3), ("gradient", E5M2)):
        dtype = hybrid if recipe in ("tensorwise", "delayed") else E4M3
        assert format_of(recipe, role) == dtype
        expected = {
            "tensorwise": lambda r, d=dtype: round_tensor(values, d),
            "delayed": lambda r, d=dtype: rounded(values, torch.tensor(1.0), d),
            "blockwise": lambda r, w=role: (
                round_tiles(values, 128, float_scale, E4M3)
                if w == "weight"
                else (round_rows if r else round_columns)(values, 128, float_scale, E4M3)
            ),
            "mxfp8": lambda r: (round_rows if r else round_columns)(values, 32, e8m0_scale, E4M3),
        }[recipe]
        for reduced in (0, 1):
            found = operands.round(role, values, reduced, operands.scale(role, values))
            assert torch.equal(found, expected(reduced))
