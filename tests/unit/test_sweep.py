"""Points from SWEEP.yaml, waves of arrays, and figures against numbers by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_papo.cluster.attempts import Attempt, write_attempt
from megatron_papo.cluster.render import array_script
from megatron_papo.cluster.slurm import QueuedJob
from megatron_papo.cluster.submit import SubmissionPlan, write
from megatron_papo.cluster.supervised_job import SupervisedJob
from megatron_papo.config import ConfigError, load_config
from megatron_papo.costs.stages import PLANNED_STAGES
from megatron_papo.sweep.gather import Row, Spread, gather, measured_steps, spread_of
from megatron_papo.sweep.plot import compared_figure, draw, draw_compared, sweep_figure
from megatron_papo.sweep.points import Point, Sweep, load_sweep, points_of
from megatron_papo.sweep.run_sweep import begin
from megatron_papo.sweep.states import State, states_of, write_refused
from megatron_papo.sweep.submit_points import waves_of
from megatron_papo.sweep.sweep_page import markdown, print_table, write_tables

REPO = Path(__file__).parents[2]
EIGHT = ["cluster.gpus_per_node=8", "train.prompts_per_step=96", "train.updates_per_step=1"]


def write_sweep(folder: Path, **changes: object) -> Path:
    tree = {
        "name": "s",
        "dir": str(folder / "out"),
        "scaling": "strong",
        "steps": 4,
        "overrides": EIGHT,
        "points": [{"ranks": 4}, {"nodes": 2}],
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree | changes))
    return folder / "sweep.yaml"


def settings(point: Point) -> dict[str, object]:
    config = load_config(None, point.overrides)
    cluster = config.cluster
    return {
        "ranks": cluster.num_ranks,
        "nodes": cluster.nodes,
        "gpus": cluster.gpus_per_node,
        "prompts": config.train.prompts_per_step,
        "steps": config.train.steps,
    }


def test_responses_have_one_length_unless_the_sweep_says_otherwise(tmp_path: Path):
    (point, _) = points_of(load_sweep(write_sweep(tmp_path)))
    assert load_config(None, point.overrides).generation.ignore_eos
    (point, _) = points_of(load_sweep(write_sweep(tmp_path, overrides=[*EIGHT, "generation.ignore_eos=false"])))
    assert not load_config(None, point.overrides).generation.ignore_eos


def test_points_of_strong_and_of_weak_scaling(tmp_path: Path):
    points = points_of(load_sweep(write_sweep(tmp_path)))
    assert [point.name for point in points] == ["ranks_4", "nodes_2"]
    assert [point.number for point in points] == [1, 2]
    assert settings(points[0]) == {"ranks": 4, "nodes": 1, "gpus": 4, "prompts": 96, "steps": 4}
    assert settings(points[1]) == {"ranks": 16, "nodes": 2, "gpus": 8, "prompts": 96, "steps": 4}
    assert points[1].run_dir == tmp_path / "out" / "points" / "nodes_2"

    odd = [{"ranks": 4}, {"ranks": 6}, {"ranks": 16}, {"ranks": 12}]
    weak = points_of(load_sweep(write_sweep(tmp_path, scaling="weak", points=odd), ["train.prompts_per_step=6"]))
    assert [settings(point)["prompts"] for point in weak[:3]] == [6, 9, 24]
    assert weak[3].fault == "ranks: 12 are no whole number of nodes of 8"
    uneven = points_of(load_sweep(write_sweep(tmp_path, scaling="weak", points=odd), ["train.prompts_per_step=5"]))
    assert uneven[1].fault == "train.prompts_per_step: 5 x 6 / 4 is no whole number"


def test_ranks_without_gpus(tmp_path: Path):
    own = ["cluster.gpus_per_node=0", "cluster.ranks_per_node=2"]
    points = points_of(load_sweep(write_sweep(tmp_path, overrides=own, points=[{"ranks": 1}, {"ranks": 4}])))
    found = [load_config(None, point.overrides).cluster for point in points]
    assert [(cluster.nodes, cluster.gpus_per_node, cluster.ranks_per_node) for cluster in found] == [
        (1, 0, 1),
        (2, 0, 2),
    ]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"scaling": "both"}, "scaling: Input should be 'strong' or 'weak', got 'both'"),
        ({"stepz": 3}, "stepz: unknown key"),
        ({"points": [{"ranks": 0}]}, "points.0.ranks: Input should be greater than or equal to 1, got 0"),
        ({"points": [{"ranks": 1, "nodes": 1}]}, "points.0: takes one of ranks and nodes"),
        ({"points": [{"ranks": 1}, {"ranks": 1}]}, "points: 1 names twice: ranks_1"),
        ({"warm_up": 4}, "warm_up: leaves out 4 of 4 steps"),
        ({"overrides": ["run.dir=x"]}, "overrides: run.dir: the sweep sets it"),
        ({"overrides": ["model.path"]}, "overrides: model.path: is written key.path=value"),
        (
            {"points": [{"ranks": 1, "overrides": ["train.prompts_per_step=4"]}]},
            "points.0: overrides: train.prompts_per_step: the sweep sets it",
        ),
        ({"dir": "a\nb"}, r"dir: holds \n, a character that does not show"),
        ({"name": "a/b"}, "name: 'a/b' is no name of a folder: letters, digits, dot, dash, underscore"),
    ],
)
def test_a_file_that_cannot_be_is_one_line_with_file_and_key(tmp_path: Path, changes, fault: str):
    path = write_sweep(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        load_sweep(path)
    assert str(error.value) == f"{path}: {fault}"


def test_a_missing_key_and_a_missing_file(tmp_path: Path):
    (tmp_path / "half.yaml").write_text("name: a\nscaling: weak\npoints: [{ranks: 1}]\n")
    for path, fault in ((tmp_path / "half.yaml", "dir: is missing"), (tmp_path / "no.yaml", "no such sweep file")):
        with pytest.raises(ConfigError) as error:
            load_sweep(path)
        assert str(error.value) == f"{path}: {fault}"


@pytest.mark.parametrize("path", sorted((REPO / "examples" / "sweeps").glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_sweeps(path: Path):
    points = points_of(load_sweep(path))
    config_file = load_sweep(path).config
    assert len(points) >= 3 and not [point.fault for point in points if point.fault]
    assert len({load_config(config_file, point.overrides).run.dir for point in points}) == len(points)


@pytest.mark.parametrize(
    ("sizes", "limit", "busy", "waves"),
    [
        ([3, 1, 2], None, 0, [0, 0, 0]),
        ([1, 1, 1], 1, 0, [0, 1, 2]),
        ([3, 1, 1, 2], 2, 0, [0, 1, 1, 2]),  # three tasks, two at a time
        ([1, 1], 2, 1, [0, 1]),
        ([1], 1, 1, [1]),
    ],
)
def test_no_wave_has_more_jobs_than_the_limit(sizes, limit, busy, waves):
    assert waves_of(sizes, limit, busy) == waves


def test_an_array_becomes_the_script_of_its_task():
    scripts = {1: Path("/runs/a b/job.sh"), 3: Path("/runs/c/job.sh")}
    text = array_script(["--array=1,3%2"], scripts, work_dir=Path("/w"), folder=Path("/out"), made_from="sweep")
    assert text.splitlines() == [
        "#!/bin/bash",
        "# Made by: sweep",
        "#SBATCH --array=1,3%2",
        "#SBATCH --chdir=/w",
        "#SBATCH --output=/out/job_%A_%a.log",
        "",
        "case $SLURM_ARRAY_TASK_ID in",
        "  1) exec bash '/runs/a b/job.sh' ;;",
        "  3) exec bash /runs/c/job.sh ;;",
        "esac",
        'echo "papo: error: no script for task $SLURM_ARRAY_TASK_ID" >&2',
        "exit 2",
    ]


def test_a_task_names_itself_and_not_its_array(monkeypatch: pytest.MonkeyPatch):
    """SLURM_JOB_ID of one task is the array's: `scontrol requeue 12` would take all of its tasks."""
    for name, value in {"JOB_ID": "12", "JOB_NODELIST": "node1", "JOB_NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert SupervisedJob.here().id == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert SupervisedJob.here().id == "12_3"


def record(step: int, ranks: int, tokens_per_s: float, update_s: float, generate_s: float) -> dict[str, float]:
    planned = {f"planned/time/{stage}": 0.0 for stage in PLANNED_STAGES}
    planned |= {"planned/time/update": 2.0 / ranks, "planned/time/generate": 1.0 / ranks}
    return planned | {
        "step": step,
        "ranks": ranks,
        "tokens_per_s": tokens_per_s,
        "time/update": update_s,
        "time/generate": generate_s,
        "time/save": 100.0,  # no part of a step
        "memory_gib/update": 2.0,
        "memory/generate": 1.0 * 2**30,
    }


def put(point: Point, records: list[dict[str, float]]) -> None:
    config = load_config(None, point.overrides)
    write(SubmissionPlan(config, "", "", ()))
    (point.run_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def two_points(tmp_path: Path, **changes: object) -> tuple[Sweep, list[Point]]:
    sweep = load_sweep(write_sweep(tmp_path, points=[{"ranks": 2}, {"ranks": 8}, {"ranks": 12}], **changes))
    points = points_of(sweep)
    put(points[0], [record(0, 2, 1.0, 90, 90), record(1, 2, 100, 4, 2), record(2, 2, 80, 5, 2), record(3, 2, 90, 6, 2)])
    put(points[1], [record(0, 8, 1.0, 90, 90), record(1, 8, 180, 2, 1)])
    return sweep, points


def test_figures_are_medians_after_the_warm_up_against_the_first_point(tmp_path: Path):
    sweep, points = two_points(tmp_path)
    states = {point.name: State("done") for point in points} | {"ranks_12": State("refused", "no whole nodes")}
    first, second, refused = gather(sweep, points, states)
    assert first.figures["tokens_per_s"] == Spread(90, 80, 100)
    assert first.figures["tokens_per_s_per_rank"] == Spread(45, 40, 50)
    assert first.figures["step_s"] == Spread(7, 6, 8)
    assert first.figures["update_s"] == Spread(5, 4, 6)
    assert first.figures["memory_gib"] == Spread(2, 2, 2)
    assert first.figures["planned_step_s"].median == 1.5
    assert first.figures["planned_tokens_per_s"].median == pytest.approx(400)  # of 400, 373 and 480
    assert (first.speed_up, first.ideal, first.efficiency, first.num_steps) == (1.0, 1.0, 1.0, 3)
    assert (second.speed_up, second.ideal, second.efficiency, second.layout) == (2.0, 4.0, 0.5, "1x1x8")
    assert "mfu" not in first.figures
    assert (refused.figures, refused.speed_up, refused.ranks) == ({}, None, 12)


def test_a_planner_fitted_to_the_first_point_forecasts_the_others(tmp_path: Path):
    sweep, points = two_points(tmp_path, calibration="first")
    first, second, _ = gather(sweep, points, {point.name: State("done") for point in points})
    # measured over planned of the first: update 5 / 1, generate 2 / 0.5
    assert first.figures["planned_step_s"].median == pytest.approx(7.0)
    assert second.figures["planned_update_s"].median == pytest.approx(0.25 * 5)
    assert second.figures["planned_generate_s"].median == pytest.approx(0.125 * 4)
    assert second.figures["planned_tokens_per_s"].median == pytest.approx(180 * 3 / 1.75)


def attempt(number: int, job: str, end: str, reason: str = "", saved: int = 0) -> Attempt:
    return Attempt(number, job, "node1", 1, 0.0, 0, saved, 0, 0.0, end, 1.0, 0, reason)


def test_a_resumed_run_warms_up_again(tmp_path: Path):
    sweep, points = two_points(tmp_path)
    write_attempt(points[0].run_dir, attempt(1, "7_1", "saved"))
    write_attempt(points[0].run_dir, attempt(2, "8_1", "done", saved=2))
    assert [found["step"] for found in measured_steps(points[0], 1)] == [1, 3]
    assert sweep.warm_up == 1


def job(state: str, task: int, run_dir: Path) -> QueuedJob:
    return QueuedJob(f"7_{task}", state, 1, "Resources", "0:01", str(run_dir))


def submitted(point: Point) -> None:
    entry = {"job": f"7_{point.number}", "submitted": 0.0, "nodes": 1, "chain_position": 1, "chain_length": 1}
    folder = point.run_dir / "cluster"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.jsonl").write_text(json.dumps(entry | {"work_dir": "/"}) + "\n")


def test_how_points_stand(tmp_path: Path):
    """From Slurm's queue while it knows, from the folder for good."""
    labels = ("new", "queued", "runs", "done", "raised", "cancelled", "gone", "asked", "refused", "nothing")
    listed = [{"ranks": 1, "name": name} for name in labels]
    sweep = load_sweep(write_sweep(tmp_path, points=listed, steps=2))
    points = {point.name: point for point in points_of(sweep)}
    sweep.folder.mkdir()
    write_refused(sweep, {"refused": "sbatch: no"})
    for name in labels[1:-2] + labels[-1:]:
        submitted(points[name])
    put(points["done"], [record(step, 1, 1, 1, 1) for step in range(2)])
    write_attempt(points["done"].run_dir, attempt(1, "7_4", "done"))
    write_attempt(points["raised"].run_dir, attempt(1, "7_5", "failed", "papo: rank 0 failed: OSError: down"))
    asked = attempt(1, "7_8", "stopped", "papo: rank 0 failed: AskedToStop: nothing is saved")
    write_attempt(points["asked"].run_dir, replace(asked, failure="AskedToStop"))
    log = points["gone"].run_dir / "cluster" / "job_7_7.log"
    log.write_text("papo: error: model.path: no such file\npapo: error: data.train: names none\n")
    jobs = [job("PENDING", 2, points["queued"].run_dir), job("RUNNING", 3, points["runs"].run_dir)]
    jobs += [job("FAILED", 5, points["raised"].run_dir), job("CANCELLED", 6, points["cancelled"].run_dir)]
    found = states_of(sweep, list(points.values()), jobs)
    assert {name: (state.word, state.reason) for name, state in found.items()} == {
        "new": ("new", ""),
        "queued": ("pending", "Resources"),
        "runs": ("running", ""),
        "done": ("done", ""),
        "raised": ("failed", "rank 0 failed: OSError: down"),
        "cancelled": ("interrupted", "job 7_6: cancelled"),
        "gone": ("failed", "data.train: names none"),
        "asked": ("interrupted", "rank 0 failed: AskedToStop: nothing is saved"),
        "refused": ("refused", "sbatch: no"),
        "nothing": ("interrupted", "job 7_10: Slurm does not know it any more"),
    }


def test_tables_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture):
    sweep, points = two_points(tmp_path, calibration="first")
    states = {point.name: State("done") for point in points} | {"ranks_12": State("failed", "a | b")}
    rows = gather(sweep, points, states)
    lines = markdown(rows, sweep).splitlines()
    assert lines[2].startswith("| point | ranks | TPxPPxDP | prompts | state | tokens/s | tokens/s/rank | speed-up |")
    assert lines[4].startswith(
        "| ranks_2 | 2 | 1x1x2 | 96 | done | 90 (80 to 100) | 45 | 1.00 | 1.00 | 1.00 | 6.17 | 7 (6 to 8)"
    )
    assert lines[6].startswith("| ranks_12 |") and lines[6].endswith("| a \\| b |")
    assert "MFU" not in lines[2]
    _, sheet = write_tables(rows, sweep)
    with sheet.open() as file:
        table = list(csv.DictReader(file))
    assert table[1]["speed_up"] == "2.0" and table[1]["tokens_per_s_max"] == "180"
    assert table[2]["tokens_per_s"] == "" and table[2]["reason"] == "a | b"
    rows = gather(sweep, points, states | {"ranks_12": State("failed", "[red]\x1b[31m\n<b>")})
    print_table(rows, sweep)
    assert r"  ranks_12: [red]\x1b[31m\n<b>" in capsys.readouterr().out.splitlines()
    assert markdown(rows, sweep).splitlines()[6].endswith(r"| [red]\x1b[31m\n&lt;b&gt; |")

    speed, shares = draw(rows, sweep).axes
    drawn = {line.get_label(): line for line in speed.get_lines() if not line.get_label().startswith("_")}
    assert drawn["ideal"].get_ydata()[-1] == pytest.approx(45 * 8)
    assert list(drawn["planner"].get_ydata()) == [first.median("planned_tokens_per_s") for first in rows[:2]]
    assert speed.get_xlim()[0] == 0 and speed.get_ylim() == pytest.approx((0, 1.15 * 360))
    bars = [bar.get_height() for bar in shares.patches]
    assert sum(bars) == pytest.approx(2.0)  # of two points, all of a step
    assert bars[2 * PLANNED_STAGES.index("update")] == pytest.approx(5 / 7)
    files = sweep_figure(rows, sweep, tmp_path / "plot")
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert [file.name for file in files] == [f"plot.{ending}" for ending in begins]
    assert all(file.read_bytes().startswith(begin) for file, begin in zip(files, begins.values()))
    assert "tokens/s, least to most" in files[2].read_text()  # text stays text
    assert sweep_figure([Row("a", State("failed"), 1)], sweep, tmp_path / "none") == []
    assert compared_figure([(sweep, [Row("a", State("failed"), 1)])], tmp_path / "none") == []


def test_log_axes_and_several_sweeps_in_one_figure(tmp_path: Path):
    sweep, points = two_points(tmp_path)
    rows = gather(sweep, points, {point.name: State("done") for point in points})
    in_log = sweep.model_copy(update={"axes": "log", "name": "t"})
    speed, _ = draw(rows, in_log).axes
    assert (speed.get_xscale(), speed.get_yscale()) == ("log", "log")
    ideal = next(line for line in speed.get_lines() if line.get_label() == "ideal")
    assert list(ideal.get_xdata()) == [2, 8] and list(ideal.get_ydata()) == pytest.approx([90, 360])
    assert [tick.get_text() for tick in speed.get_xticklabels()] == ["2", "8"]
    assert speed.get_ylim()[0] > 0
    slower = [replace(row, figures={"tokens_per_s": Spread(9, 8, 10)}, speed_up=1.0, ideal=1.0) for row in rows[:1]]
    speed, efficiency = draw_compared([(sweep, rows), (in_log, slower)]).axes
    assert [text.get_text() for text in speed.get_legend().get_texts()] == ["s", "t"]
    assert list(efficiency.get_lines()[0].get_ydata()) == [1.0, 0.5]
    assert speed.get_xscale() == "linear"  # as the first has it
    assert draw_compared([(in_log, slower), (sweep, rows)]).axes[0].get_xscale() == "log"


def test_a_point_that_is_repeated_is_one_row_of_all_its_runs(tmp_path: Path):
    listed = [{"ranks": 2}, {"ranks": 4, "overrides": ["run.seed=7"]}]
    sweep = load_sweep(write_sweep(tmp_path, points=listed, repeats=3, interval="bootstrap"))
    points = points_of(sweep)
    assert [point.number for point in points] == [1, 2, 3, 4, 5, 6]
    assert [point.name for point in points[:3]] == ["ranks_2", "ranks_4", "ranks_2_repeat_2"]
    seeds = [load_config(None, point.overrides).run.seed for point in points]
    assert seeds == [load_config(None, EIGHT).run.seed + more for more in (0, 7, 1, 8, 2, 9)]
    for place, speed in ((0, 100), (2, 90), (4, 80)):
        put(points[place], [record(0, 2, 1.0, 90, 90), *(record(step, 2, speed + step, 4, 2) for step in (1, 2, 3))])
    write_attempt(points[0].run_dir, replace(attempt(1, "7_1", "done"), ranks=2, began=0.0, ended=3600.0))
    states = {point.name: State("done") for point in points} | {"ranks_2_repeat_3": State("running")}
    row, other = gather(sweep, points, states)
    assert (row.name, row.num_runs, row.num_steps, row.state.word) == ("ranks_2", 3, 9, "running")
    speed = row.figures["tokens_per_s"]
    assert speed.median == 92 and 81 <= speed.low < 92 < speed.high <= 103
    assert row.figures["gpu_hours_per_mtoken"].median == pytest.approx(2 * 1e6 / 92 / 3600)
    assert (row.gpu_hours, other.num_runs, other.gpu_hours) == (2.0, 0, None)
    assert markdown([row, other], sweep).startswith(
        "s: strong scaling, medians of 3 runs of 4 steps without the first 1 (95 % interval by bootstrap)"
    )
    with pytest.raises(ConfigError, match="names twice: ranks_2_repeat_2"):
        load_sweep(write_sweep(tmp_path, points=[{"ranks": 2}, {"ranks": 4, "name": "ranks_2_repeat_2"}], repeats=2))


def test_an_interval_is_the_range_or_by_bootstrap_over_runs():
    assert spread_of([[1.0, 5.0], [3.0]]) == Spread(3.0, 1.0, 5.0)
    found = spread_of([[10.0] * 4, [20.0] * 4], "bootstrap")
    assert (found.low, found.high) == (10.0, 20.0)  # one run may be drawn twice
    assert spread_of([[10.0] * 4], "bootstrap") == Spread(10.0, 10.0, 10.0)
    many = [float(value) for value in range(101)]
    found = spread_of([many], "bootstrap")
    # the median of n uniform values has a standard deviation of half their range / sqrt(n)
    assert found.median == 50 and found.low == pytest.approx(40, abs=3) and found.high == pytest.approx(60, abs=3)


def test_a_file_in_the_place_of_its_folder_is_told(tmp_path):
    (tmp_path / "out").touch()
    sweep = load_sweep(write_sweep(tmp_path), [])
    with pytest.raises(ValueError, match=f"^dir: {tmp_path}/out is a file, where a folder belongs$"):
        begin(sweep, points_of(sweep), "", dry_run=True, retry=False)
