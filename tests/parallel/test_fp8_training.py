"""Training in emulated FP8: curves near those without, the way back from it, and a run that resumes.

Four language-model layers of which the middle two are in FP8, unless a test says otherwise.
"""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import pytest

from megatron_papo.config import Config, dump_config
from tests.support.commands import papo
from tests.support.ranks import run_ranks
from tests.support.tiny_run import CERTIFIED, metrics, tiny_run

REPO = Path(__file__).resolve().parents[2]
RECIPES = {
    "tensorwise": {},
    "delayed": {"fp8__first_layers": 0, "fp8__last_layers": 0},
    "blockwise": {},
    "mxfp8": {},
}
MEASURED = {"fp8/gap_mean", "fp8/gap_max", "fp8/amax_max", "fp8/saturated", "fp8/flushed"}
MODEL = {"layers": 4}


def _train(*configs: Config) -> str:
    """What the runs said on standard error."""
    from megatron_papo.train import main

    told = io.StringIO()
    with redirect_stderr(told):
        for config in configs:
            main(config)
    return told.getvalue()


def _train_as_on_an_h100(*configs: Config) -> None:
    """The records are those of a GPU with known peaks."""
    with mock.patch("megatron_papo.training.recorder.device_name", return_value="NVIDIA H100 80GB HBM3"):
        _train(*configs)


def _sft(*configs: Config) -> None:
    from megatron_papo.sft import main

    for config in configs:
        main(config)


@pytest.mark.fast
def test_papo_train_in_fp8_as_a_user_types_it(inputs, tmp_path):
    settings = tmp_path / "run.yaml"
    fp8 = {"fp8__recipe": "tensorwise", "fp8__gap_every": 2}
    config = tiny_run(inputs, tmp_path / "run", train__steps=3, **fp8, **CERTIFIED)
    settings.write_text(dump_config(config))
    done = papo("train", settings)
    assert done.returncode == 0, done.stderr
    steps = metrics(tmp_path / "run")
    assert [step["fp8/on"] for step in steps] == [1.0, 1.0, 1.0]
    assert [step.keys() >= MEASURED for step in steps] == [True, False, True]
    for step in (steps[0], steps[2]):
        # 8 products with operands rounded to 4 bits: a gap there is, and it is far from that of other weights
        assert 1e-4 < step["fp8/gap_mean"] < step["fp8/gap_max"] < 1.0
        assert step["fp8/amax_max"] > 1.0 and step["fp8/saturated"] == 0.0 and 0.0 < step["fp8/flushed"] < 0.05
    assert "FP8" not in done.stderr  # nothing to warn of


def test_beyond_the_limit_the_run_is_the_one_without_fp8(inputs, tmp_path):
    """From the first step on, which measures before it scores; and after it is resumed, whatever the limit is then."""
    kept = {"checkpoint__save_every": 1, "train__steps": 2}
    plain = tiny_run(inputs, tmp_path / "plain", **kept | {"train__steps": 3})
    tight = {"fp8__recipe": "tensorwise", "fp8__gap_limit": 1e-9, "fp8__gap_every": 1}
    first = tiny_run(inputs, tmp_path / "run", **kept, **tight)
    resumed = tiny_run(inputs, tmp_path / "run", **kept | {"train__steps": 3}, fp8__recipe="tensorwise")
    (told,) = run_ranks(_train, 1, plain, first, resumed)
    expected, found = metrics(tmp_path / "plain"), metrics(tmp_path / "run")
    assert [step["fp8/on"] for step in found] == [0.0, 0.0, 0.0]
    assert [step.keys() >= MEASURED for step in found] == [True, False, False]
    for want, got in zip(expected, found, strict=True):
        assert {name: value for name, value in got.items() if not name.startswith("fp8/")} == want
    warnings = [line for line in told.splitlines() if "FP8" in line]
    assert len(warnings) == 1 and "is off from step 0 on: mean log-prob gap" in warnings[0]
    assert "> fp8.gap_limit=1e-09" in warnings[0]


def test_scores_and_updates_are_set_apart(inputs, tmp_path):
    """The first update compares with itself, so that scores alone decide about the KL to the reference; the gradient is
    the update's, and so is the share of FP8's peak."""
    wanted = {"train__steps": 1, "train__updates_per_step": 1, "loss__reference_coef": 0.1, "fp8__recipe": "tensorwise"}
    which = {"none": (False, False), "score": (True, False), "update": (False, True), "both": (True, True)}
    configs = [
        tiny_run(inputs, tmp_path / name, fp8__score=score, fp8__update=update, **wanted)
        for name, (score, update) in which.items()
    ]
    run_ranks(_train_as_on_an_h100, 1, *configs)
    found = {name: metrics(tmp_path / name)[0] for name in which}
    records = {name: json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in which}
    of_float32 = 67.0 / 1979.0
    for name, (_, update) in which.items():
        expected = pytest.approx(records[name]["mfu"] * of_float32) if update else None
        assert records[name].get("mfu_fp8") == expected, name
    kl = {name: step["ref_kl"] for name, step in found.items()}
    # an untouched policy is its reference: rounding is all that lies between them, where they are rounded differently
    assert kl["none"] == pytest.approx(0.0, abs=1e-10) and kl["both"] == pytest.approx(0.0, abs=1e-10)
    assert kl["score"] > 1e-6 and kl["update"] > 1e-6
    norms = {name: step["optim/grad_norm"] for name, step in found.items()}
    assert norms["both"] != norms["none"] and norms["update"] != norms["score"]
    assert "fp8/gap_mean" not in found["none"] and found["score"]["fp8/gap_mean"] == found["update"]["fp8/gap_mean"]


