"""The one tree of settings: a YAML file, then dotted overrides (`loss.perception_coef=0.02`), then validation.

Unknown keys and impossible combinations are refused with the key's path. Nothing here imports torch, so that the
command line can refuse a bad setting before any rank starts. Settings never change after `load_config` returned.
Layout against model shape (heads, layers, vocabulary) is checked by `check_layout`, from the model's `config.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
NoAsOff = BeforeValidator(lambda value: "off" if value is False else value)
"""YAML 1.1 reads an unquoted `off` as false."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfig(Section):
    name: str = "papo"
    dir: Path = Path("runs/papo")
    """Everything a run writes lies under this folder."""
    seed: int = 0
    stall_limit_s: Positive = 1800.0
    """A stage that takes longer dumps every rank's Python stack and stops the run."""


class FreezeConfig(Section):
    vision: bool = False
    projector: bool = False
    language: bool = False


class ModelConfig(Section):
    path: Path | None = None
    """A Hugging Face folder (config.json, *.safetensors, tokenizer and processor)."""
    checkpoint: Path | None = None
    """A Megatron checkpoint folder to start from instead of the safetensors of `path`."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters; `auto` is bfloat16 on a GPU and float32 without one."""
    spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer specs; `auto` takes Transformer Engine when it is installed and a GPU is there."""
    freeze: FreezeConfig = FreezeConfig()
    recompute: Literal["none", "selective", "full"] = "none"
    random_init: bool = False
    """Start from random weights of the shape in `path`/config.json."""


class ParallelConfig(Section):
    tensor: Count = 1
    pipeline: Count = 1
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel blocks are split over the tensor ranks."""
    pipeline_layers: list[Count] | None = None
    """Language-model layers of each pipeline stage; by default as even as possible, first stages smaller."""
    distributed_optimizer: bool = False
    timeout_s: Positive = 1800.0
    """A collective that takes longer fails."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor > 1")
        if self.pipeline_layers is not None and len(self.pipeline_layers) != self.pipeline:
            raise ValueError(
                f"parallel.pipeline_layers names {len(self.pipeline_layers)} stages, "
                f"parallel.pipeline is {self.pipeline}"
            )
        return self


class ColumnsConfig(Section):
    problem: str = "problem"
    answer: str = "answer"
    images: str = "images"


class DataConfig(Section):
    train: str | None = None
    """A file (parquet, jsonl), an image folder or a hub name: anything `datasets` reads."""
    eval: str | None = None
    split: str = "train"
    eval_split: str | None = None
    preset: Literal["none", "virl39k", "geometry3k"] = "none"
    columns: ColumnsConfig = ColumnsConfig()
    instruction: str = (
        "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> "
        "tags. Then provide your final answer enclosed within \\boxed{}."
    )
    """Follows the question in the user's turn; empty means the question alone."""
    system: str | None = None
    min_pixels: Count = 200_704
    max_pixels: Count = 1_003_520
    max_prompt_tokens: Count = 4096
    on_bad_row: Literal["skip", "stop"] = "stop"
    shuffle: bool = True

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels={self.min_pixels} exceeds data.max_pixels={self.max_pixels}")
        return self


class MaskConfig(Section):
    """Which perturbation makes the masked image."""

    kind: Literal["cells", "blur", "noise", "swap", "crop"] = "cells"
    ratio: Fraction = 0.6
    cell: Count = 14
    """Edge of a cell in pixels."""
    align: Literal["raw", "patches"] = "raw"
    """`raw`: cells on the image as loaded (the paper); `patches`: on the resized image, a cell a merged patch."""

    @model_validator(mode="after")
    def _check(self) -> MaskConfig:
        if self.align == "patches" and self.kind != "cells":
            raise ValueError(f"perception.mask.align=patches works with kind=cells, not {self.kind}")
        return self


class GuardConfig(Section):
    """Watches for collapse of the perception term and acts before reward falls."""

    action: Annotated[Literal["off", "lower", "stop"], NoAsOff] = "off"
    perception_kl: Positive = 1.0
    clip_high_fraction: Positive = 0.007
    masked_entropy: Positive = 1.1
    patience: Count = 3
    factor: Fraction = 0.5
    """`lower` multiplies the coefficient by this."""


