"""The toy family's costs: the protocol is `FamilyCosts` of `model/layer_costs.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from megatron_papo.model.layer_costs import ActivationSettings, Grid, ParameterCount, norm_saved_bytes, vision_layer
from megatron_papo.model.shape import ModelShape


def vision_parameters(shape: ModelShape, width: Callable[[int], int]) -> Iterator[ParameterCount]:
    """Patch embedding, layers, and the projector: a norm and a matrix."""
    vision = shape.vision
    yield ParameterCount("vision", 0, vision.hidden_size * vision.patch_dim)
    yield vision_layer(shape).parameters("vision", vision.num_layers, width)
    yield ParameterCount("projector", 0, vision.hidden_size * (2 + vision.out_hidden_size))


def vision_flops(grids: Sequence[Grid], shape: ModelShape) -> int:
    """FLOPs of the tower, every patch of an image attending to every patch, and of the projector."""
    vision, sizes = shape.vision, [time * height * width for time, height, width in grids]
    patch = vision.patch_dim * vision.hidden_size + vision.num_layers * vision_layer(shape).products
    pairs = vision.num_layers * sum(size**2 for size in sizes)
    tokens = sum(sizes) // vision.merge_unit
    matrices = sum(sizes) * patch + tokens * vision.hidden_size * vision.out_hidden_size
    return 2 * matrices + 4 * pairs * vision.hidden_size


def vision_ends_bytes(num_patches: int, shape: ModelShape, settings: ActivationSettings) -> int:
    """Bytes of pixels and of the projector's norm and means."""
    vision = shape.vision
    norm = norm_saved_bytes(vision_layer(shape), settings, outputs=0)
    pixels = settings.value_bytes * vision.patch_dim // settings.sequence
    return num_patches * (norm + pixels + settings.value_bytes * vision.hidden_size // vision.merge_unit)
