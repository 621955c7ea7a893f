"""Megatron-Core on a machine without a GPU, the process groups, and the exchanges between ranks."""

import math
import os
import random

import numpy
import pytest
import torch

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="adapts machines without a GPU")


def _adapted() -> dict:
    from megatron_papo.distributed.accelerator import adapt_megatron, backend, device, has_gpu

    adapt_megatron()
    modes = torch.overrides._len_torch_function_stack()
    adapt_megatron()
    ones = torch.ones(2)
    return {
        "modes added by a second call": torch.overrides._len_torch_function_stack() - modes,
        "made": str(torch.zeros(1, device="cuda").device),
        "made on the current device": str(torch.zeros(1, device=torch.cuda.current_device()).device),
        "moved": ones.cuda() is ones and ones.to("cuda").device.type == "cpu",
        "dtype still changes": ones.to(torch.float64).dtype == torch.float64,
        "type": ones.type(),
        "here": (has_gpu(), str(device()), backend()),
    }


def test_requests_for_cuda_are_read_as_cpu():
    assert run_ranks(_adapted, 1) == [
        {
            "modes added by a second call": 0,
            "made": "cpu",
            "made on the current device": "cpu",
            "moved": True,
            "dtype still changes": True,
            "type": "torch.cuda.FloatTensor",
            "here": (False, "cpu", "gloo"),
        }
    ]


def _draws() -> list[tuple]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed.accelerator import adapt_megatron, seed_all
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    initialize(ParallelConfig(tensor=2))
    draws = []
    for _ in range(2):
        seed_all(11)
        with get_cuda_rng_tracker().fork():
            split = torch.rand(()).item()
        draws.append((random.random(), numpy.random.rand(), torch.rand(()).item(), split))
    return draws


def test_seeds_are_alike_on_all_ranks_and_differ_only_within_tensor_parallel_regions():
    first, second = run_ranks(_draws, 2)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0][:3] == second[0][:3]
    assert first[0][3] != second[0][3]


def _layout_and_exchanges() -> dict:
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.exchange import broadcast_from_last_stage, gather_objects, sum_metrics
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    here = initialize(ParallelConfig(tensor=1, pipeline=2))
    tensor = torch.arange(3.0).reshape(3, 1) + here.data_rank if here.is_last_stage else None
    metrics = {"loss": (here.rank, 1.0), f"only/{here.data_rank}": (2.0, 1.0)}
    nan = {f"nan_{place}_max": (math.nan if here.data_rank == place else 1.0, 1.0) for place in range(2)}
    return {
        "place": (here.rank, here.tensor_rank, here.pipeline_rank, here.data_rank, here.data_size),
        "stages": (here.is_first_stage, here.is_last_stage),
        "model": gather_objects(here.rank, here.model_group),
        "heard": broadcast_from_last_stage(tensor, (3, 1), torch.float32).tolist(),
        "metrics": sum_metrics(metrics),
        "nan": [value for value, _ in sum_metrics(nan).values()],
    }


def test_layout_and_exchanges_over_two_stages_and_two_replicas():
    results = run_ranks(_layout_and_exchanges, 4)
    assert [r["place"] for r in results] == [(0, 0, 0, 0, 2), (1, 0, 0, 1, 2), (2, 0, 1, 0, 2), (3, 0, 1, 1, 2)]
    assert [r["stages"] for r in results] == [(True, False)] * 2 + [(False, True)] * 2
    assert [r["model"] for r in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank, result in enumerate(results):
        expected = [[0.0 + rank % 2], [1.0 + rank % 2], [2.0 + rank % 2]]
        assert result["heard"] == expected
        assert all(map(math.isnan, result["nan"])), "a maximum keeps a NaN, whichever rank has it"
        # of the last stage: ranks 2 and 3
        assert result["metrics"] == {"loss": (5.0, 2.0), "only/0": (2.0, 1.0), "only/1": (2.0, 1.0)}


def _too_few() -> str:
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize

    adapt_megatron()
    with pytest.raises(ValueError) as caught:
        initialize(ParallelConfig(tensor=2))
    return str(caught.value)


def test_a_world_that_does_not_divide_is_refused():
    assert run_ranks(_too_few, 1) == ["1 ranks do not divide by parallel.tensor 2 x parallel.pipeline 1"]


def _alone_twice() -> list[tuple[int, int]]:
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize, shutdown

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    adapt_megatron()
    seen = []
    for _ in range(2):
        here = initialize(ParallelConfig())
        seen.append((here.rank, here.world_size))
        shutdown()
    shutdown()
    return seen


def test_a_process_started_alone_is_rank_0_of_1_and_can_start_again():
    assert run_ranks(_alone_twice, 1) == [[(0, 1), (0, 1)]]
