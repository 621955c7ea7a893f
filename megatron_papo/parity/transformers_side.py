"""Hugging Face's side of a certificate: transformers' own processor and model, on the host of one rank.

Nothing of this package is between the folder and the numbers but the hooks: chat template, images, token ids, pixels
and positions are transformers' own. Its weights are read by transformers from `model.path`, so that our loader is
tested too; where the policy is not what lies there (random weights, a checkpoint, a resumed run) the
trainer's. fp32 where the host's memory holds that, else bfloat16.
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
from megatron_papo.data.processor_files import default_template, pixel_bounds
from megatron_papo.generation.weight_check import checked, expected_shapes, read_config
from megatron_papo.parity.inspection import tape_transformers
from megatron_papo.parity.reading import ANGLES, LANGUAGE_LAYER, LOGPROBS, POSITION_IDS, TOKEN_IDS, Precision, Reading
from megatron_papo.types import Prompt

_SHARE = 0.8
"""Of the host's free memory that the model may take."""
_BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}


def precision_that_fits(folder: Path) -> Precision | None:
    """Of a copy of the model in this host's free memory; None when not even bfloat16 fits."""
    num_values = _num_values(folder)
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    room = _SHARE * int(fields["MemAvailable"].removesuffix("kB")) * 1024
    return next((name for name, size in _BYTES.items() if num_values * size <= room), None)


@cache
def _num_values(folder: Path) -> int:
    """Of the model, which stays as it is while a run lasts."""
    shapes = expected_shapes(read_config(folder))
    return sum(prod(shape) for shape in shapes.values())


def read_model(folder: Path, precision: Precision) -> Any:
    """The model of the folder, as transformers reads it."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, config=read_config(folder), dtype=getattr(torch, precision), attn_implementation="sdpa",
        local_files_only=True, trust_remote_code=False, use_safetensors=True,
    )  # fmt: skip
    if shown:
        logging.enable_progress_bar()
    return model.eval().requires_grad_(False)


def model_of(folder: Path, precision: Precision, named_tensors: Iterator[tuple[str, Tensor]]) -> Any:
    """The shape of the folder with the given weights, under the names of transformers' modules."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    config = read_config(folder)
    config.dtype = getattr(torch, precision)
    with no_init_weights():
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    model.tie_weights()
    model.eval().requires_grad_(False)
    wanted = dict(model.named_parameters())
    for name, tensor in checked(named_tensors, {name: tuple(values.shape) for name, values in wanted.items()}):
        wanted[name].copy_(tensor)
    return model


class HuggingFace:
    """Reads prompts as a user of transformers would."""

    def __init__(self, model: Any, folder: Path, data: DataConfig, banned_ids: tuple[int, ...]):
        from transformers import AutoProcessor

        self._model, self._data, self._banned_ids = model, data, list(banned_ids)
        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self._processor.chat_template = self._processor.tokenizer.chat_template = default_template(
            self._processor, folder
        )
        bounds = pixel_bounds(self._processor.image_processor, folder, data)
        self._processor.image_processor.size = dict(zip(("shortest_edge", "longest_edge"), bounds))

    @torch.inference_mode()
    def read(self, prompt: Prompt, response_ids: tuple[int, ...]) -> Reading:
        """The whole sequence in one pass, without a cache."""
        # transformers has no one way to open a picture that is transparent or has 16 bits
        images = [decode_image(data) for data in prompt.images]
        batch = self._processor(
            text=[self._render(prompt.problem)], images=images or None, return_tensors="pt", add_special_tokens=False
        )
        ids_1T = torch.cat((batch["input_ids"], torch.tensor([response_ids])), dim=1)
        grid = batch.get("image_grid_thw")
        types_1T = (ids_1T == self._model.config.image_token_id).int()
        positions, _ = self._model.model.get_rope_index(ids_1T, mm_token_type_ids=types_1T, image_grid_thw=grid)
        with tape_transformers(self._model, prompt, len(response_ids)) as recorder:
            logits_1TV = self._model(
                input_ids=ids_1T,
                position_ids=positions,
                pixel_values=batch.get("pixel_values"),
                image_grid_thw=grid,
                use_cache=False,
                logits_to_keep=len(response_ids) + 1,
            ).logits
        return Reading(_without_last(recorder.parts()) | {LOGPROBS: self._logprobs(logits_1TV[0, :-1], response_ids)})

    def _logprobs(self, logits_RV: Tensor, response_ids: tuple[int, ...]) -> Tensor:
        logprobs_RV = logits_RV.float().index_fill(1, torch.tensor(self._banned_ids), -torch.inf).log_softmax(-1)
        return logprobs_RV.gather(1, torch.tensor(response_ids)[:, None])[:, 0]

    def _render(self, problem: str) -> str:
        """The prompt with structured content; written out for a template that knows text alone."""
        question = instructed(problem, self._data.instruction)
        turns = turns_of(question, self._data.system, "parts")
        try:
            text = self._apply_template(turns)
            check_rendered(text, question, self._data.system)
        except Exception:  # whatever a template does with content that it does not know
            text = ""
        if text and str(turns[-1]["content"]) not in text:  # as a list that is written out
            return text
        return self._apply_template(turns_of(question, self._data.system, "text"))

    def _apply_template(self, turns: Turns) -> str:
        tokens = self._processor.tokenizer.special_tokens_map  # may transformers render it, in this process?
        chat_template(self._processor.chat_template).render(turns, add_generation_prompt=True, **tokens)
        return self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _without_last(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stands at the last token predicts nothing: the other parties leave it out."""
    with_last = (TOKEN_IDS, POSITION_IDS, ANGLES, LANGUAGE_LAYER)
    return {name: values[:-1] if name.startswith(with_last) else values for name, values in parts.items()}
