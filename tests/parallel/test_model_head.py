"""What parity alone does not show: both views of a joint row, rows without images, frozen parts, random weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_papo.model.family import FAMILIES
from megatron_papo.model.parameter_map import parameter_names, parameter_table
from megatron_papo.model.shape import ModelShape
from tests.parallel.model_cases import Case, write_case
from tests.support import gpu_optimizers
from tests.support.ranks import run_ranks

ROWS = ((((4, 6),), ()), ((), ()))
"""Images and text, and text alone."""
MODEL = {"vocab": 275, "vision_intermediate": 45, "tie": True, "layers": 2}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_case(Case("images and text", ROWS, MODEL, family=request.param), folder)
    return folder


def build(folder: Path, *overrides: str):
    """The policy of `folder` on this rank, and its rows."""
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import build_policy
    from megatron_papo.weights.transfer import read_hf

    adapt_megatron()
    config = load_config(None, ("model.dtype=float32", *overrides))
    initialize(config.parallel)
    model = build_policy(config, ModelShape.from_folder(folder))
    if not config.model.random_init:
        read_hf(model, model.shape, folder)
    return model, torch.load(folder / "rows.pt", weights_only=False)


def joint(row):
    """The row twice, the second time with other pixels: the two views of a joint row."""
    return replace(
        row,
        token_ids_T=row.token_ids_T.repeat(2),
        position_ids_3T=row.position_ids_3T.repeat(1, 2),
        segments=row.segments * 2,
        pixel_values=(*row.pixel_values, *(pixels * 0.3 for pixels in row.pixel_values)),
        grid_thw_I3=row.grid_thw_I3.repeat(2, 1),
        masked_logit_index_R=row.logit_index_R + row.num_tokens,
    )


def _two_views(folder: Path, *overrides: str) -> dict:
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.weights.transfer import hf_tensors

    model, rows = build(folder, *overrides)
    outputs = model(joint(rows[0]), HeadRequest(temperature=0.8, full_entropy=True, full_kl=True))
    values = {name: value.detach().clone() for name, value in vars(outputs).items()}
    torch.stack([value.mean() for value in vars(outputs).values()]).sum().backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        # of a share of the row, or of a share of the heads
        if getattr(parameter, "sequence_parallel", False) or name.endswith(
            ("q_layernorm.weight", "k_layernorm.weight")
        ):
            torch.distributed.all_reduce(grad, group=model.language.tp_group)
        parameter.data.copy_(grad)
    return {"values": values, "gradients": {name: t.clone() for name, t in hf_tensors(model, model.shape)}}


def _two_views_by_transformers(folder: Path) -> dict:
    """The same from full logits: distributions over the vocabulary without the vision tokens."""
    from transformers import AutoModelForImageTextToText

    published_name = parameter_names(ModelShape.from_folder(folder)).published_name
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    row = torch.load(folder / "rows.pt", weights_only=False)[0]
    ids = model.config
    banned = torch.tensor([ids.image_token_id, ids.video_token_id, ids.vision_start_token_id, ids.vision_end_token_id])
    (pixels,) = row.pixel_values
    views = [_row_logprobs(model, row, view, banned) for view in (pixels, pixels * 0.3)]
    logp_RV, logq_RV = (view[row.logit_index_R] for view in views)
    kept = torch.ones(ids.text_config.vocab_size, dtype=torch.bool).index_fill(0, banned, False)
    p, logp, q, logq = logp_RV[:, kept].exp(), logp_RV[:, kept], logq_RV[:, kept].exp(), logq_RV[:, kept]
    values = {
        "policy_logprobs_R": logp_RV.gather(1, row.target_ids_R[:, None])[:, 0],
        "entropy_R": -(p * logp).sum(1),
        "masked_logprobs_R": logq_RV.gather(1, row.target_ids_R[:, None])[:, 0],
        "masked_entropy_R": -(q * logq).sum(1),
        "perception_kl_R": (p * (logp - logq)).sum(1),
    }
    torch.stack([value.mean() for value in values.values()]).sum().backward()
    gradients = {published_name(name): weight.grad for name, weight in model.named_parameters()}
    return {"values": {name: value.detach() for name, value in values.items()}, "gradients": gradients}


def _row_logprobs(model, row, pixels, banned) -> torch.Tensor:
    found, begin = [], 0
    for length in row.segment_lengths:
        ids = row.token_ids_T[begin : begin + length]
        image = bool((ids == model.config.image_token_id).any())
        logits = model(
            input_ids=ids[None],
            pixel_values=pixels if image else None,
            image_grid_thw=row.grid_thw_I3 if image else None,
            position_ids=row.position_ids_3T[:, None, begin : begin + length],
        ).logits[0]
        found.append((logits / 0.8).index_fill(1, banned, -torch.inf).log_softmax(-1))
        begin += length
    return torch.cat(found)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [(1, ()), (2, ("parallel.tensor=2",)), (2, ("parallel.tensor=2", "parallel.sequence=true"))],
)
def test_both_views_of_a_joint_row(world_size, overrides, folder):
    expected = _two_views_by_transformers(folder)
    for rank in run_ranks(_two_views, world_size, folder, *overrides):
        assert rank["values"].keys() == expected["values"].keys()
        for part in ("values", "gradients"):
            for name, tensor in expected[part].items():
                torch.testing.assert_close(
                    rank[part][name], tensor, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
                )
    assert expected["values"]["perception_kl_R"].max() > 0.01  # the views do differ


def _text_only_gradients(folder: Path, *overrides: str) -> dict:
    from megatron_papo.model.policy import HeadRequest

    model, rows = build(folder, *overrides)
    assert rows[1].pixel_values == ()
    model(rows[1], HeadRequest()).policy_logprobs_R.sum().backward()
    return {name: None if p.grad is None else p.grad.abs().max().item() for name, p in model.named_parameters()}


def test_a_row_without_images_reaches_every_weight_of_the_tower_with_gradient_zero(folder):
    table = parameter_table(ModelShape.from_folder(folder))
    for overrides, world_size in (((), 1), (("parallel.tensor=2", "parallel.sequence=true"), 2)):
        for gradients in run_ranks(_text_only_gradients, world_size, folder, *overrides):
            tower = {name: value for name, value in gradients.items() if name.startswith("vision.")}
            assert tower.keys() == {name for name in table if name.startswith("vision.")}
            assert set(tower.values()) == {0.0}
            assert all(value > 0 for name, value in gradients.items() if name.startswith("language."))


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_frozen_parts_get_no_gradient_and_the_others_do(part, folder):
    (gradients,) = run_ranks(_gradients_with_images, 1, folder, f"model.freeze.{part}=true", "model.recompute=full")
    prefixes = {
        "vision": ("vision.patch_embed.", "vision.position_embed.", "vision.decoder."),
        "projector": ("vision.merger.", "vision.deepstack_mergers."),
        "language": ("language.",),
    }[part]
    for name, value in gradients.items():
        assert (value is None) == name.startswith(prefixes), name


def _gradients_with_images(folder: Path, *overrides: str) -> dict:
    from megatron_papo.model.policy import HeadRequest

    model, rows = build(folder, *overrides)
    model(rows[0], HeadRequest()).policy_logprobs_R.sum().backward()
    return {name: None if p.grad is None else p.grad.abs().max().item() for name, p in model.named_parameters()}


def _padding(folder: Path) -> dict[str, tuple[float, float]]:
    """Largest weight and gradient in what pads the vocabulary (275 to 288) and the vision FFN (45 to 48)."""
    from megatron_papo.model.policy import HeadRequest

    model, rows = build(folder, "model.random_init=true")
    model(rows[0], HeadRequest()).policy_logprobs_R.sum().backward()
    mlp = model.vision.decoder.layers[1].mlp

    def pads(tensor: torch.Tensor, name: str) -> torch.Tensor:
        if name == "fc1":
            matrices = 2 if model.shape.vision.mlp == "swiglu" else 1  # of gate and up, or one
            return torch.cat([matrix[45:] for matrix in tensor.chunk(matrices)])
        return tensor[:, 45:] if name == "fc2" else tensor[275:]

    weights = {
        "fc1": mlp.linear_fc1.weight,
        "fc1 bias": mlp.linear_fc1.bias,
        "fc2": mlp.linear_fc2.weight,
        "vocabulary": model.language.embedding.word_embeddings.weight,
    }
    found = {}
    for name, weight in weights.items():
        kind = "fc1" if name == "fc1 bias" else name
        own, gradient = pads(weight, kind), pads(weight.grad, kind)
        assert own.numel() > 0
        found[name] = (own.abs().max().item(), gradient.abs().max().item())
    return found


def test_padding_is_zero_and_stays_zero(folder):
    (found,) = run_ranks(_padding, 1, folder)
    assert found == dict.fromkeys(("fc1", "fc1 bias", "fc2", "vocabulary"), (0.0, 0.0))


def _random_weights(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    from megatron_papo.weights.transfer import hf_tensors

    model, _ = build(folder, "model.random_init=true", "run.seed=3", *overrides)
    return {name: tensor.clone() for name, tensor in hf_tensors(model, model.shape)}


def test_random_weights_do_not_depend_on_the_layout(folder):
    (single,) = run_ranks(_random_weights, 1, folder)
    deviations = [tensor.std().item() for tensor in single.values() if tensor.dim() > 1]
    assert all(0.015 < deviation < 0.025 for deviation in deviations)
    for name, tensor in single.items():
        if tensor.dim() == 1:
            norm = re.search(r"norm\d?\.weight$|ln_q\.weight$", name) is not None
            assert torch.equal(tensor, torch.full_like(tensor, norm)), name
    for world_size, overrides in ((4, ("parallel.tensor=4",)), (4, ("parallel.tensor=2", "parallel.pipeline=2"))):
        for rank in run_ranks(_random_weights, world_size, folder, *overrides):
            assert rank.keys() == single.keys()
            assert all(torch.equal(rank[name], tensor) for name, tensor in single.items())


def _transformer_engine(folder: Path) -> str:
    from megatron_papo.config import ConfigError

    with pytest.raises(ConfigError) as caught:
        build(folder, "model.spec=transformer_engine")
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Transformer Engine may be usable here")
def test_transformer_engine_asked_for_and_absent(folder):
    (message,) = run_ranks(_transformer_engine, 1, folder)
    assert message.startswith("model.spec: transformer_engine needs ")


def _vision_flops(folder: Path, *overrides: str) -> int:
    """Of this rank's matrix products in the tower's forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model, rows = build(folder, *overrides)
    if model.vision is None:  # a later stage
        return 0
    with FlopCounterMode(display=False) as counter:
        model.vision(torch.cat(rows[0].pixel_values), rows[0].grid_thw_I3)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_of_the_first_stage_share_the_tower(family, tmp_path):
    """None encodes an image whole: with sequence parallelism every product is split, without it all but the patch
    embedding, which is 0.2 % of the published towers' work."""
    write_case(Case("one image", ((((8, 12),),),), {"vision_intermediate": 48}, family=family), tmp_path)
    (whole,) = run_ranks(_vision_flops, 1, tmp_path)
    embedding = 2 * 96 * ModelShape.from_folder(tmp_path).vision.patch_dim * 32
    for flops in run_ranks(_vision_flops, 2, tmp_path, "parallel.tensor=2", "parallel.sequence=true"):
        assert flops == whole / 2
    stages = run_ranks(_vision_flops, 4, tmp_path, "parallel.tensor=2", "parallel.pipeline=2")
    assert stages == [(whole - embedding) / 2 + embedding] * 2 + [0, 0]


