"""Models and packed rows for the parity tests, and what Hugging Face transformers makes of them.

A case is a tiny model and its rows; a row is several prompts, each with images of given grids (patches in height and
width), some text and a response. The reference runs every prompt alone, so a row also shows that packed sequences do
not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

from megatron_papo.model.positions import positions_of
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import MicroBatch, Segment
from tests.support.tiny import tiny_config, tiny_model, wide_weights
from tests.toy_family.reference import Toy, toy_config

Grid = tuple[int, int]


@dataclass(frozen=True)
class Case:
    name: str
    rows: tuple[tuple[tuple[Grid, ...], ...], ...]
    """rows -> prompts -> images of the prompt."""
    model: dict[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    family: str = "qwen2_5_vl"
    """The family of the model; `toy_vl` lies outside the package."""


CASES = (
    Case("odd sizes", ((((6, 10),), ((2, 14),)), (((4, 2),),)), {"vision_depth": 3}),
    Case(
        "many images, none, tied, padded vocabulary and FFN",
        ((((4, 4), (8, 6), (2, 2)), ()), ((), ()), (((10, 4),), ((2, 2), (6, 4)), ())),
        {"tie": True, "vocab": 275, "vision_intermediate": 45},
        temperature=0.7,
    ),
    Case(
        "one key-value head, one frame in full attention",
        ((((8, 8),), ((8, 8),), ((8, 8),)), (((8, 8),),)),
        {"kv_heads": 1},
    ),
)
SECOND_CASES = (
    Case(
        "second family: three levels, heads of their own width, odd sizes",
        ((((6, 10),), ((2, 14), (4, 4)), ()), ((), ()), (((4, 2),),)),
        {"layers": 4, "vision_depth": 4, "deepstack": (0, 2, 3), "head_dim": 24},
        temperature=0.8,
        family="qwen3_vl",
    ),
    Case(
        "second family, tied, padded vocabulary and FFN, one level",
        ((((8, 6),), ((2, 2),)), (((6, 2),),)),
        {"tie": True, "vocab": 275, "vision_intermediate": 45, "deepstack": (1,), "kv_heads": 1},
        family="qwen3_vl",
    ),
)
TOY_CASES = (
    Case("toy family", ((((6, 10),), ((2, 14), (4, 4)), ()), (((4, 2),),)), temperature=0.8, family="toy_vl"),
    Case("toy family, tied", (((), ((2, 2),)), (((6, 2),),)), {"tie": True}, family="toy_vl"),
)


@dataclass(frozen=True)
class Reference:
    """What transformers says: log-probs by row and gradients by name of the weighted sum of all log-probs."""

    logprobs: list[Tensor]
    gradients: dict[str, Tensor]


def write_case(case: Case, folder: Path) -> Reference:
    """Writes the model to `folder` and its rows to `folder`/rows.pt; returns the reference."""
    if case.family == "toy_vl":
        model: Any = wide_weights(Toy(toy_config(**case.model)), seed=len(case.rows))
    else:
        sizes = {"layers": 3, "heads": 4, "vision_heads": 4, **case.model}
        model = tiny_model(tiny_config(case.family, **sizes), seed=len(case.rows))
    model.save_pretrained(folder)
    shape = ModelShape.from_folder(folder)
    generator = torch.Generator().manual_seed(7)
    prompts = [[_prompt(model.config, shape, images, generator) for images in row] for row in case.rows]
    logprobs = []
    for row in prompts:
        logprobs.append(torch.cat([_score(model, prompt, case.temperature) for prompt in row]))
    weights = [torch.randn(len(values), generator=generator) / 8 for values in logprobs]
    torch.stack([(weight * values).sum() for weight, values in zip(weights, logprobs)]).sum().backward()
    torch.save([_pack(row, weight) for row, weight in zip(prompts, weights)], folder / "rows.pt")
    return Reference(
        [values.detach() for values in logprobs],
        {name: weight.grad for name, weight in model.named_parameters()},
    )


@dataclass(frozen=True)
class _Prompt:
    token_ids: Tensor
    num_response: int
    pixels: Tensor | None
    grids: Tensor | None
    positions: Tensor


def _prompt(config: Any, shape: ModelShape, images: tuple[Grid, ...], generator: torch.Generator) -> _Prompt:
    def text(num: int) -> list[int]:
        return torch.randint(0, 255, (num,), generator=generator).tolist()

    ids = text(int(torch.randint(1, 9, (), generator=generator)))
    for height, width in images:
        ids += [config.vision_start_token_id, *[config.image_token_id] * (height * width // 4)]
        ids += [config.vision_end_token_id, *text(2)]
    num_response = int(torch.randint(3, 12, (), generator=generator))
    token_ids = torch.tensor(ids + text(num_response))
    if not images:
        return _Prompt(token_ids, num_response, None, None, torch.arange(len(token_ids)).expand(3, -1))
    grids = torch.tensor([[1, height, width] for height, width in images])
    pixels = torch.randn(int(grids.prod(1).sum()), shape.vision.patch_dim, generator=generator)
    positions = positions_of(shape)(token_ids, grids)
    if config.model_type != "toy_vl":
        assert torch.equal(positions, _positions(config, token_ids, grids))
    return _Prompt(token_ids, num_response, pixels, grids, positions)


def _positions(config: Any, token_ids: Tensor, grids: Tensor) -> Tensor:
    """Transformers' own M-RoPE positions."""
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    types = (token_ids == config.image_token_id).int()[None]
    positions, _ = model.get_rope_index(token_ids[None], mm_token_type_ids=types, image_grid_thw=grids)
    return positions[:, 0]


def _score(model: Any, prompt: _Prompt, temperature: float) -> Tensor:
    """Log-probs of the response, the vision tokens banned."""
    logits = model(
        input_ids=prompt.token_ids[None],
        pixel_values=prompt.pixels,
        image_grid_thw=prompt.grids,
        position_ids=prompt.positions[:, None],
        use_cache=False,
    ).logits[0]
    config = model.config
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    logits = logits[-prompt.num_response - 1 : -1] / temperature
    logits = logits.index_fill(1, torch.tensor(banned), -torch.inf)
    return logits.log_softmax(-1).gather(1, prompt.token_ids[-prompt.num_response :, None])[:, 0]


def _pack(prompts: list[_Prompt], weights: Tensor) -> MicroBatch:
    lengths = [len(prompt.token_ids) for prompt in prompts]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    index = [torch.arange(end - prompt.num_response - 1, end - 1) for prompt, end in zip(prompts, ends)]
    index_R = torch.cat(index)
    token_ids = torch.cat([prompt.token_ids for prompt in prompts])
    pixels = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    grids = [prompt.grids for prompt in prompts if prompt.grids is not None]
    none = torch.zeros(len(index_R))
    return MicroBatch(
        token_ids_T=token_ids,
        position_ids_3T=torch.cat([prompt.positions for prompt in prompts], dim=1),
        segments=tuple(map(Segment, lengths)),
        pixel_values=tuple(pixels),
        grid_thw_I3=torch.cat(grids) if grids else None,
        target_ids_R=token_ids[index_R + 1],
        logit_index_R=index_R,
        rollout_index_R=none.long(),
        loss_mask_R=none == 0,
        has_image_R=none == 0,
        weights_R=weights,
        perception_weights_R=none,
        advantages_R=none,
        rollout_logprobs_R=none,
    )
