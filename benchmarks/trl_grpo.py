"""TRL's side: a real GRPOTrainer on the same folder, driven through its own training step and optimizer.

`Trl.update` is the inside of transformers' training loop for one optimizer step: `_prepare_inputs` and `training_step`
a micro-batch, then clip, step, zero. Only generation and reward are bypassed, by handing the trainer its rollouts in
the form that its `_generate_and_score_completions` returns; that method's splitting into micro-batches is TRL's.
`Trl.step` bypasses nothing. Logging, callbacks and the learning rate's schedule are left out, to TRL's advantage.

What could slow TRL down without need is a `Variant`; a benchmark takes the fastest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from benchmarks.ours import LEARNING_RATE, Key
from benchmarks.padded import image_inputs, pad_left, pad_right, without_cuda_mode
from megatron_papo.types import Group

warnings.filterwarnings("ignore", message="TRL currently supports vLLM", category=UserWarning)

import trl.trainer.utils  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402


@dataclass(frozen=True)
class Variant:
    sequences: int
    """Rollouts of a micro-batch (per_device_train_batch_size)."""
    checkpointing: bool = False
    """Gradient checkpointing; TRL's default is True."""
    every_logit: bool = False
    """Without a GPU TRL's head scores every position, with one only those of responses. False: those of responses."""

    @property
    def name(self) -> str:
        return (
            f"{self.sequences} sequences"
            + (", checkpointing" if self.checkpointing else "")
            + (", head on every position" if self.every_logit else "")
        )


class _GivenRollouts(GRPOTrainer):
    """A trainer that trains on the rollouts in `given`, if there are any, instead of generating some."""

    given: dict[str, Any] | None = None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.given) if self.given is not None else super()._generate_and_score_completions(inputs)


class Trl:
    """One variant of TRL's GRPO: token mean (`dapo`), no reference, the clipping of PAPO's recipe."""

    def __init__(
        self,
        folder: Path,
        variant: Variant,
        *,
        batch_size: int,
        group_size: int,
        reward: Callable[..., list[float]] | None = None,
        max_response_tokens: int = 256,
    ):
        """`batch_size`: rollouts of an optimizer step. `folder`/model is the Hugging Face folder."""
        self.variant = variant
        self.num_micro_batches = batch_size // variant.sequences
        assert self.num_micro_batches * variant.sequences == batch_size
        config = _config(folder / "trl", variant, self.num_micro_batches, group_size, max_response_tokens)
        self.trainer = _GivenRollouts(
            model=str(folder / "model"),
            reward_funcs=reward or _no_reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": ""}]}]),  # not read
        )
        if variant.checkpointing:
            self.trainer.model.gradient_checkpointing_enable()
        self.trainer.create_optimizer()
        self.model, self.trainer.optimizer = self.trainer.accelerator.prepare(
            self.trainer.model, self.trainer.optimizer
        )
        self.trainer.current_gradient_accumulation_steps = self.num_micro_batches
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def update(self, given: dict[str, Any]) -> tuple[float, float]:
        """One optimizer step on `given_rollouts`; loss and norm of the gradient before clipping."""
        self.trainer.given = given
        return self._optimizer_step([])

    def step(self, examples: list[dict[str, Any]]) -> tuple[float, float]:
        """One whole step on rows as the trainer's own data loader yields them: a row a rollout."""
        self.trainer.given = None
        return self._optimizer_step(examples)

    def logprobs(self, given: dict[str, Any], groups: Sequence[Group]) -> dict[Key, Tensor]:
        """Log-probs of the response tokens of every rollout."""
        ids, mask = (torch.cat([given[f"prompt_{x}"], given[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        with without_cuda_mode(), torch.no_grad(), self._head():
            values, _, _ = self.trainer._get_per_token_logps_and_entropies(
                self.model, ids, mask, given["completion_ids"].shape[1], **{name: given[name] for name in names}
            )
        return dict(zip(_keys(groups), (row[keep.bool()] for row, keep in zip(values, given["completion_mask"]))))

    def reset(self) -> None:
        """Loads the weights of the folder again."""
        self.model.load_state_dict(self.start)

    def _optimizer_step(self, examples: list[dict[str, Any]]) -> tuple[float, float]:
        trainer, loss = self.trainer, 0.0
        with without_cuda_mode(), self._head():
            self.model.train()
            for _ in range(self.num_micro_batches):
                loss += float(trainer.training_step(self.model, examples, None))
            norm = trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
            trainer.optimizer.step()
            self.model.zero_grad()
        return loss, float(norm)

    @contextmanager
    def _head(self) -> Iterator[None]:
        """TRL chooses by the device which positions its head scores; its kernel stays that of the CPU."""
        own = trl.trainer.utils._use_triton
        if not self.variant.every_logit:
            trl.trainer.utils._use_triton = lambda device: True
        try:
            yield
        finally:
            trl.trainer.utils._use_triton = own


def given_rollouts(
    groups: Sequence[Group], image_token_id: int, pad_id: int, old: dict[Key, Tensor] | None = None
) -> dict[str, Any]:
    """The groups as GRPOTrainer's `_generate_and_score_completions` returns them: a row a rollout, prompts padded on
    the left, responses on the right, every row with its own copy of the pixels.

    Without `old` log-probs, as TRL itself leaves them out of an update that is on-policy.
    """
    pairs = [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
    prompt_ids, prompt_mask = pad_left([prompt.inputs.token_ids_S for prompt, _ in pairs], pad_id)
    completion_ids, completion_mask = pad_right([torch.tensor(r.response_ids) for _, r in pairs], pad_id)
    types = torch.cat([(prompt_ids == image_token_id).long(), torch.zeros_like(completion_ids)], dim=1)
    pixel_values, image_grid_thw = image_inputs([prompt for prompt, _ in pairs])
    given = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([value for group in groups for value in group.advantages]),
        "num_items_in_batch": completion_mask.sum(),
        "pixel_values": pixel_values,
        "image_grid_thw": image_grid_thw,
        "mm_token_type_ids": types,
        "num_images": [len(prompt.images) for prompt, _ in pairs],
    }
    if old is not None:
        given["old_per_token_logps"], _ = pad_right([old[key] for key in _keys(groups)], 0)
    return given


def _config(
    output: Path, variant: Variant, num_micro_batches: int, group_size: int, max_response_tokens: int
) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=variant.sequences,
        gradient_accumulation_steps=num_micro_batches,
        num_generations=group_size,
        max_completion_length=max_response_tokens,
        gradient_checkpointing=variant.checkpointing,
        learning_rate=LEARNING_RATE,
        weight_decay=0.01,
        max_grad_norm=1.0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.3,
        delta=3.0,
        loss_type="dapo",
        temperature=1.0,
        top_p=1.0,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        report_to="none",
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        log_multimodal=False,
    )


def _keys(groups: Sequence[Group]) -> list[Key]:
    return [(group.prompt.id, rollout.index) for group in groups for rollout in group.rollouts]


def _no_reward(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)
