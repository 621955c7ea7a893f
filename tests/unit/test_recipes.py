"""The recipes under examples/ hold what paper and reference code of PAPO (arXiv 2507.06448) set, value by value."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_papo.config import Config, load_config

EXAMPLES = Path(__file__).parents[2] / "examples"

# The paper's settings of each method: gamma (perception_coef), eta 1 = eta 2 (entropy_coef, masked_entropy_coef),
# beta (reference_coef), and the upper clip: 0.3 with GRPO, 0.28 with DAPO.
GRPO, DAPO = (0.0, 0.0, 0.01, 0.3), (0.0, 0.0, 0.0, 0.28)
PAPO_G_3B, PAPO_G_7B = (0.02, 0.0, 0.01, 0.3), (0.02, 0.05, 0.01, 0.3)
PAPO_G_NO_REF, PAPO_D = (0.01, 0.03, 0.0, 0.3), (0.01, 0.03, 0.0, 0.28)
RECIPES = {
    "grpo_3b": GRPO,
    "grpo_7b": GRPO,
    "dapo_3b": DAPO,
    "dapo_7b": DAPO,
    "papo_g_3b": PAPO_G_3B,
    "papo_g_7b": PAPO_G_7B,
    "papo_g_no_ref_3b": PAPO_G_NO_REF,
    "papo_g_no_ref_7b": PAPO_G_NO_REF,
    "papo_d_3b": PAPO_D,
    "papo_d_7b": PAPO_D,
    # no runs of the paper: its settings for 7B
    "papo_g_7b_ahead": PAPO_G_7B,
    "papo_g_7b_fp8": PAPO_G_7B,
    "papo_g_72b": PAPO_G_7B,
    "papo_g_qwen3_vl_8b": PAPO_G_7B,
    "papo_g_qwen3_vl_32b": PAPO_G_7B,
    "papo_g_qwen3_vl_4b": PAPO_G_3B,  # those for 3B
}
MODELS = {
    "qwen3_vl_4b": "Qwen3-VL-4B",
    "qwen3_vl_8b": "Qwen3-VL-8B",
    "qwen3_vl_32b": "Qwen3-VL-32B",
    "3b": "Qwen2.5-VL-3B",
    "7b": "Qwen2.5-VL-7B",
    "72b": "Qwen2.5-VL-72B",
}
INSTRUCTION = (
    "You first think through the reasoning process as an internal monologue, enclosed within <think> </think> tags. "
    "Then, provide your final answer enclosed within \\boxed{}."
)


@pytest.fixture(params=RECIPES)
def recipe(request) -> tuple[str, Config]:
    return request.param, load_config(EXAMPLES / f"{request.param}.yaml")


def test_every_recipe_is_compared():
    assert RECIPES.keys() == {path.stem for path in EXAMPLES.glob("*.yaml") if not path.stem.startswith("_")}


def test_the_objective_is_the_papers(recipe):
    name, config = recipe
    loss, perception = config.loss, config.perception
    assert loss.entropy_coef == loss.masked_entropy_coef
    assert (loss.perception_coef, loss.entropy_coef, loss.reference_coef, loss.clip_high) == RECIPES[name]
    assert (loss.clip_low, loss.dual_clip, loss.averaging) == (0.2, 3.0, "token")
    cell = None if "qwen3_vl" in name else 14  # a patch of the model's own
    assert (perception.mask.ratio, perception.mask.cell, perception.mask.kind) == (0.6, cell, "cells")
    assert (perception.masked_branch, perception.kl, perception.coef_end) == ("frozen", "k3", None)


def test_batches_and_rollouts_are_the_papers(recipe):
    name, config = recipe
    train, generation, optim, dynamic = config.train, config.generation, config.optim, config.train.dynamic_sampling
    assert (train.prompts_per_step, train.group_size, train.updates_per_step, train.steps) == (384, 5, 3, 202)
    assert dynamic.enabled == ("_d_" in name or name.startswith("dapo"))
    assert (dynamic.low, dynamic.high, dynamic.max_rounds) == (0.01, 0.99, 20)
    assert (dynamic.prompts_per_round, dynamic.when_none_kept) == (128, "keep")  # the reference code
    assert train.prompts_per_round == (128 if dynamic.enabled else 384)
    assert (generation.temperature, generation.top_p, generation.max_response_tokens) == (1.0, 0.99, 2048)
    assert (optim.lr, optim.schedule, optim.weight_decay, optim.clip_grad) == (1e-6, "constant", 0.01, 1.0)
    assert (optim.beta1, optim.beta2, optim.warmup_steps) == (0.9, 0.999, 0)


def test_prompts_rewards_and_validation_are_the_papers(recipe):
    name, config = recipe
    data, reward = config.data, config.reward
    assert (data.preset, data.instruction, data.system) == ("virl39k", INSTRUCTION, None)
    assert (data.min_pixels, data.max_pixels, data.max_prompt_tokens) == (200_704, 1_003_520, 4096)
    assert (reward.accuracy_weight, reward.format_weight) == (0.9, 0.1)
    assert (config.train.eval_at_start, config.train.eval_every) == (True, 5)
    assert data.eval and (config.eval.limit, config.eval.samples) == (2000, 1), "an evaluation costs 2,000 answers"
    assert config.checkpoint.keep_best, "the best of the evaluations"
    assert (config.eval.temperature, config.eval.top_p, config.eval.top_k) == (1.0, 1.0, 50)
    assert config.run.name == name and str(config.run.dir) == f"runs/{name}"
    model = next(model for part, model in MODELS.items() if f"_{part}" in name)
    assert str(config.model.path) == f"{model}-Instruct"
