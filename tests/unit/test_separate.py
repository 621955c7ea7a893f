"""Parts of separate engines that need no engine: the weight broadcast over real gloo, the store of their addresses, the
rollouts that a checkpoint keeps, and what is refused before ranks start."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.data.draw import Draw
from megatron_papo.data.order import DataCursor
from megatron_papo.generation.remote.engine_store import Address, EngineStore
from megatron_papo.generation.remote.messages import BucketMessage
from megatron_papo.generation.remote.weight_broadcast import BroadcastBroken, WeightBroadcast
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight.layout_faults import faults_of_layout
from megatron_papo.training.pending_rollouts import PendingRollouts, age, from_state, to_state
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout
from tests.support.ranks import run_ranks
from tests.unit.test_shape import PUBLISHED_3B


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def _broadcasts(store: dist.Store, size: int) -> list[WeightBroadcast]:
    with ThreadPoolExecutor(size) as pool:  # each waits for the others
        return list(pool.map(lambda rank: WeightBroadcast("weights", store, rank, size), range(size)))


def test_weights_are_broadcast_in_buckets(store):
    named = [(f"w{index}", torch.randn(index + 1, 3, dtype=torch.float64)) for index in range(6)]
    sender, *receivers = _broadcasts(store, 3)
    told: list[SimpleQueue[BucketMessage | None]] = [SimpleQueue() for _ in receivers]

    def receive(broadcast: WeightBroadcast, messages: SimpleQueue[BucketMessage | None]) -> dict[str, torch.Tensor]:
        return {name: tensor for bucket in iter(messages.get, None) for name, tensor in broadcast.receive(bucket)}

    def announce(bucket: BucketMessage | None) -> None:
        for messages in told:
            messages.put(bucket)
        if bucket is not None:
            buckets.append(bucket)

    buckets: list[BucketMessage] = []
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(receive, broadcast, messages) for broadcast, messages in zip(receivers, told)]
        sender.send(iter(named), announce, torch.float32, bucket_bytes=4 * 3 * 6)
        announce(None)
        for each in found:
            assert list(each.result()) == [name for name, _ in named]
            for name, tensor in named:
                assert torch.equal(each.result()[name], tensor.float())
    # rows of 3 values: 1 + 2 + 3 fill a bucket of 6 rows, then each is one of its own, the last as large as the bucket
    assert [bucket.names for bucket in buckets] == [("w0", "w1", "w2"), ("w3",), ("w4",), ("w5",)]


def _raises_soon(action: Callable[[], Any]) -> float:
    start = time.monotonic()
    with pytest.raises(BroadcastBroken):
        action()
    return time.monotonic() - start


def test_a_rank_that_waits_in_an_aborted_broadcast_stops_waiting(store):
    _, receiver = _broadcasts(store, 2)
    threading.Timer(0.5, receiver.abort).start()
    assert _raises_soon(lambda: list(receiver.receive(BucketMessage(("w",), ((2,),), torch.float32)))) < 5


def test_a_broken_broadcast_still_draws_every_tensor(store):
    broadcasts = _broadcasts(store, 2)
    sender = broadcasts[0]
    broadcasts.clear()  # as if the other process had ended
    drawn = []

    def tensors():
        for index in range(40):
            drawn.append(index)
            yield f"w{index}", torch.ones(2**18)

    with pytest.raises(BroadcastBroken):
        sender.send(tensors(), lambda bucket: None, torch.float32, bucket_bytes=2**20)
    assert drawn == list(range(40))


def test_the_first_living_restart_is_found(store):
    engines = EngineStore(store)
    first, third = Address("h", 1), Address("h", 3)
    engines.announce(0, 0, first)
    assert engines.living(0, 0, wait_s=1) == (0, first)
    engines.note_death(0, 0, "signal 9")
    engines.note_death(0, 0, "exit code 1")
    assert engines.death(0, 0) == "signal 9"
    engines.note_death(0, 1, "signal 9")  # before it could be asked
    threading.Timer(0.3, lambda: engines.announce(0, 2, third)).start()
    assert engines.living(0, 0, wait_s=5) == (2, third)
    with pytest.raises(TimeoutError, match="engine 1 did not come up within 0 s"):
        engines.living(1, 0, wait_s=0.2)
    assert engines.death(1, 0) is None and not engines.stopping
    engines.stop()
    assert engines.stopping
    threading.Timer(0.2, lambda: engines.publish_key("print")).start()
    assert engines.key_fingerprint() == "print"


def _prompt(place: int) -> Prompt:
    return Prompt(f"row-{place}", place, "", "", (), ModelInputs(torch.arange(3), None, None))


def _group(place: int) -> Group:
    rollouts = tuple(
        Rollout(index, (place, index) * (index + 1), tuple(-0.1 * place - 1e-9 * k for k in range(2 * (index + 1))),
                f"{(place, index) * (index + 1)}", "stop" if index else "length", 6,
                sampled=(True, False, True, True) if (place, index) == (6, 1) else None)
        for index in range(2)
    )  # fmt: skip
    return Group(_prompt(place), rollouts)


def _pending(places: list[int]) -> PendingRollouts:
    groups = tuple(_group(place) for place in places)
    draw = Draw((tuple(group.prompt for group in groups),), (tuple(places),), DataCursor(9, 0, position=8))
    return PendingRollouts(7, DataCursor(9, 0, position=4), draw, groups)


def _without_sampled(state: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint was written before responses had turns."""
    arrays = dict(np.load(io.BytesIO(base64.b64decode(state["rollouts"]))))
    assert arrays.pop("sampled").sum() < len(arrays["ids"])
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return state | {"rollouts": base64.b64encode(buffer.getvalue()).decode()}