def _pixels_on_their_way(folder: Path) -> dict[str, Any]:
    """To a GPU that is not there, which says where they are; and as to one, which says what the tower makes of them."""
    from megatron_papo.model.vision_tower import pixels_beside

    found: dict[str, Any] = {}
    with FakeTensorMode():
        weight = torch.zeros(8, 6, dtype=torch.bfloat16, device="cuda")
        patches = [torch.zeros(4, 6), torch.zeros(8, 6)]
        with mock.patch.object(torch, "empty", wraps=torch.empty) as empty:
            moved = pixels_beside(weight, patches)
        found["arrives"] = moved.device.type, moved.dtype, tuple(moved.shape)
        found["pinned"] = [call.kwargs.get("pin_memory") for call in empty.call_args_list]
    model, rows = build(folder, "model.dtype=bfloat16")
    views = (*rows[0].pixel_values, *(pixels * 0.3 for pixels in rows[0].pixel_values))
    grids = rows[0].grid_thw_I3.repeat(2, 1)
    with gpu_optimizers.a_host_beside_it():
        rounded = pixels_beside(model.vision.patch_embed.weight, views)
    found["dtypes"] = rounded.dtype, pixels_beside(model.vision.patch_embed.weight, views).dtype
    with torch.no_grad():
        found["tokens"] = [model.vision(pixels, grids).tokens_MH for pixels in (rounded, torch.cat(views))]
    return found


def test_pixels_go_to_a_gpu_rounded_as_the_tower_rounds_them(folder):
    (found,) = run_ranks(_pixels_on_their_way, 1, folder)
    assert found["arrives"] == ("cuda", torch.bfloat16, (12, 6)) and found["pinned"] == [True]
    assert found["dtypes"] == (torch.bfloat16, torch.float32), "without a GPU they stay as they are"
    assert torch.equal(*found["tokens"]) and found["tokens"][0].abs().max() > 0
