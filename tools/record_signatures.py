"""Records the parameters of other projects' functions, from their source. A test compares our calls with releases that
cannot be installed beside each other, or not without a GPU.

    python tools/record_signatures.py vllm FOLDER > tests/data/signatures/vllm-0.32.0.json

FOLDER is an unpacked wheel (`pip download --no-deps vllm==0.32.0`, then unzip). Nothing is imported. What is recorded
is what `CALLS`, `NAMES` and `ABSTRACT` ask for; which arguments we pass is read from the calls themselves.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef


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
_QWEN = "vllm.model_executor.models.qwen2_5_vl"
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
        Call(_WEIGHTS, "load_weights", (f"{_QWEN}:Qwen2_5_VLForConditionalGeneration.load_weights",)),
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
        f"{_QWEN}:Qwen2_5_VisionTransformer": ("get_rope_by_thw",),
        f"{_QWEN}:Qwen2_5_VLForConditionalGeneration": ("language_model", "visual"),
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


def record(project: str, folder: Path) -> dict[str, Any]:
    """Raises LookupError for a symbol that `folder` does not have."""
    source = Source(folder)
    symbols = {symbol for call in CALLS[project] for symbol in call.symbols}
    return {
        "takes": {symbol: source.takes(symbol) for symbol in sorted(symbols)},
        "names": {symbol: sorted(set(names) & source.names(symbol)) for symbol, names in NAMES[project].items()},
        "abstract": {symbol: source.abstract(symbol) for symbol in ABSTRACT[project]},
    }


class Source:
    """Modules below a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tree = cache(self._tree)

    def takes(self, symbol: str) -> dict[str, Any]:
        """The parameters of a function or of a class's constructor. A class without one takes its annotated fields."""
        module, node = self.find(symbol)
        if isinstance(node, ast.ClassDef):
            constructor = self._member(module, node, "__init__")
            if constructor is None:
                fields = [name for _, each in self._lineage(module, node) for name in _fields(each)]
                passed_over = self._is_of_pydantic(module, node)
                return {
                    "positional": [],
                    "required": 0,
                    "keyword": sorted(fields),
                    "args": False,
                    "kwargs": passed_over,
                }
            node = constructor
        assert isinstance(node, Function), symbol
        given = node.args
        positional = [each.arg for each in (*given.posonlyargs, *given.args) if each.arg not in ("self", "cls")]
        return {
            "positional": positional,
            "required": max(len(positional) - len(given.defaults), 0),
            "keyword": sorted(each.arg for each in given.kwonlyargs),
            "args": given.vararg is not None,
            "kwargs": given.kwarg is not None,
        }

    def _is_of_pydantic(self, module: str, node: ast.ClassDef) -> bool:
        """Whether the class is one of pydantic's dataclasses, which ignore arguments that they do not know."""
        imports = [each for each in self.tree(module).body if isinstance(each, ast.ImportFrom)]
        theirs = [each for each in imports if each.module == "pydantic.dataclasses"]
        return bool(theirs) and "dataclass" in _decorators(node)

    def names(self, symbol: str) -> set[str]:
        """The names that a module or a class has, those of its base classes included."""
        if ":" not in symbol:
            return _bound(self.tree(symbol).body)
        module, node = self.find(symbol)
        assert isinstance(node, ast.ClassDef), symbol
        return {name for _, each in self._lineage(module, node) for name in _bound(each.body) | _own(each)}

    def abstract(self, symbol: str) -> list[str]:
        _, node = self.find(symbol)
        assert isinstance(node, ast.ClassDef), symbol
        marked = [each for each in node.body if isinstance(each, Function) and "abstractmethod" in _decorators(each)]
        return sorted(each.name for each in marked)

    def find(self, symbol: str) -> tuple[str, ast.AST]:
        """(module, node) of `module:name` or `module:Class.method`, imports and base classes followed."""
        module, _, name = symbol.partition(":")
        first, _, method = name.partition(".")
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.ClassDef | Function) and node.name == first:
                if not method:
                    return module, node
                member = self._member(module, node, method)
                if member is not None:
                    return module, member
                break
            if isinstance(node, ast.ImportFrom) and first in [each.asname or each.name for each in node.names]:
                return self.find(f"{self._absolute(module, node)}:{name}")
        raise LookupError(f"{symbol}: not below {self.folder}")

    def _tree(self, module: str) -> ast.Module:
        file = self.folder / module.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if not file.is_file():
            raise LookupError(f"{module}: not below {self.folder}")
        return ast.parse(file.read_text())

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        if not (self.folder / module.replace(".", "/")).is_dir():
            parts.pop()  # a module's own package
        return ".".join([*parts[: len(parts) + 1 - node.level], *([node.module] if node.module else [])])

    def _lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and those of its base classes that the folder has."""
        yield module, node
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            try:
                parent = self.find(f"{module}:{ast.unparse(name)}")
            except LookupError:  # of another project
                continue
            if isinstance(parent[1], ast.ClassDef):
                yield from self._lineage(*parent)  # type: ignore[arg-type]

    def _member(self, module: str, node: ast.AST, name: str) -> Function | None:
        assert isinstance(node, ast.ClassDef)
        for _, each in self._lineage(module, node):
            for member in each.body:
                if isinstance(member, Function) and member.name == name:
                    return member
        return None


def _decorators(node: Function | ast.ClassDef) -> str:
    return " ".join(ast.unparse(each) for each in node.decorator_list)


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]


def _bound(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind: definitions, imports and assignments."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | Function):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for each in targets if isinstance(each, ast.Name)}
    return names


def _own(node: ast.ClassDef) -> set[str]:
    """Attributes that methods of the class assign to `self`."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }


def written(recorded: dict[str, dict[str, Any]]) -> str:
    """The record as JSON, with a line for each symbol."""
    parts = [
        f' "{part}": {{\n' + ",\n".join(f"  {json.dumps(key)}: {json.dumps(each[key])}" for key in each) + "\n }"
        for part, each in recorded.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    print(written(record(sys.argv[1], Path(sys.argv[2]))))
