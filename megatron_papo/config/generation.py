"""The section `generation`: which engine makes the rollouts, where it runs, and how tokens are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_papo.config.basics import Count, Fraction, Positive, Section


class GenerationConfig(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    """Program that generates the rollouts: vLLM, or transformers, the default, for machines without a GPU."""
    placement: Literal["colocated", "separate"] = "colocated"
    """Where the engine runs: `colocated`, in the training ranks, which generate and train in turn; `separate`, on ranks
    of its own, which come after the trainer's."""
    engines: Count = 1
    """Number of separate engines, each on `tensor` ranks of its own."""
    temperature: Positive = 1.0
    """Sampling temperature: logits are divided by it, in the engine and for the trainer's log-probs."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    """Tokens are sampled from the smallest set with this probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Tokens are sampled from this many most probable ones; 0: no limit."""
    max_response_tokens: Count = 2048
    """Most tokens of a response; a longer one is cut off."""
    ignore_eos: bool = False
    """Whether the rollouts of training go on behind an end-of-text token, so that each has max_response_tokens tokens:
    for timings that can be compared. Such rollouts are no training data."""
    batch_size: Count = 64
    """Number of rows that the transformers engine decodes together."""
    tensor: Count = 1
    """vLLM's tensor parallelism; it must divide the number of ranks that generate."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type in which the engine keeps its weights; `auto`: the trainer's."""
    quantization: Literal["none", "fp8"] = "none"
    """Whether vLLM's linear layers run in FP8; the weights are quantized as they are handed over. Needs a GPU."""
    kv_cache_gib: Positive | None = None
    """Size of vLLM's KV cache in GiB; null: what gpu_memory_fraction leaves (1/2 GiB without a GPU)."""
    gpu_memory_fraction: Fraction = 0.5
    """Fraction of the GPU's memory for vLLM, its weights included. A colocated vLLM needs it free beside what the
    trainer keeps, as it wakes and as it is started again; papo check says the largest that would do. Not used where
    kv_cache_gib is given."""
    prefix_caching: bool = True
    """Whether vLLM reads a prompt only once for all rollouts of its group."""
    sleep: bool = True
    """Whether a colocated vLLM gives its GPU memory back while the trainer works."""
    keep_weights_asleep: bool = True
    """Whether a sleeping vLLM keeps its weights in pinned host memory. false: it drops them, since a hand-over writes
    all of them again; rollouts that follow rollouts without an update between them then begin with a hand-over. Not
    tried on a GPU yet."""
    bucket_mib: Count = 64
    """Approximate size, in MiB, of the buckets in which weights are handed over to the engine."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """How often in a run an engine that dies is started again; it is then given the current weights and the same
    requests."""
    enforce_eager: bool = False
    """Whether vLLM runs without CUDA graphs."""

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
