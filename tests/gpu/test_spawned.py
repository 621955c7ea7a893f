"""Ranks on GPUs are spawned, each on its own card, and talk over NCCL. Skipped without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def report(folder: str) -> None:
    """What a launched rank finds: called by name."""
    import torch.distributed as dist

    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed.accelerator import device
    from megatron_papo.distributed.layout import initialize, shutdown

    layout = initialize(ParallelConfig())
    total = torch.full((3,), float(layout.rank + 1), device=device())
    dist.all_reduce(total)
    found = {"device": str(device()), "backend": dist.get_backend(), "total": total.tolist()}
    Path(folder, f"{layout.rank}.json").write_text(json.dumps(found))
    shutdown()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_rank_has_its_card(tmp_path, num_ranks):
    from megatron_papo.runtime.launch import Work, launch

    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    work = Work("tests.gpu.test_spawned:report", (str(tmp_path),), tmp_path / "run")
    assert launch(work, num_ranks) == 0
    total = num_ranks * (num_ranks + 1) / 2
    for rank in range(num_ranks):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["device"] == f"cuda:{rank}" and "nccl" in found["backend"] and found["total"] == [total] * 3
