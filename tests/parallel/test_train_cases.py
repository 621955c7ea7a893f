"""Training and evaluation where ranks or rows are not alike: nothing hangs, nothing is lost, numbers stay the same."""

from __future__ import annotations

import filecmp
import gzip
import importlib
import io
import json
import math
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_papo.checkpoint.state_file import read_state_file
from megatron_papo.config import Config
from megatron_papo.files.small_files import read_records
from megatron_papo.rewards import MetricRow, RewardRow
from megatron_papo.runtime.failures import Failure, describe
from tests.support.metric_names import recorded_at_every_step
from tests.support.ranks import run_ranks
from tests.support.tiny import make_tiny_folder
from tests.support.tiny_run import make_inputs, metrics, share_of_even_bytes, tiny_run


def only_rows_0_and_1(response: str, answer: str, problem: str) -> float:
    """A reward that differs within a group for two prompts, and is nothing for all others."""
    return share_of_even_bytes(response, answer, problem) if problem.endswith(("0?", "1?")) else 0.0


async def fails_but_for_row_0(rows: list[RewardRow]) -> list[dict[str, float]]:
    """A reward that fails for every row but one, and for one response to another."""
    row = rows[0]
    if not row.problem.endswith("0?") and (row.rollout == 1 or not row.problem.endswith("1?")):
        raise ConnectionError("the judge is away")
    return [{"even": share_of_even_bytes(row.response, row.answer, row.problem)}]


def lengths_and_step(rows: list[MetricRow]) -> dict[str, float | tuple[float, float]]:
    """Metrics of the user's own: a mean, and a sum with a count of one."""
    return {"tokens": sum(row.num_tokens for row in rows) / len(rows), "responses": (len(rows), 1)}


def _stopped(config: Config) -> str:
    from megatron_papo.runtime.failures import RunStopped
    from megatron_papo.train import main

    with pytest.raises(RunStopped) as caught:
        main(config)
    return str(caught.value)


def _train(*configs: Config) -> None:
    from megatron_papo.train import main

    for config in configs:
        main(config)


def _sft(config: Config) -> None:
    from megatron_papo.sft import main

    main(config)


def _evaluate(*configs: Config) -> None:
    from megatron_papo.evaluate import main

    for config in configs:
        main(config)


@pytest.mark.parametrize("branch", ["frozen", "joint"])
def test_a_rank_whose_prompts_were_all_dropped_takes_part(inputs, tmp_path, branch):
    rows = inputs / "rows.jsonl"
    others = f"{{path: {rows}, filter: {{answer: {{min: 1}}}}}}"
    settings = {
        "data__train": f"[{{path: {rows}, name: a, filter: {{answer: 0}}}}, {others}]",
        "reward__function": "tests.parallel.test_train_cases:only_rows_0_and_1",
        "data__shuffle": "false",
        "train__steps": 1,
        "train__updates_per_step": 1,
        "train__dynamic_sampling__enabled": "true",
        "train__dynamic_sampling__high": 1.0,
        "train__tokens_per_micro_batch": 400,
        "perception__masked_branch": branch,
    }
    of_failed = {
        "reward__function": "tests.parallel.test_train_cases:fails_but_for_row_0",
        "reward__on_failure": "drop_group",
        "observe__metrics": "[tests.parallel.test_train_cases:lengths_and_step]",
        "data__shuffle": "false",
        "train__steps": 1,
        "train__tokens_per_micro_batch": 400,
        "perception__masked_branch": branch,
    }
    for ranks in (1, 2):
        failed = tiny_run(inputs, tmp_path / f"failed_{ranks}", **of_failed)
        run_ranks(_train, ranks, tiny_run(inputs, tmp_path / str(ranks), **settings), failed)
    (alone,), (shared,) = metrics(tmp_path / "failed_1"), metrics(tmp_path / "failed_2")
    assert shared == pytest.approx(alone, rel=2e-4, abs=2e-5)
    assert shared["sampling/kept_share"] == 1 / 4 and shared["trained/reward/failed"] == 0
    assert shared["reward/failed"] == pytest.approx(7 / 12) and shared["rewards_failed"] == 7
    assert shared["own/tokens"] == shared["trained/response_tokens"] and shared["own/responses"] == 3
    told = read_records(tmp_path / "failed_2" / "reward_failures.jsonl")
    assert sorted((line["prompt"][-1], line["rollout"]) for line in told) == [
        ("1", 1), ("2", 0), ("2", 1), ("2", 2), ("3", 0), ("3", 1), ("3", 2),
    ]  # fmt: skip
    assert told[0]["reason"].startswith("failed: ConnectionError: the judge is away (test_train_cases.py:")
    (alone,), (shared,) = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    assert shared == pytest.approx(alone, rel=2e-4, abs=2e-5)
    assert shared["sampling/rounds"] >= 3 and shared["sampling/kept_share"] < 0.5
    assert 0 < shared["reward/accuracy"] < 0.5 * shared["trained/reward/accuracy"], "of all, and of those trained on"
    assert shared["group/all_equal"] > 0.5 > shared["trained/group/all_equal"]
    assert shared["optim/grad_norm"] > 0
    assert shared["source/a/reward"] > shared["source/rows/reward"] > 0 and shared["source/a/group/all_equal"] == 0


