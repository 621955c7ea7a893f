"""The functions, names and classes of other projects that this package uses: vLLM, Transformer Engine, Megatron-Core.

`record_signatures.py` reads them in the source of a release. A new call of such a function gets an entry in `CALLS`.
Which arguments we pass is not written down: the test reads it from the calls themselves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """Calls in a file of the project, or of Megatron-Core, and what they reach in the other project."""

    file: str
    """Below `megatron_papo`, or beginning with `megatron/`."""
    name: str
    """The last part of the name that is called; `Class:super` is the call by which `Class` initializes its base
    class."""
    symbols: tuple[str, ...]
    """`module:name`; what the first does not know it passes on to the next."""


_START, _ENGINE = "generation/vllm/start.py", "generation/vllm/vllm_engine.py"
_SLEEP, _WEIGHTS = "generation/vllm/sleep.py", "generation/vllm/weight_transfer.py"
_LLM, _LLM_ENGINE = "vllm.entrypoints.llm:LLM", "vllm.v1.engine.llm_engine:LLMEngine"
_TRANSFER, _RELOAD = "vllm.distributed.weight_transfer", "vllm.model_executor.model_loader.reload"
_QWEN2_5, _QWEN3 = "vllm.model_executor.models.qwen2_5_vl", "vllm.model_executor.models.qwen3_vl"
_TE, _TE_RECIPE = "transformer_engine.pytorch", "transformer_engine.common.recipe"
_MEGATRON_TE, _MEGATRON_FP8 = "megatron/core/extensions/transformer_engine.py", "megatron/core/fp8_utils.py"

CALLS: dict[str, tuple[Call, ...]] = {
    "vllm": (
        Call(_START, "LLM", (_LLM, "vllm.engine.arg_utils:EngineArgs")),
        Call(_START, "WeightTransferConfig", ("vllm.config.weight_transfer:WeightTransferConfig",)),
        Call(_START, "shutdown", ("vllm.v1.engine.core_client:InprocClient.shutdown",)),
        Call("generation/vllm/vllm_requests.py", "SamplingParams", ("vllm.sampling_params:SamplingParams",)),
        Call("generation/vllm/probe.py", "apply_model", (f"{_LLM}.apply_model",)),
        *(
            Call(_ENGINE, name, (f"{_LLM}.{name}",))
            for name in ("enqueue", "start_weight_update", "update_weights", "finish_weight_update")
        ),
        *(
            Call(_ENGINE, name, (f"{_LLM_ENGINE}.{name}",))
            for name in (
                "has_unfinished_requests",
                "step",
                "reset_mm_cache",
                "reset_encoder_cache",
                "reset_prefix_cache",
            )
        ),
        Call(_SLEEP, "sleep", (f"{_LLM}.sleep",)),
        Call(_SLEEP, "wake_up", (f"{_LLM}.wake_up",)),
        Call(_SLEEP, "get_current_usage", ("vllm.device_allocator.cumem:CuMemAllocator.get_current_usage",)),
        Call(_WEIGHTS, "register_engine", (f"{_TRANSFER}.factory:WeightTransferEngineFactory.register_engine",)),
        Call(_WEIGHTS, "parse_update_info", (f"{_TRANSFER}.base:WeightTransferEngine.parse_update_info",)),
        Call(_WEIGHTS, "initialize_layerwise_reload", (f"{_RELOAD}:initialize_layerwise_reload",)),
        Call(_WEIGHTS, "finalize_layerwise_reload", (f"{_RELOAD}.layerwise:finalize_layerwise_processing",)),
        Call(_WEIGHTS, "load_weights", (f"{_QWEN2_5}:Qwen2_5_VLForConditionalGeneration.load_weights",)),
        Call(_WEIGHTS, "load_weights", (f"{_QWEN3}:Qwen3VLForConditionalGeneration.load_weights",)),
    ),
    "transformer_engine": (
        Call(_MEGATRON_TE, "TELinear:super", (f"{_TE}.module.linear:Linear",)),
        Call(
            _MEGATRON_TE, "TELayerNormColumnParallelLinear:super", (f"{_TE}.module.layernorm_linear:LayerNormLinear",)
        ),
        Call(_MEGATRON_TE, "TEDelayedScaling:super", (f"{_TE_RECIPE}:DelayedScaling",)),
        Call(_MEGATRON_TE, "norm_module", (f"{_TE}.module.rmsnorm:RMSNorm",)),
        *(
            Call(_MEGATRON_FP8, name, (f"{_TE_RECIPE}:{name}",))
            for name in ("Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")
        ),
        Call("model/fusions.py", "initialize_ub", (f"{_TE}.module.base:initialize_ub",)),
        Call("model/fp8/switch.py", "QParams", (f"{_TE_RECIPE}:QParams",)),
        Call(
            "model/fp8/switch.py",
            "reduce_and_update_fp8_tensors",
            (f"{_TE}.quantization:FP8GlobalStateManager.reduce_and_update_fp8_tensors",),
        ),
        Call(
            "checkpoint/optimizer_state.py",
            "initialize_state",
            (f"{_TE}.optimizers.fused_adam:FusedAdam.initialize_state",),
        ),
    ),
    "megatron": (
        Call(
            "model/transformer_config.py",
            "TransformerConfig",
            ("megatron.core.transformer.transformer_config:TransformerConfig",),
        ),
        Call(
            "optimization/optimizer.py",
            "DistributedDataParallelConfig",
            ("megatron.core.distributed.distributed_data_parallel_config:DistributedDataParallelConfig",),
        ),
        Call(
            "optimization/optimizer.py",
            "OptimizerConfig",
            ("megatron.core.optimizer.optimizer_config:OptimizerConfig",),
        ),
        Call(
            "optimization/optimizer.py", "get_megatron_optimizer", ("megatron.core.optimizer:get_megatron_optimizer",)
        ),
    ),
}

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {
        _LLM: ("llm_engine",),
        _LLM_ENGINE: ("engine_core", "vllm_config"),
        "vllm.config.vllm:VllmConfig": ("model_config", "use_v2_model_runner"),
        "vllm.outputs:RequestOutput": ("finished", "num_cached_tokens", "outputs", "prompt_token_ids", "request_id"),
        "vllm.outputs:CompletionOutput": ("finish_reason", "logprobs", "token_ids"),
        "vllm.logprobs:Logprob": ("logprob",),
        "vllm.distributed.parallel_state": ("_NODE_COUNT", "_WORLD", "destroy_distributed_environment"),
        "vllm.device_allocator.cumem:CuMemAllocator": ("allocator_and_pools", "instance", "pointer_to_data"),
        "vllm.v1.executor.uniproc_executor:ExecutorWithExternalLauncher": ("_distributed_args",),
        f"{_TRANSFER}.factory:WeightTransferEngineFactory": ("_registry",),
        f"{_TRANSFER}.base:WeightTransferEngine": ("_default_model", "model", "model_config"),
        _RELOAD: ("finalize_layerwise_reload", "initialize_layerwise_reload"),
        f"{_QWEN2_5}:Qwen2_5_VisionTransformer": ("blocks", "get_rope_by_thw", "merger"),
        f"{_QWEN2_5}:Qwen2_5_VisionBlock": ("norm1",),
        f"{_QWEN2_5}:Qwen2_5_VisionPatchMerger": ("ln_q",),
        f"{_QWEN2_5}:Qwen2_5_VLForConditionalGeneration": ("language_model", "visual"),
        f"{_QWEN3}:Qwen3_VisionTransformer": ("blocks", "deepstack_merger_list", "merger"),
        f"{_QWEN3}:Qwen3_VisionBlock": ("norm1",),
        f"{_QWEN3}:Qwen3_VisionPatchMerger": ("norm",),
        f"{_QWEN3}:Qwen3VLForConditionalGeneration": ("deepstack_input_embeds", "language_model", "visual"),
    },
    "transformer_engine": {
        f"{_TE}.module.base:UserBufferQuantizationMode": ("FP8", "NONE"),
        f"{_TE_RECIPE}:Float8BlockScaling": (
            "fp8_quant_bwd_grad",
            "fp8_quant_fwd_inp",
            "fp8_quant_fwd_weight",
            "use_f32_scales",
        ),
        f"{_TE}.fp8": ("FP8GlobalStateManager",),
    },
    "megatron": {},
}
"""What else of a module or a class our code reads."""

ABSTRACT: dict[str, dict[str, tuple[str, str]]] = {
    "vllm": {f"{_TRANSFER}.base:WeightTransferEngine": (_WEIGHTS, "InProcessTransfer")},
    "transformer_engine": {},
    "megatron": {},
}
"""Classes of which we have a subclass, which has to define what is abstract: its file and name."""
