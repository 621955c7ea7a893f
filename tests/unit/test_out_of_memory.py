"""Memory that ran out: recognised by types and wordings, said once with stage, row and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_papo.config import RunConfig, load_config
from megatron_papo.distributed.accelerator import allocator_in_words
from megatron_papo.observe.clock import StageClock
from megatron_papo.runtime import out_of_memory
from megatron_papo.runtime.failures import describe
from megatron_papo.runtime.out_of_memory import OutOfMemoryError


@pytest.mark.parametrize(
    ("error", "stage", "helps"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "update", "model.recompute=full"),
        (RuntimeError("a frame\nengine: CUDA out of memory"), "generate", "generation.gpu_memory_fraction"),
        (ValueError("Free memory on device (20/80 GiB) is less than desired"), "set_up", "optim.precision_aware=true"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "score", "train.tokens_per_micro_batch"),
        (MemoryError(), "save", "checkpoint.asynchronous=false"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "draw", "data.prefetch=false"),
    ],
)
def test_memory_that_runs_out_is_said_with_the_stage_and_what_helps(tmp_path, error, stage, helps):
    clock = StageClock(RunConfig(dir=tmp_path), rank=1)
    with pytest.raises(OutOfMemoryError) as caught, clock.stage("outer"), clock.stage(stage):
        error.add_note("row 2 of 3 (90 tokens, 1 images, 12 response tokens)")
        raise error
    said = str(caught.value)
    assert (
        said.startswith(f"stage outer/{stage}, row 2 of 3 (90 tokens, 1 images, 12 response tokens): ")
        and helps in said
    )
    assert "\n" not in said and said.count("stage ") == 1
    failure = describe(1, caught.value)
    assert (failure.kind, failure.name) == ("value", "OutOfMemoryError") and type(error).__name__ in failure.traceback


def test_other_failures_of_a_stage_stay_what_they_are(tmp_path):
    clock = StageClock(RunConfig(dir=tmp_path), rank=1)
    with pytest.raises(RuntimeError, match=r"^a bug$"), clock.stage("update"):
        raise RuntimeError("a bug")


def test_every_stage_of_which_help_is_told_is_one(tmp_path):
    """Names are those that the code opens; settings that are named exist, and stand in the page's row of the stage."""
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*)", page, re.M)
    rows = {stage: rest for stages, rest in table for stage in re.findall(r"\w+", stages)}
    sources = "".join(path.read_text() for path in (Path(__file__).parents[2] / "megatron_papo").rglob("*.py"))
    for stage, remedies in out_of_memory.HELP.items():
        assert f'clock.stage("{stage}"' in sources, stage
        assert all(key in rows[stage] for key in re.findall(r"[a-z]+\.[a-z_]+", " ".join(remedies))), stage
        for key in re.findall(r"[a-z]+\.[a-z_]+", " ".join((*remedies, *out_of_memory.HOST_HELP))):
            section, _, name = key.partition(".")
            assert name in type(getattr(load_config(None, []), section)).model_fields, key


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            3,
            4,
            "by signal SIGKILL, probably by the kernel: host memory ran out; what helps most: checkpoint.asynchronous=",
        ),
        (3, 3, "by signal SIGKILL, not by the kernel for want of memory"),
        (None, 4, "by signal SIGKILL (host memory may have run out)"),
    ],
)
def test_a_kill_is_told_by_the_kernels_own_count(monkeypatch, before, now, said):
    assert out_of_memory.kernel_kills() is None or out_of_memory.kernel_kills() >= 0
    monkeypatch.setattr(out_of_memory, "kernel_kills", lambda: now)
    assert out_of_memory.why_killed(before).startswith(said)


def test_what_the_gpu_holds_is_said_in_gib(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, held in (("memory_allocated", 2**31), ("memory_reserved", 3 * 2**30), ("mem_get_info", (0, 2**36))):
        monkeypatch.setattr(torch.cuda, name, lambda held=held: held)
    said = out_of_memory.told(torch.OutOfMemoryError("CUDA out of memory"), "load", allocator_in_words)
    assert "; torch has 2.0 GiB allocated and 3.0 reserved of 64.0; what helps most: " in str(said)

    def broken() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert allocator_in_words() == ""