def test_every_kind_of_mask_trains_and_is_shown(inputs, tmp_path):
    kinds = {"blur": {}, "noise": {}, "swap": {}, "crop": {"ratio": 0.5}, "cells": {"align": "patches"}}
    configs = [
        tiny_run(
            inputs, tmp_path / kind, train__steps=1, train__updates_per_step=1, perception__mask__kind=kind,
            **{f"perception__mask__{key}": value for key, value in more.items()},
        )
        for kind, more in kinds.items()
    ]  # fmt: skip
    run_ranks(_train, 1, *configs)
    for kind in kinds:
        (step,) = metrics(tmp_path / kind)
        assert step["perception_kl"] > 1e-5, f"{kind} changed nothing"
        assert "masked" in (tmp_path / kind / "samples" / "step_000000.html").read_text()


@pytest.fixture(scope="module")
def torn_inputs(tmp_path_factory) -> Path:
    """The usual rows, with a truncated picture in row 4."""
    folder = make_inputs(tmp_path_factory.mktemp("torn"))
    (folder / "4_0.png").write_bytes((folder / "4_0.png").read_bytes()[:60])
    return folder


def half_of_the_rows(response: str, answer: str, problem: str) -> float:
    """A reward that differs within a group for every second prompt, and is nothing for the others."""
    return share_of_even_bytes(response, answer, problem) if problem.endswith(("0?", "2?", "4?", "6?")) else 0.0


@pytest.mark.parametrize(("align", "dynamic"), [("raw", True), ("patches", False)])
def test_neither_prompts_prepared_ahead_nor_a_resume_change_a_number(torn_inputs, tmp_path, align, dynamic):
    settings = {
        "data__on_bad_row": "skip",
        "data__eval": torn_inputs / "rows.jsonl",
        "eval__samples": 1,
        "perception__mask__align": align,
        "train__eval_every": 2,
        "train__eval_at_start": "true",
    }
    if dynamic:
        settings |= {
            "reward__function": "tests.parallel.test_train_cases:half_of_the_rows",
            "train__dynamic_sampling__enabled": "true",
            "train__dynamic_sampling__high": 1.0,
            "train__dynamic_sampling__prompts_per_round": 3,
        }
    runs = [
        tiny_run(torn_inputs, tmp_path / way, data__prefetch=way, train__steps=steps, **settings)
        for way, steps in (("true", 4), *([("false", 2)] if dynamic else []), ("false", 4))
    ]
    run_ranks(_train, 1, *runs)
    ahead, on_the_spot = metrics(tmp_path / "true"), metrics(tmp_path / "false")
    assert json.dumps(ahead) == json.dumps(on_the_spot)
    start, *steps = ahead
    assert start["step"] == -1 and start.keys() == {"step", *(name for name in steps[1] if name.startswith("eval/"))}
    assert len(steps) == 4 and any(step.get("perception_kl", 0.0) > 0 for step in steps)
    assert (max(step["sampling/rounds"] for step in steps) > 1) == dynamic


def _scores(folder: Path) -> dict[str, float]:
    scores = json.loads((folder / "eval.jsonl").read_text())
    return {name: value for name, value in scores.items() if name != "model"}


