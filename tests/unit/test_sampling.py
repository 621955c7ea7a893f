"""The draw itself: seeds, the processed distribution on a vocabulary small enough to do by hand, hand-over."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.reference_model import expected_shapes
from megatron_papo.generation.requests import make_requests
from megatron_papo.generation.sampling import draw, rollout_seed, sampled_logprobs, uniforms
from megatron_papo.generation.vllm.start import check_bans, remove_leftovers
from megatron_papo.generation.vllm.vllm_requests import compact_ids
from megatron_papo.generation.weight_check import checked
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import ModelInputs, Prompt
from tests.support.tiny import tiny_config

NONE = torch.tensor([], dtype=torch.int64)
PROBABILITIES = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])


def sampling(**changes) -> Sampling:
    values = {
        "group_size": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_response_tokens": 8, "seed": 0
    }  # fmt: skip
    return Sampling(**(values | changes))


def probabilities(banned=NONE, logits=None, **changes) -> list[float]:
    logits = PROBABILITIES.log() if logits is None else logits
    return sampled_logprobs(logits, sampling(**changes), banned).exp()[0].tolist()


def test_seeds_are_fixed_and_distinct():
    assert rollout_seed(0, 0, "a", 0) == 8_620_633_999_387_762_751  # resumed runs and other machines draw alike
    seeds = {rollout_seed(s, v, p, i) for s in range(3) for v in range(3) for p in ("1", "11", "a") for i in range(8)}
    assert len(seeds) == 3 * 3 * 3 * 8
    assert rollout_seed(1, 2, "3", 4) != rollout_seed(1, 23, "", 4)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_prompt_that_comes_twice_in_a_call_has_seeds_of_its_own_each_time():
    first = Prompt("train:7", 7, "", "", (), ModelInputs(torch.tensor([1]), None, None), visit=30)
    jobs = make_requests([first, replace(first, visit=37), first], sampling(group_size=16))
    seeds = [{job.seed for job in jobs if job.prompt_index == place} for place in range(3)]
    assert len(seeds[0] | seeds[1]) == 32 and seeds[0] == seeds[2]


def test_uniforms_belong_to_the_row():
    rows = uniforms([7, 8, 7], 50)
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(uniforms([8], 50)[0], rows[1])
    assert rows.dtype == torch.float64 and rows.min() >= 0 and rows.max() < 1


def test_temperature_divides_the_logits():
    expected = (PROBABILITIES**2 / (PROBABILITIES**2).sum())[0].tolist()
    assert probabilities(temperature=0.5) == pytest.approx(expected, abs=1e-6)


def test_top_k_keeps_the_likeliest_and_renormalises():
    assert probabilities(top_k=2) == pytest.approx([0, 0.4 / 0.7, 0, 0.3 / 0.7, 0], abs=1e-6)
    assert probabilities(top_k=9) == pytest.approx(PROBABILITIES[0].tolist(), abs=1e-6)


def test_top_k_keeps_ties_of_the_last():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    kept = probabilities(logits=logits, top_k=2)
    assert kept[3] == 0 and kept[0] == kept[2] > 0


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (0.9, [0, 1, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    total = sum(PROBABILITIES[0, token].item() for token in kept)
    expected = [PROBABILITIES[0, token].item() / total if token in kept else 0.0 for token in range(5)]
    assert probabilities(top_p=top_p) == pytest.approx(expected, abs=1e-6)


def test_top_p_follows_top_k():
    # of {1: 4/7, 3: 3/7}, 0.55 is reached by the first alone; of the whole vocabulary it would take both
    assert probabilities(top_k=2, top_p=0.55) == pytest.approx([0, 1, 0, 0, 0], abs=1e-6)


def test_bans_come_before_everything():
    banned = torch.tensor([1, 2])
    assert probabilities(banned=banned, top_k=1) == pytest.approx([0, 0, 0, 1, 0], abs=1e-6)
    greedy = sampled_logprobs(PROBABILITIES.log(), sampling(temperature=0, top_k=1, top_p=0.1), banned)
    assert greedy.exp()[0].tolist() == pytest.approx([0.1 / 0.55, 0, 0, 0.3 / 0.55, 0.15 / 0.55], abs=1e-6)
    ids, logprobs = draw(greedy, torch.zeros(1, dtype=torch.float64), sampling(temperature=0))
    assert ids.tolist() == [3] and logprobs.exp().item() == pytest.approx(0.3 / 0.55, abs=1e-6)


def test_draws_follow_the_distribution():
    settings = sampling(top_k=4, top_p=0.8, temperature=1.3)
    num_draws = 40_000
    logprobs = sampled_logprobs(PROBABILITIES.log(), settings, NONE).expand(num_draws, -1)
    ids, drawn_logprobs = draw(logprobs, uniforms([3], num_draws)[0], settings)
    expected = logprobs[0].exp()
    assert torch.equal(drawn_logprobs, logprobs[0][ids])
    counts = torch.bincount(ids, minlength=5)
    assert (counts[expected == 0] == 0).all() and (expected == 0).sum() == 2
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    assert ((counts / num_draws - expected).abs() <= 4 * deviation).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_extreme_draws_stay_in_the_support(uniform):
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 2.0, float("-inf")]]).log_softmax(-1)
    ids, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), sampling())
    assert ids.item() == (1 if uniform == 0 else 3)


def test_settings_out_of_range_are_refused():
    for changes in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"group_size": 0}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            sampling(**changes)


def test_compact_prompt_keeps_one_token_a_picture_even_where_runs_touch():
    shape = ModelShape.from_dict(tiny_config().to_dict())
    image, ids = shape.image_token_id, [5, *[shape.image_token_id] * 6, 7, 7]
    grids = torch.tensor([[1, 4, 4], [1, 2, 4]])  # 4 and 2 tokens, next to each other
    assert compact_ids(torch.tensor(ids), grids, shape) == [5, image, image, 7, 7]
    assert compact_ids(torch.tensor([5, 7]), None, shape) == [5, 7]


def test_hand_over_names_every_fault_after_the_last_tensor():
    expected = expected_shapes(tiny_config(tie=True))
    assert "lm_head.weight" not in expected
    whole = [(name, torch.empty(shape, device="meta")) for name, shape in expected.items()]
    assert [name for name, _ in checked(iter(whole), expected)] == list(expected)

    drawn = []
    norm, published = "model.language_model.norm.weight", "model.norm.weight"
    broken = [(norm, torch.empty(3)), (published, torch.empty(64)), *whole[2:], whole[2]]
    with pytest.raises(ValueError) as caught:
        list(checked((drawn.append(pair) or pair for pair in broken), expected))
    assert len(drawn) == len(broken)
    for fault in (f"{norm}: is (3,), expected (64,)", f"{published}: unknown",
                  f"{whole[2][0]}: handed over twice", f"{next(iter(expected))}: missing"):  # fmt: skip
        assert fault in str(caught.value)


def test_leftover_shared_memory_of_dead_engines_alone_is_removed():
    import os
    import subprocess

    dead = subprocess.Popen(["true"])
    dead.wait()
    left, live, other = (
        Path("/dev/shm") / name
        for name in (f"megatron_papo_{dead.pid}_x_0", f"megatron_papo_{os.getpid()}_x_0", f"another_{dead.pid}_x_0")
    )
    try:
        for file in (left, live, other):
            file.touch()
        remove_leftovers()
        assert [file.exists() for file in (left, live, other)] == [False, True, True]
    finally:
        for file in (left, live, other):
            file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("on_gpu", "runner_v2", "num_banned", "refused"),
    [(True, True, 1024, False), (True, True, 1025, True), (True, False, 1025, False), (False, True, 1025, False)],
)
def test_more_banned_ids_than_the_engine_takes_are_refused(monkeypatch, on_gpu, runner_v2, num_banned, refused):
    monkeypatch.setattr("megatron_papo.distributed.accelerator.has_gpu", lambda: on_gpu)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=runner_v2)))
    if not refused:
        return check_bans(num_banned, llm)
    with pytest.raises(ValueError, match=r"1025 ids .* takes 1024, .* VLLM_USE_V2_MODEL_RUNNER=0"):
        check_bans(num_banned, llm)
