"""The transformers engine against full forward passes of the same model, in several layouts, batches and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_papo.config import ParallelConfig
from megatron_papo.distributed.accelerator import adapt_megatron
from megatron_papo.distributed.layout import initialize, shutdown
from megatron_papo.generation import build_generator
from megatron_papo.generation.engine_images import pictures
from tests.parallel.generation_cases import (
    BANNED,
    EOS,
    TOLERANCE,
    largest_gap,
    make_config,
    make_folder,
    make_prompts,
    make_sampling,
    named_tensors,
    read_model,
    tokens,
)
from tests.support.ranks import run_ranks

SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6, "temperature": 0.8},
    "both": {"top_k": 20, "top_p": 0.9},
    "masked": {"masked": True},
    "twice": {},
    "other_seed": {"seed": 6},
}
SECOND_SETTINGS = {name: SETTINGS[name] for name in ("plain", "top_p", "masked")}
"""What the second family is asked: settings cut the distribution of any model alike."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return read_model(folder)


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Any]:
    """What one rank generates in each of the settings."""
    return run_ranks(_generate, 1, folder, {}, SETTINGS)[0]


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> tuple[Any, dict[str, Any]]:
    """A model of the second family, and what one rank generates with it, all prompts together and one by one."""
    folder = make_folder(tmp_path_factory.mktemp("second") / "model", family="qwen3_vl")
    together, by_one = run_ranks(_generate_in_batches, 1, folder)[0]
    return read_model(folder), together | {"one by one": by_one}


def _generate_in_batches(folder: Path) -> list[dict[str, Any]]:
    return [_generate(folder, {}, SECOND_SETTINGS, (64,)), _generate(folder, {}, {"plain": {}}, (1,))["plain"]]


def _generator(folder: Path, parallel: dict[str, int], **generation: Any):
    adapt_megatron()
    layout = initialize(ParallelConfig(**parallel))
    config = make_config(folder, **generation)
    processor, prompts = make_prompts(config)
    return build_generator(config, processor, layout), prompts, layout, processor


def _generate(folder: Path, parallel: dict[str, int], settings: dict[str, dict], batch_sizes=(64,)) -> dict[str, Any]:
    """Groups by setting; with several data-parallel ranks, this rank's share of the prompts."""
    generator, prompts, layout, _ = _generator(folder, parallel)
    model = read_model(folder)
    generator.load_weights(iter(named_tensors(model)), policy_version=7)
    mine = prompts[layout.data_rank :: layout.data_size]
    twice = [replace(prompt, visit=visit) for prompt in mine for visit in (3, 4)]
    found = {}
    for batch_size in batch_sizes:
        generator.batch_size = batch_size
        found |= {
            name if len(batch_sizes) == 1 else batch_size: generator.generate(
                twice if name == "twice" else mine, make_sampling(**changes)
            )
            for name, changes in settings.items()
        }
    generator.close()
    shutdown()
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_logprobs_are_those_of_a_full_forward_pass(setting, alone, model):
    assert largest_gap(model, alone[setting], make_sampling(**SETTINGS[setting])) < TOLERANCE


@pytest.mark.parametrize("setting", SECOND_SETTINGS)
def test_logprobs_of_the_second_family_are_those_of_a_full_forward_pass(setting, second):
    model, found = second
    assert largest_gap(model, found[setting], make_sampling(**SECOND_SETTINGS[setting])) < TOLERANCE
    assert tokens(found["one by one"]) == tokens(found["plain"]), "neither padding nor the batch matters"


def test_top_k_and_top_p_cut_the_distribution(alone):
    """Otherwise the comparison above would say nothing of them."""
    entire, cut = (_mean_logprob(alone[name]) for name in ("plain", "top_k"))
    assert cut > entire + 0.5
    assert _mean_logprob(alone["top_p"]) > entire + 0.5


def test_greedy_takes_the_likeliest_token_and_every_rollout_is_alike(alone, model):
    for group in alone["greedy"]:
        assert len({rollout.response_ids for rollout in group.rollouts}) == 1
        inputs, response = group.prompt.inputs, torch.tensor(group.rollouts[0].response_ids)
        ids = torch.cat((inputs.token_ids_S, response))[None]
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs.pixel_values_PD, image_grid_thw=inputs.grid_thw_I3,
                           mm_token_type_ids=(ids == model.config.image_token_id).int()).logits[0]  # fmt: skip
        logits[:, list(BANNED)] = -torch.inf
        assert torch.equal(logits[inputs.token_ids_S.numel() - 1 : -1].argmax(-1), response)


def test_rollouts_differ_in_a_group_between_visits_and_between_seeds(alone):
    for group in alone["plain"]:
        assert len({rollout.response_ids for rollout in group.rollouts}) == 4
    first, later = tokens(alone["twice"])[::2], tokens(alone["twice"])[1::2]
    assert first == tokens(alone["plain"]), "the same prompt again in the batch changes nothing"
    drawn = [{ids for group in groups for ids in group} for groups in (first, later, tokens(alone["other_seed"]))]
    assert not drawn[0] & drawn[1] and not drawn[0] & drawn[2] and not drawn[1] & drawn[2]


def test_groups_hold_what_the_types_say(alone):
    for group in alone["plain"]:
        assert [rollout.index for rollout in group.rollouts] == [0, 1, 2, 3]
        assert {rollout.policy_version for rollout in group.rollouts} == {7}
        for rollout in group.rollouts:
            assert len(rollout.response_ids) == len(rollout.rollout_logprobs) <= 12
            text = bytes(_BYTES[i] for i in rollout.response_ids if i < 256).decode("utf-8", errors="replace")
            assert rollout.text == text


