"""`papo eval`: avg@k on held-out prompts, with the images and with them masked.

`eval.samples` answers to every prompt are sampled at `eval.temperature`. A second pass shows the masked images only, so
the gap between the two accuracies is what seeing the image is worth. Every evaluation samples with the same seeds and
sees the same masked images, since its rows are not draws from the run's order. The perception KL is the token mean of
k3 between the two views, on the answers that were given with the image. `papo eval` appends one line of scores to
`RUN/eval.jsonl`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

from megatron_papo.algorithm.estimators import kl_k3
from megatron_papo.config import Config
from megatron_papo.config.derived import model_folder
from megatron_papo.data.bad_rows import BadRows, reasons_in_words
from megatron_papo.data.dataset import PromptDataset
from megatron_papo.data.draw import prompts_of
from megatron_papo.data.masking import Masks
from megatron_papo.data.order import share_of
from megatron_papo.distributed.exchange import gather_objects, sum_metrics
from megatron_papo.files.small_files import append_record
from megatron_papo.generation import Generator, Sampling, build_generator
from megatron_papo.model.policy import HeadRequest
from megatron_papo.optimization.pipeline import add_metrics, score_views
from megatron_papo.rewards import Rewarder
from megatron_papo.rewards.returned import FAILED
from megatron_papo.training.batching import pack_rows
from megatron_papo.training.console import print_scores, say_what_is_read, warn_of_bad_rows, warn_of_missing_images
from megatron_papo.training.engine_rank import serve, serves
from megatron_papo.training.reward_failures import FILE
from megatron_papo.training.rollout_metrics import sum_and_count, sums_by_source
from megatron_papo.training.rollouts import build_rewarder, generate, hand_over, reward_groups
from megatron_papo.training.session import Run, open_run
from megatron_papo.types import Group, Metrics, Prompt

_PROMPTS_AT_ONCE = 64
"""How many prompts are in memory at a time, with their images and answers."""


class NothingEvaluated(ValueError):
    """Raised where every row of `data.eval` is a bad row, or the user's reward function failed for all responses."""


def main(config: Config) -> int:
    """Evaluates the model of `config.model` and prints its scores. Returns the exit code."""
    if serves(config):
        return serve(config)
    with open_run(config, config.generation.num_engine_ranks) as run:
        with build_rewarder(run) as rewarder, closing(_generator(run)) as generator:
            dataset = open_heldout(run)
            scores = evaluate(run, dataset, generator, rewarder, BadRows(config.data.on_bad_row))
        if run.is_writer:
            model = str(model_folder(config))
            append_record(run.folder / "eval.jsonl", {"model": model, **scores})
            print_scores(scores)
    return 0


def open_heldout(run: Run) -> PromptDataset:
    """The data set `data.eval`, with a warning where it seems to have lost its images."""
    dataset = PromptDataset(run.config.data, "eval", run.processor)
    say_what_is_read(run, dataset)
    warn_of_missing_images(run, dataset)
    return dataset


def evaluate(
    run: Run, dataset: PromptDataset, generator: Generator, rewarder: Rewarder, bad_rows: BadRows
) -> dict[str, float]:
    """Scores over the data set, the same on all ranks: `accuracy`, `format` and `response_tokens` (a mean).

    With `eval.masked`, over the prompts that have an image: `masked_accuracy`, `masked_format`,
    `masked_response_tokens`, `perception_kl` (nats a token), and `gap`, the accuracy with the image less that with the
    masked one. `failed` and `masked_failed` are the share of responses for which the user's reward function failed,
    where there are any; they count 0. Where rows name their source, also `source/<name>/<score>` of each. Raises
    NothingEvaluated.
    """
    config = run.config
    all_rows = dataset.first_rows(config.eval.limit)
    rows = share_of(all_rows, run.layout.data_rank, run.layout.data_size)
    # generation may be a collective across data-parallel ranks: all of them call it equally often
    most = max(gather_objects(len(rows), run.layout.data_group))
    masks = Masks(config.perception.mask, config.run.seed) if config.eval.masked else None
    total: Metrics = {}
    with run.clock.stage("evaluate", total=len(rows)) as progress:
        for start in range(0, most, _PROMPTS_AT_ONCE):
            chunk = rows[start : start + _PROMPTS_AT_ONCE]
            prompts = list(prompts_of(dataset, chunk, bad_rows, masks))
            groups = _answer(run, generator, rewarder, prompts, masked=False)
            add_metrics(total, _answer_sums(groups, ""))
            if config.eval.masked:
                seen = [group for group in groups if group.prompt.inputs.grid_thw_I3 is not None]
                blind = _answer(run, generator, rewarder, [group.prompt for group in seen], masked=True)
                sums = _answer_sums(seen, "seen_") | _answer_sums(blind, "masked_")
                add_metrics(total, sums | _perception_kl(run, seen))
            progress.advance(len(chunk))
    warn_of_bad_rows(run, bad_rows, "eval")
    scores = {name: value / count for name, (value, count) in sum_metrics(total).items() if count}
    if not scores:
        raise NothingEvaluated(
            f"data.eval: no good row left in {dataset.name}, of {len(all_rows)}: nothing was evaluated: "
            f"{_reasons(run, bad_rows)}"
        )
    if scores[FAILED] == 1.0:
        raise NothingEvaluated(f"reward.function: it failed for all responses to data.eval: see {run.folder / FILE}")
    return with_gaps({name: value for name, value in scores.items() if value or not name.endswith(FAILED)})


