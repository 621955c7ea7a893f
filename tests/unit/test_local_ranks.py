"""How many ranks a command starts by default: one a GPU; and which models are not meant for a machine without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_papo.config import ConfigError, load_config
from megatron_papo.distributed import visible_gpus
from megatron_papo.distributed.visible_gpus import HIDDEN, num_visible_gpus
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight import local_ranks as module
from megatron_papo.preflight.local_ranks import faults_of_cpu, host_bytes, local_ranks
from tests.unit.test_shape import PUBLISHED_3B

SPLIT = "parallel.tensor=2"
ENGINES = ("generation.placement=separate", "generation.engine=vllm", "generation.engines=2", "generation.tensor=1")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (None, 8), ("", 0), ("-1", 0), ("3", 1), ("0,1,2", 3), (" 0, 1 ", 2), ("0,1,9,2", 2), ("0,-1,2", 1),
        ("GPU-8932f937,GPU-1b2c", 2), ("MIG-1,MIG-2", 1), ("0,0", 0), ("none", 0),
    ],
)  # fmt: skip
def test_gpus_are_counted_as_cuda_shows_them(monkeypatch: pytest.MonkeyPatch, value: str | None, number: int):
    monkeypatch.setattr(visible_gpus, "_num_installed", lambda: 8)
    environ = {} if value is None else {"CUDA_VISIBLE_DEVICES": value}
    assert num_visible_gpus(environ) == number
    assert num_visible_gpus(environ | HIDDEN) == 0
    monkeypatch.setattr(visible_gpus, "_num_installed", lambda: 0)
    assert num_visible_gpus(environ) == 0


@pytest.mark.parametrize(
    ("words", "asked", "num_gpus", "number"),
    [
        ([], None, 0, 1), ([SPLIT], None, 0, 2), ([SPLIT], None, 8, 8), ([SPLIT], 4, 8, 4), ([SPLIT], 8, 0, 8),
        ([*ENGINES], None, 0, 3), ([*ENGINES], None, 8, 8), ([*ENGINES], 5, 8, 5),
    ],
)  # fmt: skip
def test_there_is_a_rank_for_each_gpu(words: list[str], asked: int | None, num_gpus: int, number: int):
    assert local_ranks("train", load_config(None, words), asked, num_gpus) == number


@pytest.mark.parametrize(
    ("words", "asked", "num_gpus", "line"),
    [
        (
            ["parallel.tensor=3"], None, 8,
            "parallel: this machine's 8 GPUs: no multiple of parallel.tensor=3 x parallel.pipeline=1: "
            "--ranks 6 uses 6 of them, or parallel.tensor=1, 2, 4, 8 divides them",
        ),
        (
            ["parallel.tensor=2", *ENGINES], None, 3,
            "parallel: this machine's 3 GPUs less 2 for engines: no multiple of parallel.tensor=2 x "
            "parallel.pipeline=1: parallel.tensor=1 divides them",
        ),
        (
            ["parallel.pipeline=4"], None, 1,
            "parallel: this machine's one GPU: no multiple of parallel.tensor=1 x parallel.pipeline=4: more GPUs are "
            "needed",
        ),
        ([], 9, 8, "--ranks: 9 ranks for this machine's 8 GPUs: each takes a GPU of its own"),
        (["parallel.tensor=2"], 3, 0, "--ranks: 3 is no multiple of parallel.tensor=2 x parallel.pipeline=1"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_one_line(words: list[str], asked: int | None, num_gpus: int, line: str):
    with pytest.raises(ConfigError) as refused:
        local_ranks("train", load_config(None, words), asked, num_gpus)
    assert str(refused.value) == line


@pytest.fixture
def shape(tmp_path: Path) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_3B))
    return ModelShape.from_folder(tmp_path)


def test_a_large_model_is_not_trained_on_cpus_unless_that_is_meant(shape: ModelShape, monkeypatch: pytest.MonkeyPatch):
    config = load_config(None, ["parallel.tensor=2"])
    (line,) = faults_of_cpu("train", config, shape, 8)
    assert line == (
        "model.path: 3.8 billion parameters, and this machine shows no GPU: on CPUs a step would take minutes to "
        "hours; `papo doctor` says what it has, CUDA_VISIBLE_DEVICES may hide its GPUs, --cpu takes its "
        "CPUs all the same"
    )
    monkeypatch.setattr(module, "_memory", lambda: 128 * 2**30)
    assert not list(faults_of_cpu("score", config, shape, 2)) and not list(faults_of_cpu("train", config, None, 8))
    monkeypatch.setattr(module, "_memory", lambda: 10 * 2**30)
    (line,) = faults_of_cpu("score", config, shape, 2)
    assert "2 ranks need 14.0 GiB of its memory, which is 10.0" in line and "--cpu" in line


def test_the_memory_of_a_host_holds_every_copy_of_the_model(shape: ModelShape):
    config = load_config(None, ["parallel.distributed_optimizer=false"])
    assert host_bytes("train", config, shape, 2) == 2 * host_bytes("train", config, shape, 1)
    assert host_bytes("train", config, shape, 1) == 4 * host_bytes("eval", config, shape, 1)  # fp32, gradients, Adam