def test_evaluation_does_not_depend_on_the_ranks(inputs, tmp_path):
    rows = inputs / "rows.jsonl"
    sources = (
        f"[{{path: {rows}, filter: {{answer: {{max: 4}}}}}}, {{path: {rows}, name: few, filter: {{answer: [7]}}}}]"
    )
    for ranks in (1, 3):
        settings = {"data__eval": sources, "eval__samples": 2, "eval__limit": 5}
        run_ranks(_evaluate, ranks, tiny_run(inputs, tmp_path / str(ranks), **settings))
    alone, shared = _scores(tmp_path / "1"), _scores(tmp_path / "3")
    assert shared == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert {"accuracy", "masked_accuracy", "gap", "perception_kl"} <= shared.keys()
    assert {f"source/{name}/{score}" for name in ("rows", "few") for score in ("accuracy", "gap")} <= shared.keys()
    parts = shared["source/rows/response_tokens"] * 4 / 5 + shared["source/few/response_tokens"] / 5
    assert parts == pytest.approx(shared["response_tokens"]), "four rows of one source, one of the other"


@pytest.mark.fast
def test_evaluation_of_text_alone_has_no_masked_scores(inputs, tmp_path):
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows if not row["images"]))
    ways = {"own": {}, "greedy": {"temperature": 0}, "top_k": {"top_k": 1}, "top_p": {"top_p": 1e-6}}
    configs = [
        tiny_run(
            inputs, tmp_path / way, data__eval=text, eval__samples=2,
            **{f"eval__{name}": value for name, value in settings.items()},
        )
        for way, settings in ways.items()
    ]  # fmt: skip
    run_ranks(_evaluate, 1, *configs)
    own, greedy, top_k, top_p = (_scores(tmp_path / way) for way in ways)
    assert own.keys() == {"accuracy", "format", "response_tokens"}
    assert own != greedy == top_k == top_p, "settings of evaluation alone, whatever generation.top_k and top_p are"


def _said(*runs: tuple[str, Config]) -> list[str]:
    """What each verb says, one after the other in the same process, its error last."""
    found = []
    for verb, config in runs:
        told = io.StringIO()
        with redirect_stdout(told), redirect_stderr(told):
            try:
                importlib.import_module(f"megatron_papo.{verb}").main(config)
            except ValueError as error:
                print(f"error: {error}")
        found.append(
            "".join(line for line in told.getvalue().splitlines(keepends=True) if "papo: " in line or "error: " in line)
        )
    return found


