"""Converted checkpoints in real Megatron models of any layout, and those models' checkpoints exported.

How conversion itself behaves is in tests/system/test_convert.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_papo.checkpoint.state import TrainState
from megatron_papo.checkpoint.store import CheckpointStore
from megatron_papo.checkpoint.weight_loading import load_weights
from megatron_papo.config import load_config
from megatron_papo.conversion.convert import convert
from megatron_papo.conversion.plan import Settings
from megatron_papo.conversion.verify import verify
from megatron_papo.conversion.workers import Workers
from megatron_papo.distributed.accelerator import adapt_megatron
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.transfer import read_hf, write_hf
from tests.support.ranks import run_ranks
from tests.support.tiny import make_tiny_folder

SHAPE = {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "vision_depth": 2, "vocab": 275}
VISION = {"vision_hidden": 32, "vision_heads": 4, "vision_intermediate": 42}  # 42: padded at every layout
SMALL = Settings(file_bytes=100_000, box_bytes=5_000)
"""Several files, and most matrices in several boxes."""
MEMORY = 8 * 2**30


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(tmp_path_factory, request) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("hf") / "hf", **SHAPE, **VISION, tie=request.param)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _model(folder: str, tensor: int, pipeline: int):
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import build_policy

    adapt_megatron()
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    config = load_config(None, [*layout, "model.dtype=float32", "model.spec=local"])
    initialize(config.parallel)
    shape = ModelShape.from_folder(folder)
    return build_policy(config, shape), shape


def _into_a_model(source: str, checkpoint: str, tensor: int, pipeline: int, target: str) -> None:
    model, shape = _model(source, tensor, pipeline)
    load_weights(model, shape, checkpoint)
    write_hf(model, shape, target, source)


def _saved_by_a_run(source: str, folder: str, tensor: int, pipeline: int) -> None:
    model, shape = _model(source, tensor, pipeline)
    read_hf(model, shape, source)
    CheckpointStore(folder, source=source).save(7, TrainState(model, shape))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (2, 2)])
def test_any_layout_reads_a_converted_checkpoint_and_any_layouts_is_exported(source, tmp_path, tensor, pipeline):
    expected = _tensors(source)
    convert("hf-to-megatron", source, tmp_path / "m", SMALL, MEMORY, Workers())
    assert len(list((tmp_path / "m").glob("*.distcp"))) > 5
    run_ranks(
        _into_a_model, tensor * pipeline, str(source), str(tmp_path / "m"), tensor, pipeline, str(tmp_path / "read")
    )
    run_ranks(_saved_by_a_run, tensor * pipeline, str(source), str(tmp_path / "run"), tensor, pipeline)
    convert("megatron-to-hf", tmp_path / "run" / "step_00000007", tmp_path / "export", SMALL, MEMORY, Workers())
    for folder in ("read", "export"):
        found = _tensors(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), folder
    verdict = verify(tmp_path / "export", MEMORY, Workers(), tmp_path / "run" / "step_00000007")
    assert verdict.faults == [] and not verdict.inexact
