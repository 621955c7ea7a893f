"""Whole updates traced on a fake H100 (`tools/fake_gpu`): where the host waits for the GPU, dtypes and devices, and the
peak of memory against what `costs/memory.py` counts. Skipped with the reason where there is no C compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest

from megatron_papo.config import ModelConfig
from tests.support.interpreter import PYTHON
from tests.support.tiny import tiny_config
from tools.fake_gpu.cases import BENCHMARK, counted, shape_tree, update_case
from tools.fake_gpu.libraries import NoFakeGpu
from tools.fake_gpu.rows import Work
from tools.fake_gpu.trace import Case, FakeGpu

RECOMPUTE = get_args(ModelConfig.model_fields["recompute"].annotation)
WAITS = {
    "megatron_papo/algorithm/loss_metrics.py:to_host: read a list": "all that a row's loss reports, in one copy",
    "megatron_papo/optimization/gradient_norm.py:gradient_norm: read a value": "their norm decides about the step",
}
"""Where an update of one row may make the host wait for the GPU, once each, and what for."""
CLOSE = 0.05
"""Between a peak that is counted and the one that is traced."""
FEW = 3
"""Layers: each more adds the same, and `tools/trace_update.py` traces whole models."""
BOTH_VIEWS = replace(BENCHMARK, joint=True)


@pytest.fixture(scope="module")
def gpu() -> Iterator[FakeGpu]:
    try:
        with FakeGpu(PYTHON) as process:  # not a forked one: the libraries are loaded as it starts
            yield process
    except NoFakeGpu as reason:
        pytest.skip(str(reason))


def test_a_process_forked_after_all_imports_can_use_the_gpu(gpu):
    """Importing Megatron-Core asks torch whether there is a GPU. Asked by CUDA itself, no fork could use one."""
    assert gpu.after_fork() == "cuda:0"


def small_case(family: str, joint: bool, **settings: Any) -> Case:
    """Three layers a stack at most; of Qwen3-VL each of them has a level of DeepStack."""
    layers = 1 if family == "qwen2_5_vl" else 3
    sizes = {"hidden": 256, "layers": layers, "heads": 2, "kv_heads": 1, "vocab": 2048}
    tower = {"vision_hidden": 64, "vision_heads": 2, "vision_intermediate": 96, "vision_depth": max(layers, 2)}
    work = Work(image_edge=6, text_tokens=20, response_tokens=12, group_size=4, joint=joint)
    return update_case(tiny_config(family, **sizes, **tower).to_dict(), work, **settings)


@pytest.mark.parametrize(
    ("family", "recompute", "dtype", "joint"),
    [  # every recomputation in both dtypes, and with either branch
        ("qwen2_5_vl", recompute, dtype, (place + (dtype == "float32")) % 2 == 0)
        for place, recompute in enumerate(RECOMPUTE)
        for dtype in ("bfloat16", "float32")
    ]
    + [("qwen3_vl", "none", "float32", False), ("qwen3_vl", "full", "bfloat16", True)],
)
def test_an_update_stays_on_the_gpu_in_its_dtype_and_waits_where_it_must(gpu, family, recompute, dtype, joint):
    traced = gpu.trace(small_case(family, joint, model__dtype=dtype, model__recompute=recompute))
    assert traced.parameters == [f"torch.{dtype} on cuda:0"]
    assert set(traced.products) == {f"{dtype} x {dtype}"}
    assert traced.waits == dict.fromkeys(WAITS, 1)
    assert traced.states < traced.passes_peak


def test_a_stage_that_adds_levels_it_received_waits_for_nothing(gpu):
    """Of DeepStack's three levels the first stage adds one; under sequence parallelism every rank its share."""
    layout = {"parallel__tensor": 2, "parallel__sequence": True, "parallel__pipeline": 2}
    stage = {"num_ranks": 4, "rank": 2, "parallel__pipeline_layers": [1, 2]}
    traced = gpu.trace(small_case("qwen3_vl", True, **layout, **stage))
    assert traced.waits == {wait: 1 for wait, why in WAITS.items() if "norm" in why}
    assert set(traced.products) == {"bfloat16 x bfloat16"}


def check_peaks(gpu: FakeGpu, name: str, work: Work, *, stage: int = 0, **settings: Any) -> None:
    layers = FEW * int(settings.get("parallel__pipeline", 1))
    tensor, pipeline = (int(settings.get(f"parallel__{axis}", 1)) for axis in ("tensor", "pipeline"))
    case = update_case(
        shape_tree(name, layers, FEW), work, num_ranks=tensor * pipeline, rank=stage * tensor,
        in_flight=pipeline - stage, **settings,
    )  # fmt: skip
    traced, said = gpu.trace(case), counted(case)
    found = {"states": traced.states, "passes": traced.passes_peak, "step": traced.step_peak}
    expected = {"states": said.states, "passes": said.passes, "step": said.step}
    gaps = {name: expected[name] / found[name] - 1 for name in found}
    held = expected["passes"] - expected["states"], found["passes"] - found["states"]
    print(f"{name}, stage {stage}, {settings}: " + ", ".join(f"{part} {gap:+.1%}" for part, gap in gaps.items()),
          f"passes beside states {held[0] / held[1] - 1:+.1%}", sep=", ")  # fmt: skip
    assert gaps["states"] == pytest.approx(0.0, abs=0.005)
    assert max(map(abs, gaps.values())) < CLOSE, gaps


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_peaks_of_3b_are_those_that_are_counted(gpu, recompute):
    check_peaks(gpu, "Qwen2.5-VL-3B", BOTH_VIEWS, model__recompute=recompute)


def test_peaks_of_3b_with_the_masked_view_frozen(gpu):
    check_peaks(gpu, "Qwen2.5-VL-3B", BENCHMARK)


def test_peaks_of_qwen3_vl_4b(gpu):
    check_peaks(gpu, "Qwen3-VL-4B", BOTH_VIEWS, model__recompute="selective")


def test_peaks_of_7b(gpu):
    check_peaks(gpu, "Qwen2.5-VL-7B", BOTH_VIEWS, model__recompute="full")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_peaks_of_stages_of_72b(gpu, stage):
    layout = {"parallel__tensor": 8, "parallel__pipeline": 4, "parallel__sequence": True}
    check_peaks(gpu, "Qwen2.5-VL-72B", BOTH_VIEWS, stage=stage, model__recompute="selective", **layout)