def test_a_run_goes_on_with_its_own_data_and_model_alone(inputs, tmp_path):
    """Its own: wherever they lie. Two ranks, of which one compares, end alike."""
    run_dir, last = tmp_path / "run", tmp_path / "run/checkpoints/step_00000001"

    def copy(name: str) -> Path:
        return Path(shutil.copytree(inputs, tmp_path / name))

    def sft(folder: Path, steps: int = 2, **settings) -> tuple[str, Config]:
        return "sft", tiny_run(folder, run_dir, **{"sft__steps": steps, "sft__batch_size": 2, **settings})

    rows, template, weights = copy("rows"), copy("template"), copy("weights")
    (rows / "rows.jsonl").write_text((rows / "rows.jsonl").read_text().replace("it is 5", "it is 6"))
    (template / "model/chat_template.jinja").write_text((inputs / "model/chat_template.jinja").read_text() + " ")
    make_tiny_folder(weights / "model", seed=1)
    refused = [sft(rows), sft(template), ("train", tiny_run(inputs, run_dir))]
    goes_on = [sft(weights), sft(copy("copy"), 3)]
    by_length = {"data__order_by": "response", "sft__steps": "null", "sft__epochs": 0.9}  # 7.2 of 8 rows
    goes_on += [sft(rows, **by_length), sft(rows, **by_length, data__on_change="continue"), sft(rows, **by_length)]
    told, told_elsewhere = run_ranks(_said, 2, sft(inputs, 1), sft(inputs, 1), *refused, *goes_on)
    begun, same, *told = told
    assert begun == ""
    resumed = f"papo: resumed from {last}, step 1"
    assert (
        same == f"{resumed}\npapo: all 1 steps are done: nothing is left to train; a larger sft.steps would go on "
        "from here, another run.dir begins anew\n"
    )
    otherwise = f"take another run.dir (model.checkpoint={last} begins with its weights)"
    or_continue = ", or data.on_change=continue, which goes on with these\n"
    began = f"{inputs}/{{}}, with which this run began; {otherwise}"
    assert (
        told[0] == f"error: data.train: {rows}/rows.jsonl has other rows than {began.format('rows.jsonl')}{or_continue}"
    )
    assert told[1] == f"error: model.path: {template}/model has another chat template than {began.format('model')}\n"
    assert told[2].startswith(f"error: run.dir: {last} is a checkpoint of papo sft, this is papo train")
    changed = "papo: settings that are others than the checkpoint's: sft.steps"
    other = f"model.path: {weights}/model has other weights than {inputs}/model, with which this run began"
    assert told[3].splitlines()[:3] == [
        f"papo: warning: {other}: it goes on with those of {last}",
        resumed,
        f"{changed} 1 -> 2",
    ]
    last = last.with_name("step_00000002")
    assert told[4].splitlines() == [f"papo: resumed from {last}, step 2", f"{changed} 2 -> 3"], "it began with these"
    length = "papo: sft.epochs=0.9: 8 prompts from 8 rows are 4 steps of 2"
    other_rows = (
        f"data.train: {rows}/rows.jsonl has other rows than {tmp_path}/copy/rows.jsonl, with which this run began"
    )
    said, refusal = told[5].splitlines()
    assert said == length and refusal.startswith(f"error: {other_rows}; take")
    assert told[6].splitlines()[:2] == [
        length,
        f"papo: warning: {other_rows}: it goes on with what is there now, of which 6 prompts count as drawn",
    ]
    assert 'data.order_by null -> "response"): it goes on with what is there now' in told[6]
    assert "papo: data.train: 8 rows before, 8 now; after 6 prompts the run goes on at epoch 0, row 6 of 8" in told[6]
    assert told[7].splitlines()[2].startswith("papo: settings that are others"), "it goes on with these by itself"
    done = "all 4 steps are done: nothing is left to train; a larger sft.epochs (and sft.steps, if set) would go on"
    assert done in told[7]
    assert [text.partition("error")[0] for text in told_elsewhere[5:]] == [""] * 5, "the writer speaks for all"


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.distcp"))


def test_what_a_run_saves_and_exports_is_what_the_settings_ask_for(inputs, tmp_path):
    """Checkpoints of weights alone, from which a run goes on with new moments; none; folders on the way."""

    def sft(name: str, steps: int, **settings: Any) -> tuple[str, Config]:
        return "sft", tiny_run(inputs, tmp_path / name, sft__steps=steps, sft__batch_size=2, **settings)

    weights = {"checkpoint__contents": "weights", "checkpoint__save_every": 1}
    exported = {"checkpoint__export_every": 1, "checkpoint__keep_exports": 2, "checkpoint__export_at_end": True}
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/exports").write_text("a file, where the folder belongs")
    runs = [sft("full", 2), sft("weights", 2, **weights), sft("weights", 3, **weights, **exported)]
    runs += [sft("none", 3, checkpoint__contents="none", **exported), sft("blocked", 1, **exported)]
    told, _ = run_ranks(_said, 2, *runs)
    full, last = (tmp_path / name / "checkpoints/step_00000002" for name in ("full", "weights"))
    assert _bytes_of(last) < 0.4 * _bytes_of(full), "weights are a third of a checkpoint in float32"
    assert told[2].splitlines()[:2] == [
        f"papo: resumed from {last}, step 2",
        f"papo: warning: {last} holds no optimizer state (checkpoint.contents=weights): Adam's moments begin anew",
    ]
    assert read_state_file(last)["schedule_steps"] == 2, "the learning rate goes on where it was"
    assert [line["step"] for line in _records(tmp_path / "weights")] == [0, 1, 2]
    assert {path.name for path in (tmp_path / "none").iterdir()} >= {"export", "exports"}
    assert not (tmp_path / "none/checkpoints").exists()
    exports = sorted((tmp_path / "none/exports").iterdir())
    assert [path.name for path in exports] == ["step_00000002", "step_00000003"], "the newest two are kept"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert filecmp.cmp(exports[-1] / name, tmp_path / "none/export" / name, shallow=False), "the same weights"
    assert not filecmp.cmp(exports[0] / "model.safetensors", exports[1] / "model.safetensors", shallow=False)
    assert "the Hugging Face folder of step 1 was not written: rank 0: " in told[4] and "blocked/exports" in told[4]
    assert _records(tmp_path / "blocked")[-1]["step"] == 0 and (tmp_path / "blocked/export/config.json").is_file()


