"""The shape of a Qwen2.5-VL model, read from its Hugging Face `config.json`, and the layouts that it allows.

Reads the nested file that transformers 5 writes and the flat one of the published models. Imports no torch, so that
the command line refuses an impossible layout before a rank starts. Leaves out what the model here does not do:
sliding-window attention, RoPE scaling other than M-RoPE, video pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_papo.config import Config, ConfigError, ParallelConfig
from megatron_papo.distributed.rank_arithmetic import fault_of_ranks
from megatron_papo.files.json_keys import Keys, read_json, shown

PAD_TO = 16
"""FFN widths and the vocabulary are padded to a multiple of this and of the tensor ranks, so that a checkpoint has
the same shapes under every tensor parallelism that divides 16."""

_MOST_LAYERS = 4096
"""Each is walked in Python, before any weight is seen."""


@dataclass(frozen=True)
class LanguageShape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Rotary frequencies that turn with time, height and width; they sum to half a head."""
    initializer_range: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class VisionShape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    """Edge of an attention window in pixels."""
    full_attention_layers: tuple[int, ...]
    """Layers (from 0) that attend over a whole image; the others attend within windows."""
    rope_theta: float
    rms_norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one patch as the processor lays them out: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token of the language model."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class ModelShape:
    model_type: str
    """The family, as config.json names it; `model/family.py` says what belongs to one."""
    language: LanguageShape
    vision: VisionShape
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Ids that are never a response token: -inf in the engine's logits and in the trainer's."""
        ids = {self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id}
        return tuple(sorted(i for i in ids if i < self.language.vocab_size))

    def banned_ids(self, num_words: int) -> tuple[int, ...]:
        """What neither engine nor trainer gives any probability: the vision tokens, and the rows of the vocabulary
        beyond the tokenizer's `num_words` (its highest id and one), which stand for nothing."""
        return tuple(sorted({*self.vision_token_ids, *range(num_words, self.language.vocab_size)}))

    @classmethod
    def from_folder(cls, path: Path | str) -> ModelShape:
        """The shape in `path`/config.json. Raises ValueError naming the file and the key at fault."""
        file = Path(path) / "config.json"
        return cls.from_dict(read_json(file), source=str(file))

    @classmethod
    def from_dict(cls, tree: dict[str, Any], source: str = "config.json") -> ModelShape:
        """The same from the parsed file; `source` is what error messages call it."""
        root = Keys(tree, source, "")
        model_type = root.get("model_type", str)
        if model_type != "qwen2_5_vl":
            raise root.fault("model_type", f"is {shown(model_type)}; qwen2_5_vl is what this package trains")
        if tree.get("quantization_config"):
            raise root.fault("quantization_config", "quantised weights are not what this package trains")
        if tree.get("transformers_weights"):
            raise root.fault("transformers_weights", "weights under a name of their own are not what is read")
        text = root.section("text_config") if "text_config" in tree else root
        vision = root.section("vision_config")
        shape = cls(
            model_type=model_type,
            language=_language(text),
            vision=_vision(vision),
            tie_word_embeddings=root.flag("tie_word_embeddings") or text.flag("tie_word_embeddings"),
            image_token_id=root.index("image_token_id", 151655),
            video_token_id=root.index("video_token_id", 151656),
            vision_start_token_id=root.index("vision_start_token_id", 151652),
            vision_end_token_id=root.index("vision_end_token_id", 151653),
        )
        if shape.vision.out_hidden_size != shape.language.hidden_size:
            raise vision.fault("out_hidden_size", f"is not the language model's width {shape.language.hidden_size}")
        return shape


