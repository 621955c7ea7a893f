"""Ranks of one machine meet where nobody else can reach them."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from megatron_papo.config import ParallelConfig
from megatron_papo.distributed.rendezvous import world_store
from tests.support.ports import Places, beyond_loopback, listening
from tests.support.ranks import run_ranks


def _meet_twice(alone: bool) -> tuple[Places, int]:
    """Where this rank can be reached, and the sum of two worlds one after the other."""
    from megatron_papo.distributed.layout import initialize, shutdown

    if alone:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    total = torch.zeros(())
    for _ in range(2):
        initialize(ParallelConfig())
        part = torch.ones(())
        dist.all_reduce(part)
        total += part
        places = listening({os.getpid()})
        assert places, "gloo does"
        shutdown()
    return beyond_loopback(places), int(total)


@pytest.mark.parametrize(("num_ranks", "alone"), [(2, False), (1, True)])
def test_ranks_of_one_machine_listen_on_its_loopback_alone(num_ranks, alone):
    assert run_ranks(_meet_twice, num_ranks, alone) == [(set(), 2 * num_ranks)] * num_ranks


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
            monkeypatch.setenv(name, "of the user")
        with pytest.raises(OSError, match=f"MASTER_PORT={port}: Address already in use"):
            world_store(1.0)
        assert os.environ["GLOO_SOCKET_IFNAME"] == "of the user"
