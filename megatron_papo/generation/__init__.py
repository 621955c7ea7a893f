"""Rollouts: one `Generator` interface, and the engines that offer it, chosen by `config.generation`.

`transformers/` and `vllm/` run in the trainer's ranks, `remote/` reaches a vLLM on ranks of its own. Every engine
answers the same requests (`requests`), samples from the same distribution (`sampling`) and can be observed in the same
parts (`readings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_papo.config import Config
from megatron_papo.distributed.layout import Layout
from megatron_papo.generation.generator import EngineLost, Generator, Report, Sampling

if TYPE_CHECKING:
    from megatron_papo.data.processor import Processor


def build_generator(config: Config, processor: Processor, layout: Layout, reporter: Report | None = None) -> Generator:
    """This rank's engine of `config.generation`; it has no weights until the first `load_weights`.

    `reporter(done, total)` is called as rollouts of this rank finish. Raises ValueError when the engine is not
    installed or cannot run in this layout.
    """
    if config.generation.placement == "separate":
        from megatron_papo.generation.remote.remote_generator import RemoteGenerator

        return RemoteGenerator(config, processor, layout, reporter)
    if config.generation.engine == "vllm":
        from megatron_papo.generation.vllm.vllm_engine import VllmGenerator

        return VllmGenerator(config, processor, layout, reporter)
    from megatron_papo.generation.transformers.transformers_engine import TransformersGenerator

    return TransformersGenerator(config, processor, layout, reporter)


__all__ = ["EngineLost", "Generator", "Report", "Sampling", "build_generator"]
