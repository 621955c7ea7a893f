"""Counted FLOPs against what torch counts in transformers' model, against its parameters, and against pairs by hand.

torch counts every matrix product that runs: all of a causal square, where the model needs half. The linear parts and
the head are compared exactly, attention with the counted formula over whole squares.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from megatron_papo.costs.flops import (
    Flops,
    Meter,
    causal_pairs,
    group_flops,
    row_flops,
)
from megatron_papo.costs.hardware import peak_tflops
from megatron_papo.model.qwen2_5_vl.costs import vision_attention_flops
from megatron_papo.model.qwen2_5_vl.patches import plan_image
from megatron_papo.model.shape import ModelShape
from megatron_papo.model.tower_costs import matrix_flops
from megatron_papo.types import MicroBatch, Segment
from tests.support.tiny import tiny_config

GRIDS = ((1, 6, 10), (1, 2, 14), (1, 8, 8))
"""Windows of the first family's tiny model are 4 x 4 patches: cut at the edges in the first two."""
NUM_TEXT, NUM_RESPONSE = 9, 7
NUM_IMAGE_TOKENS = (60 + 28 + 64) // 4


OTHER_SIZES = {"layers": 3, "kv_heads": 1, "vision_depth": 3, "hidden": 96, "tie": True}
MODELS = {
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen2_5_vl of other sizes": ("qwen2_5_vl", OTHER_SIZES),
    "qwen3_vl": ("qwen3_vl", {}),
    "qwen3_vl of other sizes": ("qwen3_vl", {**OTHER_SIZES, "head_dim": 40, "deepstack": [1]}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    family, sizes = MODELS[request.param]
    config = tiny_config(family, **sizes)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def shape_of(model) -> ModelShape:
    return ModelShape.from_dict(model.config.to_dict())


def counted(model) -> dict[str, int]:
    """FLOPs of a forward pass over one sequence with `GRIDS` as torch counts them, by module."""
    ids = [1] * NUM_TEXT + [model.config.image_token_id] * NUM_IMAGE_TOKENS + [2] * NUM_RESPONSE
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            input_ids=torch.tensor([ids]),
            pixel_values=torch.randn(sum(t * h * w for t, h, w in GRIDS), shape_of(model).vision.patch_dim),
            image_grid_thw=torch.tensor(GRIDS),
            position_ids=torch.arange(len(ids)).expand(3, 1, -1),
            use_cache=False,
            logits_to_keep=NUM_RESPONSE,
        )
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


def of(counts: dict[str, int], *endings: str) -> int:
    return sum(value for name, value in counts.items() if name.endswith(endings))


def test_what_torch_counts_in_transformers_model(model):
    counts, shape = counted(model), shape_of(model)
    num_tokens = NUM_TEXT + NUM_IMAGE_TOKENS + NUM_RESPONSE
    flops = group_flops(NUM_TEXT + NUM_IMAGE_TOKENS, [NUM_RESPONSE], GRIDS, shape)
    language = {name: value for name, value in counts.items() if ".language_model.layers." in name}
    vision = {name: value for name, value in counts.items() if ".visual." in name}
    projections = (".q_proj", ".k_proj", ".v_proj", ".o_proj", ".gate_proj", ".up_proj", ".down_proj")
    assert flops.language == of(language, *projections)
    assert flops.head == of(counts, ".lm_head")

    attention = of(language, ".self_attn") - of(language, ".q_proj", ".k_proj", ".v_proj", ".o_proj")
    per_pair = 4 * shape.language.num_layers * shape.language.num_heads * shape.language.head_dim
    assert attention == per_pair * num_tokens**2
    assert flops.attention == per_pair * num_tokens * (num_tokens + 1) // 2

    own_attention = of(vision, ".attn") - of(vision, ".attn.qkv", ".attn.proj")
    assert flops.vision == of(counts, "model.visual")
    assert matrix_flops(GRIDS, shape) == of(counts, "model.visual") - own_attention
    rotary = of(counts, ".language_model.rotary_emb")  # angles, which transformers computes by a matrix product
    assert counts["Global"] == flops.total + per_pair * num_tokens * (num_tokens - 1) // 2 + rotary


def test_a_parameter_of_a_matrix_is_one_multiply_add_a_token(model):
    shape = shape_of(model)

    def weights(module) -> int:
        return sum(one.weight.numel() for one in module.modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv3d))

    flops = group_flops(5, [3, 2], [], shape)
    assert flops.language == 2 * 10 * weights(model.model.language_model)
    assert flops.head == 2 * 5 * weights(model.lm_head)
    visual = model.model.visual
    blocks = sum(weights(part) for name, part in visual.named_children() if "merger" in name)
    assert matrix_flops([(1, 2, 2)], shape) == 2 * (4 * (weights(visual) - blocks) + blocks)


@pytest.mark.parametrize("grid", [(1, 6, 10), (2, 4, 4), (1, 2, 2), (3, 14, 18)])
def test_windows_are_those_of_the_vision_tower(grid):
    vision = ModelShape.from_dict(tiny_config(vision_depth=3).to_dict()).vision
    plan = plan_image(*grid, merge=2, window=2)
    pairs = 2 * sum(length**2 for length in plan.windows) + sum(length**2 for length in plan.frames)
    assert vision_attention_flops([grid], vision) == 4 * vision.hidden_size * pairs