class PerceptionConfig(Section):
    masked_branch: Literal["frozen", "joint"] = "frozen"
    """`frozen`: masked log-probs scored once per rollout batch, no gradient; `joint`: gradient through both views."""
    kl: Literal["k3", "full"] = "k3"
    mask: MaskConfig = MaskConfig()
    clamp: Positive | None = None
    """Upper bound of the per-token perception KL in the loss (0.2 counters collapse); None keeps k3's own +-10."""
    top_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The term reads only this fraction of a micro-batch-independent set: each response's tokens of highest KL."""
    coef_end: NonNegative | None = None
    """Linear schedule of loss.perception_coef to this value over `coef_steps`."""
    coef_steps: Count | None = None
    guard: GuardConfig = GuardConfig()

    @model_validator(mode="after")
    def _check(self) -> PerceptionConfig:
        if (self.coef_end is None) != (self.coef_steps is None):
            raise ValueError("perception.coef_end and perception.coef_steps go together")
        return self


class EntropyConfig(Section):
    kind: Literal["sampled", "full"] = "sampled"


class LossConfig(Section):
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: Positive = 0.3
    dual_clip: Annotated[float, Field(gt=1.0)] | None = 3.0
    averaging: Literal["token", "sequence", "fixed"] = "token"
    fixed_denominator: Positive | None = None
    """Tokens that `averaging: fixed` divides by, e.g. global batch x generation.max_response_tokens."""
    perception_coef: NonNegative = 0.02
    reference_coef: NonNegative = 0.01
    entropy_coef: NonNegative = 0.0
    masked_entropy_coef: NonNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if (self.averaging == "fixed") != (self.fixed_denominator is not None):
            raise ValueError("loss.averaging=fixed and loss.fixed_denominator go together")
        return self


class DynamicSamplingConfig(Section):
    enabled: bool = False
    low: Fraction = 0.01
    high: Fraction = 0.99
    max_rounds: Count = 20


class OverlongConfig(Section):
    """DAPO's soft overlong punishment: from 0 to -penalty over the last `buffer` tokens before the limit."""

    enabled: bool = False
    buffer: Count = 512
    penalty: NonNegative = 1.0


class RewardConfig(Section):
    accuracy_weight: NonNegative = 0.9
    format_weight: NonNegative = 0.1
    accuracy: Literal["math", "exact", "anls"] = "math"
    repetition_weight: NonNegative = 0.0
    """Subtracted: weight x fraction of repeated n-grams."""
    repetition_ngram: Count = 4
    function: str | None = None
    """`module:function(response: str, answer: str, problem: str) -> float`, replaces the accuracy part."""
    timeout_s: Positive = 2.0
    overlong: OverlongConfig = OverlongConfig()


class GenerationConfig(Section):
    engine: Literal["transformers", "vllm"] = "transformers"
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.99
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: no limit."""
    max_response_tokens: Count = 2048
    batch_size: Count = 64
    """Rows that the transformers engine decodes together."""
    tensor: Count = 1
    """vLLM's tensor parallelism; must divide the ranks of the world."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the engine; `auto` is the trainer's."""
    kv_cache_gib: Positive | None = None
    gpu_memory_fraction: Fraction = 0.5
    enforce_eager: bool = False


class TrainConfig(Section):
    steps: Count = 202
    prompts_per_step: Count = 384
    group_size: Annotated[int, Field(ge=2)] = 5
    updates_per_step: Count = 3
    """Optimizer steps of one rollout batch; prompts_per_step must divide by it."""
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    tokens_per_micro_batch: Count = 16_384
    eval_every: Annotated[int, Field(ge=0)] = 0
    """0: only after the last step, when data.eval is set."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.prompts_per_step % self.updates_per_step:
            raise ValueError(
                f"train.prompts_per_step={self.prompts_per_step} does not divide by "
                f"train.updates_per_step={self.updates_per_step}"
            )
        return self


class SftConfig(Section):
    steps: Count = 100
    batch_size: Count = 64
    """Rows of an optimizer step, over all data-parallel ranks."""
    response_column: str = "response"
    epochs_shuffle: bool = True


class EvalConfig(Section):
    samples: Count = 8
    """k of avg@k."""
    temperature: NonNegative = 1.0
    """0 is greedy."""
    limit: Count | None = None
    masked: bool = True
    """Also answer with the image masked, and report the gap."""


class ScoreConfig(Section):
    response_column: str = "response"