def test_a_response_ends_with_the_end_of_turn_or_at_the_limit(folder):
    groups, whole = run_ranks(_many, 1, folder)[0]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    cut = [rollout for rollout in rollouts if rollout.finish_reason == "length"]
    assert len(stopped) + len(cut) == len(rollouts) and stopped and cut
    assert all(rollout.response_ids.index(EOS) == len(rollout.response_ids) - 1 for rollout in stopped)
    assert all(EOS not in rollout.response_ids and len(rollout.response_ids) == 60 for rollout in cut)
    for short, full in zip(groups[0].rollouts, whole[0].rollouts):  # generation.ignore_eos
        assert (len(full.response_ids), full.finish_reason) == (60, "length")
        assert full.response_ids[: len(short.response_ids)] == short.response_ids
    seen = {token for rollout in rollouts for token in rollout.response_ids}
    assert not seen & set(BANNED) and len(seen) > 230  # of 259


def _many(folder: Path):
    generator, prompts, _, _ = _generator(folder, {})
    model = read_model(folder)
    generator.load_weights(iter(named_tensors(model)), policy_version=0)
    sampling = make_sampling(group_size=24, temperature=4.0, max_response_tokens=60)
    return generator.generate(prompts, sampling), generator.generate(prompts[:1], replace(sampling, ignore_eos=True))


def test_a_rollout_does_not_depend_on_its_batch(folder, alone):
    found = run_ranks(_generate, 1, folder, {}, {"plain": {}}, (1, 3, 7))[0]
    for batch_size in (1, 3, 7):
        assert tokens(found[batch_size]) == tokens(alone["plain"])


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}])
def test_a_model_parallel_group_gives_the_same_rollouts_on_every_rank(folder, alone, parallel):
    for found in run_ranks(_generate, 2, folder, parallel, {"plain": {}, "masked": {"masked": True}}):
        for name in ("plain", "masked"):
            assert tokens(found[name]) == tokens(alone[name])


def test_data_parallel_ranks_answer_their_own_prompts(folder, alone):
    first, second = run_ranks(_generate, 2, folder, {}, {"plain": {}})
    assert tokens(first["plain"]) == tokens(alone["plain"])[0::2]
    assert tokens(second["plain"]) == tokens(alone["plain"])[1::2]


def test_a_tied_head_is_the_embedding(tmp_path):
    folder = make_folder(tmp_path / "tied", tie=True)
    (found,) = run_ranks(_generate, 1, folder, {}, {"plain": {}})
    model = read_model(folder)
    assert largest_gap(model, found["plain"], make_sampling()) < TOLERANCE


def test_masked_rollouts_see_the_masked_pictures(alone):
    plain, masked = tokens(alone["plain"]), tokens(alone["masked"])
    assert plain[1] == masked[1]  # no picture
    assert all(plain[place] != masked[place] for place in (0, 2, 3, 4))


def test_misuse_is_refused_by_name(folder):
    assert run_ranks(_misuse, 1, folder) == [
        {
            "no weights": "RuntimeError: generate before the first load_weights: the generator has no weights",
            "missing": "ValueError: weights handed to the generator: model.language_model.norm.weight: missing",
            "after a failed hand-over": "RuntimeError: generate before the first load_weights: "
            "the generator has no weights",
            "no masked view": "ValueError: prompt row-0: masked rollouts asked for, and it has no masked view",
        }
    ]


def _misuse(folder: Path) -> dict[str, str]:
    generator, prompts, _, _ = _generator(folder, {})
    weights = named_tensors(read_model(folder))
    lacking = [(name, tensor) for name, tensor in weights if name != "model.language_model.norm.weight"]
    steps = {
        "no weights": lambda: generator.generate(prompts, make_sampling()),
        "missing": lambda: generator.load_weights(iter(lacking), 0),
        "after a failed hand-over": lambda: generator.generate(prompts, make_sampling()),
        "all is well": lambda: generator.load_weights(iter(weights), 0),
        "no masked view": lambda: generator.generate(
            [replace(prompts[0], masked_pixel_values_PD=None)], make_sampling(masked=True)
        ),
    }
    found = {}
    for name, step in steps.items():
        try:
            step()
        except (RuntimeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_pictures_from_processed_pixels_are_processed_to_the_same_pixels(folder):
    processor, prompts = make_prompts(make_config(folder))
    for prompt in prompts:
        for pixels in (prompt.inputs.pixel_values_PD, prompt.masked_pixel_values_PD):
            if pixels is not None:
                again, grid = processor.pixel_values(
                    pictures(pixels, prompt.inputs.grid_thw_I3, processor.image_processor)
                )
                assert torch.equal(grid, prompt.inputs.grid_thw_I3) and torch.equal(again, pixels)
    with pytest.raises(ValueError, match="256 levels"):
        pictures(prompts[0].inputs.pixel_values_PD + 0.01, prompts[0].inputs.grid_thw_I3, processor.image_processor)


def _mean_logprob(groups) -> float:
    return sum(sum(r.rollout_logprobs) for g in groups for r in g.rollouts) / sum(
        len(r.response_ids) for g in groups for r in g.rollouts
    )


def _bytes_of_ids() -> list[int]:
    from tokenizers import pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    value_of = {letter: value for value, letter in bytes_to_unicode().items()}
    return [value_of[letter] for letter in sorted(pre_tokenizers.ByteLevel.alphabet())]


_BYTES = _bytes_of_ids()
