"""Prompts, sampling and answers as vLLM takes and gives them. Imports vLLM only to make its sampling parameters, so a
trainer that asks an engine in other processes makes its requests here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL.Image import Image
from torch import Tensor

from megatron_papo.config import Config
from megatron_papo.generation.engine_images import pictures
from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.generation.weight_check import read_config
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Prompt

if TYPE_CHECKING:
    from vllm import RequestOutput

    from megatron_papo.data.processor import Processor

_BAN = -100.0
"""The lowest bias vLLM takes; the probability left is below the smallest fp32 number for logits of any use."""


@dataclass(frozen=True)
class VllmRequest:
    """A prompt for vLLM."""

    compact_ids: list[int]
    """With one image token a picture."""
    full_ids: list[int]
    """What vLLM has to make of it."""
    pictures: list[Image]

    def prompt(self) -> dict[str, Any]:
        """In vLLM's own words."""
        pictures = {"multi_modal_data": {"image": self.pictures}} if self.pictures else {}
        return {"prompt_token_ids": self.compact_ids, **pictures}


@dataclass(frozen=True)
class Requests:
    """Of one model and its processor."""

    processor: Processor
    shape: ModelShape
    banned_ids: tuple[int, ...]
    max_model_len: int
    """Tokens of a prompt with its response."""

    @classmethod
    def of(cls, config: Config, processor: Processor) -> Requests:
        shape = ModelShape.from_folder(processor.folder)
        model_config = read_config(processor.folder)
        longest = config.data.max_prompt_tokens + config.generation.max_response_tokens
        return cls(
            processor=processor,
            shape=shape,
            banned_ids=shape.banned_ids(processor.num_words),
            max_model_len=min(longest, model_config.text_config.max_position_embeddings),
        )

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raises ValueError naming a prompt that the engine cannot answer. Given all prompts of a call, not a rank's
        share alone, the ranks of a group refuse together."""
        for prompt in prompts:
            num_tokens = prompt.inputs.token_ids_S.numel()
            if num_tokens + sampling.max_response_tokens > self.max_model_len:
                raise ValueError(
                    f"prompt {prompt.id}: {num_tokens} tokens and a response of {sampling.max_response_tokens} "
                    f"exceed the engine's {self.max_model_len}"
                )
            if sampling.masked and prompt.inputs.pixel_values_PD is not None and prompt.masked_pixel_values_PD is None:
                raise ValueError(f"prompt {prompt.id}: masked rollouts asked for, and it has no masked view")

    def request(self, prompt: Prompt, sampling: Sampling) -> VllmRequest:
        inputs = prompt.inputs
        pixel_values_PD = prompt.masked_pixel_values_PD if sampling.masked else inputs.pixel_values_PD
        compact, images = _compact(inputs.token_ids_S, inputs.grid_thw_I3, self.shape), []
        if pixel_values_PD is not None:
            assert inputs.grid_thw_I3 is not None
            images = pictures(pixel_values_PD, inputs.grid_thw_I3, self.processor.image_processor)
        return VllmRequest(compact, inputs.token_ids_S.tolist(), images)

    def params(self, job: RolloutRequest, sampling: Sampling) -> Any:
        """vLLM's sampling parameters."""
        from vllm import SamplingParams

        return SamplingParams(
            n=1,
            seed=job.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            logprobs=0,  # of the sampled token alone
            logit_bias=dict.fromkeys(self.banned_ids, _BAN),
            stop_token_ids=list(self.processor.eos_ids),
            detokenize=False,
        )

    def answer(self, job: RolloutRequest, request: VllmRequest, output: RequestOutput) -> Answer:
        if list(output.prompt_token_ids or ()) != request.full_ids:
            raise RuntimeError(f"rollout {job}: vLLM expanded the prompt to other tokens than the processor's")
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        assert completion.logprobs is not None and not set(ids) & set(self.banned_ids)
        logprobs = tuple(place[token].logprob for place, token in zip(completion.logprobs, ids))
        assert completion.finish_reason in ("stop", "length"), completion.finish_reason
        return Answer(job, ids, logprobs, completion.finish_reason)


def _compact(token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> list[int]:
    """The prompt with each picture's run of image tokens cut to its first; runs that touch are told apart by size."""
    kept, ids, place = [], token_ids_S.tolist(), 0
    runs = iter([] if grid_thw_I3 is None else (grid_thw_I3.prod(dim=1) // shape.vision.merge_unit).tolist())
    while place < len(ids):
        kept.append(ids[place])
        place += next(runs) if ids[place] == shape.image_token_id else 1
    return kept
