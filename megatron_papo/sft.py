"""`papo sft`: supervised warm-up on demonstrations, with the same model, packing and optimizer as `papo train`.

Minimises the token mean of -log-prob of the column `sft.response_column`, closed by the end-of-turn token. The
learning-rate schedule spreads over `sft.steps`.
"""

from __future__ import annotations

from contextlib import ExitStack

from megatron_papo.config import Config
from megatron_papo.data.dataset import BadRows, PromptDataset
from megatron_papo.data.draw import draw_prompts
from megatron_papo.data.order import DataCursor
from megatron_papo.losses import sft_loss
from megatron_papo.model.policy import HeadRequest
from megatron_papo.observe.failures import RunStopped
from megatron_papo.observe.profiling import profiled
from megatron_papo.observe.stopping import StopSignal
from megatron_papo.optim import Optimizer, build_optimizer, wrap_policy
from megatron_papo.origin import origin_of
from megatron_papo.packing import supervised_group
from megatron_papo.pipeline import update_policy
from megatron_papo.record import Recorder, name_bad_rows
from megatron_papo.run import Run, open_run, pack_update
from megatron_papo.save import Checkpoints
from megatron_papo.types import Group, Metrics, Prompt


def main(config: Config) -> int:
    """Trains from the newest checkpoint under `run.dir`, or from `model`, to `sft.steps`; the exit code."""
    with StopSignal() as stop, open_run(config) as run, ExitStack() as stack:
        with run.clock.stage("set up"):
            dataset = PromptDataset(config.data, "train", run.processor, needs_answer=False)
            origin = origin_of(run, dataset, config.sft.response_column)
            bad_rows = BadRows(config.data.on_bad_row)
            optimizer = build_optimizer(wrap_policy(run.policy, config), config, config.sft.steps)
        cursor = DataCursor(len(dataset), config.run.seed, config.data.shuffle)
        checkpoints = stack.enter_context(Checkpoints(run, optimizer, "sft", origin))
        state = checkpoints.resume()
        if state is not None:
            cursor = cursor.load_state_dict(state["cursor"])
            optimizer.guard.load(state.get("updates", {}))
        run.clock.take()  # what came before is no step's time
        with Recorder(run, checkpoints.next_step, config.sft.steps) as recorder:
            for step in range(checkpoints.next_step, config.sft.steps):
                with profiled(config.observe, run.folder, run.layout.rank, step):
                    groups, cursor = _draw_demonstrations(run, dataset, bad_rows, cursor)
                    metrics = _update(run, optimizer, groups)
                recorder.record(step, groups, metrics, {})
                leaving, stopped = stop.asked(), optimizer.guard.reason_to_stop
                state = {"cursor": cursor.state_dict(), "updates": optimizer.guard.state()}
                checkpoints.save_when_due(step, config.sft.steps, state, now=leaving or bool(stopped))
                if stopped:
                    raise RunStopped(f"stopped the run after step {step}: {stopped}")
                if leaving:
                    return checkpoints.leave(step)
        checkpoints.export()
        return 0


def _draw_demonstrations(
    run: Run, dataset: PromptDataset, bad_rows: BadRows, cursor: DataCursor
) -> tuple[list[Group], DataCursor]:
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
        name_bad_rows(run, bad_rows, "train")
        return [_demonstration(run, dataset, prompt) for prompt in draw.prompts], draw.cursor


def _demonstration(run: Run, dataset: PromptDataset, prompt: Prompt) -> Group:
    text = dataset.column(prompt.row, run.config.sft.response_column)
    if not isinstance(text, str) or not text:
        raise ValueError(f"data.train: row {prompt.row} has no text in {run.config.sft.response_column!r}")
    budget = run.config.train.tokens_per_micro_batch
    if len(text) > budget * run.processor.most_letters_of_a_token:  # tokenising it would take its time
        raise ValueError(
            f"data.train: row {prompt.row}: a response of {len(text)} letters is more than "
            f"train.tokens_per_micro_batch={budget}"
        )
    if token := run.processor.vision_token_in(text):
        raise ValueError(f"data.train: row {prompt.row}: the response contains the vision token {token}")
    return supervised_group(prompt, run.processor.encode_response(text), text)


def _update(run: Run, optimizer: Optimizer, groups: list[Group]) -> Metrics:
    if not groups:
        raise ValueError(f"sft.batch_size={run.config.sft.batch_size} leaves a data-parallel rank without a row")
    with run.clock.stage("pack"):
        rows = pack_update(run, groups, groups[0])
    run.meter.updated(rows)
    with run.clock.stage("update"):
        return update_policy(optimizer, rows, HeadRequest(banned_ids=run.banned_ids), sft_loss)
