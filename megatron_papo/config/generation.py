"""The section `generation`: which engine makes the rollouts, where it runs, and how tokens are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Fraction, Positive, Section


class GenerationConfig(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    """vLLM, or transformers: the default for machines without a GPU."""
    placement: Literal["colocated", "separate"] = "colocated"
    """In the training ranks, one after the other, or on ranks of its own, which come after the trainer's."""
    engines: Count = 1
    """Separate: engines, each on `tensor` ranks of its own."""
    temperature: Positive = 1.0
    """Logits are divided by it, in the engine and in the trainer's log-probs."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    """Sampled from the smallest set of tokens with this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit."""
    max_response_tokens: Count = 2048
    """Longer responses are cut off."""
    batch_size: Count = 64
    """Rows that the transformers engine decodes together."""
    tensor: Count = 1
    """vLLM's tensor parallelism; must divide the ranks that generate."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the engine; `auto` is the trainer's."""
    quantization: Literal["none", "fp8"] = "none"
    """vLLM's linear layers in FP8, quantized as the weights are handed over. Needs a GPU."""
    kv_cache_gib: Positive | None = None
    """Of vLLM; null: what gpu_memory_fraction leaves (1/2 GiB without a GPU)."""
    gpu_memory_fraction: Fraction = 0.5
    """Of the GPU, for vLLM with its weights. A colocated one needs it free beside what the trainer keeps, as it wakes
    and as it is started again; papo check says the largest that would do. Unused where kv_cache_gib is given."""
    prefix_caching: bool = True
    """vLLM reads a prompt once for all rollouts of its group."""
    sleep: bool = True
    """A colocated vLLM gives its memory back while the trainer works; on a GPU."""
    keep_weights_asleep: bool = True
    """A sleeping vLLM keeps its weights in pinned host memory. False: it forgets them, since a hand-over writes them
    anew; rollouts that follow rollouts with no update between then begin with a hand-over. Not tried on a GPU yet."""
    bucket_mib: Count = 64
    """Weights are handed over in buckets of about this size."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """An engine that dies is started again, given the current weights and asked again, this often in a run."""
    enforce_eager: bool = False
    """vLLM without CUDA graphs."""

    @property
    def num_engine_ranks(self) -> int:
        """Ranks that serve and do not train: of separate engines. They come last in the world."""
        return self.engines * self.tensor if self.placement == "separate" else 0

    @model_validator(mode="after")
    def _check(self) -> GenerationConfig:
        if self.engines > 1 and self.placement == "colocated":
            raise ValueError("generation.engines: colocated engines are as many as the ranks make; leave it at 1")
        if self.engine != "vllm":
            for key in ("placement", "quantization"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"generation.{key}={getattr(self, key)} needs generation.engine=vllm")
        return self
