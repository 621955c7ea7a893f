"""Whole updates traced on a fake H100 (`tools/fake_gpu`): where the host waits for the GPU, dtypes and devices, and the
peak of memory against what `costs/memory.py` counts. Skipped with the reason where there is no C compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest

from megatron_papo.config import ModelConfig
from tests.support.interpreter import PYTHON
from tools.fake_gpu.cases import BENCHMARK, counted, shape_tree, update_case
from tools.fake_gpu.libraries import NoFakeGpu
from tools.fake_gpu.rows import Work
from tools.fake_gpu.trace import FakeGpu

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


@pytest.mark.parametrize(
    ("recompute", "dtype", "joint"),
    [  # every recomputation in both dtypes, and with either branch
        (recompute, dtype, (place + (dtype == "float32")) % 2 == 0)
        for place, recompute in enumerate(RECOMPUTE)
        for dtype in ("bfloat16", "float32")
    ],
)
def test_an_update_stays_on_the_gpu_in_its_dtype_and_waits_where_it_must(gpu, recompute, dtype, joint):
    tree = shape_tree("3B", 1, 2) | {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    tree |= {"intermediate_size": 512, "vocab_size": 2048, "image_token_id": 2000, "video_token_id": 2001}
    tree |= {"vision_start_token_id": 2002, "vision_end_token_id": 2003}
    tree["vision_config"] |= {"out_hidden_size": 256, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96}
    work = Work(image_edge=6, text_tokens=20, response_tokens=12, group_size=4, joint=joint)
    traced = gpu.trace(update_case(tree, work, model__dtype=dtype, model__recompute=recompute))
    assert traced.parameters == [f"torch.{dtype} on cuda:0"]
    assert set(traced.products) == {f"{dtype} x {dtype}"}
    assert traced.waits == dict.fromkeys(WAITS, 1)
    assert traced.states < traced.passes_peak


def check_peaks(gpu: FakeGpu, size: str, work: Work, *, stage: int = 0, **settings: Any) -> None:
    layers = FEW * int(settings.get("parallel__pipeline", 1))
    tensor, pipeline = (int(settings.get(f"parallel__{axis}", 1)) for axis in ("tensor", "pipeline"))
    case = update_case(
        shape_tree(size, layers, FEW), work, num_ranks=tensor * pipeline, rank=stage * tensor,
        in_flight=pipeline - stage, **settings,
    )  # fmt: skip
    traced, said = gpu.trace(case), counted(case)
    found = {"states": traced.states, "passes": traced.passes_peak, "step": traced.step_peak}
    expected = {"states": said.states, "passes": said.passes, "step": said.step}
    gaps = {name: expected[name] / found[name] - 1 for name in found}
    held = expected["passes"] - expected["states"], found["passes"] - found["states"]
    print(f"{size}, stage {stage}, {settings}: " + ", ".join(f"{name} {gap:+.1%}" for name, gap in gaps.items()),
          f"passes beside states {held[0] / held[1] - 1:+.1%}", sep=", ")  # fmt: skip
    assert gaps["states"] == pytest.approx(0.0, abs=0.005)
    assert max(map(abs, gaps.values())) < CLOSE, gaps


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_peaks_of_3b_are_those_that_are_counted(gpu, recompute):
    check_peaks(gpu, "3B", BOTH_VIEWS, model__recompute=recompute)


def test_peaks_of_3b_with_the_masked_view_frozen(gpu):
    check_peaks(gpu, "3B", BENCHMARK)


def test_peaks_of_7b(gpu):
    check_peaks(gpu, "7B", BOTH_VIEWS, model__recompute="full")


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_peaks_of_stages_of_72b(gpu, stage):
    layout = {"parallel__tensor": 8, "parallel__pipeline": 4, "parallel__sequence": True}
    check_peaks(gpu, "72B", BOTH_VIEWS, stage=stage, model__recompute="selective", **layout)
