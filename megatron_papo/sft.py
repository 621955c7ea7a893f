"""`papo sft`: supervised warm-up on demonstrations, with the same model, packing and optimizer as `papo train`.

The loss is the token mean of -log-prob of the responses in the column `sft.response_column`, each closed by the
end-of-turn token. The learning-rate schedule spreads over `sft.steps`. A row whose response cannot be learnt from is a
bad row like any other: `data.on_bad_row` says whether it ends the run.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from megatron_papo.algorithm.losses import sft_loss
from megatron_papo.config import Config
from megatron_papo.data.bad_rows import BadRow, BadRows
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.draw import draw_prompts
from megatron_papo.data.masking import Masks
from megatron_papo.data.order import DataCursor
from megatron_papo.data.processor import Processor
from megatron_papo.data.settings_order import first_cursor
from megatron_papo.model.policy import HeadRequest
from megatron_papo.observe.profiling import profiled
from megatron_papo.optimization.optimizer import Optimizer, build_optimizer, wrap_policy
from megatron_papo.optimization.pipeline import update_policy
from megatron_papo.packing import supervised_group
from megatron_papo.runtime.failures import RunStopped
from megatron_papo.runtime.stop_signal import StopSignal
from megatron_papo.training.batching import pack_update
from megatron_papo.training.checkpoints import Checkpoints
from megatron_papo.training.console import (
    say_what_is_read,
    warn_of_bad_rows,
    warn_of_missing_images,
    warn_of_skipped_updates,
)
from megatron_papo.training.origin import origin_of
from megatron_papo.training.prompt_source import resumed_cursor
from megatron_papo.training.recorder import Recorder, StepPlanner
from megatron_papo.training.run_length import with_num_steps
from megatron_papo.training.session import Run, open_run
from megatron_papo.types import Group, Metrics, Prompt


class Demonstrations(PromptDataset):
    """`data.train` with a response to every prompt. Raises ValueError where the column of responses is missing."""

    def __init__(self, config: Config, processor: Processor) -> None:
        super().__init__(config.data, "train", processor, needs_answer=False)
        self._column, self._budget = config.sft.response_column, config.train.tokens_per_micro_batch
        self._encoder = processor
        for source in self.sources:
            source.column(0, self._column)

    def prompt(self, row: int, masks: Masks | None = None, visit: int = 0) -> Prompt:
        """The prompt of a row; raises BadRow where its response cannot be learnt from. Cheap checks come first."""
        with self.named(row):
            text = self._text(row)
            prompt = super().prompt(row, masks, visit)
            num_tokens = prompt.inputs.token_ids_S.numel() + len(self._encoder.encode_response(text))
            if num_tokens > self._budget:
                raise self._too_long(row, f"{num_tokens} tokens with the prompt")
            return prompt

    def group(self, prompt: Prompt) -> Group:
        """A prompt of this data set with its response, as a group of one rollout."""
        text = self._text(prompt.row)
        return supervised_group(prompt, self._encoder.encode_response(text), text)

    def _text(self, row: int) -> str:
        text: Any = self.column(row, self._column)
        if not isinstance(text, str) or not text:
            raise BadRow(row, "no response", f"no text in {self._column!r}")
        if len(text) > self._budget * self._encoder.most_letters_of_a_token:  # tokenising it would take its time
            raise self._too_long(row, f"{len(text)} letters")
        if token := self._encoder.vision_token_in(text):
            raise BadRow(row, "vision token in text", f"{token} in the response")
        return self._encoder.behind_prefix(text)

    def _too_long(self, row: int, how_long: str) -> BadRow:
        limit = f"train.tokens_per_micro_batch is {self._budget}"
        return BadRow(row, "response too long", f"{how_long}, {limit}")


def main(config: Config, planner: StepPlanner | None = None) -> int:
    """Trains up to `sft.steps` steps, from the newest checkpoint under `run.dir` or else from `model`. Returns the exit
    code; raises RunStopped where too many updates in a row are skipped. `planner` is as in `train.main`."""
    with StopSignal() as stop, open_run(config, records=True) as run, ExitStack() as stack:
        with run.clock.stage("set_up"):
            dataset = Demonstrations(config, run.processor)
            say_what_is_read(run, dataset)
            warn_of_missing_images(run, dataset)
            bad_rows = BadRows(config.data.on_bad_row)
            cursor = first_cursor(config.data, dataset, config.run.seed, config.sft.batch_size)
            origin = origin_of(run, dataset, cursor, config.sft.response_column)
            run = with_num_steps(run, "sft", cursor)
            config, num_steps = run.config, run.config.sft.num_steps
            optimizer = build_optimizer(wrap_policy(run.policy, config), config, num_steps)
        checkpoints = stack.enter_context(Checkpoints(run, optimizer, "sft", origin))
        state = checkpoints.resume()
        if state is not None:
            cursor = resumed_cursor(run, checkpoints, cursor, state["cursor"])
            optimizer.guard.load(state.get("updates", {}))
        run.clock.take()  # the time until now belongs to no step
        with Recorder(run, checkpoints.next_step, num_steps, planner) as recorder:
            for step in range(checkpoints.next_step, num_steps):
                with profiled(config.observe, run.folder, run.layout.rank, step):
                    groups, cursor = _draw_demonstrations(run, dataset, bad_rows, cursor)
                    metrics = _update(run, optimizer, groups)
                recorder.record(step, groups, metrics, {})
                stopped = optimizer.guard.reason_to_stop
                leaving = stop.requested()
                state = {"cursor": cursor.state_dict(), "updates": optimizer.guard.state()}
                checkpoints.save_when_due(step, num_steps, state, now=bool(stopped) or leaving)
                if stopped:
                    raise RunStopped(f"stopped the run after step {step}: {stopped}")
                if leaving:
                    return checkpoints.leave(step)
        checkpoints.export()
        return 0


def _draw_demonstrations(
    run: Run, dataset: Demonstrations, bad_rows: BadRows, cursor: DataCursor
) -> tuple[list[Group], DataCursor]:
    """This rank's demonstrations of one step, and where the next draw begins."""
    with run.clock.stage("draw"):
        draw = draw_prompts(
            dataset,
            cursor,
            num_prompts=run.config.sft.batch_size,
            updates_per_step=1,
            data_rank=run.layout.data_rank,
            data_size=run.layout.data_size,
            bad_rows=bad_rows,
        )
        warn_of_bad_rows(run, bad_rows, "train")
        return [dataset.group(prompt) for prompt in draw.prompts], draw.cursor


def _update(run: Run, optimizer: Optimizer, groups: list[Group]) -> Metrics:
    """One optimizer step over the demonstrations of all ranks; its metrics."""
    if not groups:
        raise ValueError(f"sft.batch_size={run.config.sft.batch_size} leaves a data-parallel rank without a row")
    with run.clock.stage("pack"):
        rows = pack_update(run, groups, groups[0])
    run.meter.updated(rows)
    with run.clock.stage("update"):
        metrics = update_policy(optimizer, rows, HeadRequest(banned_ids=run.banned_ids), sft_loss)
    warn_of_skipped_updates(run, optimizer.guard)
    return metrics
