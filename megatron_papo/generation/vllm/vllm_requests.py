"""Prompts, sampling and answers as vLLM takes and gives them.

Imports vLLM only to make its sampling parameters, so that a trainer whose engines run in other processes makes its
prompts here too.
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
from megatron_papo.generation.reference_model import classes_of, read_config
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.model.family import family_of
from megatron_papo.model.shape import ModelShape
from megatron_papo.types import Prompt

if TYPE_CHECKING:
    from vllm import RequestOutput

    from megatron_papo.data.processor import Processor

_BAN = -100.0
"""The lowest bias vLLM takes; the probability left is below the smallest fp32 number for logits of any use."""


@dataclass(frozen=True)
class VllmPrompt:
    """A prompt for vLLM."""

    compact_ids: list[int]
    """Its token ids, with one image token for each picture."""
    full_ids: list[int]
    """What vLLM has to expand them to: the trainer's token ids."""
    pictures: list[Image]

    def as_input(self) -> dict[str, Any]:
        """The prompt as `vllm.LLM.enqueue` takes it."""
        pictures = {"multi_modal_data": {"image": self.pictures}} if self.pictures else {}
        return {"prompt_token_ids": self.compact_ids, **pictures}


@dataclass(frozen=True)
class VllmFormat:
    """Writes prompts and sampling in vLLM's form and reads its answers, for one model and its processor."""

    processor: Processor
    shape: ModelShape
    banned_ids: tuple[int, ...]
    max_model_len: int
    """The most tokens of a prompt with its response."""

    @classmethod
    def of(cls, config: Config, processor: Processor) -> VllmFormat:
        """For the model in the processor's folder."""
        shape = ModelShape.from_folder(processor.folder)
        family = family_of(shape)
        most = classes_of(family).max_positions(read_config(processor.folder, family))
        longest = config.data.max_prompt_tokens + config.generation.max_response_tokens
        return cls(
            processor=processor,
            shape=shape,
            banned_ids=shape.banned_ids(processor.num_words),
            max_model_len=min(longest, most),
        )

    def check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        """Raises ValueError naming a prompt that the engine cannot answer.

        Called with all prompts of a call and not with a rank's share, so that the ranks of a group refuse together.
        """
        for prompt in prompts:
            num_tokens = prompt.inputs.token_ids_S.numel()
            if num_tokens + sampling.max_response_tokens > self.max_model_len:
                raise ValueError(
                    f"prompt {prompt.id}: {num_tokens} tokens and a response of {sampling.max_response_tokens} "
                    f"exceed the engine's {self.max_model_len}"
                )
            if sampling.masked and prompt.inputs.pixel_values_PD is not None and prompt.masked_pixel_values_PD is None:
                raise ValueError(f"prompt {prompt.id}: masked rollouts asked for, and it has no masked view")

    def prompt(self, prompt: Prompt, sampling: Sampling) -> VllmPrompt:
        """The prompt in vLLM's form, with the view of its images that `sampling` asks for."""
        inputs = prompt.inputs
        pixel_values_PD = prompt.masked_pixel_values_PD if sampling.masked else inputs.pixel_values_PD
        compact, images = compact_ids(inputs.token_ids_S, inputs.grid_thw_I3, self.shape), []
        if pixel_values_PD is not None:
            assert inputs.grid_thw_I3 is not None
            images = pictures(pixel_values_PD, inputs.grid_thw_I3, self.processor.image_processor)
        return VllmPrompt(compact, inputs.token_ids_S.tolist(), images)

    def params(self, request: RolloutRequest, sampling: Sampling) -> Any:
        """vLLM's `SamplingParams` for one rollout."""
        from vllm import SamplingParams

        return SamplingParams(
            n=1,
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            logprobs=0,  # those of the sampled token alone
            logit_bias=dict.fromkeys(self.banned_ids, _BAN),
            stop_token_ids=[] if sampling.ignore_eos else list(self.processor.eos_ids),
            ignore_eos=sampling.ignore_eos,  # the one that vLLM reads in the model's own configuration
            detokenize=False,
        )

    def answer(self, request: RolloutRequest, prompt: VllmPrompt, output: RequestOutput) -> Answer:
        """vLLM's finished output as the answer to `request`. Raises RuntimeError where it read another prompt."""
        if list(output.prompt_token_ids or ()) != prompt.full_ids:
            raise RuntimeError(f"rollout {request}: vLLM expanded the prompt to other tokens than the processor's")
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        assert completion.logprobs is not None and not set(ids) & set(self.banned_ids)
        logprobs = tuple(place[token].logprob for place, token in zip(completion.logprobs, ids))
        assert completion.finish_reason in ("stop", "length"), completion.finish_reason
        return Answer(request, ids, logprobs, completion.finish_reason)


def compact_ids(token_ids_S: Tensor, grid_thw_I3: Tensor | None, shape: ModelShape) -> list[int]:
    """The prompt with each picture's run of image tokens cut to its first; the sizes separate runs that touch."""
    compact, ids, place = [], token_ids_S.tolist(), 0
    runs = iter([] if grid_thw_I3 is None else (grid_thw_I3.prod(dim=1) // shape.vision.merge_unit).tolist())
    while place < len(ids):
        compact.append(ids[place])
        place += next(runs) if ids[place] == shape.image_token_id else 1
    return compact
