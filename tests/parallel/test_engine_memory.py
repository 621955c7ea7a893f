"""The end of an engine whose memory sleeps, without a GPU: vLLM's own allocator keeps the books, and stand-ins for the
CUDA driver's calls, and for the engine, say in which order memory is mapped and unmapped. What the driver itself does
is seen by `tests/gpu/test_sleep.py` alone."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.ranks import run_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


class _Driver:
    """Counts what is mapped; a piece unmapped twice is the fault that a driver answers with an error."""

    def __init__(self) -> None:
        self.mapped: set[int] = set()
        self.told: list[str] = []

    def create_and_map(self, handle: tuple[int, int, int, int]) -> None:
        assert handle[2] not in self.mapped
        self.mapped.add(handle[2])

    def unmap_and_release(self, handle: tuple[int, int, int, int]) -> None:
        if handle[2] not in self.mapped:
            self.told.append("unmapped twice")
        self.mapped.discard(handle[2])


class _Engine:
    """An LLM with two pieces of weights and one of keys and values, of a MiB each."""

    def __init__(self, driver: _Driver, leaves: int = 0):
        from vllm.device_allocator.cumem import CuMemAllocator
        from vllm.device_allocator.sleep_mode_backend import CuMemBackend

        self.driver, self.leaves = driver, leaves
        self.allocator, self.backend = CuMemAllocator.get_instance(), CuMemBackend()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shutdown))
        for place, tag in enumerate(("weights", "weights", "kv_cache")):
            handle = 0, 2**20, 4096 * (place + 1), place
            self.allocator.current_tag = tag
            driver.create_and_map(handle)
            self.allocator._python_malloc_callback(handle)

    def sleep(self, level: int) -> None:
        self.driver.told.append(f"sleep {level}")
        self.backend.suspend(level)

    def wake_up(self, tags: list[str]) -> None:
        self.driver.told.append(f"wake {' '.join(tags)}")
        self.backend.resume(tags)

    def _shutdown(self) -> None:
        """As vLLM's allocator frees each piece when its last tensor goes."""
        self.driver.told.append("shutdown")
        for pointer in list(self.allocator.pointer_to_data)[self.leaves :]:
            self.driver.unmap_and_release(self.allocator._python_free_callback(pointer))  # type: ignore[arg-type]


def _without_a_gpu(driver: _Driver) -> None:
    """vLLM's allocator with the driver's calls replaced. Of a rank's own process, so nothing is put back."""
    import vllm.device_allocator as device_allocator
    from vllm.device_allocator import cumem

    cumem.cumem_available = True
    cumem.create_and_map, cumem.unmap_and_release = driver.create_and_map, driver.unmap_and_release
    cumem.libcudart = SimpleNamespace(cudaMemcpy=lambda *_: None)
    device_allocator.get_mem_allocator_instance = cumem.CuMemAllocator.get_instance
    torch.cuda.synchronize = torch.accelerator.empty_cache = lambda *_: None  # type: ignore[assignment]
    torch.cuda.mem_get_info = lambda *_: (2**36 - 2**20 * len(driver.mapped), 2**36)  # type: ignore[assignment]


def _generator(engine: _Engine, keeps_weights: bool = True) -> Any:
    from megatron_papo.generation.vllm.sleep import Sleeper
    from megatron_papo.generation.vllm.vllm_engine import VllmGenerator

    generator = VllmGenerator.__new__(VllmGenerator)
    generator.llm, generator.shm_name = engine, "of_no_engine"  # type: ignore[assignment]
    generator.in_vllm = SimpleNamespace(CACHED_METHODS=())
    generator.sleeper = Sleeper(engine, True, keeps_weights)  # type: ignore[arg-type]
    generator.policy_version, generator.forgotten_version = 7, None
    generator._start = lambda: engine.driver.told.append("start")  # type: ignore[method-assign]
    return generator


def _ended() -> dict[str, Any]:
    """What the driver saw as an engine ended: asleep, with its weights awake, and awake; and one that left a piece."""
    driver = _Driver()
    _without_a_gpu(driver)
    found: dict[str, Any] = {}
    for name, before in (("asleep", ()), ("weights", ("wake_weights",)), ("awake", ("wake",))):
        generator = _generator(_Engine(driver))
        generator.sleeper.sleep()
        freed = generator.sleeper.freed_bytes
        for step in before:
            getattr(generator.sleeper, step)()
        generator.restart()
        found[name] = (freed, driver.told.copy(), len(driver.mapped))
        driver.told.clear()
    generator = _generator(_Engine(driver), keeps_weights=False)
    generator._sleep()
    generator._sleep()  # of a call that found it asleep
    found["forgot"] = generator.policy_version, generator.forgotten_version, driver.told.copy()
    found["reminded"] = [_reminded(generator), _reminded(_generator(generator.llm))]
    generator.restart()
    try:
        _generator(_Engine(driver, leaves=1)).restart()
    except RuntimeError as error:
        found["left"] = str(error)
    return found


def _reminded(generator: Any) -> list[int]:
    """Versions of the weights that it is given before it is asked."""
    from megatron_papo.training import rollouts

    given: list[int] = []
    rollouts.hand_over = lambda run, generator, policy_version: given.append(policy_version)
    rollouts.give_weights_again(None, generator)  # type: ignore[arg-type]
    return given


def test_a_sleeping_engine_wakes_before_it_ends_and_leaves_nothing_mapped():
    (found,) = run_ranks(_ended, 1, vllm=True)
    steps = ["sleep 1", "wake weights", "wake kv_cache", "shutdown", "start"]
    for name in ("asleep", "weights", "awake"):
        assert found[name] == (3 * 2**20, steps, 0), name
    assert found["forgot"] == (None, 7, ["sleep 2"]) and found["reminded"] == [[7], []]
    assert found["left"].startswith("the engine that was closed still holds 0.00 GiB in 1 pieces of vLLM's sleeping")