def _reasons(run: Run, bad_rows: BadRows) -> str:
    """Why rows were left out, over all ranks, which all call it."""
    shares = gather_objects((bad_rows.counts, bad_rows.first), run.layout.data_group)
    counts = sum((Counter(counts) for counts, _ in shares), Counter[str]())
    return reasons_in_words(counts, next((first for _, first in shares if first), ""))


def _generator(run: Run) -> Generator:
    """The engine, with the policy's weights."""
    with run.clock.stage("hand_over"):
        generator = build_generator(run.config, run.processor, run.layout, run.clock.report)
        hand_over(run, generator, policy_version=0)
    return generator


def _answer(
    run: Run, generator: Generator, rewarder: Rewarder, prompts: Sequence[Prompt], *, masked: bool
) -> list[Group]:
    """Sampled and rewarded answers to the prompts; with `masked` the engine sees the masked images."""
    config = run.config
    sampling = Sampling(
        group_size=config.eval.samples,
        temperature=config.eval.temperature,
        top_p=config.generation.top_p if config.eval.top_p is None else config.eval.top_p,
        top_k=config.generation.top_k if config.eval.top_k is None else config.eval.top_k,
        max_response_tokens=config.generation.max_response_tokens,
        seed=config.run.seed,
        masked=masked,
    )
    with run.clock.stage("answer"):
        return reward_groups(run, rewarder, generate(run, generator, prompts, sampling))


def _answer_sums(groups: Sequence[Group], prefix: str) -> Metrics:
    """Sums over all answers of the groups and over those of each source, with their counts; `prefix` begins the name of
    every score."""

    def scores(group: Group) -> dict[str, list[float]]:
        values = {name: list(group.reward_parts[name]) for name in ("accuracy", "format")}
        values[FAILED] = list(group.reward_parts.get(FAILED, (0.0,) * len(group.rollouts)))
        values["response_tokens"] = [float(len(rollout.response_ids)) for rollout in group.rollouts]
        return {f"{prefix}{name}": numbers for name, numbers in values.items()}

    total: Metrics = {}
    for group in groups:
        add_metrics(total, sum_and_count(scores(group)))
    return total | sums_by_source(groups, scores)


def with_gaps(scores: dict[str, float]) -> dict[str, float]:
    """The scores with `gap`, of all rows and of each source, in place of the parts that only it is made of."""
    gaps = {}
    for name, masked in scores.items():
        source, part = name[: name.rfind("/") + 1], name[name.rfind("/") + 1 :]
        if part == "masked_accuracy":
            gaps[f"{source}gap"] = scores[f"{source}seen_accuracy"] - masked
    parts = {name: value for name, value in scores.items() if not name.rpartition("/")[2].startswith("seen_")}
    return parts | gaps


def _perception_kl(run: Run, groups: Sequence[Group]) -> Metrics:
    """Sum and count of k3 between the two views, at temperature 1, over the tokens of answers given with the image."""
    if not groups:
        return {}
    rows = pack_rows(run, [replace(group, advantages=(0.0,) * len(group.rollouts)) for group in groups])
    head = HeadRequest(banned_ids=run.banned_ids)
    views = score_views(run.policy, rows, head)
    kl = [kl_k3(seen.policy_logprobs_R, blind.policy_logprobs_R) for seen, blind in views]
    return {"perception_kl": (sum(float(values_R.sum()) for values_R in kl), float(sum(map(len, kl))))}
