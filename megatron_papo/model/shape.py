"""The shape of a vision-language model, read from its Hugging Face `config.json`, and the layouts that it allows.

This module has what all model families share: the numbers by which a model is built, counted and split. The file
`model/<family>/shape.py` reads a family's config.json. Imports no torch, so that the command line can refuse an
impossible layout before a rank starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_papo.config import Config, ConfigError, ParallelConfig
from megatron_papo.distributed.rank_arithmetic import fault_of_ranks
from megatron_papo.files.json_keys import Keys, read_json, shown
from megatron_papo.model.family import families, family_named

PAD_TO = 16
"""FFN widths and the vocabulary are padded to a multiple of this and of the tensor ranks, so that a checkpoint has
the same shapes under every tensor parallelism that divides 16."""

MOST_LAYERS = 4096
"""The largest number of layers that is accepted: Python loops over all layers before any weight is read."""

NormKind = Literal["rms", "layer"]
"""`rms`: root-mean-square norm, with a weight. `layer`: layer norm, with a weight and a bias."""

MlpKind = Literal["swiglu", "gelu", "gelu_tanh"]
"""`swiglu`: gated, silu(gate) times up. The others: two linear layers with that activation between them."""

MergerNorms = Literal["patch", "block"]
"""What a patch merger norms: each patch, or each block of patches as a whole."""


@dataclass(frozen=True, kw_only=True)
class LanguageShape:
    """The language model: a decoder whose layers are all alike."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Values of one attention head; need not be the hidden size over the number of heads."""
    vocab_size: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    """Numbers of rotary frequencies for time, height and width; they sum to half a head."""
    initializer_range: float
    """Standard deviation of random weights."""
    norm: NormKind = "rms"
    mlp: MlpKind = "swiglu"
    qkv_bias: bool = False
    """Whether the linear layer of queries, keys and values has a bias."""
    linear_bias: bool = False
    """Whether the attention's output and the MLP's two linear layers have biases. Megatron-Core then gives queries,
    keys and values one too, so `qkv_bias` must be set."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normed, with the layers' kind of norm, before they are rotated."""
    interleaved_mrope: bool = False
    """Whether time, height and width take frequencies in turn; otherwise each takes one run of them."""

    def __post_init__(self) -> None:
        assert self.qkv_bias or not self.linear_bias, "Megatron-Core has no linear biases without those of qkv"


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    """The vision tower: the fields that all families share. A family adds fields in a class of its own."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    """Width of its image tokens: the language model's hidden size."""
    in_channels: int
    patch_size: int
    """Edge of a patch in pixels."""
    temporal_patch_size: int
    """Frames of a patch."""
    spatial_merge_size: int
    """Edge, in patches, of the block that becomes one image token."""
    norm_eps: float
    norm: NormKind = "rms"
    mlp: MlpKind = "swiglu"
    deepstack_layers: tuple[int, ...] = ()
    """Layers of the tower (from 0, in rising order) whose patches become image tokens of their own, which are added to
    the hidden states of the language model (`deepstack.py`)."""
    position_edge: int = 0
    """Places along an edge of the square grid of learned position embeddings; 0 for a tower without them."""

    @property
    def head_dim(self) -> int:
        """Values of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one patch as the processor lays them out: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patch_sizes(self) -> dict[str, int]:
        """How the image processor has to cut pictures, by its own settings."""
        return {
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.spatial_merge_size,
        }

    @property
    def merge_unit(self) -> int:
        """Patches that become one token of the language model."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class ModelShape:
    """A whole model: language model, vision tower, and the tokens that stand for images."""

    model_type: str
    """The family, as config.json names it; `model/family.py` says what belongs to one."""
    language: LanguageShape
    vision: VisionShape
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    def levels_from(self, layer: int) -> int:
        """The number of DeepStack's levels that language layer `layer` (from 0) and those after it add."""
        return max(len(self.vision.deepstack_layers) - layer, 0)

    @property
    def vision_token_ids(self) -> tuple[int, ...]:
        """Token ids that never occur in a response: engine and trainer give them logits of -inf."""
        ids = {self.image_token_id, self.video_token_id, self.vision_start_token_id, self.vision_end_token_id}
        return tuple(sorted(i for i in ids if i < self.language.vocab_size))

    def banned_ids(self, num_words: int) -> tuple[int, ...]:
        """Token ids to which engine and trainer give no probability: the vision tokens, and the rows of the vocabulary
        from `num_words` on (the tokenizer's highest id plus one), which stand for no token."""
        return tuple(sorted({*self.vision_token_ids, *range(num_words, self.language.vocab_size)}))

    @classmethod
    def from_folder(cls, path: Path | str) -> ModelShape:
        """The shape in `path`/config.json. Raises ValueError naming the file and the key at fault."""
        file = Path(path) / "config.json"
        return cls.from_dict(read_json(file), source=str(file))

    @classmethod
    def from_dict(cls, tree: dict[str, Any], source: str = "config.json") -> ModelShape:
        """The shape in the parsed config.json `tree`; error messages call it `source`. Raises ValueError as
        `from_folder`."""
        root = Keys(tree, source, "")
        model_type = root.get("model_type", str)
        if model_type not in (names := families()):
            known = ", ".join(names)
            are = "is what this package trains" if len(names) == 1 else "are what this package trains"
            raise root.fault("model_type", f"is {shown(model_type)}; {known} {are}")
        if tree.get("quantization_config"):
            raise root.fault("quantization_config", "quantised weights are not what this package trains")
        if tree.get("transformers_weights"):
            raise root.fault("transformers_weights", "weights under a name of their own are not what is read")
        reader: ShapeModule = family_named(model_type).module("shape")
        shape = reader.read_shape(root)
        if shape.vision.out_hidden_size != shape.language.hidden_size:
            width = shape.language.hidden_size
            raise root.fault("vision_config.out_hidden_size", f"is not the language model's width {width}")
        return shape


