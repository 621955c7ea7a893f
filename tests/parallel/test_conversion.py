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
from megatron_papo.model.family import FAMILIES
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
def sources(tmp_path_factory, request) -> dict[str, Path]:
    """Of each family."""
    root, sizes = tmp_path_factory.mktemp("hf"), {**SHAPE, **VISION, "tie": request.param}
    return {family: make_tiny_folder(root / family, family=family, **sizes) for family in FAMILIES}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _of_each(sources: dict[str, Path], root: Path, tensor: int, pipeline: int) -> None:
    """In `root`/FAMILY, of each family: `read`, the checkpoint `m` as a model read it and wrote it, and `run`, the
    checkpoint of step 7 of a run."""
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import build_policy

    adapt_megatron()
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    config = load_config(None, [*layout, "model.dtype=float32", "model.spec=local"])
    initialize(config.parallel)
    for family, source in sources.items():
        shape, folder = ModelShape.from_folder(source), root / family
        converted, run = build_policy(config, shape), build_policy(config, shape)
        load_weights(converted, shape, folder / "m")
        write_hf(converted, shape, folder / "read", source)
        read_hf(run, shape, source)
        CheckpointStore(folder / "run", source=source).save(7, TrainState(run, shape))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (2, 2)])
def test_any_layout_reads_a_converted_checkpoint_and_any_layouts_is_exported(sources, tmp_path, tensor, pipeline):
    for family, source in sources.items():
        convert("hf-to-megatron", source, tmp_path / family / "m", SMALL, MEMORY, Workers())
        assert len(list((tmp_path / family / "m").glob("*.distcp"))) > 5
    run_ranks(_of_each, tensor * pipeline, sources, tmp_path, tensor, pipeline)
    for family, source in sources.items():
        root, expected = tmp_path / family, _tensors(source)
        checkpoint = root / "run" / "step_00000007"
        convert("megatron-to-hf", checkpoint, root / "export", SMALL, MEMORY, Workers())
        for folder in ("read", "export"):
            found = _tensors(root / folder)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), folder
        verdict = verify(root / "export", MEMORY, Workers(), checkpoint)
        assert verdict.faults == [] and not verdict.inexact