class OptimConfig(Section):
    lr: Positive = 1e-6
    lr_vision: Positive | None = None
    lr_projector: Positive | None = None
    """Learning rates of vision tower and projector when they differ from `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_fraction: Fraction = 0.0
    weight_decay: NonNegative = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    eps: Positive = 1e-8
    clip_grad: NonNegative = 1.0
    """0: no clipping."""


class CheckpointConfig(Section):
    save_every: Annotated[int, Field(ge=0)] = 50
    """Optimizer-independent steps between checkpoints; 0: only at the end."""
    keep_last: Count = 2
    keep_best: bool = True
    resume: bool = True
    """Go on from the newest complete checkpoint under run.dir."""
    export_at_end: bool = True
    """Write a Hugging Face folder beside the last checkpoint."""
    reference: Path | None = None
    """Weights of the reference policy (Hugging Face folder); by default a copy of the starting policy in CPU memory."""


class ObserveConfig(Section):
    console: bool = True
    tensorboard: bool = True
    wandb: Annotated[Literal["off", "offline", "online"], NoAsOff] = "off"
    wandb_project: str = "megatron_papo"
    samples_every: Annotated[int, Field(ge=0)] = 10
    samples: Count = 8


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    generation: GenerationConfig = GenerationConfig()
    reward: RewardConfig = RewardConfig()
    loss: LossConfig = LossConfig()
    perception: PerceptionConfig = PerceptionConfig()
    entropy: EntropyConfig = EntropyConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    sft: SftConfig = SftConfig()
    eval: EvalConfig = EvalConfig()
    score: ScoreConfig = ScoreConfig()

    @property
    def reads_masked_view(self) -> bool:
        """Whether a term of the loss reads the masked images: plain GRPO and DAPO do not pay for them."""
        coefs = (self.loss.perception_coef, self.loss.masked_entropy_coef, self.perception.coef_end or 0.0)
        return any(coef > 0 for coef in coefs)

    def warnings(self) -> list[str]:
        """Settings that are allowed and have no effect, each with its reason."""
        found = []
        frozen = self.perception.masked_branch == "frozen"
        if frozen and self.loss.masked_entropy_coef > 0:
            found.append(
                "loss.masked_entropy_coef has no gradient with perception.masked_branch=frozen: "
                "the masked log-probs are constants; use joint"
            )
        if self.perception.guard.action != "off" and not self.reads_masked_view:
            found.append("perception.guard watches a term whose coefficient loss.perception_coef is 0")
        return found

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.perception.kl == "full" and self.perception.masked_branch == "frozen":
            raise ValueError("perception.kl=full needs perception.masked_branch=joint: a frozen branch keeps no logits")
        return self


class ConfigError(ValueError):
    """A setting that cannot be; the message names the key's path."""


def load_config(path: Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads `path` (YAML; `extends: FILE` takes another file's values first), then `key.path=value` overrides.

    Raises ConfigError with one line a fault, each beginning with the key's path.
    """
    tree = _read_yaml(Path(path)) if path else {}
    texts = {}
    for override in overrides:
        key, equals, texts[key] = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override}: overrides are written key.path=value")
        _put(tree, key.split("."), _scalar(key, texts[key]))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        return _validate_with_texts(tree, texts, error)


def dump_config(config: Config) -> str:
    """The resolved settings as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping, not {type(tree).__name__}")
    base = tree.pop("extends", None)
    return _merge(_read_yaml(path.parent / base), tree) if base else tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _validate_with_texts(tree: dict[str, Any], texts: dict[str, str], error: ValidationError) -> Config:
    """Once more, with the overrides of text settings as they were written: `data.system=Answer: yes` is no mapping."""
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] in ("string_type", "path_type") and key in texts:
            _put(tree, key.split("."), texts[key])
    try:
        return Config.model_validate(tree)
    except ValidationError as last:
        raise ConfigError("\n".join(_explain(fault) for fault in last.errors())) from None


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(tree.get(key), dict):
            if tree.get(key) is not None:
                raise ConfigError(f"{'.'.join(keys[: depth + 1])}: is a value, not a section")
            tree[key] = {}
        tree = tree[key]
    tree[keys[-1]] = value


def _scalar(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except ValueError:
            return text
    return value


def _explain(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "unknown key"
    elif fault["type"] != "value_error":
        message = f"{message}, got {fault['input']!r}"
    return f"{path}: {message}" if path else message