def _saved(world_size: int) -> dict[str, Any]:
    from megatron_papo.config import ParallelConfig
    from megatron_papo.distributed.layout import initialize, shutdown

    layout = initialize(ParallelConfig())
    state = to_state(_pending([4, 5, 6, 7][layout.rank :: world_size]), layout.data_group)
    shutdown()
    return state


def test_rollouts_under_way_are_kept_exactly_and_for_any_number_of_ranks():
    (alone,), pair = run_ranks(_saved, 1, 1), run_ranks(_saved, 2, 2)
    assert alone == pair[0] == pair[1]
    for places in ([4, 5, 6, 7], [6, 4]):
        draw, wanted = _pending(places).draw, _pending(places).groups
        found = from_state(alone, 7, draw, 2, str)
        assert wanted is not None and found is not None
        assert [group.rollouts for group in found] == [group.rollouts for group in wanted]
        assert [group.prompt.id for group in found] == [group.prompt.id for group in wanted]
    draw = _pending([4, 5]).draw
    older = from_state(_without_sampled(alone), 7, draw, 2, str)
    assert older is not None and [group.rollouts for group in older] == [_group(4).rollouts, _group(5).rollouts]
    assert from_state(alone, 8, draw, 2, str) is None, "another step's"
    assert from_state(alone, 7, draw, 3, str) is None, "another number of rollouts"
    assert from_state(alone, 7, _pending([8]).draw, 2, str) is None, "another prompt"
    assert from_state({}, 7, draw, 2, str) is None
    for spoilt in (alone["rollouts"][:-40], "", "?", None, base64.b64encode(b"PK").decode()):
        with pytest.raises(ValueError, match="not rollouts"):
            from_state({"step": 7, "rollouts": spoilt}, 7, draw, 2, str)
    assert age([_group(1), _group(2)], 7) == (4.0, 4.0)


SEPARATE = ["generation.engine=vllm", "generation.placement=separate"]


def _faults(num_ranks: int, *settings: str, verb: str = "train") -> list[str]:
    config = load_config(None, [*SEPARATE, "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", *settings])
    return faults_of_layout(verb, config, ModelShape.from_dict(PUBLISHED_3B), num_ranks)


def test_a_world_must_have_ranks_for_trainer_and_engines():
    tensor = ["parallel.tensor=2", "generation.tensor=2", "generation.engines=2"]
    assert _faults(8, *tensor) == []
    assert _faults(7, *tensor) == [
        "generation.engines: 7 ranks less 2 engines of generation.tensor=2 leave 3, which is no multiple of "
        "parallel.tensor=2 x parallel.pipeline=1"
    ]
    assert _faults(4, *tensor)[0].startswith(
        "generation.engines: 4 ranks less 2 engines of generation.tensor=2 leave 0"
    )
    assert _faults(6, *tensor) == [
        "generation.engines: 2 engines for 1 data-parallel ranks: each of these asks one engine, so 1 would be idle"
    ]
    assert _faults(4, *tensor, verb="sft") == [], "who does not generate has no engines"


def test_what_an_engine_cannot_split_is_refused():
    (heads,) = [fault for fault in _faults(4, "generation.tensor=3") if "attention" in fault]
    assert heads == "generation.tensor: 16 attention heads do not divide by 3"
    assert "generation.tensor: 2 key-value heads and 3 ranks do not divide" in _faults(4, "generation.tensor=3")
    assert _faults(9, "generation.tensor=8") == [
        "generation.tensor: 3420 columns of the vision tower's MLP do not divide by 8"
    ]
    colocated = load_config(None, ["generation.engine=vllm", "generation.tensor=8", "cluster.gpus_per_node=0",
                                   "cluster.ranks_per_node=1"])  # fmt: skip
    assert "generation.tensor: 3420 columns of the vision tower's MLP do not divide by 8" in faults_of_layout(
        "train", colocated, ModelShape.from_dict(PUBLISHED_3B), 8
    )


def test_training_ahead_without_a_correction_is_doubtful():
    ahead = [*SEPARATE, "train.ahead=true", "train.tokens_per_micro_batch=100000"]
    assert load_config(None, [*ahead, "loss.correction=truncated"]).warnings() == []
    (warning,) = load_config(None, ahead).warnings()
    assert warning.startswith("train.ahead: rollouts are one step old")
    with pytest.raises(ConfigError, match=r"train.ahead needs generation.placement=separate"):
        load_config(None, ["train.ahead=true"])
    assert Config().generation.num_engine_ranks == 0
    assert (
        load_config(None, [*SEPARATE, "generation.engines=3", "generation.tensor=2"]).generation.num_engine_ranks == 6
    )