def padded(width: int, tensor: int) -> int:
    """An FFN width or a vocabulary as it lies in the model: up to a multiple of PAD_TO and of the tensor ranks.

    The added rows and columns are at the end, zero, and stay zero under training.
    """
    multiple = math.lcm(PAD_TO, tensor)
    return -(-width // multiple) * multiple


def stage_layers(parallel: ParallelConfig, shape: ModelShape) -> tuple[int, ...]:
    """Language-model layers of each pipeline stage; first stages are the smaller ones: they hold the vision tower."""
    if parallel.pipeline_layers is not None:
        return tuple(parallel.pipeline_layers)
    each, rest = divmod(shape.language.num_layers, parallel.pipeline)
    return tuple(each + (stage >= parallel.pipeline - rest) for stage in range(parallel.pipeline))


def check_layout(config: Config, shape: ModelShape, world_size: int | None = None) -> None:
    """Raises ConfigError, a line a fault, when the model of `shape` cannot be laid out as `config.parallel` says.

    `world_size`: the number of ranks, when it is known.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    language, vision = shape.language, shape.vision
    faults = []
    if language.num_heads % tensor:
        faults.append(f"parallel.tensor: {language.num_heads} attention heads do not divide by {tensor}")
    if language.num_kv_heads % tensor and tensor % language.num_kv_heads:
        faults.append(f"parallel.tensor: {language.num_kv_heads} key-value heads and {tensor} ranks do not divide")
    if vision.num_heads % tensor:
        faults.append(f"parallel.tensor: {vision.num_heads} heads of the vision tower do not divide by {tensor}")
    if pipeline > language.num_layers:
        faults.append(f"parallel.pipeline: {pipeline} stages for {language.num_layers} layers")
    layers = config.parallel.pipeline_layers
    if layers is not None and sum(layers) != language.num_layers:
        faults.append(f"parallel.pipeline_layers: {layers} sum to {sum(layers)}, the model has {language.num_layers}")
    if world_size is not None and (fault := fault_of_ranks(config.parallel, world_size)):
        faults.append(f"parallel.tensor: {fault}")
    if faults:
        raise ConfigError("\n".join(faults))


def faults_of_engine(config: Config, shape: ModelShape) -> list[str]:
    """A line a fault: what vLLM's tensor parallelism cannot split of the model of `shape`. The vocabulary it pads."""
    tensor, language, vision = config.generation.tensor, shape.language, shape.vision
    if config.generation.engine != "vllm":
        return []
    faults = []
    if language.num_heads % tensor:
        faults.append(f"generation.tensor: {language.num_heads} attention heads do not divide by {tensor}")
    if language.num_kv_heads % tensor and tensor % language.num_kv_heads:
        faults.append(f"generation.tensor: {language.num_kv_heads} key-value heads and {tensor} ranks do not divide")
    widths = {
        "heads of the vision tower": vision.num_heads,
        "columns of the language model's MLP": language.intermediate_size,
        "columns of the vision tower's MLP": vision.intermediate_size,
    }
    faults += [
        f"generation.tensor: {width} {what} do not divide by {tensor}"
        for what, width in widths.items()
        if width % tensor
    ]
    return faults


def _language(keys: Keys) -> LanguageShape:
    keys.must_be("hidden_act", "silu")
    if keys.flag("use_sliding_window"):
        raise keys.fault("use_sliding_window", "sliding-window attention is not supported")
    num_heads = keys.count("num_attention_heads")
    shape = LanguageShape(
        num_layers=keys.count("num_hidden_layers", most=_MOST_LAYERS),
        hidden_size=keys.count("hidden_size"),
        intermediate_size=keys.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads", num_heads),
        vocab_size=keys.count("vocab_size"),
        rms_norm_eps=keys.positive("rms_norm_eps", 1e-5),
        initializer_range=keys.positive("initializer_range", 0.02),
        **_rope(keys),
    )
    _check_heads(keys, "num_attention_heads", shape.hidden_size, num_heads)
    if num_heads % shape.num_kv_heads:
        raise keys.fault("num_key_value_heads", f"{shape.num_kv_heads} does not divide {num_heads} heads")
    if sum(shape.mrope_section) * 2 != shape.head_dim:
        raise keys.fault("rope_parameters", f"mrope_section {shape.mrope_section} is not half of {shape.head_dim}")
    return shape


def _rope(keys: Keys) -> dict[str, Any]:
    """rope_theta and mrope_section: in `rope_parameters`, or in `rope_scaling` beside a `rope_theta`."""
    name = "rope_parameters" if keys.tree.get("rope_parameters") else "rope_scaling"
    rope = keys.section(name)
    kind = rope.tree.get("rope_type", rope.tree.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise rope.fault("rope_type", f"is {shown(kind)}; only M-RoPE without scaling is supported")
    section = rope.counts("mrope_section", [16, 24, 24])
    if len(section) != 3:
        raise rope.fault("mrope_section", f"is {list(section)}, not a count each of time, height and width")
    source = rope if "rope_theta" in rope.tree else keys
    return {"rope_theta": source.positive("rope_theta", 1e6), "mrope_section": section}


def _vision(keys: Keys) -> VisionShape:
    keys.must_be("hidden_act", "silu")
    channels = "in_chans" if "in_chans" in keys.tree else "in_channels"
    rope = keys.section("rope_parameters") if keys.tree.get("rope_parameters") else keys
    shape = VisionShape(
        num_layers=keys.count("depth", most=_MOST_LAYERS),
        hidden_size=keys.count("hidden_size"),
        intermediate_size=keys.count("intermediate_size"),
        num_heads=keys.count("num_heads"),
        out_hidden_size=keys.count("out_hidden_size"),
        in_channels=keys.count(channels, 3),
        patch_size=keys.count("patch_size", 14),
        temporal_patch_size=keys.count("temporal_patch_size", 2),
        spatial_merge_size=keys.count("spatial_merge_size", 2),
        window_size=keys.count("window_size", 112),
        full_attention_layers=keys.counts("fullatt_block_indexes", [7, 15, 23, 31]),
        rope_theta=rope.positive("rope_theta", 10000.0),
    )
    _check_heads(keys, "num_heads", shape.hidden_size, shape.num_heads)
    if shape.head_dim % 4:
        raise keys.fault("num_heads", f"a head of {shape.head_dim} does not divide by 4 for the 2-D rotary embedding")
    if shape.window_size % (shape.patch_size * shape.spatial_merge_size):
        raise keys.fault("window_size", f"{shape.window_size} is no whole number of merged patches")
    return shape


def _check_heads(keys: Keys, key: str, hidden_size: int, num_heads: int) -> None:
    if hidden_size % num_heads:
        raise keys.fault(key, f"hidden_size {hidden_size} does not divide by {num_heads} heads")
