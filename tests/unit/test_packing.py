"""Positions against transformers, rows by hand, and a loss and gradient that no packing changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_papo.algorithm.advantages import with_advantages
from megatron_papo.algorithm.loss_settings import LossSettings
from megatron_papo.algorithm.losses import papo_loss, sft_loss
from megatron_papo.config import Config, LossConfig
from megatron_papo.distributed.exchange import merge_metric
from megatron_papo.model.mrope_positions import mrope_positions
from megatron_papo.packing import (
    Totals,
    balance,
    empty_like,
    joint_row,
    masked_row,
    pack,
    sum_totals,
    supervised_group,
    token_totals,
)
from megatron_papo.types import Batch, Group, HeadOutputs, MicroBatch, ModelInputs, Prompt, Rollout, Segment
from tests.support.tiny import tiny_config

IMAGE, START, END, VIDEO, MERGE = 261, 259, 260, 262, 2
Grid = tuple[int, int, int]


def _ids(*parts: int | Grid) -> Tensor:
    """Text tokens as they are; a grid as start, its run of image tokens, end."""
    found: list[int] = []
    for part in parts:
        if isinstance(part, tuple):
            found += [START, *[IMAGE] * (part[0] * part[1] * part[2] // MERGE**2), END]
        else:
            found.append(part)
    return torch.tensor(found)


def _prompt(name: str, *parts: int | Grid, masked: bool = True) -> Prompt:
    """Its pixels hold one constant a prompt, positive; the masked view the same, negative."""
    grids = [part for part in parts if isinstance(part, tuple)]
    if not grids:
        return Prompt(name, 0, "", "", (), ModelInputs(_ids(*parts), None, None))
    pixels = torch.full((sum(t * h * w for t, h, w in grids), 3), float(sum(map(ord, name))))
    inputs = ModelInputs(_ids(*parts), pixels, torch.tensor(grids))
    return Prompt(name, 0, "", "", (), inputs, -pixels if masked else None)


def _group(prompt: Prompt, *responses: tuple[int, ...], rewards: tuple[float, ...] = ()) -> Group:
    rollouts = tuple(
        Rollout(index, ids, tuple(-float(word) for word in ids), "", "stop", 0) for index, ids in enumerate(responses)
    )
    return with_advantages(Group(prompt, rollouts, rewards or tuple(float(index) for index in range(len(responses)))))


def _pack(
    groups: list[Group],
    *,
    budget: int = 1000,
    joint: bool = False,
    totals: Totals | None = None,
    least_rows: int = 1,
    longest_row: int | None = None,
    **loss,
) -> Batch:
    return pack(
        groups,
        tokens_per_micro_batch=budget,
        loss=LossConfig(**loss),
        totals=totals or token_totals(groups),
        joint=joint,
        positions=partial(mrope_positions, image_token_id=IMAGE, merge_size=MERGE),
        cost=_tokens,
        banned_ids=(IMAGE, START, END, VIDEO),
        least_rows=least_rows,
        longest_row=longest_row,
    )


def _tokens(prompt: int, responses: Sequence[int], grids: Sequence[Grid]) -> float:
    return prompt + sum(responses)


@pytest.mark.parametrize(
    "parts",
    [
        (1, 2, 3, 4),
        (1, (1, 4, 4), 2, 3),
        ((1, 2, 6), 1, 2),
        (7, 7, (1, 6, 2), 5, (1, 4, 10), (1, 2, 2), 9, 9, 9),
        ((1, 14, 6), (1, 6, 14)),
    ],
)
def test_positions_are_those_of_transformers(parts: tuple[int | Grid, ...]):
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    ids = _ids(*parts)
    grids = [part for part in parts if isinstance(part, tuple)]
    grid_thw = torch.tensor(grids) if grids else None
    with torch.device("meta"):
        theirs = Qwen2_5_VLModel(tiny_config())
    expected, _ = theirs.get_rope_index(ids[None], (ids == IMAGE).int()[None], image_grid_thw=grid_thw)
    found = mrope_positions(ids, grid_thw, image_token_id=IMAGE, merge_size=MERGE)
    assert torch.equal(found, expected[:, 0])


def test_positions_by_hand():
    # one text token and the start token; a 2 x 3 merged grid from position 2; after it 2 + max(2, 3) = 5
    found = mrope_positions(_ids(8, (1, 4, 6), 9), torch.tensor([[1, 4, 6]]), image_token_id=IMAGE, merge_size=MERGE)
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        (_ids(1, (1, 4, 4)), [[1, 4, 4], [1, 2, 2]], r"4 image tokens for 2 images of \[4, 1\]"),
        (_ids(1, (1, 4, 4)), None, r"4 image tokens for 0 images"),
        (_ids((1, 4, 4), (1, 2, 2)), [[1, 2, 2], [1, 4, 4]], r"image 1 of grid \(1, 4, 4\) is not one run of 4"),
        (_ids((2, 2, 2)), [[2, 2, 2]], r"image 0 of grid \(2, 2, 2\)"),
    ],
)
def test_image_tokens_that_do_not_match_the_grids_are_counted(ids: Tensor, grids: list | None, message: str):
    grid_thw = None if grids is None else torch.tensor(grids)
    with pytest.raises(ValueError, match=message):
        mrope_positions(ids, grid_thw, image_token_id=IMAGE, merge_size=MERGE)


def _two_groups() -> list[Group]:
    return [
        _group(_prompt("a", 1, (1, 2, 4), 2), (10, 11), (12,), rewards=(1.0, 0.0)),
        _group(_prompt("b", 3, 4), (13, 14, 15), (16, 17), rewards=(0.5, 0.5)),
    ]


def test_a_row_by_hand():
    groups = _two_groups()
    (row,) = _pack(groups)
    image = [1, START, IMAGE, IMAGE, END, 2]
    assert row.token_ids_T.tolist() == [*image, 10, 11, 12, 3, 4, 13, 14, 15, 16, 17]
    assert row.segments == (
        Segment(6, None, 1), Segment(2, 0), Segment(1, 0), Segment(2), Segment(3, 3), Segment(2, 3),
    )  # fmt: skip
    assert row.num_tokens == 16 and row.segment_lengths == (6, 2, 1, 2, 3, 2)
    assert row.target_ids_R.tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    # the first token of every response is predicted by the last of the prompt that they share
    assert row.logit_index_R.tolist() == [5, 6, 5, 10, 11, 12, 10, 14]
    assert row.rollout_index_R.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert row.sequences == (("a", 0), ("a", 1), ("b", 0), ("b", 1))
    assert row.has_image_R.tolist() == [True] * 3 + [False] * 5 and row.loss_mask_R.all()
    std = 0.5**0.5 + 1e-6
    assert row.advantages_R.tolist() == pytest.approx([0.5 / std, 0.5 / std, -0.5 / std, 0, 0, 0, 0, 0])
    assert row.rollout_logprobs_R.tolist() == [-10, -11, -12, -13, -14, -15, -16, -17]
    # the prompt's own tensors, once for all its rollouts
    prompt = groups[0].prompt
    assert [id(pixels) for pixels in row.pixel_values] == [id(prompt.inputs.pixel_values_PD)]
    assert [id(pixels) for pixels in row.masked_pixel_values] == [id(prompt.masked_pixel_values_PD)]
    assert row.grid_thw_I3.tolist() == [[1, 2, 4]]
    assert row.position_ids_3T[:, :9].tolist() == [
        [0, 1, 2, 2, 4, 5, 6, 7, 6],
        [0, 1, 2, 2, 4, 5, 6, 7, 6],
        [0, 1, 2, 3, 4, 5, 6, 7, 6],
    ]
    assert row.position_ids_3T[:, 9:].tolist() == [[0, 1, 2, 3, 4, 2, 3]] * 3


def test_a_prompt_with_one_response_is_one_plain_segment():
    (row,) = _pack([_group(_prompt("a", 1, (1, 2, 4), 2), (10, 11))])
    assert row.segments == (Segment(8, None, 1),) and row.logit_index_R.tolist() == [5, 6]
    assert row.token_ids_T.tolist() == [1, START, IMAGE, IMAGE, END, 2, 10, 11]
    assert row.position_ids_3T[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("loss", "weights", "perception"),
    [
        # 8 response tokens, 3 of them of a prompt with an image; 4 sequences, 2 of them with an image
        ({"averaging": "token"}, [1 / 8] * 8, [1 / 3] * 3),
        (
            {"averaging": "sequence"},
            [1 / 8, 1 / 8, 1 / 4, 1 / 12, 1 / 12, 1 / 12, 1 / 8, 1 / 8],
            [1 / 4, 1 / 4, 1 / 2],
        ),
        ({"averaging": "fixed", "fixed_denominator": 50.0}, [1 / 50] * 8, [1 / 50] * 3),
    ],
)
def test_weights_are_shares_of_the_mean(loss: dict, weights: list[float], perception: list[float]):
    (row,) = _pack(_two_groups(), **loss)
    assert row.weights_R.tolist() == pytest.approx(weights)
    assert row.perception_weights_R.tolist() == pytest.approx([*perception, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("averaging", ["token", "sequence"])
def test_tokens_that_were_given_are_in_the_row_and_in_no_mean(averaging: str):
    group = _group(_prompt("a", (1, 4, 4), 1), (11, 12, 13), (14, 15))
    turns = replace(group.rollouts[0], sampled=(True, False, True))
    group = replace(group, rollouts=(turns, *group.rollouts[1:]))
    (row,) = _pack([group], averaging=averaging)
    assert row.target_ids_R.tolist() == [11, 12, 13, 14, 15]
    assert row.loss_mask_R.tolist() == [True, False, True, True, True]
    assert row.weights_R.tolist() == row.perception_weights_R.tolist() == [0.25, 0.0, 0.25, 0.25, 0.25]


def test_totals_of_ranks_add_up_and_reach_the_weights():
    groups = _two_groups()
    assert token_totals(groups) == Totals(4, 8, 2, 3)
    assert token_totals(groups[1:]) == Totals(2, 5, 0, 0) and token_totals([]) == Totals(0, 0, 0, 0)
    everywhere = sum_totals([token_totals(groups[:1]), token_totals([]), token_totals(groups[1:])])
    assert everywhere == Totals(4, 8, 2, 3)
    (row,) = _pack(groups[:1], totals=everywhere)
    assert row.weights_R.tolist() == pytest.approx([1 / 8] * 3)


def test_rows_are_few_and_of_equal_cost_and_lose_nothing():
    groups = [_group(_prompt("t", 1, 2), tuple(range(10, 10 + length)), (9,)) for length in (5, 2, 6, 1)]
    rows = _pack(groups, budget=15)
    # tokens by group: 8, 5, 9, 4. Two rows hold them: 9 + 4 and 8 + 5
    assert [row.segment_lengths for row in rows] == [(2, 5, 1, 2, 2, 1), (2, 6, 1, 2, 1, 1)]
    assert sum(float(row.weights_R.sum()) for row in rows) == pytest.approx(1.0)
    assert _pack([], totals=Totals(1, 1, 0, 0)) == ()


def test_a_pipeline_gets_rows_as_far_as_there_are_prompts():
    groups = [_group(_prompt("t", 1, 2), (10,) * length, (9,)) for length in (5, 2, 6, 1)]
    assert [len(_pack(groups, least_rows=least)) for least in (1, 2, 3, 4, 9)] == [1, 2, 3, 4, 4]
    assert [row.num_tokens for row in _pack(groups, least_rows=2)] == [13, 13]


def test_a_group_over_the_budget_is_split_by_responses_into_few_even_parts():
    prompt = _prompt("a", 1, (1, 2, 4), 2)  # 6 tokens
    lengths = (1, 7, 2, 6, 3, 5)  # 24
    group = _group(prompt, *(tuple(range(10, 10 + length)) for length in lengths))
    rows = _pack([group], budget=19)  # room for 13 response tokens: two parts of 12
    assert [row.num_tokens for row in rows] == [18, 18]
    assert [row.sequences for row in rows] == [(("a", 0), ("a", 3), ("a", 5)), (("a", 1), ("a", 2), ("a", 4))]
    assert [len(row.pixel_values) for row in rows] == [1, 1]
    assert [row.num_tokens for row in _pack([group], budget=16)] == [14, 14, 14]
    # alone in its row, a response is one segment with its prompt
    assert [row.segments for row in _pack([group], budget=13)][1] == (Segment(13, None, 1),)


def test_joint_packing_leaves_room_for_the_copies():
    image, text = _prompt("a", (1, 2, 4)), _prompt("t", 1, 2)  # 4 and 2 tokens
    groups = [_group(image, (10, 11)), _group(image, (10, 11)), _group(text, (12, 13))]
    assert [row.segment_lengths for row in _pack(groups, budget=16)] == [(6, 6, 4)]
    rows = _pack(groups, budget=16, joint=True)  # 12, 12 and 4
    assert [row.segment_lengths for row in rows] == [(6, 4), (6,)]
    assert [joint_row(row).num_tokens for row in rows] == [16, 12]
    # 4 + 2 x 3 tokens in two views are 20: split into 14 and 14
    split = _pack([_group(image, (10, 11, 12), (13, 14, 15))], budget=19, joint=True)
    assert [joint_row(row).num_tokens for row in split] == [14, 14]


def test_a_response_over_the_budget_is_refused_with_the_numbers():
    groups = [_group(_prompt("long one", 1, 2, (1, 2, 2)), (10, 11, 12), (10,))]
    message = r"prompt long one: its 5 tokens with a response of 3 are 8, more than train.tokens_per_micro_batch=7"
    with pytest.raises(ValueError, match=message):
        _pack(groups, budget=7)
    message = r"5 tokens with a response of 3 in two views are 16, more than train.tokens_per_micro_batch=15"
    with pytest.raises(ValueError, match=message):
        _pack(groups, budget=15, joint=True)


def test_a_response_over_the_budget_has_a_row_of_its_own_within_the_limit():
    long = _group(_prompt("long", 1, 2, (1, 2, 2)), (10, 11, 12), (10,), (10, 11))
    short = [_group(_prompt(f"short {index}", 1), (10, 11), (12,)) for index in range(3)]  # 4 tokens each
    alone = _pack(short, budget=8)
    rows = _pack([short[0], long, *short[1:]], budget=7, longest_row=8)
    assert [row.num_tokens for row in rows] == [4, 8, 8, 4, 4], "5 tokens, of the long one with 3, and with 1 and 2"
    assert sorted(row.sequences for row in rows)[:2] == [(("long", 0),), (("long", 1), ("long", 2))]
    assert [row.sequences for row in _pack(short, budget=8, longest_row=99)] == [row.sequences for row in alone]
    with pytest.raises(ValueError, match=r"3 are 8, more than train\.tokens_per_micro_batch=6"):
        _pack([long], budget=6, longest_row=7)
    # in two views 16 tokens
    rows = _pack([long], budget=15, longest_row=16, joint=True)
    assert [joint_row(row).num_tokens for row in rows] == [16, 16]
    weights = sum(float(row.weights_R.sum()) for row in _pack([long, *short], budget=7, longest_row=8))
    assert weights == pytest.approx(1.0), "every token counts once"


def test_images_without_pixels_or_masked_views_are_refused_with_the_numbers():
    whole = _prompt("a", 1, (1, 2, 4), (1, 2, 2))
    blind = replace(whole, inputs=replace(whole.inputs, pixel_values_PD=None))
    with pytest.raises(ValueError, match="prompt a: 2 images and 0 pixels"):
        _pack([_group(blind, (10,))])
    unmasked = replace(whole, masked_pixel_values_PD=None)
    with pytest.raises(ValueError, match="prompt a: 2 images and 0 masked ones: a row of both views needs each"):
        _pack([_group(unmasked, (10,))], joint=True)
    gone = replace(whole, inputs=ModelInputs(whole.inputs.token_ids_S, None, None))
    with pytest.raises(ValueError, match=r"prompt a: 3 image tokens for 0 images"):
        _pack([_group(gone, (10,))], joint=True)


@pytest.mark.parametrize("seed", range(30))
def test_ranks_are_balanced_with_few_moves(seed: int):
    generator = torch.Generator().manual_seed(seed)
    num_ranks, num_groups = 4, 12
    costs = torch.exp(torch.randn(num_ranks, num_groups, generator=generator) / 2).tolist()
    moves = balance(costs)
    held = [dict(enumerate(own)) for own in costs]
    for move in moves:
        assert move.source != move.target
        held[move.target][move.source, move.place] = held[move.source].pop(move.place)
    loads, before = [sum(own.values()) for own in held], [sum(own) for own in costs]
    assert sum(loads) == pytest.approx(sum(before)) and max(loads) <= 1.02 * sum(loads) / num_ranks
    assert len(moves) <= num_groups and len({(move.source, move.place) for move in moves}) == len(moves)


def test_what_is_balanced_stays_and_nothing_is_balanced_alone():
    assert balance([[3.0, 1.0], [2.0, 2.0]]) == [] and balance([[5.0]]) == [] and balance([[], []]) == []
    (move,) = balance([[4.0, 4.0], []])
    assert (move.source, move.target) == (0, 1)
    # a swap, where giving alone does not help: 6 + 4 and 5 + 1 become 5 + 4 and 6 + 1 ... or 6 + 1 and 5 + 4
    moves = balance([[6.0, 4.0], [5.0, 1.0]])
    assert sorted((move.source, move.target) for move in moves) == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (_group(_prompt("p", 1), (10,), (11, IMAGE, START)), r"prompt p: rollout 1 holds banned tokens \[259, 261\]"),
        (_group(_prompt("p", 1), (10,), ()), "prompt p: rollout 1 has an empty response"),
    ],
)
def test_responses_that_the_model_cannot_read_are_refused(group: Group, message: str):
    with pytest.raises(ValueError, match=message):
        _pack([group])


def test_a_prompt_whose_images_do_not_match_is_named():
    prompt = _prompt("bad", 1, (1, 2, 4))
    wrong = replace(prompt, inputs=replace(prompt.inputs, grid_thw_I3=torch.tensor([[1, 2, 6]])))
    with pytest.raises(ValueError, match=r"prompt bad: 2 image tokens for 1 images of \[3\]"):
        _pack([_group(wrong, (10,))])


def test_masked_and_unmasked_prompts_do_not_share_a_row():
    groups = [_group(_prompt("a", (1, 2, 2)), (10,)), _group(_prompt("b", (1, 2, 2), masked=False), (10,))]
    with pytest.raises(ValueError, match=r"prompts \['b'\] have no masked view"):
        _pack(groups)
    (row,) = _pack(groups[1:])
    assert row.masked_pixel_values == () and len(row.pixel_values) == 1


def test_masked_row_differs_in_its_pixels_alone():
    (row,) = _pack(_two_groups())
    masked = masked_row(row)
    assert masked.pixel_values is row.masked_pixel_values
    assert [torch.equal(view, -pixels) for view, pixels in zip(masked.pixel_values, row.pixel_values)] == [True]
    for name in ("token_ids_T", "position_ids_3T", "logit_index_R", "target_ids_R", "grid_thw_I3"):
        assert getattr(masked, name) is getattr(row, name)
    (text,) = _pack(_two_groups()[1:])
    assert masked_row(text) is text


def test_moving_a_row_leaves_its_pixels_and_grids_where_they_are():
    (row,) = _pack(_two_groups())
    moved = row.to(torch.device("meta"))
    assert moved.token_ids_T.is_meta and moved.weights_R.is_meta and moved.grid_thw_I3 is row.grid_thw_I3
    assert moved.pixel_values is row.pixel_values and moved.masked_pixel_values is row.masked_pixel_values


def test_joint_row_by_hand():
    (row,) = _pack(list(reversed(_two_groups())))  # text first, then a prompt with an image
    joint = joint_row(row)
    assert row.segments == (
        Segment(2), Segment(3, 0), Segment(2, 0), Segment(6, None, 1), Segment(2, 3), Segment(1, 3),
    )  # fmt: skip
    assert joint.segments == (*row.segments, Segment(6, None, 1), Segment(2, 6), Segment(1, 6))
    assert torch.equal(joint.token_ids_T, torch.cat([row.token_ids_T, row.token_ids_T[7:]]))
    assert torch.equal(joint.position_ids_3T[:, 16:], row.position_ids_3T[:, 7:])
    assert list(map(id, joint.pixel_values)) == list(map(id, (*row.pixel_values, *row.masked_pixel_values)))
    assert joint.grid_thw_I3.tolist() == [[1, 2, 4]] * 2 and joint.masked_pixel_values == ()
    assert torch.equal(joint.logit_index_R, row.logit_index_R)
    # text: the original's place; images: 9 further, by the length of what is copied
    assert (joint.masked_logit_index_R - row.logit_index_R).tolist() == [0] * 5 + [9] * 3
    (text,) = _pack(_two_groups()[1:])
    assert torch.equal(joint_row(text).masked_logit_index_R, text.logit_index_R)
    assert joint_row(text).token_ids_T is text.token_ids_T


def test_empty_like_counts_nothing_and_has_no_gradient():
    (row,) = _pack(_two_groups())
    policy = torch.full((8,), -1.0, requires_grad=True)
    row = replace(row, rollout_logprobs_R=torch.full((8,), math.nan))  # of a group that nobody trains on
    row = replace(empty_like(row), ref_logprobs_R=torch.full((8,), -2.0), masked_logprobs_R=torch.full((8,), -2.0))
    total, metrics = papo_loss(HeadOutputs(policy), row, LossSettings.at_step(Config(), 0))
    total.backward()
    assert total.item() == 0.0 and torch.equal(policy.grad, torch.zeros(8))
    assert metrics.pop("rollout_gap_max") == (0.0, 1.0)
    assert set(metrics.values()) == {(0.0, 0.0)}


def _toy_outputs(row: MicroBatch, table: Tensor) -> HeadOutputs:
    """A stand-in for the model: six smooth functions of the target and its position in its own sequence, so that
    what it says of a token does not depend on the row around it."""
    position_R = row.position_ids_3T[0, row.logit_index_R].double()
    values = F.softplus(table[row.target_ids_R] + position_R[:, None] / 7)
    return HeadOutputs(-values[:, 0], values[:, 1], -values[:, 2], values[:, 3], (values[:, 4] - values[:, 5]) ** 2)


@pytest.mark.parametrize("averaging", ["token", "sequence", "fixed"])
@pytest.mark.parametrize(("kl", "top_fraction"), [("k3", 1.0), ("k3", 0.2), ("full", 0.5)])
def test_no_split_into_micro_batches_changes_loss_or_gradient(averaging: str, kl: str, top_fraction: float):
    loss = {"averaging": averaging, "fixed_denominator": 64.0 if averaging == "fixed" else None}
    coefs = {"perception_coef": 0.3, "reference_coef": 0.2, "entropy_coef": 0.1, "masked_entropy_coef": 0.4}
    perception = {"masked_branch": "joint", "kl": kl, "top_fraction": top_fraction}
    config = Config.model_validate({"loss": loss | coefs, "perception": perception, "entropy": {"kind": "full"}})
    words = iter(range(10, 90))
    prompts = [_prompt("a", 1, (1, 2, 4), 2), _prompt("t", 3, 4), _prompt("b", (1, 2, 2), (1, 4, 2))]
    groups = [
        _group(prompt, *(tuple(next(words) for _ in range(length)) for length in lengths))
        for prompt, lengths in zip(prompts, [(7, 3, 1), (5, 2), (4, 11)])
    ]
    results = []
    for budget, joint in ((1000, True), (70, True), (40, True), (30, False), (18, False)):
        table = torch.randn(100, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        rows = _pack(groups, budget=budget, joint=joint, **loss)
        sums: dict[str, tuple[float, float]] = {}
        for row in rows:
            row = replace(row, ref_logprobs_R=-row.target_ids_R / 50.0, old_logprobs_R=-row.target_ids_R / 40.0)
            total, metrics = papo_loss(_toy_outputs(row, table), joint_row(row), LossSettings.at_step(config, 0))
            total.backward()
            for name, pair in metrics.items():
                sums[name] = merge_metric(name, sums.get(name), pair)
        results.append(([row.segment_lengths for row in rows], table.grad, sums))
    splits = [split for split, *_ in results]
    assert [len(split) for split in splits] == [1, 2, 3, 2, 4]
    _, gradient, sums = results[0]
    assert gradient.abs().max() > 1e-3
    for _, other_gradient, other_sums in results[1:]:
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-6, atol=1e-9)  # weights are fp32
        for name, pair in sums.items():
            assert other_sums[name] == pytest.approx(pair, rel=1e-6, abs=1e-9), name


def test_supervised_demonstrations_pack_like_rollouts():
    groups = [supervised_group(_prompt("a", 1, (1, 2, 2)), (10, 11, 12)), supervised_group(_prompt("t", 1), (13,))]
    (row,) = _pack(groups)
    policy = torch.tensor([-1.0, -2.0, -3.0, -6.0], requires_grad=True)
    total, metrics = sft_loss(HeadOutputs(policy), row)
    total.backward()
    assert total.item() == pytest.approx(3.0) and metrics["policy_logprobs"] == (-12.0, 4.0)
    assert policy.grad.tolist() == [-0.25] * 4


@pytest.mark.parametrize("values", list(permutations((1.0, math.nan, 3.0, -math.inf))))
def test_a_maximum_of_micro_batches_keeps_a_nan_wherever_it_stands(values):
    for name, expected in (("gap_max", math.nan), ("gap", math.nan)):
        total = None
        for value in values:
            total = merge_metric(name, total, (value, 1.0))
        assert total == pytest.approx((expected, 1.0 if name == "gap_max" else 4.0), nan_ok=True)
    numbers = [value for value in values if not math.isnan(value)]
    assert reduce(partial(merge_metric, "gap_max"), [(value, 1.0) for value in numbers]) == (3.0, 1.0)
