"""The head's kernels of Triton, compiled for an H100 ahead of time: they compile, and hold what they compute with in
registers. No GPU is needed; ptxas and cuobjdump come with Triton. What they compute is tested by the interpreter
(`tests/unit/test_tile_kernels.py`) and on a GPU (`tests/gpu/test_head.py`)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

H100 = ("cuda", 90, 32)
MOST_REGISTERS = 128
"""Of a thread: with four warps a block, half of what a multiprocessor has then serves four blocks at a time."""
MOST_SHARED = 2048
"""Bytes a block: sums over the lanes alone."""
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SUMS = {
    "z_ptr": "*fp32", "y_ptr": "*fp32", "columns_ptr": "*i64", "sums_ptr": "*fp32", "num_rows": "i32",
    "num_words": "i32", "scale": "fp32",
}  # fmt: skip
GRADIENTS = {
    "z_ptr": "*fp32", "y_ptr": "*fp32", "z_out_ptr": "*{out}", "y_out_ptr": "*{out}", "columns_ptr": "*i64",
    "pulls_ptr": "*fp32", "num_rows": "i32", "num_words": "i32", "scale": "fp32",
}  # fmt: skip
EVEN = [["tt.divisibility", 16]]


def resources(kernel: Any, types: dict[str, str], constants: dict[str, Any], even: bool) -> dict[str, int]:
    """Registers, stack, shared and local memory of the compiled kernel, in bytes but for registers. `even`: numbers of
    rows and words are multiples of 16, which Triton compiles for by itself; addresses always are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(names) == set(types) | set(constants)
    aligned = [name for name, kind in types.items() if kind.startswith("*") or (even and name.startswith("num_"))]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): EVEN for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget(*H100))
    return read_resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def read_resources(machine_code: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        said = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    assert found, said
    return dict(zip(("registers", "stack", "local"), map(int, found.groups())))


def holds_all_in_registers(found: dict[str, int]) -> None:
    assert found["registers"] <= MOST_REGISTERS, found
    assert found["stack"] == found["local"] == 0, f"values are spilled to memory: {found}"
    assert found["shared"] <= MOST_SHARED, found


@pytest.mark.parametrize(("pair", "entropy"), product((False, True), repeat=2))
def test_sums_compile_for_an_h100_without_spills(pair: bool, entropy: bool):
    from megatron_papo.logprobs import triton_tile

    constants = {"PAIR": pair, "ENTROPY": entropy, "BLOCK": triton_tile.BLOCK_SIZE}
    for even in (True, False) if pair and entropy else (True,):
        holds_all_in_registers(resources(triton_tile.sums_kernel, SUMS, constants, even))


@pytest.mark.parametrize(("out", "pair", "slope"), product(("fp32", "bf16"), (False, True), (False, True)))
def test_gradients_compile_for_an_h100_without_spills(out: str, pair: bool, slope: bool):
    from megatron_papo.logprobs import triton_tile

    types = {name: kind.format(out=out) for name, kind in GRADIENTS.items()}
    constants = {"PAIR": pair, "SLOPE": slope, "BLOCK": triton_tile.BLOCK_SIZE}
    for even in (True, False) if pair and slope else (True,):
        holds_all_in_registers(resources(triton_tile.gradients_kernel, types, constants, even))