class ShapeModule(Protocol):
    """A family's module `shape`. It imports no torch."""

    PROCESSOR: str
    """The class of transformers that the family's model folders name as their processor."""

    def read_shape(self, root: Keys) -> ModelShape:
        """The shape that the parsed config.json `root` describes. Raises ValueError naming the key at fault."""


def padded(width: int, tensor: int) -> int:
    """The width of an FFN or a vocabulary in the model: rounded up to a multiple of PAD_TO and of the tensor ranks.

    The added rows and columns are at the end; they are zero and stay zero in training.
    """
    multiple = math.lcm(PAD_TO, tensor)
    return -(-width // multiple) * multiple


def stage_layers(parallel: ParallelConfig, shape: ModelShape) -> tuple[int, ...]:
    """Number of language-model layers of each pipeline stage. First stages are the smaller ones, since the first also
    has the vision tower."""
    if parallel.pipeline_layers is not None:
        return tuple(parallel.pipeline_layers)
    each, rest = divmod(shape.language.num_layers, parallel.pipeline)
    return tuple(each + (stage >= parallel.pipeline - rest) for stage in range(parallel.pipeline))


def check_layout(config: Config, shape: ModelShape, world_size: int | None = None) -> None:
    """Raises ConfigError, with a line for each fault, when a model of `shape` does not allow the layout
    `config.parallel`.

    `world_size`: the number of ranks, when it is known.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    language, vision = shape.language, shape.vision
    folder = config.model.path or config.model.checkpoint
    where = "" if folder is None else f" ({folder / 'config.json'})"
    faults = []
    if language.num_heads % tensor:
        faults.append(f"parallel.tensor: {language.num_heads} attention heads do not divide by {tensor}")
    if language.num_kv_heads % tensor and tensor % language.num_kv_heads:
        faults.append(f"parallel.tensor: {language.num_kv_heads} key-value heads and {tensor} ranks do not divide")
    if vision.num_heads % tensor:
        faults.append(f"parallel.tensor: {vision.num_heads} heads of the vision tower do not divide by {tensor}")
    if pipeline > language.num_layers:
        faults.append(f"parallel.pipeline: {pipeline} stages for {language.num_layers} layers{where}")
    layers = config.parallel.pipeline_layers
    if layers is not None and sum(layers) != language.num_layers:
        has = f"the model has {language.num_layers} layers{where}"
        faults.append(f"parallel.pipeline_layers: {layers} sum to {sum(layers)}, {has}")
    if world_size is not None and (fault := fault_of_ranks(config.parallel, world_size)):
        faults.append(f"parallel.tensor: {fault}")
    if faults:
        raise ConfigError("\n".join(faults))


def faults_of_engine(config: Config, shape: ModelShape) -> list[str]:
    """What vLLM's tensor parallelism cannot split in a model of `shape`, a line for each fault. vLLM pads the
    vocabulary."""
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