def test_every_recipe_trains_near_the_run_without(inputs, tmp_path):
    """Supervised, so that the curve is of one loss on the same tokens.

    The bound: a value rounded to E4M3 is off by at most 2 ** -4 of itself, evenly spread, so by 2 ** -4 / sqrt(3) in
    the mean square, and a product of two by sqrt(2) times that. Eight such products (of `delayed` sixteen), if each
    moved the whole hidden state, move a logit by sqrt(8) times that share of the logits' spread, and a log-prob, the
    difference of two, by sqrt(2) times that. Tokens' errors have signs of their own: their mean is within four
    standard errors. Logits of a random model are normal, and so its loss is log(vocabulary) + spread ** 2 / 2. To it
    comes the gradients' error as a share of what the loss has fallen by: operands off by at most 2 ** -3 (E5M2) and 2
    ** -4.
    """
    common = {"sft__steps": 6, "sft__batch_size": 8, "optim__lr": 3e-3, "optim__warmup_steps": 0}
    configs = [tiny_run(inputs, tmp_path / "off", **common)]
    configs += [
        tiny_run(inputs, tmp_path / recipe, fp8__recipe=recipe, **common, **more) for recipe, more in RECIPES.items()
    ]
    run_ranks(_sft, 1, *configs)
    plain = [step["loss/total"] for step in metrics(tmp_path / "off")]
    assert plain[0] - plain[-1] > 1.0  # it learns: otherwise any run would be near it
    spread, num_tokens = math.sqrt(2 * (plain[0] - math.log(272))), 8 * len("it is 0.")
    for recipe in RECIPES:
        found = [step["loss/total"] for step in metrics(tmp_path / recipe)]
        products = 16 if recipe == "delayed" else 8
        of_a_token = math.sqrt(2 * products) * math.sqrt(2) * 2**-4 / math.sqrt(3) * spread
        forward = 4 * of_a_token / math.sqrt(num_tokens)
        for want, got in zip(plain, found, strict=True):
            assert got != want  # FP8 it was
            assert abs(got - want) <= forward + (2**-3 + 2**-4) * (plain[0] - want), recipe
        print(recipe, forward, [round(got - want, 4) for want, got in zip(plain, found)])


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"parallel__tensor": 2, "parallel__sequence": True}),
        (2, {"parallel__pipeline": 2}),
        (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "train__fixed_rows": True}),
    ],
)
def test_every_layout_measures_the_same(ranks, layout, inputs, tmp_path):
    """The gap, and what is counted of all layers on all ranks; mxfp8 has the same scales in every layout. One prompt
    is one row in all of them."""
    wanted = {
        "fp8__recipe": "mxfp8",
        "train__steps": 1,
        "train__prompts_per_step": 1,
        "train__updates_per_step": 1,
        "train__tokens_per_micro_batch": 512,
        "data__shuffle": False,
    }
    run_ranks(_train, 1, tiny_run(inputs, tmp_path / "one", **wanted))
    run_ranks(_train, ranks, tiny_run(inputs, tmp_path / "many", **wanted, **layout))
    (expected,), (found,) = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    for name in sorted(MEASURED):
        # sums over ranks differ in their last bit, which can turn single values of thousands to the next 8-bit float
        assert found[name] == pytest.approx(expected[name], rel=0.02), name
    assert expected["fp8/gap_mean"] > 1e-4 and expected["fp8/flushed"] > 0


def test_bfloat16_parameters_and_unequal_data_parallel_ranks(inputs, tmp_path):
    """Delayed scales among them: ranks with unequal numbers of rows must not wait for one another."""
    wanted = {"train__steps": 2, "model__dtype": "bfloat16", "fp8__recipe": "delayed", **RECIPES["delayed"]}
    wanted |= {
        "fp8__vision": True,
        "fp8__gap_limit": 9,
        "train__prompts_per_step": 6,
        "train__tokens_per_micro_batch": 120,
    }
    run_ranks(_train, 2, tiny_run(inputs, tmp_path, **wanted))
    steps = metrics(tmp_path)
    assert [step["fp8/on"] for step in steps] == [1.0, 1.0]
    assert all(math.isfinite(step["optim/grad_norm"]) and step["optim/grad_norm"] > 0 for step in steps)


def _measure_with_noise_in_the_padding(config: Config) -> None:
    from megatron_papo.model.policy import HeadRequest
    from megatron_papo.training.precision_guard import measure, over_ranks
    from megatron_papo.training.session import open_run
    from tests.parallel.test_pipeline import _rows

    with open_run(config) as run:
        row = max(_rows(run, (0, 1)), key=lambda row: -row.num_tokens % 16)
        assert row.num_tokens % 16

        def disturb(_, inputs):
            hidden = inputs[0].clone()
            hidden[-1] += 1e-3
            return (hidden, *inputs[1:])

        run.policy.language.decoder.layers[1].mlp.linear_fc2.register_forward_pre_hook(disturb)
        over_ranks(measure(run.policy, [row], HeadRequest()))


def test_padding_that_is_not_zero_is_found(inputs, tmp_path):
    with pytest.raises(Exception, match=r"an FP8 layer reads \d\S+ in a place of padding"):
        run_ranks(_measure_with_noise_in_the_padding, 1, tiny_run(inputs, tmp_path, fp8__recipe="tensorwise"))


def test_a_row_longer_than_the_fixed_length_is_refused(inputs, tmp_path):
    config = tiny_run(inputs, tmp_path, train__fixed_rows=True, train__tokens_per_micro_batch=20)
    with pytest.raises(Exception, match=r"train\.tokens_per_micro_batch is 20"):
        run_ranks(_train, 1, config)