def test_a_step_records_its_flops_and_memory_and_leaves_a_trace_when_asked(inputs, tmp_path):
    """FLOPs of the head by hand: forward and backward of the update, and log-probs of the reference."""
    runs = {"train__steps": 2, "observe__profile_step": 1, "observe__peak_tflops": 0.5}
    runs |= {"train__updates_per_step": 1, "loss__perception_coef": 0.0}
    for ranks in (1, 2):
        run_ranks(_train, ranks, tiny_run(inputs, tmp_path / str(ranks), **runs))
    alone, shared = (_records(tmp_path / str(ranks)) for ranks in (1, 2))
    for one, two in zip(alone, shared, strict=True):
        assert not recorded_at_every_step() - two.keys()
        num_response = round(4 * 3 * one["response_tokens"])
        assert one["flops/head"] == two["flops/head"] == 4 * (2 * num_response * 64 * 272)
        assert one["flops/vision"] > 0 and one["flops/language"] > one["flops/attention"] > 0
        assert two["mfu"] == two["tflops_per_gpu"] / 0.5 > 0
        update = sum(value for name, value in two.items() if name.startswith("flops/")) * 3 / 4
        assert two["tflops_per_gpu"] == pytest.approx(update / two["time/update"] / 2 / 1e12)
        assert two["tokens_per_s"] >= two["tokens_computed_per_s"] > 0
        assert two["tokens_per_s_per_gpu"] == two["tokens_per_s"] / 2 and two["time/step"] > two["time/update"]
        lengths = [two[f"response_tokens_{name}"] for name in ("p50", "p90", "p99", "max")]
        assert lengths == sorted(lengths) == [one[f"response_tokens_{name}"] for name in ("p50", "p90", "p99", "max")]
        if "memory_gib/update" in two:
            stages = ("draw", "generate", "reward", "advantage", "pack", "score", "update", "hand_over")
            assert all(2**-4 < two[f"memory_gib/{stage}"] < 2**6 for stage in stages)
    for rank in range(2):
        with gzip.open(tmp_path / "2" / "profile" / f"rank_{rank}.json.gz") as trace:
            names = {event.get("name") for event in json.load(trace)["traceEvents"]}
        assert {"draw", "generate", "pack", "score", "update", "hand_over"} <= names
        assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= names
    assert len(list((tmp_path / "1" / "profile").iterdir())) == 1


def _records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_updates_that_are_not_finite_change_nothing_and_end_the_run_when_too_many(inputs, tmp_path):
    overflow = {"loss__entropy_coef": 1e39, "train__steps": 4, "optim__max_skipped": 3, "checkpoint__save_every": 1}
    reason = "stopped the run after step 1: optim.max_skipped: 4 updates in a row were skipped; the loss is not finite"
    for told in run_ranks(_stopped, 2, tiny_run(inputs, tmp_path, **overflow)):
        assert told == reason
    for step in metrics(tmp_path):
        assert step["optim/skipped"] == 1 and step["ref_kl"] == 0, "the policy is still the one that it started as"
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir(), "saved before it stopped"