def test_pairs_of_a_shared_prompt_by_hand():
    # a prompt of 3 tokens: 1 + 2 + 3; a response of 2 sees those 3 twice, its own tokens 1 + 2
    assert causal_pairs(3) == 6 and causal_pairs(2, 3) == 9
    # which is what a sequence of 5 has, less its prompt's own pairs
    assert causal_pairs(5) == causal_pairs(3) + causal_pairs(2, 3)


SHAPE = ModelShape.from_dict(tiny_config().to_dict())


def row(*segments: Segment, num_response: int, grids=None, masked: bool = False, counts: bool = True) -> MicroBatch:
    num_tokens = sum(segment.length for segment in segments)
    empty_R = torch.zeros(num_response)
    places_R = torch.zeros(num_response, dtype=torch.int64)
    return MicroBatch(
        token_ids_T=torch.zeros(num_tokens, dtype=torch.int64),
        position_ids_3T=torch.zeros(3, num_tokens, dtype=torch.int64),
        segments=segments,
        pixel_values=(),
        grid_thw_I3=None if grids is None else torch.tensor(grids),
        target_ids_R=places_R,
        logit_index_R=places_R,
        rollout_index_R=places_R,
        loss_mask_R=torch.full((num_response,), counts),
        has_image_R=torch.zeros(num_response, dtype=torch.bool),
        weights_R=empty_R,
        perception_weights_R=empty_R,
        advantages_R=empty_R,
        rollout_logprobs_R=empty_R,
        masked_logit_index_R=places_R if masked else None,
    )


def test_a_row_of_shared_prompts_costs_what_its_groups_were_estimated_at():
    packed = row(
        Segment(20, None, 1), Segment(4, 0), Segment(6, 0), Segment(11), Segment(5, 3),
        num_response=15, grids=[(1, 4, 6)],
    )  # fmt: skip
    assert row_flops(packed, SHAPE) == group_flops(20, [4, 6], [(1, 4, 6)], SHAPE) + group_flops(11, [5], [], SHAPE)


def test_sharing_a_prompt_saves_its_other_copies_and_nothing_of_attention_among_the_rest():
    alone = row(Segment(24, None, 1), Segment(26, None, 1), num_response=10, grids=[(1, 4, 6)] * 2)
    shared = row(Segment(20, None, 1), Segment(4, 0), Segment(6, 0), num_response=10, grids=[(1, 4, 6)])
    prompt = group_flops(20, [], [(1, 4, 6)], SHAPE)
    assert row_flops(alone, SHAPE) == row_flops(shared, SHAPE) + prompt


def test_the_head_of_a_joint_row_reads_both_views():
    one = row_flops(row(Segment(9), num_response=4), SHAPE)
    assert row_flops(row(Segment(9), num_response=4, masked=True), SHAPE) == replace(one, head=2 * one.head)


def test_the_meter_counts_scoring_once_a_pass_and_updates_three_times():
    meter, logprobs_R = Meter(SHAPE), torch.zeros(4)
    first, idle = row(Segment(9), num_response=4), row(Segment(30), num_response=4, counts=False)
    scored = replace(first, old_logprobs_R=logprobs_R, ref_logprobs_R=logprobs_R.clone())
    meter.scored([(scored, first), (replace(idle, old_logprobs_R=logprobs_R),)])
    meter.updated([first, idle])
    one = row_flops(first, SHAPE)
    assert meter.take() == {
        "flops/language": 5 * one.language,
        "flops/attention": 5 * one.attention,
        "flops/vision": 0,
        "flops/head": 5 * one.head,
        "update_flops": 3 * one.total,
        "update_tokens": 9,
    }
    assert set(meter.take().values()) == {0}
    meter.scored([(replace(first, old_logprobs_R=logprobs_R, ref_logprobs_R=logprobs_R),)])  # one pass served both
    assert meter.take()["flops/head"] == one.head


def test_the_published_3b_model_costs_two_flops_a_parameter_and_token():
    """6 N a token of an update, the rule of thumb, with N the 2.77 billion weights of the layers' matrices."""
    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    shape = ModelShape.from_dict({"model_type": "qwen2_5_vl", **text, "vision_config": vision})
    flops = group_flops(1000, [], [], shape)
    assert flops == Flops(language=2 * 1000 * 2_774_532_096, attention=36 * 4 * 2048 * 500_500)


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100 80GB PCIe", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "float32", 67.0),
        ("NVIDIA H200 NVL", "bfloat16", 835.5),
        ("NVIDIA B200", "bfloat16", 2250.0),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979.0),
        ("NVIDIA A100 80GB PCIe", "fp8", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GB200", "bfloat16", None),
        (None, "float32", None),
    ],
)
def test_peaks_are_known_by_the_gpus_name(name, dtype, peak):
    assert peak_tflops(name, dtype) == peak
