"""Faults to plant in a run, one at a time, and what a certificate has to say of each.

All are mistakes that others have made. Each damages the real trainer or the real engine and is taken back afterwards.
The models are `tests.support.tiny`'s at a standard deviation of 0.12, biases included: at the usual 0.02 with biases
of zero, a missing bias is no fault and the two halves of a rotation hardly matter. Where a family lacks the part that a
fault damages, another part of the same layer is damaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_papo.generation import Generator
from megatron_papo.training.rollouts import hand_over
from megatron_papo.training.session import Run
from megatron_papo.weights.held import global_parameters
from megatron_papo.weights.transfer import hf_tensors
from tests.support.inputs import FOR_VLLM

_SIZES = {**FOR_VLLM, "layers": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": _SIZES,
    "qwen3_vl": {**_SIZES, "family": "qwen3_vl", "vision_depth": 3},
}
"""By family. Heads of 32 dimensions, which vLLM's kernels need; layers 2 and 3 are the second pipeline stage's, which
adds the last of the three levels of DeepStack."""
MODEL = MODELS["qwen2_5_vl"]
"""Where no family is named."""
STALE_LAYER = "model.language_model.layers.2."

Fault = Callable[[Run, Generator], AbstractContextManager[None]]


@contextmanager
def _changed(run: Run, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A parameter of the trainer, by its name in the whole model, on the ranks that hold it."""
    parameter = global_parameters(run.policy).get(name)
    before = None if parameter is None else parameter.detach().clone()
    if parameter is not None:
        with torch.no_grad():
            parameter.copy_(change(parameter.detach().clone()))
    try:
        yield
    finally:
        if parameter is not None and before is not None:
            with torch.no_grad():
                parameter.copy_(before)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def transposed_features(run: Run, _: Generator) -> Iterator[None]:
    """Features of the first image as if its height and width were swapped."""
    vision = run.policy.vision
    if vision is None:
        yield
        return
    forward = vision.forward

    def swapped(pixel_values_PD: Tensor, grid_thw_I3: Tensor) -> Any:
        images = forward(pixel_values_PD, grid_thw_I3)
        features_MH = images.tokens_MH
        rows, columns = (grid_thw_I3[0, 1:] // 2).tolist()
        order_M = torch.arange(len(features_MH))
        order_M[: rows * columns] = torch.arange(rows * columns).view(rows, columns).T.flatten()
        return images._replace(tokens_MH=features_MH[order_M])

    with _replaced(vision, "forward", swapped):
        yield


@contextmanager
def wrong_section(run: Run, _: Generator) -> Iterator[None]:
    """Time takes three frequencies of height's."""
    shape = run.policy.language.shape
    with _replaced(run.policy.language, "shape", replace(shape, mrope_section=_shifted(shape.mrope_section))):
        yield


def _shifted(sections: Sequence[int]) -> tuple[int, int, int]:
    time, height, width = sections
    return time + 3, height - 3, width


@contextmanager
def chunked_rotary(run: Run, _: Generator) -> Iterator[None]:
    """Time, height and width take a run of frequencies each instead of every third one."""
    with _replaced(run.policy.language, "shape", replace(run.policy.language.shape, interleaved_mrope=False)):
        yield


@contextmanager
def off_by_one(run: Run, _: Generator) -> Iterator[None]:
    """The text after an image goes on one position too far."""
    from megatron_papo.model.family import family_of
    from megatron_papo.model.shape import ModelShape

    positions = family_of(run.shape).module("positions")
    right = positions.prompt_positions

    def wrong(token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> Tensor:
        positions_3S = right(token_ids_S, grid_thw_I3, shape).clone()
        after = int((token_ids_S == shape.image_token_id).nonzero().max()) + 1
        positions_3S[:, after:] += 1
        return positions_3S

    with _replaced(positions, "prompt_positions", wrong):
        yield


@contextmanager
def wrong_normalisation(run: Run, _: Generator) -> Iterator[None]:
    """Another family's mean and standard deviation."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    images, half = run.processor.image_processor, [0.5] * 3
    mean, std = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if list(images.image_mean) == half else (half, half)
    with _replaced(images, "image_mean", mean), _replaced(images, "image_std", std):
        yield


@contextmanager
def positions_not_interpolated(run: Run, _: Generator) -> Iterator[None]:
    """Every patch takes the learned position embedding that is nearest to it."""
    if run.policy.vision is None:
        yield
        return
    learned: Any = run.policy.vision.position_embed

    def nearest(corners_P4: Tensor, shares_P4: Tensor) -> Tensor:
        return learned.weight[corners_P4.gather(1, shares_P4.argmax(1, keepdim=True))[:, 0]]

    with _replaced(learned, "forward", nearest):
        yield


@contextmanager
def levels_at_the_wrong_layer(run: Run, _: Generator) -> Iterator[None]:
    """Every level is added one layer later, the last one after the first layer."""
    language = run.policy.language
    forward = language.forward

    def late(*args: Any, levels_LM1H: Tensor | None = None, **kwargs: Any) -> Tensor:
        rolled = None if levels_LM1H is None else levels_LM1H.roll(1, dims=0)
        return forward(*args, levels_LM1H=rolled, **kwargs)

    with _replaced(language, "forward", late):
        yield


@contextmanager
def no_q_norm(run: Run, _: Generator) -> Iterator[None]:
    """The queries of layer 3 are not normed."""
    layers = [layer for layer in run.policy.language.decoder.layers if layer.layer_number == 4]  # counted from 1
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_replaced(layer.self_attention, "q_layernorm", nn.Identity()))
        yield


def missing_language_bias(run: Run, _: Generator) -> AbstractContextManager[None]:
    return _changed(run, "language.decoder.layers.2.self_attention.linear_qkv.bias", torch.zeros_like)


def missing_k_norm_weight(run: Run, _: Generator) -> AbstractContextManager[None]:
    return _changed(run, "language.decoder.layers.2.self_attention.k_layernorm.weight", torch.ones_like)


def missing_vision_bias(run: Run, _: Generator) -> AbstractContextManager[None]:
    return _changed(run, "vision.decoder.layers.1.self_attention.linear_qkv.bias", torch.zeros_like)


def missing_merger_bias(run: Run, _: Generator) -> AbstractContextManager[None]:
    return _changed(run, "vision.merger.linear_fc2.bias", torch.zeros_like)


def missing_level_bias(run: Run, _: Generator) -> AbstractContextManager[None]:
    return _changed(run, "vision.deepstack_mergers.1.linear_fc2.bias", torch.zeros_like)


def swapped_heads(run: Run, _: Generator) -> AbstractContextManager[None]:
    """The first two query heads of the first query group that a rank holds."""
    size = run.shape.language.head_dim

    def swap(weight: Tensor) -> Tensor:
        return torch.cat((weight[size : 2 * size], weight[:size], weight[2 * size :]))

    return _changed(run, "language.decoder.layers.1.self_attention.linear_qkv.weight", swap)


def damaged_head(run: Run, _: Generator) -> AbstractContextManager[None]:
    """The output matrix: no hidden state shows it."""
    return _changed(run, "language.output_layer.weight", lambda weight: weight * 1.02)


_TRAINER_FAULTS: dict[str, tuple[Fault, str]] = {
    "off-by-one position": (off_by_one, "position ids"),
    "wrong M-RoPE section": (wrong_section, "rotary angles"),
    "wrong image normalisation": (wrong_normalisation, "pixel values"),
    "missing bias in the vision tower": (missing_vision_bias, "vision layer 1"),
    "transposed image features": (transposed_features, "image features"),
    "missing bias in the merger": (missing_merger_bias, "image features"),
    "swapped QKV head": (swapped_heads, "language layer 1"),
    "damaged head": (damaged_head, "log-probs"),
}
TRAINER_FAULTS: dict[str, dict[str, tuple[Fault, str]]] = {
    "qwen2_5_vl": {**_TRAINER_FAULTS, "missing bias": (missing_language_bias, "language layer 2")},
    "qwen3_vl": {
        **_TRAINER_FAULTS,
        "missing weight of the k norm": (missing_k_norm_weight, "language layer 2"),
        "chunked rotary": (chunked_rotary, "rotary angles"),
        "position embeddings not interpolated": (positions_not_interpolated, "position embeddings"),
        "missing bias in a merger of DeepStack": (missing_level_bias, "DeepStack level 1"),
        "levels at the wrong layer": (levels_at_the_wrong_layer, "language layer 0"),
        "q norm left out": (no_q_norm, "language layer 3"),
    },
}
"""Family -> name -> the fault, and the part that has to be named."""


def engine_module(generator: Any) -> Any:
    """The engine's language model; of either engine."""
    if hasattr(generator, "llm"):
        (model,) = generator.llm.apply_model(lambda model: model)
        return model.language_model.model
    return generator.model.model.language_model


@contextmanager
def wrong_section_in_the_engine(_: Run, generator: Generator) -> Iterator[None]:
    language = engine_module(generator)
    rotary = language.rotary_emb if hasattr(language, "rotary_emb") else language.layers[0].self_attn.rotary_emb
    with _replaced(rotary, "mrope_section", list(_shifted(rotary.mrope_section))):
        yield


@contextmanager
def damaged_engine_norm(_: Run, generator: Generator) -> Iterator[None]:
    """The norm before the MLP of layer 3."""
    weight: nn.Parameter = engine_module(generator).layers[3].post_attention_layernorm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.05)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


ENGINE_FAULTS: dict[str, tuple[Fault, str]] = {
    "wrong M-RoPE section in the engine": (wrong_section_in_the_engine, "rotary angles"),
    "another norm in the engine": (damaged_engine_norm, "language layer 3"),
}


def hand_over_but_one_layer(run: Run, generator: Generator, before: dict[str, Tensor]) -> None:
    """The policy's weights, but for one layer's, which stay as they were `before`."""
    tensors = hf_tensors(run.policy, run.shape, module_names=True)
    generator.load_weights(((name, before.get(name, tensor)) for name, tensor in tensors), policy_version=1)


def layer_now(run: Run) -> dict[str, Tensor]:
    """The tensors of the layer that goes stale."""
    tensors = hf_tensors(run.policy, run.shape, module_names=True)
    return {name: tensor.clone() for name, tensor in tensors if name.startswith(STALE_LAYER)}


def update_every_weight(run: Run) -> None:
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(1.05)


__all__ = [
    "ENGINE_FAULTS", "MODEL", "MODELS", "TRAINER_FAULTS", "hand_over", "hand_over_but_one_layer", "layer_now",
    "update_every_weight",
]  # fmt: skip