def _train_and_run_out_of_memory(config: Config, full: Config) -> tuple[Failure, tuple[int, int, int, int]]:
    """Trains by `config`, then by `full`, where backward of the second row finds no memory. The failure that this ends
    with; number of rows, and tokens, images and response tokens of the second."""
    import torch

    from megatron_papo import train

    _train(config)
    seen: list[Any] = []
    update = train.update_policy

    def no_memory(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. If reserved memory is large try")

    def updated(optimizer: Any, rows: Any, head: Any, whole: Any) -> Any:
        seen.extend(rows)

        def loss(outputs: Any, row: Any) -> Any:
            value, metrics = whole(outputs, row)
            if row.token_ids_T.equal(rows[1].token_ids_T):
                value.register_hook(no_memory)
            return value, metrics

        return update(optimizer, rows, head, loss)

    with mock.patch.object(train, "update_policy", updated), pytest.raises(ValueError) as caught:
        train.main(full)
    row = seen[1]
    images = 0 if row.grid_thw_I3 is None else len(row.grid_thw_I3)
    return describe(0, caught.value), (len(seen), row.num_tokens, images, row.target_ids_R.numel())


def test_corrected_updates_weigh_what_the_engine_sampled(inputs, tmp_path):
    """In one precision the weights are 1: nothing moves but by rounding. With top-p they are not."""
    config = {"train__steps": 1}
    for name, more in {
        "none": {},
        "truncated": {"loss__correction": "truncated"},
        "cut": {"loss__correction": "truncated", "generation__top_p": 0.7},
    }.items():
        run_ranks(_train, 1, tiny_run(inputs, tmp_path / name, **config, **more))
    engine = tiny_run(inputs, tmp_path / "engine", **config, loss__old_logprobs="rollout")
    full = tiny_run(inputs, tmp_path / "full", **config, train__tokens_per_micro_batch=100)
    ((failure, rows),) = run_ranks(_train_and_run_out_of_memory, 1, engine, full)
    assert (failure.kind, failure.name) == ("value", "OutOfMemoryError")
    assert failure.message == (
        f"stage update, row 2 of {rows[0]} ({rows[1]:,} tokens, {rows[2]} images, {rows[3]} response tokens): CUDA out "
        "of memory. Tried to allocate 20.00 GiB; what helps most: a smaller train.tokens_per_micro_batch, or "
        "model.recompute=full (docs/troubleshooting.md#out-of-memory)"
    )
    ((none,), (truncated,), (cut,), (engine,)) = (
        metrics(tmp_path / name) for name in ("none", "truncated", "cut", "engine")
    )
    assert truncated.pop("correction") == pytest.approx(1, abs=1e-5) and truncated.pop("correction_cut") == 0
    assert truncated == pytest.approx(none, rel=2e-4, abs=2e-5)
    # compared with the engine in the first update alone, where the policy is the one that generated
    assert engine["rollout_gap_max"] < 1e-5
    assert engine == pytest.approx(none, rel=2e-4, abs=2e-5)
    # the engine drew from fewer tokens, each likelier there than in the trainer: every weight is below 1
    assert 0.3 < cut["correction"] < 0.95 and cut["rollout_gap"] > 0.05
    assert cut["rollout_gap_max"] >= cut["rollout_gap"] and cut["rollout_kl"] > 0


def _train_with_a_broken_engine(*configs: Config) -> str:
    """What rank 0 wrote. The engine reports NaN for one token, of the second data-parallel rank's last prompt."""
    from megatron_papo import train
    from megatron_papo.distributed.layout import layout

    whole = train.generate

    def broken(*arguments: Any) -> list[Any]:
        groups = whole(*arguments)
        if layout().data_rank != 1:
            return groups
        first, *others = groups[-1].rollouts
        spoilt = replace(first, rollout_logprobs=(*first.rollout_logprobs[:-1], math.nan))
        return [*groups[:-1], replace(groups[-1], rollouts=(spoilt, *others))]

    said = io.StringIO()
    with mock.patch.object(train, "generate", broken), redirect_stderr(said):
        _train(*configs)
    return said.getvalue()


def test_an_engines_nan_costs_its_update_and_is_named(inputs, tmp_path):
    """Whether the loss reads the engine's log-probs or not, on every rank alike; the other update is made."""
    ways = ("recomputed", "rollout")
    config = {"train__steps": 1, "train__prompts_per_step": 8}
    runs = [tiny_run(inputs, tmp_path / way, loss__old_logprobs=way, **config) for way in ways]
    told, _ = run_ranks(_train_with_a_broken_engine, 2, *runs)
    assert told.count("an update was skipped: ") == 2 and told.count("the engine's") == 2
    for way in ways:
        (step,) = metrics(tmp_path / way)
        assert step["optim/skipped"] == 0.5 and math.isfinite(step["optim/grad_norm"])
        assert math.isnan(float(step["loss/total"])) == (way == "rollout")
        assert math.isnan(float(step["rollout_gap_max"])) == (way == "recomputed")  # the token is of the second update
