"""Prompts, settings and the independent reference that the tests of both engines share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from megatron_papo.config import Config
from megatron_papo.data.processor import Processor, load_processor
from megatron_papo.generation import Sampling
from megatron_papo.types import Group, Prompt
from tests.support.inputs import FOR_VLLM
from tests.support.tiny import make_tiny_folder

BANNED = tuple(range(259, 272))
"""The four vision tokens, and the padding of the vocabulary that no tokenizer writes."""
EOS = 258
TOLERANCE = 1e-4


def make_folder(path: Path, *, family: str = "qwen2_5_vl", tie: bool = False) -> Path:
    """A model that vLLM loads too, whose logits are wide enough that top-k and top-p cut something."""
    return make_tiny_folder(path, family=family, tie=tie, **FOR_VLLM)


def read_model(folder: Path) -> Any:
    """transformers' own model of the folder, in fp32."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def make_config(folder: Path, **generation: Any) -> Config:
    values = {"max_response_tokens": 12} | generation
    return Config.model_validate(
        {
            "model": {"path": folder, "dtype": "float32"},
            "data": {"min_pixels": 784, "max_pixels": 12544, "max_prompt_tokens": 200, "instruction": ""},
            "generation": values,
        }
    )


def make_sampling(**changes: Any) -> Sampling:
    values = {
        "group_size": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_response_tokens": 12, "seed": 5
    }  # fmt: skip
    return Sampling(**(values | changes))


def make_prompts(config: Config) -> tuple[Processor, list[Prompt]]:
    """One picture, none, three of odd sizes, one of another length, and one longer than a block of vLLM's prefix cache;
    each picture with a masked view."""
    assert config.model.path is not None
    processor, random = load_processor(config.model.path, config.data), np.random.default_rng(0)

    def pictures(number: int) -> list[Image.Image]:
        edges = random.integers(20, 150, (number, 2))
        return [Image.fromarray(random.integers(0, 255, (*edge, 3), dtype=np.uint8)) for edge in edges]

    prompts = []
    cases = [("how many?", 1), ("hi", 0), ("compare these", 3), ("what is this now?", 1), ("and so on " * 11, 1)]
    for row, (text, number) in enumerate(cases):
        images = pictures(number)
        inputs = processor.encode("<image>" * number + text, images)
        prompt = Prompt(f"row-{row}", row, text, "", (), inputs, visit=3)
        if images:
            spoiled = [Image.new("RGB", image.size, (20 * row, 0, 90)) for image in images]
            prompt = replace(prompt, masked_pixel_values_PD=processor.pixel_values(spoiled)[0])
        prompts.append(prompt)
    return processor, prompts


def full_forward_logprobs(model: Any, prompt: Prompt, response: tuple[int, ...], sampling: Sampling) -> Tensor:
    """Log-probs of the response in one forward pass without a cache, the distribution processed in plain NumPy."""
    inputs = prompt.inputs
    ids = torch.cat((inputs.token_ids_S, torch.tensor(response)))[None]
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=prompt.masked_pixel_values_PD if sampling.masked else inputs.pixel_values_PD,
            image_grid_thw=inputs.grid_thw_I3,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
        ).logits[0, inputs.token_ids_S.numel() - 1 : -1]
    return torch.stack([_processed(row, sampling)[token] for row, token in zip(logits, response)])


def _processed(logits_V: Tensor, sampling: Sampling) -> Tensor:
    values = logits_V.double().numpy() / (sampling.temperature or 1.0)
    values[list(BANNED)] = -np.inf
    order = np.argsort(-values)
    if sampling.temperature and sampling.top_k:
        values[order[sampling.top_k :]] = -np.inf
    probabilities = np.exp(values - values.max())
    probabilities /= probabilities.sum()
    if sampling.temperature and sampling.top_p < 1:
        reached = np.cumsum(probabilities[order])
        probabilities[order[np.searchsorted(reached, sampling.top_p) + 1 :]] = 0
        probabilities /= probabilities.sum()
    with np.errstate(divide="ignore"):
        return torch.tensor(np.log(probabilities))


def largest_gap(model: Any, groups: list[Group], sampling: Sampling) -> float:
    """Between the engine's log-probs and the full forward's, over every token of every rollout."""
    gaps = [
        (full_forward_logprobs(model, group.prompt, rollout.response_ids, sampling)
         - torch.tensor(rollout.rollout_logprobs, dtype=torch.float64)).abs().max()
        for group in groups
        for rollout in group.rollouts
    ]  # fmt: skip
    return torch.stack(gaps).max().item()


def tokens(groups: list[Group]) -> list[list[tuple[int, ...]]]:
    return [[rollout.response_ids for rollout in group.rollouts] for group in groups]


def named_tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]
