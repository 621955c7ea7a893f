"""Hugging Face's side of a certificate: transformers' own processor and model, on the host of one rank.

Nothing of this package stands between the folder and the numbers but the hooks: chat template, images, token ids,
pixels and positions are transformers' own. transformers also reads the weights from `model.path`, so that our loader is
tested too; where the policy has other weights (random ones, a checkpoint, a resumed run) it is given the trainer's. It
computes in fp32 where the host's memory holds that, else in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_papo.config import DataConfig
from megatron_papo.data.chat_template import chat_template
from megatron_papo.data.conversation import Turns, check_rendered, instructed, turns_of
from megatron_papo.data.images import decode_image
from megatron_papo.data.processor_files import default_template, pixel_bounds, text_tokenizer
from megatron_papo.generation.readings import ActivationRecorder, Precision, Reading
from megatron_papo.generation.reference_model import (
    classes_of_model,
    empty_model,
    expected_shapes,
    read_config,
    shapes_of,
)
from megatron_papo.generation.weight_check import checked
from megatron_papo.model.family import Family
from megatron_papo.model.observed import ANGLES, LANGUAGE_LAYER, LOGPROBS, POSITION_IDS, TOKEN_IDS
from megatron_papo.types import Prompt

_SHARE = 0.8
"""Share of the host's free memory that the model may take."""
_BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}


def precision_that_fits(folder: Path, family: Family) -> Precision | None:
    """The precision in which this host's free memory holds a copy of the model; None when not even bfloat16 fits."""
    num_values = _num_values(folder, family)
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    num_bytes = _SHARE * int(fields["MemAvailable"].removesuffix("kB")) * 1024
    return next((name for name, size in _BYTES.items() if num_values * size <= num_bytes), None)


@cache
def _num_values(folder: Path, family: Family) -> int:
    """Parameters of the model; its folder does not change while a run lasts."""
    shapes = expected_shapes(read_config(folder, family))
    return sum(prod(shape) for shape in shapes.values())


def model_of(folder: Path, family: Family, precision: Precision, named_tensors: Iterator[tuple[str, Tensor]]) -> Any:
    """The model of the folder's config.json with the given weights, under the names of transformers' modules."""
    model = empty_model(read_config(folder, family), getattr(torch, precision), torch.device("cpu"))
    parameters = dict(model.named_parameters())
    for name, tensor in checked(named_tensors, shapes_of(model)):
        parameters[name].copy_(tensor)
    return model


class HuggingFace:
    """A model and a processor of transformers, which read prompts as a user of transformers would."""

    def __init__(self, model: Any, folder: Path, data: DataConfig, banned_ids: tuple[int, ...]):
        from transformers import AutoProcessor

        self._model, self._data, self._banned_ids = model, data, list(banned_ids)
        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        template = default_template(self._processor, folder)
        self._processor.tokenizer = text_tokenizer(self._processor.tokenizer, template)
        self._processor.chat_template = self._processor.tokenizer.chat_template = template
        bounds = pixel_bounds(self._processor.image_processor, folder, data)
        self._processor.image_processor.size = dict(zip(("shortest_edge", "longest_edge"), bounds))

    @torch.inference_mode()
    def read(self, prompt: Prompt, response_ids: tuple[int, ...]) -> Reading:
        """Reads the prompt with the response to it in one pass, without a cache."""
        # transformers has no one way to open a picture that is transparent or has 16 bits
        images = [decode_image(data) for data in prompt.images]
        batch = self._processor(
            text=[self._render(prompt.problem, prompt.system)],
            images=images or None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        ids_1T = torch.cat((batch["input_ids"], torch.tensor([response_ids])), dim=1)
        grid = batch.get("image_grid_thw")
        classes = classes_of_model(self._model)
        positions_31T = classes.position_ids(self._model, ids_1T, grid)
        with ActivationRecorder() as recorder:
            recorder.observe(classes.observed(self._model), prompt, len(response_ids))
            logits_1TV = classes.forward(
                self._model,
                ids_1T,
                positions_31T,
                pixel_values_PD=batch.get("pixel_values"),
                grid_thw_I3=grid,
                num_logits=len(response_ids) + 1,
            )
        return Reading(_without_last(recorder.parts()) | {LOGPROBS: self._logprobs(logits_1TV[0, :-1], response_ids)})

    def _logprobs(self, logits_RV: Tensor, response_ids: tuple[int, ...]) -> Tensor:
        logprobs_RV = logits_RV.float().index_fill(1, torch.tensor(self._banned_ids), -torch.inf).log_softmax(-1)
        return logprobs_RV.gather(1, torch.tensor(response_ids)[:, None])[:, 0]

    def _render(self, problem: str, system: str | None = None) -> str:
        """The prompt's text, rendered from structured content, else from plain text where a template knows no other."""
        question, system = instructed(problem, self._data.instruction), system or self._data.system
        turns = turns_of(question, system, "parts")
        try:
            text = self._apply_template(turns)
            check_rendered(text, question, system)
        except Exception:  # whatever a template does with content that it does not know
            text = ""
        if text and str(turns[-1]["content"]) not in text:  # as a list that is written out
            return text
        return self._apply_template(turns_of(question, system, "text"))

    def _apply_template(self, turns: Turns) -> str:
        tokens = self._processor.tokenizer.special_tokens_map  # may transformers render it, in this process?
        chat_template(self._processor.chat_template).render(turns, add_generation_prompt=True, **tokens)
        return self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _without_last(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cuts off the last token, which predicts nothing: the other parties do not compute it."""
    with_last = (TOKEN_IDS, POSITION_IDS, ANGLES, LANGUAGE_LAYER)
    return {name: values[:-1] if name.startswith(with_last) else values for name, values in parts.items()}
