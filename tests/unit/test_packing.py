"""Positions against transformers, rows by hand, and a loss and gradient that no packing changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_papo.advantages import with_advantages
from megatron_papo.config import Config, LossConfig
from megatron_papo.losses import LossSettings, papo_loss, sft_loss
from megatron_papo.packing import (
    Totals,
    empty_like,
    joint_row,
    masked_row,
    mrope_positions,
    pack,
    sum_totals,
    supervised_group,
    token_totals,
)
from megatron_papo.types import Batch, Group, HeadOutputs, MicroBatch, ModelInputs, Prompt, Rollout
from tests.tiny import tiny_config

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
    groups: list[Group], *, budget: int = 1000, joint: bool = False, totals: Totals | None = None, **loss
) -> Batch:
    return pack(
        groups,
        tokens_per_micro_batch=budget,
        loss=LossConfig(**loss),
        totals=totals or token_totals(groups),
        joint=joint,
        image_token_id=IMAGE,
        merge_size=MERGE,
        banned_ids=(START, END, VIDEO),
    )


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
    assert row.token_ids_T.tolist() == [*image, 10, 11, *image, 12, 3, 4, 13, 14, 15, 3, 4, 16, 17]
    assert row.segment_lengths == (8, 7, 5, 4) and row.num_tokens == 24
    assert row.target_ids_R.tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    # the first token of a response is predicted by the last of its prompt
    assert row.logit_index_R.tolist() == [5, 6, 13, 16, 17, 18, 21, 22]
    assert torch.equal(row.token_ids_T[row.logit_index_R + 1], row.target_ids_R)
    assert row.rollout_index_R.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert row.has_image_R.tolist() == [True] * 3 + [False] * 5 and row.loss_mask_R.all()
    std = 0.5**0.5 + 1e-6
    assert row.advantages_R.tolist() == pytest.approx([0.5 / std, 0.5 / std, -0.5 / std, 0, 0, 0, 0, 0])
    assert row.rollout_logprobs_R.tolist() == [-10, -11, -12, -13, -14, -15, -16, -17]
    # the prompt's own tensors, once a rollout: a copy of each would be most of a step's memory
    prompt = groups[0].prompt
    assert [id(pixels) for pixels in row.pixel_values] == [id(prompt.inputs.pixel_values_PD)] * 2
    assert [id(pixels) for pixels in row.masked_pixel_values] == [id(prompt.masked_pixel_values_PD)] * 2
    assert row.grid_thw_I3.tolist() == [[1, 2, 4]] * 2
    assert row.position_ids_3T[:, 8:15].tolist() == [
        [0, 1, 2, 2, 4, 5, 6],
        [0, 1, 2, 2, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    assert row.position_ids_3T[:, 15:20].tolist() == [list(range(5))] * 3


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


def test_totals_of_ranks_add_up_and_reach_the_weights():
    groups = _two_groups()
    assert token_totals(groups) == Totals(4, 8, 2, 3)
    assert token_totals(groups[1:]) == Totals(2, 5, 0, 0) and token_totals([]) == Totals(0, 0, 0, 0)
    everywhere = sum_totals([token_totals(groups[:1]), token_totals([]), token_totals(groups[1:])])
    assert everywhere == Totals(4, 8, 2, 3)
    (row,) = _pack(groups[:1], totals=everywhere)
    assert row.weights_R.tolist() == pytest.approx([1 / 8] * 3)


def test_rows_fill_first_fit_longest_first_and_lose_nothing():
    groups = [_group(_prompt("t", 1, 2), tuple(range(10, 10 + length)), (9,)) for length in (5, 2, 6, 1)]
    rows = _pack(groups, budget=10)
    # lengths by sequence: 7 3 | 4 3 | 8 3 | 3 3.  Longest first: 8, 7 + 3, 4 + 3 + 3, 3 + 3
    assert [row.segment_lengths for row in rows] == [(8,), (7, 3), (4, 3, 3), (3, 3)]
    assert sorted(length for row in rows for length in row.segment_lengths) == [3, 3, 3, 3, 3, 4, 7, 8]
    assert sum(float(row.weights_R.sum()) for row in rows) == pytest.approx(1.0)
    assert _pack([], totals=Totals(1, 1, 0, 0)) == ()


def test_joint_packing_leaves_room_for_the_copies():
    image, text = _prompt("a", (1, 2, 4)), _prompt("t", 1, 2)  # 4 and 2 tokens
    groups = [_group(image, (10, 11)), _group(image, (10, 11)), _group(text, (12, 13))]
    assert [row.segment_lengths for row in _pack(groups, budget=16)] == [(6, 6, 4)]
    rows = _pack(groups, budget=16, joint=True)  # 12, 12 and 4
    assert [row.segment_lengths for row in rows] == [(6, 4), (6,)]
    assert [joint_row(row).num_tokens for row in rows] == [16, 12]


def test_a_sequence_over_the_budget_is_refused_with_both_numbers():
    groups = [_group(_prompt("long one", 1, 2, (1, 2, 2)), (10, 11, 12))]
    with pytest.raises(ValueError, match=r"prompt long one: a sequence of 8 tokens .*tokens_per_micro_batch=7"):
        _pack(groups, budget=7)
    with pytest.raises(ValueError, match=r"prompt long one: a sequence of 16 tokens \(two views\) .*=15"):
        _pack(groups, budget=15, joint=True)


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
    assert [torch.equal(view, -pixels) for view, pixels in zip(masked.pixel_values, row.pixel_values)] == [True] * 2
    for name in ("token_ids_T", "position_ids_3T", "logit_index_R", "target_ids_R", "grid_thw_I3"):
        assert getattr(masked, name) is getattr(row, name)
    (text,) = _pack(_two_groups()[1:])
    assert masked_row(text) is text


def test_moving_a_row_leaves_its_pixels_where_they_are():
    (row,) = _pack(_two_groups())
    moved = row.to(torch.device("meta"))
    assert moved.token_ids_T.is_meta and moved.grid_thw_I3.is_meta and moved.weights_R.is_meta
    assert moved.pixel_values is row.pixel_values and moved.masked_pixel_values is row.masked_pixel_values


def test_joint_row_by_hand():
    (row,) = _pack(list(reversed(_two_groups())))  # text first, then two sequences with an image
    joint = joint_row(row)
    assert row.segment_lengths == (5, 4, 8, 7) and joint.segment_lengths == (5, 4, 8, 7, 8, 7)
    assert torch.equal(joint.token_ids_T, torch.cat([row.token_ids_T, row.token_ids_T[9:]]))
    assert torch.equal(joint.position_ids_3T[:, 24:], row.position_ids_3T[:, 9:])
    assert list(map(id, joint.pixel_values)) == list(map(id, (*row.pixel_values, *row.masked_pixel_values)))
    assert joint.grid_thw_I3.tolist() == [[1, 2, 4]] * 4 and joint.masked_pixel_values == ()
    assert torch.equal(joint.logit_index_R, row.logit_index_R)
    # text: the original's place; images: 15 further, by the length of what is copied
    assert (joint.masked_logit_index_R - row.logit_index_R).tolist() == [0] * 5 + [15] * 3
    assert torch.equal(joint.token_ids_T[joint.masked_logit_index_R + 1], row.target_ids_R)
    (text,) = _pack(_two_groups()[1:])
    assert torch.equal(joint_row(text).masked_logit_index_R, text.logit_index_R)
    assert joint_row(text).token_ids_T is text.token_ids_T


def test_empty_like_counts_nothing_and_has_no_gradient():
    (row,) = _pack(_two_groups())
    policy = torch.full((8,), -1.0, requires_grad=True)
    row = replace(empty_like(row), ref_logprobs_R=torch.full((8,), -2.0), masked_logprobs_R=torch.full((8,), -2.0))
    total, metrics = papo_loss(HeadOutputs(policy), row, LossSettings.at_step(Config(), 0))
    total.backward()
    assert total.item() == 0.0 and torch.equal(policy.grad, torch.zeros(8))
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
        sums: dict[str, Tensor] = {}
        for row in rows:
            row = replace(row, ref_logprobs_R=-row.target_ids_R / 50.0, old_logprobs_R=-row.target_ids_R / 40.0)
            total, metrics = papo_loss(_toy_outputs(row, table), joint_row(row), LossSettings.at_step(config, 0))
            total.backward()
            for name, pair in metrics.items():
                sums[name] = sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.tensor(pair)
        results.append(([row.segment_lengths for row in rows], table.grad, sums))
    splits = [split for split, *_ in results]
    assert [len(split) for split in splits] == [1, 2, 4, 3, 4] and splits[2] != splits[4]
    _, gradient, sums = results[0]
    assert gradient.abs().max() > 1e-3
    for _, other_gradient, other_sums in results[1:]:
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-6, atol=1e-9)  # weights are fp32
        torch.testing.assert_close(other_sums, sums, rtol=1e-6, atol=1e-9)


def test_supervised_demonstrations_pack_like_rollouts():
    groups = [supervised_group(_prompt("a", 1, (1, 2, 2)), (10, 11, 12)), supervised_group(_prompt("t", 1), (13,))]
    (row,) = _pack(groups)
    policy = torch.tensor([-1.0, -2.0, -3.0, -6.0], requires_grad=True)
    total, metrics = sft_loss(HeadOutputs(policy), row)
    total.backward()
    assert total.item() == pytest.approx(3.0) and metrics["policy_logprobs"] == (-12.0, 4.0)
    assert policy.grad.tolist() == [-0.25] * 4
