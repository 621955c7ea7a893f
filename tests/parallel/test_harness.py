import pytest
import torch

from tests.ranks import run_ranks


def _sum_of_ranks(bias: int) -> float:
    torch.distributed.init_process_group("gloo")
    value = torch.tensor(float(torch.distributed.get_rank() + bias))
    torch.distributed.all_reduce(value)
    return value.item()


def _second_rank_fails() -> None:
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        raise RuntimeError("planted")
    torch.distributed.barrier()


@pytest.mark.fast
def test_ranks_talk_to_each_other_and_return_their_results():
    assert run_ranks(_sum_of_ranks, 3, 10) == [33.0, 33.0, 33.0]


@pytest.mark.fast
def test_a_rank_that_raises_fails_the_run_with_its_reason():
    with pytest.raises(Exception, match="planted"):
        run_ranks(_second_rank_fails, 2)
