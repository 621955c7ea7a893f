"""Which updates are traced: a published model's shape, whole or with few of its layers, on one GPU or as one stage."""

from __future__ import annotations

from typing import Any

from megatron_papo.config import load_config
from megatron_papo.costs.memory import UpdateBytes, update_bytes
from megatron_papo.model.published_shapes import published_config
from megatron_papo.model.shape import ModelShape
from tools.fake_gpu.rows import Work
from tools.fake_gpu.trace import Case

BENCHMARK = Work(image_edge=34, text_tokens=344, response_tokens=512, group_size=8)
"""The GPU benchmark's: 1,500 tokens of prompt and 8 responses of 512; 5,596 tokens a row, 11,192 with both views."""


def shape_tree(name: str, language_layers: int | None = None, vision_layers: int | None = None) -> dict[str, Any]:
    """config.json of a published model by name, with so many of its layers: every layer more adds the same, so two
    depths tell what the whole takes. Of levels of DeepStack it keeps as many as it has layers for."""
    tree = published_config(name)
    language, vision = dict(tree.get("text_config", tree)), dict(tree["vision_config"])
    if language_layers is not None:
        language["num_hidden_layers"] = language_layers
    if vision_layers is not None:
        vision["depth"] = vision_layers
        if "fullatt_block_indexes" in vision:
            vision["fullatt_block_indexes"] = [vision_layers - 1]
    levels = vision.get("deepstack_visual_indexes", [])
    if levels and (levels[-1] >= vision["depth"] or len(levels) > language["num_hidden_layers"]):
        most = min(len(levels), vision["depth"], language["num_hidden_layers"])
        vision["deepstack_visual_indexes"] = list(range(most))
    if "text_config" in tree:
        language = tree | {"text_config": language}
    return language | {"vision_config": vision}


def update_case(
    tree: dict[str, Any],
    work: Work = BENCHMARK,
    *,
    num_ranks: int = 1,
    rank: int = 0,
    in_flight: int = 1,
    **settings: Any,
) -> Case:
    """`settings` by key with `__` for the dot, over those of an update in bfloat16 without a reference."""
    own: dict[str, Any] = {
        "model.dtype": "bfloat16",
        "model.spec": "local",
        "perception.masked_branch": "joint" if work.joint else "frozen",
        "loss.reference_coef": 0,
        "parallel.distributed_optimizer": True,
        "train.tokens_per_micro_batch": work.row_tokens,
    }
    own |= {name.replace("__", "."): value for name, value in settings.items()}
    return Case(tree, work, own, num_ranks, rank, in_flight)


def counted(case: Case) -> UpdateBytes:
    """What `megatron_papo.costs.memory` says of the update, to be held against its trace."""
    config = load_config(None, [f"{name}={value}" for name, value in case.settings.items()])
    shape = ModelShape.from_dict(case.tree)
    stage = case.rank // config.parallel.tensor
    return update_bytes(config, shape, case.work.row_size(shape), num_ranks=case.num_ranks, stage=stage)
