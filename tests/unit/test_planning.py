"""The planner: schedules and exchanges by hand, work against the accounting, what fits and why the rest does not."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.costs.hardware import GPUS, Cluster
from megatron_papo.costs.memory import GIB
from megatron_papo.costs.stages import PLANNED_STAGES
from megatron_papo.model.published_shapes import published_models, shape_named
from megatron_papo.model.shape import ModelShape
from megatron_papo.planning.assumptions import Assumptions, factor_of
from megatron_papo.planning.candidates import RECOMPUTE, Candidate, stage_layers_by_cost
from megatron_papo.planning.collectives import all_reduce_s, gather_s
from megatron_papo.planning.estimate import estimate
from megatron_papo.planning.measured_run import planned
from megatron_papo.planning.plan_page import HEADERS, cells
from megatron_papo.planning.published_runs import beside_published
from megatron_papo.planning.ranking import LayoutPlan, plan
from megatron_papo.planning.scale import scale
from megatron_papo.planning.schedule import forward_backward_s, forward_s
from megatron_papo.planning.workload import Workload
from megatron_papo.preflight.check import summary
from tests.support import commands
from tools import predict_update

ROOT = Path(__file__).parents[2]
IDEAL = Assumptions(
    matmul=1, attention=1, memory=1, link=1, network=1, latency_s=0, network_latency_s=0, layer_launch_s=0, row_spread=0
)
H100_NODE = Cluster(GPUS["H100"], 1)
ONE = "train.updates_per_step=1"


def recipe(*words: str) -> Config:
    return load_config(ROOT / "examples" / "papo_g_72b.yaml", words)


@pytest.fixture(scope="module")
def found() -> LayoutPlan:
    shape = shape_named("Qwen2.5-VL-72B")
    return plan(recipe(), shape, Cluster(GPUS["H100"], 8), Assumptions(), Workload.of(recipe(), shape))


def test_a_step_of_dynamic_sampling_generates_more_than_it_trains_on():
    """Updates are planned for what was trained on, rollouts for all that was drawn, round by round."""
    shape = shape_named("Qwen2.5-VL-72B")
    lengths = {"prompt_tokens": 750.0, "image_tokens": 600.0, "response_tokens": 400.0}
    longer = {f"trained/{name}": value for name, value in (lengths | {"response_tokens": 800.0}).items()}

    def seconds(record: dict[str, float], *words: str) -> dict[str, float]:
        return planned(recipe(*words), shape, GPUS["H100"], 64, Assumptions(), record).seconds

    found = seconds({**lengths, **longer, "sampling/prompts": 640.0, "sampling/rounds": 5.0})
    assert found["generate"] == pytest.approx(5 * seconds(lengths, "train.prompts_per_step=128", ONE)["generate"])
    assert found["update"] == pytest.approx(seconds(lengths | {"response_tokens": 800.0})["update"])
    assert found["update"] > seconds(lengths)["update"]


@pytest.mark.parametrize(("stages", "rows"), [(1, 5), (2, 2), (4, 4), (4, 16), (8, 3)])
def test_equal_stages_stand_still_as_the_formula_says(stages: int, rows: int):
    """(p - 1) / (m + p - 1) of the time (Narayanan et al. 2021), whatever forward and backward take."""
    total, bubble = forward_backward_s([1.0] * stages, [2.0] * stages, rows)
    assert total == pytest.approx(3 * (rows + stages - 1))
    assert bubble == pytest.approx((stages - 1) / (rows + stages - 1))


def test_a_slow_stage_sets_the_pace_and_sending_takes_its_time():
    total, _ = forward_backward_s([1.0, 3.0], [2.0, 6.0], 10)
    assert total == pytest.approx(1 + 10 * 9 + 2)  # filled by one forward, emptied by one backward
    assert forward_backward_s([1.0, 1.0], [2.0, 2.0], 1, [0.5])[0] == pytest.approx(6 + 2 * 0.5)
    assert forward_backward_s([1.0] * 3, [2.0] * 3, 1, [0.5, 4.0])[0] == pytest.approx(9 + 2 * 4.5)
    assert forward_s([1.0] * 3, 1, [0.5, 4.0]) == pytest.approx(3 + 4.5)
    assert forward_s([1.0, 3.0], 10) == pytest.approx(4 + 9 * 3) and forward_s([1.0], 0) == 0


def test_exchanges_by_hand():
    """450 GB/s within a node, 50 between nodes; a ring moves (n - 1) / n of the bytes."""
    assert gather_s(450e9, 8, H100_NODE, IDEAL) == pytest.approx(7 / 8)
    assert all_reduce_s(450e9, 2, H100_NODE, IDEAL) == pytest.approx(1.0)
    wide = Cluster(GPUS["H100"], 4)
    assert gather_s(50e9, 4, wide, IDEAL, stride=8) == pytest.approx(3 / 4)
    assert gather_s(450e9, 4, wide, IDEAL, stride=2) == pytest.approx(3 / 4)  # eight ranks: still one node
    late = Assumptions(latency_s=1.0, network_latency_s=10.0)
    assert gather_s(0, 32, wide, late) == pytest.approx(1 + 10 * 2)  # a tree over four nodes
    assert gather_s(1e9, 1, wide, late) == 0


def test_a_first_stage_of_few_layers_also_sends_the_image_tokens_that_later_stages_add():
    """Between two nodes so far apart that a pass takes what sending takes; three levels of DeepStack."""
    shape, far = shape_named("Qwen3-VL-4B"), replace(IDEAL, network=1e-6)
    config = recipe("train.prompts_per_step=2", ONE)
    work = Workload.of(config, shape)

    def score_s(*layers: int) -> float:
        candidate = Candidate(1, 2, 1, layers, "none", "fp32 moments", 1)
        return estimate(candidate, config, shape, Cluster(GPUS["H100"], 2, gpus_per_node=1), far, work).seconds["score"]

    row = work.rows(shape, 1, 2).size(shape)
    image_tokens = row.patches // 4
    for num_layers, levels in ((1, 2), (2, 1), (3, 0), (18, 0)):
        expected = (row.tokens + levels * image_tokens) / row.tokens
        assert score_s(num_layers, 36 - num_layers) / score_s(3, 33) == pytest.approx(expected, rel=1e-3)


def test_layers_are_dealt_by_what_the_ends_do_beside_them():
    assert stage_layers_by_cost(80, 4, 0, 0) == (20, 20, 20, 20)
    assert stage_layers_by_cost(80, 4, 4, 0) == (17, 21, 21, 21)
    assert stage_layers_by_cost(8, 4, 30, 1) == (1, 2, 3, 2)
    assert stage_layers_by_cost(3, 1, 5, 5) == (3,)


def test_an_update_on_one_gpu_takes_its_flops_at_the_peak():
    """Everything ideal and recomputed: forward twice, backward twice a forward, at 989.5 TFLOP/s."""
    shape = shape_named("Qwen2.5-VL-3B")
    config = recipe("model.recompute=full", "train.prompts_per_step=12", "loss.reference_coef=0")
    work = Workload.of(config, shape)
    candidate = Candidate(1, 1, 1, (36,), "full", "fp32 moments", 1)
    alone = Cluster(GPUS["H100"], 1, gpus_per_node=1)
    found = estimate(candidate, config, shape, alone, IDEAL, work)
    rows = work.rows(shape, 1)
    flops = rows.flops(shape).total * rows.num * work.updates
    elementwise = found.seconds["update"] - found.seconds["update/optimizer"] - 4 * flops / 989.5e12
    assert 0 < elementwise < 0.35 * found.seconds["update"]
    assert found.mfu == pytest.approx(3 * flops / found.seconds["update"] / 989.5e12)
    assert found.bubble == 0 and found.seconds["update/gradients"] == 0


@pytest.mark.parametrize("spec", ["local", "transformer_engine"])
def test_each_recomputation_takes_more_time_and_less_memory_than_the_one_before(spec):
    shape = shape_named("Qwen2.5-VL-3B")
    config = load_config(ROOT / "examples" / "papo_g_3b.yaml", (f"model.spec={spec}",))
    work, alone = Workload.of(config, shape), Cluster(GPUS["H100"], 1, gpus_per_node=1)
    seconds, held = [], []
    for recompute in RECOMPUTE:
        candidate = Candidate(1, 1, 1, (36,), recompute, "bf16 moments", 1)
        found = estimate(candidate, config, shape, alone, Assumptions(), work)
        seconds.append(found.seconds["update"])
        held.append(found.stages[0].activations)
    assert RECOMPUTE == ("none", "selective", "mlp", "full")
    assert seconds == sorted(seconds) and held == sorted(held, reverse=True)
    none, selective, mlp, full = seconds
    assert selective / none < 1.05 and 1.1 < mlp / none < 1.2 and 1.25 < full / none < 1.34
    # of the layers' products a third is forward, and of that the first linear's share 2 F of 3 F + 2 (A + G) widths
    assert (mlp - selective) / (full - none) < 2 * 11008 / (3 * 11008 + 2 * (2048 + 256))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(
    ("name", "model", "tensor", "data", "layers"),
    [
        ("papo_g_3b", "Qwen2.5-VL-3B", 1, 8, (36,)),
        ("papo_g_7b", "Qwen2.5-VL-7B", 2, 4, (28,)),
        ("papo_g_7b", "Qwen3-VL-8B", 4, 1, (1, 35)),
        ("dapo_7b", "Qwen2.5-VL-7B", 4, 2, (28,)),
        ("papo_g_7b_fp8", "Qwen2.5-VL-7B", 2, 2, (13, 15)),
        ("papo_g_72b", "Qwen2.5-VL-72B", 8, 2, (19, 20, 21, 20)),
        ("papo_g_qwen3_vl_32b", "Qwen3-VL-32B", 8, 4, (64,)),
    ],
)
def test_plan_and_check_print_the_same_memory(name, model, tensor, data, layers, recompute):
    """Whatever the lengths that seconds are planned for: the data says nothing of the fullest row."""
    shape, config = shape_named(model), load_config(ROOT / "examples" / f"{name}.yaml")
    candidate = Candidate(tensor, len(layers), data, layers, recompute, "bf16 moments", tensor)
    num_ranks = tensor * len(layers) * data
    cluster = Cluster(GPUS["H100"], max(1, num_ranks // 8))
    printed = dict(zip(HEADERS, _cells(candidate, config, shape, cluster, image_tokens=600), strict=True))
    parts = {part: printed[f"{part} GiB"] for part in ("weights", "gradients", "optimizer", "activations")}
    longer = dict(zip(HEADERS, _cells(candidate, config, shape, cluster, image_tokens=50), strict=True))
    assert parts == {part: longer[f"{part} GiB"] for part in parts} and printed["update s"] != longer["update s"]
    checked = summary("train", candidate.applied(config), shape, num_ranks)
    assert "weights {weights}, gradients {gradients}, optimizer {optimizer}, ".format(**parts) in checked
    assert f" and about {parts['activations']} of activations (full rows of 16,384 tokens, 50% of images" in checked


def _cells(candidate: Candidate, config: Config, shape: ModelShape, cluster: Cluster, **lengths: int) -> list[str]:
    work = Workload.of(config, shape, **lengths)
    return cells(estimate(candidate, config, shape, cluster, Assumptions(), work))


def test_a_measured_step_is_planned_with_rows_of_its_own_lengths():
    """Pictures of few tokens take less memory than those of `papo check`."""
    shape, config = shape_named("Qwen2.5-VL-7B"), load_config(ROOT / "examples" / "papo_g_7b.yaml")
    peaks = [
        planned(config, shape, GPUS["H100"], 8, Assumptions(), lengths).fullest.activations
        for images in (50.0, 600.0, 1200.0)
        for lengths in ({"prompt_tokens": images + 150, "image_tokens": images, "response_tokens": 100.0},)
    ]
    assert peaks == sorted(set(peaks))


def test_every_layout_is_found_or_told_why_not(found):
    names = {each.candidate.name for each in found.fitting} | {each.name for each in found.reasons()}
    every = {
        f"TP{t} PP{p} DP{64 // t // p}"
        for t in (1, 2, 4, 8, 16, 32, 64)
        for p in (1, 2, 4, 8, 16, 32, 64)
        if t * p <= 64
    }
    assert names == every
    reasons = {each.name: each.reason for each in found.reasons()}
    assert reasons["TP16 PP1 DP4"].startswith("tensor ranks beyond the 8 of a node")
    assert reasons["TP1 PP1 DP64"].startswith("stage 0 needs 4") and "gradients 273.5" in reasons["TP1 PP1 DP64"]
    assert all(each.reason for each in found.reasons())


def test_what_fits_fits_and_is_sorted(found):
    has = (GPUS["H100"].memory_gib - 6) * GIB
    steps = [each.step_s for each in found.fitting]
    assert steps == sorted(steps) and len(steps) > 50
    for each in found.fitting:
        assert each.peak <= has * 1.0001, each.candidate
        assert (
            sum(each.candidate.layers) == 80
            and each.candidate.tensor * each.candidate.pipeline * each.candidate.data == 64
        )
    assert found.best.candidate.tensor == 8, "eight tensor ranks on NVLink: what the recipe has"
    assert 0.2 < found.best.mfu < 0.6


def test_settings_of_a_plan_are_settings(found, tmp_path):
    from megatron_papo.planning.plan_page import overrides_yaml

    (tmp_path / "layout.yaml").write_text(overrides_yaml(found.best, GPUS["H100"].memory_gib))
    tree = yaml.safe_load((tmp_path / "layout.yaml").read_text())
    tree["extends"] = str(ROOT / "examples" / "papo_g_72b.yaml")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "run.yaml")
    assert config.parallel.tensor == found.best.candidate.tensor
    assert tuple(config.parallel.pipeline_layers or ()) == found.best.candidate.layers


def test_more_gpus_are_never_slower_and_longer_answers_never_faster():
    shape, config = shape_named("Qwen2.5-VL-7B"), recipe()
    steps = [
        plan(config, shape, Cluster(GPUS["H100"], nodes), Assumptions(), Workload.of(config, shape)).best.step_s
        for nodes in (1, 2, 4)
    ]
    assert steps == sorted(steps, reverse=True)
    longer = Workload.of(config, shape, response_tokens=1024)
    assert plan(config, shape, Cluster(GPUS["H100"], 4), Assumptions(), longer).best.step_s > steps[2]


@pytest.mark.parametrize("name", list(published_models()))
def test_published_names_with_and_without_their_ending(name):
    assert shape_named(f"{name}-Instruct") == shape_named(name)


def _tool(*words: str) -> subprocess.CompletedProcess[str]:
    return commands.run(ROOT / "tools" / "plan.py", *words)


def test_the_tool_prints_writes_and_refuses(tmp_path):
    out, page = tmp_path / "layout.yaml", tmp_path / "plan.md"
    words = ("--model", "Qwen2.5-VL-7B", "--nodes", "1", "--explain", "--out", str(out), "--markdown", str(page))
    done = _tool(*words)
    assert done.returncode == 0, done.stderr
    assert "Memory is that of full rows of 16,384 tokens, 50% of images, 50% of responses, as" in done.stdout
    assert "prompts of 150 text and 600 image tokens, responses of 512.\n" in done.stdout
    assert "ways fit" in done.stdout and "TP16" not in done.stdout
    assert yaml.safe_load(out.read_text())["parallel"]["distributed_optimizer"] is True
    assert page.read_text().startswith("| layout | stages |")
    ways = ("--model", "Qwen2.5-VL-3B", "--nodes", "1", "--gpus-per-node", "1", "--every", "--rows", "12")
    assert _tool(*ways, "--markdown", str(page)).returncode == 0
    assert page.read_text().count("\n| TP1 PP1 DP1 ") == 12  # four recomputations of three optimizers
    for words, line in (
        (("--model", "Qwen3", "--nodes", "1"), "plan: error: --model: Qwen3 is none of Qwen2.5-VL-3B, "),
        (
            ("--model", "Qwen2.5-VL-7B", "--nodes", "1", "--gpu", "MI300"),
            "plan: error: --gpu: MI300 is none of A100-40GB, ",
        ),
        (
            ("--model", "Qwen2.5-VL-72B", "--nodes", "1", "--gpus-per-node", "1"),
            "plan: error: cluster: 1 x H100 have 80 GiB, ",
        ),
        (("--model", "Qwen2.5-VL-72B", "--nodes", "1"), "plan: error: Qwen2.5-VL-72B fits 8 x H100 in no layout"),
        (("--model", "Qwen2.5-VL-7B", "--nodes", "1", "train.stepps=1"), "plan: error: train.stepps: unknown key"),
    ):
        done = _tool(*words)
        assert done.returncode == 2 and done.stderr.startswith(line), done.stderr


def test_assumptions_are_read_and_checked(tmp_path):
    assert all(hasattr(Assumptions(), factor_of(stage)) for stage in PLANNED_STAGES)
    Assumptions(matmul=0.5).save(tmp_path / "a.json")
    assert Assumptions.load(tmp_path / "a.json") == Assumptions(matmul=0.5)
    (tmp_path / "b.json").write_text('{"matmull": 1}')
    with pytest.raises(ValueError, match=r"b\.json: matmull: no such assumption"):
        Assumptions.load(tmp_path / "b.json")


def test_published_runs_of_megatron_are_met_within_a_tenth():
    for run, predicted in beside_published(Assumptions()):
        middle = sum(run.published) / 2
        assert abs(predicted / middle - 1) < 0.1, (run.name, run.gpus, predicted)


def test_the_same_batch_on_ever_more_nodes_runs_out_of_rows_and_a_growing_one_does_not():
    shape, config = shape_named("Qwen2.5-VL-72B"), recipe()
    lengths = {"text_tokens": 150, "image_tokens": 600, "response_tokens": None}
    strong, weak = (
        scale(config, shape, GPUS["H100"], [8, 64], Assumptions(), lengths, weak=weak) for weak in (False, True)
    )
    assert [point.prompts for point in strong] == [384, 384] and [point.prompts for point in weak] == [384, 3072]
    assert strong[1].best.step_s < strong[0].best.step_s and strong[1].efficiency < weak[1].efficiency < 1.05
    assert strong[0].efficiency == weak[0].efficiency == 1 and strong[1].breaks and not strong[0].breaks


def test_a_cluster_that_cannot_hold_the_weights_is_refused():
    shape = shape_named("Qwen2.5-VL-72B")
    with pytest.raises(ConfigError, match="the weights alone take 137: no layout can hold the model"):
        plan(recipe(), shape, Cluster(GPUS["H100"], 1, 1), Assumptions(), Workload.of(recipe(), shape))


def test_the_table_of_predicted_updates_is_in_order_of_what_recomputation_costs():
    name = "Qwen2.5-VL-3B"
    ranks, layout = predict_update.LAYOUTS[name]
    found = [predict_update.predicted(name, ranks, layout, "bf16 moments", recompute) for recompute in RECOMPUTE]
    assert [each.candidate.name for each in found] == ["TP1 PP1 DP1"] * len(RECOMPUTE)
    held, rates = [each.stages[0].training for each in found], [each.mfu for each in found]
    assert held == sorted(held, reverse=True) and rates == sorted(rates, reverse=True)
