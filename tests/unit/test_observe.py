"""Sinks, sample pages, reports, the stage clock and the choice of a run's reason, against what they write."""

import errno
import gzip
import io
import json
import math
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from megatron_papo.config import ObserveConfig, RunConfig, load_config
from megatron_papo.distributed.accelerator import reset_peak_memory
from megatron_papo.observe import wandb_run
from megatron_papo.observe.clock import StageClock
from megatron_papo.observe.profiling import profiled
from megatron_papo.observe.report import before_after_table, curves_png, read_metrics, series, smooth
from megatron_papo.observe.samples import SampleRow, beside_each_other, sample_page
from megatron_papo.observe.sinks import Sinks, console_line, keep_steps_before, markdown_table
from megatron_papo.observe.wandb_run import WandbRun
from megatron_papo.runtime.awake_clock import AwakeClock
from megatron_papo.runtime.failure_notes import (
    NotesInMemory,
    belong_to,
    leave_note,
    own_attempt,
    read_failures,
    write_failure,
)
from megatron_papo.runtime.failures import Failure, describe, is_peers_fault, print_failure, the_cause
from megatron_papo.runtime.heartbeat import Heartbeat, silent_rank
from megatron_papo.runtime.progress import read_progress

QUIET = ObserveConfig(console=False, tensorboard=False)


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def png(colour):
    packed = io.BytesIO()
    Image.new("RGB", (4, 6), colour).save(packed, format="PNG")
    return packed.getvalue()


ROW = SampleRow(
    problem="how many <image> 7s?",
    answer="2",
    response="<script>alert(1)</script> a|b\n\\boxed{2}",
    reward=0.95,
    reward_parts={"accuracy": 1.0, "format": 0.5},
    images=(png("red"),),
    masked_images=(Image.new("RGB", (4, 6)),),
)


def test_every_number_of_a_step_is_on_its_line(tmp_path):
    with Sinks(QUIET, tmp_path, "run: {seed: 3}\n") as sinks:
        sinks.log(0, {"reward": 0.25, "lr": 1e-6})
        sinks.log(1, {"reward": math.nan, "lr": math.inf})
    first, second = records(tmp_path)
    assert (first["step"], first["reward"], first["lr"]) == (0, 0.25, 1e-6)
    assert (second["step"], second["reward"], second["lr"]) == (1, "nan", "inf")
    assert (tmp_path / "config.yaml").read_text() == "run: {seed: 3}\n"


def test_a_resumed_run_drops_what_it_will_log_again_and_a_torn_line(tmp_path):
    with Sinks(QUIET, tmp_path, "") as sinks:
        for step in range(5):
            sinks.log(step, {"reward": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # the crash
    with Sinks(QUIET, tmp_path, "", start_step=3) as sinks:
        sinks.log(3, {"reward": 33.0})
    assert [(record["step"], record["reward"]) for record in records(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 33.0)]


def test_a_fresh_start_in_an_old_folder_sets_the_old_numbers_aside(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0}\n')
    keep_steps_before(tmp_path / "metrics.jsonl", 0)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "metrics.jsonl.old").read_text() == '{"step": 0, "reward": 1.0}\n'


def test_ranks_that_are_not_enabled_write_nothing(tmp_path):
    with Sinks(ObserveConfig(), tmp_path / "run", "", enabled=False) as sinks:
        sinks.log(0, {"reward": 1.0})
        assert sinks.samples(0, [ROW]) is None
    assert not (tmp_path / "run").exists()


def test_tensorboard_and_wandb_without_a_key_hold_the_numbers_and_the_samples(tmp_path, monkeypatch):
    """An online run that finds no key goes on offline: the same files, after one warning."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    (tmp_path / "netrc").touch(0o600)
    monkeypatch.setattr("sys.argv", ["papo", "train", "data.train=https://me:pass@host/rows.jsonl"])
    (tmp_path / "wandb_id.txt").write_bytes(b"\0\xff")  # spoilt by a disk
    said: list[str] = []
    observe, settings = ObserveConfig(console=False, wandb="online"), RunConfig(name="first-run", dir=tmp_path)
    text = "run: {seed: 3}\n"
    with (
        WandbRun(observe, settings, text, said.append) as tracked,
        Sinks(observe, tmp_path, text, warn=said.append, wandb_run=tracked) as sinks,
    ):
        sinks.log(-1, {"eval/accuracy": 0.125})
        sinks.log(0, {"reward": 0.25, "loss/total": -1.5})
        sinks.log(1, {"reward": 0.5, "loss/total": -2.5})
        sinks.samples(1, [ROW])
    lost, offline = said
    assert lost == f"{tmp_path / 'wandb_id.txt'}: holds no id: wandb shows what follows as another run"
    assert offline.startswith("wandb: No API key configured")
    assert offline.endswith(f": the run goes on offline, `wandb sync {tmp_path}/wandb/offline-run-*` uploads it later")
    assert len((tmp_path / "wandb_id.txt").read_text()) == 12
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(0, 0.25), (1, 0.5)]
    assert [event.value for event in board.Scalars("loss/total")] == [-1.5, -2.5]
    assert [(event.step, event.value) for event in board.Scalars("eval/accuracy")] == [(-1, 0.125)]
    (image,) = board.Images("samples/0")
    assert (image.step, image.width, image.height) == (1, 12, 6)
    assert {"samples/text_summary", "config/text_summary"} <= set(board.Tags()["tensors"])
    (dashboard,) = board.Tensors("custom_scalars__config__")
    (category,) = layout_pb2.Layout.FromString(dashboard.tensor_proto.string_val[0]).category
    assert [list(chart.multiline.tag) for chart in category.chart][:2] == [
        ["^reward$", "^trained/reward$"], ["^reward/accuracy$", "^eval/accuracy$"],
    ]  # fmt: skip
    assert len(category.chart) == 12
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"me:pass" in path.read_bytes()]
    assert b"loss/total" in content and b"samples" in content and b"eval/accuracy" in content
    assert b"first-run" in content and b"0_overview/01_reward" in content
    tables = list((tmp_path / "wandb").glob("offline-run-*/files/media/table/*.json"))
    (row,) = json.loads(tables[0].read_text())["data"]
    assert row[2:] == [ROW.problem, ROW.response, "2", 0.95, 1.0, 0.5]


def test_a_sample_page_is_whole_in_itself_and_escapes_what_a_model_said(tmp_path):
    with Sinks(QUIET, tmp_path, "") as sinks:
        page = sinks.samples(10, [ROW, SampleRow("text only", "3", "4", 0.0)])
    assert page == tmp_path / "samples" / "step_000010.html"
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "://" not in text and "default-src 'none'" in text
    assert "how many &lt;image&gt; 7s?" in text and "accuracy 1" in text and "format 0.5" in text
    assert text.count("<article class=right>") == 1 and text.count("<article class=wrong>") == 1
    assert "mean reward 0.475" in text


class FailingRun:
    """A run of wandb whose `log` does what `deeds` says, one a call; afterwards it keeps what it is given."""

    url = "http://here"

    def __init__(self, deeds: list[Callable[[], None]]):
        self._deeds, self.kept, self.exit_code = deeds, [], None

    def log(self, record):
        if self._deeds:
            self._deeds.pop(0)()
        self.kept.append(record["step"])

    def finish(self, exit_code):
        self.exit_code = exit_code


def test_whatever_wandb_does_the_run_goes_on(tmp_path, monkeypatch):
    """It raises, asks to exit, hangs, cannot be imported, has no room: nothing but warnings, and bounded waits."""
    said: list[str] = []
    opened: list[bool] = []
    runs: list[object] = []

    def open_fake(*_, online):
        opened.append(online)
        run = runs.pop(0)
        if isinstance(run, Exception):
            raise run
        return run

    def deed(error):
        def do():
            raise error

        return do

    monkeypatch.setattr(wandb_run, "open_wandb", open_fake)
    monkeypatch.setattr(wandb_run, "end_wandb", lambda: None)
    monkeypatch.setattr(wandb_run, "_CALL_S", 0.05)

    def steps_of(*fakes, mode="online"):
        said.clear(), opened.clear()
        runs[:] = fakes
        with WandbRun(ObserveConfig(wandb=mode), RunConfig(dir=tmp_path), "", said.append) as tracked:
            for step in range(3):
                tracked.numbers(step, {"reward": 0.0})
        return [fake.kept for fake in fakes if isinstance(fake, FailingRun)]

    whole = FailingRun([])
    assert steps_of(whole) == [[0, 1, 2]] and not said and whole.exit_code == 0
    lasts_long = threading.Event()
    for deed_of, reason in (
        (deed(ConnectionError("key is hf_" + 30 * "x")), "key is <secret_left_out>"),
        (deed(SystemExit(1)), "SystemExit: 1"),
        (lambda: lasts_long.wait(20) or None, "no answer within 0.05 s"),
    ):
        assert steps_of(FailingRun([deed_of]), FailingRun([]))[1] == [0, 1, 2], reason
        assert opened == [True, False] and len(said) == 1
        assert said[0].startswith(f"wandb: {reason}: the run goes on offline"), said
    lasts_long.set()
    assert steps_of(RuntimeError("a"), ValueError("b\n")) == []
    assert said[1:] == [f"wandb: b: the run goes on without wandb; {tmp_path}/metrics.jsonl has all numbers"]
    assert steps_of(ImportError("broken")) == [] and len(said) == 1 and opened == [True]
    full = OSError(errno.ENOSPC, "No space left on device")
    assert steps_of(FailingRun([deed(full)]), FailingRun([]), mode="offline") == [[], [0, 1, 2]]
    assert said == ["wandb: [Errno 28] No space left on device"] and opened == [False, False]


def test_wandb_is_opened_before_the_ranks_meet_and_is_told_of_a_failure(tmp_path, monkeypatch):
    from megatron_papo.training import session

    said: list[object] = []

    class Told(WandbRun):
        def close(self, failed=False):
            said.append(failed)

    def no_peers(*_):
        raise ValueError("nobody came")

    monkeypatch.setattr(session, "WandbRun", Told)
    monkeypatch.setattr(session, "initialize", no_peers)
    monkeypatch.setattr(wandb_run, "open_wandb", lambda *_, online: said.append(online) or FailingRun([]))
    monkeypatch.setattr(wandb_run, "end_wandb", lambda: None)
    config = load_config(None, [f"run.dir={tmp_path}", f"model.path={tmp_path}", "observe.wandb=offline"], to_run=False)
    with pytest.raises(ValueError, match="nobody came"), session.open_run(config, records=True):
        pass
    assert said == [False, True], "opened offline, closed as failed"
    with pytest.raises(ValueError, match="nobody came"), session.open_run(config):
        pass
    assert len(said) == 2, "a verb that records no steps opens none"


HOSTILE = "</script><img src=x onerror=alert(1)>![p](http://evil/p.png) \x1b]0;x\x07 \u202etxt `a` |b|\n# c"


def test_a_page_a_table_and_the_screen_show_what_a_model_said_as_text(capsys, tmp_path):
    row = SampleRow(HOSTILE, HOSTILE, HOSTILE, 1.0, {"<b>\x1b": 1.0})
    shown = sample_page(0, [row])
    assert not [part for part in ("<img", "</script", "<b>", "\x1b", "\x07", "\u202e") if part in shown]
    assert shown.count(r"\x1b]0;x\x07 \u202etxt") == 3
    assert shown.index("Content-Security-Policy") < shown.index("<style>")
    (_, _, line) = markdown_table([row]).splitlines()
    assert "<img" not in line and "![" not in line and "](" not in line and "\x1b" not in line
    assert r"\!\[p\]\(http://evil/p\.png\)" in line and r"<br>\# c" in line
    assert line.replace("\\|", "").count("|") == 5
    told = describe(0, ValueError("data.train: cannot read https://me:pass@host/a"))
    assert "me:pass" not in told.message + told.traceback and told.message.endswith("@host/a")
    print_failure(Failure(0, 0.0, "error", "RuntimeError", "row 3: \x1b[2J\u202e"), tmp_path)
    assert capsys.readouterr().err == "papo: rank 0 failed: RuntimeError: row 3: \\x1b[2J\\u202e\n"


def test_pictures_stand_beside_each_other():
    both = beside_each_other([png("red"), Image.new("RGB", (2, 3), "blue")])
    assert both.size == (4 + 4 + 2, 6)
    assert [both.getpixel(place) for place in ((0, 5), (5, 0), (9, 2), (9, 5))] == [
        (255, 0, 0), (255, 255, 255), (0, 0, 255), (255, 255, 255),
    ]  # fmt: skip
    assert "data:image" in sample_page(0, [ROW])


def test_the_line_of_a_step_shows_what_was_logged_and_the_longest_stages():
    values = {"reward": 0.5, "nobody/asked": 3.0, "time/generate": 2.0, "time/pack": 0.25, "time/update": 1.0}
    line = console_line(7, values | {"time/draw": 0.05})
    assert "reward [cyan]0.500[/]" in line and "nobody" not in line
    assert "3.3 s (generate 2.0, update 1.0, pack 0.2)" in line


def test_a_stage_within_another_is_not_counted_twice(tmp_path):
    """Neither on the console, nor by whoever sums `time/<stage>` of the record."""
    clock = StageClock(RunConfig(dir=tmp_path), rank=1)
    start = time.monotonic()
    for _ in range(2):
        with clock.stage("evaluate"), clock.stage("answer"), clock.stage("hand_over"):
            time.sleep(0.02)
    with clock.stage("hand_over"):
        pass
    passed, taken = time.monotonic() - start, clock.take()
    seconds = {name: value for name, value in taken.items() if name.startswith("time/")}
    assert seconds.keys() == {
        "time/evaluate", "time/evaluate/answer", "time/evaluate/answer/hand_over", "time/hand_over",
    }  # fmt: skip
    outermost = sum(value for name, value in seconds.items() if name.count("/") == 1)
    assert seconds["time/evaluate"] <= outermost <= passed
    line = console_line(0, {"time/evaluate": 4.0, "time/evaluate/answer": 3.0, "time/update": 1.0})
    assert "5.0 s (evaluate 4.0, update 1.0)" in line


def test_scores_of_the_starting_weights_stand_before_the_first_step(tmp_path):
    """Once, whatever became of an earlier attempt; and they are no step that was done."""
    for _ in range(2):
        with Sinks(QUIET, tmp_path, "") as sinks:
            sinks.log(-1, {"eval/accuracy": 0.25})
    assert (read_progress(tmp_path).steps_done, read_progress(tmp_path).saved_at) == (0, 0.0)
    with Sinks(QUIET, tmp_path, "") as sinks:
        sinks.log(-1, {"eval/accuracy": 0.25})
        sinks.log(0, {"eval/accuracy": 0.5})
        sinks.log(1, {"eval/accuracy": 0.75})
    with Sinks(QUIET, tmp_path, "", start_step=1):
        pass
    assert [(record["step"], record["eval/accuracy"]) for record in records(tmp_path)] == [(-1, 0.25), (0, 0.5)]
    assert "before step 0" in console_line(-1, {"eval/accuracy": 0.25}, 4)


def test_curves_are_drawn_from_the_record(tmp_path):
    lines = [{"step": step, "reward": step / 10, "lr": "nan"} for step in range(20)]
    lines[9]["eval/accuracy"] = 0.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = curves_png(tmp_path / "metrics.jsonl", tmp_path / "new" / "c.png", ["reward", "eval/accuracy", "lr", "none"])
    with Image.open(out) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
        assert picture.width == round(2 * 4.2 * 130), "two panels: lr is never finite, none is never there"
    assert any(colour == (0x24, 0x68, 0xB4) and count > 500 for count, colour in colours)
    with pytest.raises(ValueError, match="has none of lr, none"):
        curves_png(tmp_path / "metrics.jsonl", tmp_path / "c.png", ["lr", "none"])


def test_series_skip_what_is_missing_and_smoothing_does_not_lag():
    logged = [{"step": 0, "kl": 1.0}, {"step": 1}, {"step": 2, "kl": math.nan}, {"step": 3, "kl": 2.0}]
    assert series(logged, "kl") == ([0, 3], [1.0, 2.0])
    assert smooth([0.0, 3.0, 6.0, 9.0, 12.0], 3) == [0.0, 3.0, 6.0, 9.0, 12.0]
    assert smooth([0.0, 0.0, 9.0, 0.0, 0.0], 3) == [0.0, 3.0, 3.0, 3.0, 0.0]


def test_before_and_after_as_a_table():
    screen = Console(file=io.StringIO(), width=80)
    markdown = before_after_table({"accuracy": 0.4, "gap": 0.1}, {"accuracy": 0.75, "kl": 2.0}, console=screen)
    assert markdown.splitlines()[2:] == [
        "| accuracy | 0.400 | 0.750 | +0.350 |",
        "| gap | 0.100 | – | – |",
        "| kl | – | 2.000 | – |",
    ]
    assert "+0.350" in screen.file.getvalue()


def test_the_clock_adds_up_the_seconds_of_each_stage(tmp_path):
    with StageClock(RunConfig(dir=tmp_path), rank=1) as clock:
        for _ in range(2):
            with clock.stage("update", total=4) as progress:
                progress.advance(2)
                with clock.stage("inner"):
                    time.sleep(0.05)
        taken = clock.take()
    assert {name for name in taken if name.startswith("time/")} == {"time/update", "time/update/inner"}
    assert 0.1 <= taken["time/update/inner"] <= taken["time/update"] < 2.0
    assert clock.take() == {}


def test_a_stage_ends_when_the_gpu_has_done_its_work(tmp_path, monkeypatch):
    waits = []

    def wait():
        waits.append(clock.running())
        time.sleep(0.05)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    clock = StageClock(RunConfig(dir=tmp_path), rank=1)
    with clock.stage("update"):
        pass
    with pytest.raises(KeyError), clock.stage("save"):
        raise KeyError("x")  # a failure is not waited for: the GPU may be what failed
    taken = clock.take()
    assert waits == ["update"] and taken["time/update"] >= 0.05 > taken["time/save"]


@pytest.mark.skipif(not reset_peak_memory(), reason="this machine does not tell a process's peak memory")
def test_a_stage_has_its_own_peak_and_at_least_that_of_the_stages_within(tmp_path):
    def hold(megabytes):
        with mmap.mmap(-1, megabytes << 20) as memory:  # of the system, whatever the heap still keeps from earlier
            for _ in range(megabytes):
                memory.write(bytes(1 << 20))  # written, so resident

    clock = StageClock(RunConfig(dir=tmp_path), rank=1)
    with clock.stage("empty"):
        pass
    with clock.stage("outer"):
        hold(400)
        with clock.stage("inner"):
            hold(200)
        with clock.stage("tiny"):
            pass
    with clock.stage("around"), clock.stage("within"):
        hold(300)
    taken = clock.take()
    base = taken["memory_gib/empty"]
    expected = {"outer": 400, "outer/inner": 200, "outer/tiny": 0, "around": 300, "around/within": 300}
    above = {name: (taken[f"memory_gib/{name}"] - base) * 2**10 for name in expected}
    assert above == pytest.approx(expected, abs=40)
    assert clock.take() == {}


def test_only_the_step_asked_for_leaves_a_trace_with_its_stages_by_name(tmp_path):
    observe, clock = ObserveConfig(profile_step=1), StageClock(RunConfig(dir=tmp_path), rank=1)
    for step in range(3):
        with profiled(observe, tmp_path, 3, step), clock.stage(f"stage of {step}"):
            torch.ones(8, 4) @ torch.ones(4, 2)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "rank_3.json.gz"
    with gzip.open(file) as trace:
        names = {event.get("name") for event in json.load(trace)["traceEvents"]}
    assert "stage of 1" in names and "aten::mm" in names
    assert not {"stage of 0", "stage of 2"} & names


def test_a_stage_that_fails_is_timed_and_nothing_is_armed_once_the_clock_has_ended(tmp_path):
    with StageClock(RunConfig(dir=tmp_path, stall_limit_s=0.2), rank=0, console=False) as clock:
        with pytest.raises(KeyError), clock.stage("update"):
            raise KeyError("x")
        with clock.stage("pack") as progress:
            for _ in range(6):
                time.sleep(0.05)
                progress.advance()
    progress.advance()
    time.sleep(0.5)  # an armed watchdog would end this process here
    assert {"time/update", "time/pack"} < set(clock.take())


def test_time_for_which_a_process_was_stopped_does_not_count(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock, seconds = AwakeClock(longest_gap_s=2.0), []
    for now in (1001.0, 1002.5, 9002.5, 9003.0):  # noqa: B007 - read by the clock
        seconds.append(clock.seconds())
    assert seconds == [1.0, 2.5, 4.5, 5.0]


def test_plain_output_shows_a_long_stage_by_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("megatron_papo.observe.clock.PLAIN_EVERY_S", 0.0)
    with StageClock(RunConfig(dir=tmp_path), rank=0) as clock, clock.stage("generate", total=8) as progress:
        progress.advance(3)
        progress.advance(2)
    assert capsys.readouterr().out.splitlines() == ["  generate 3/8 (0 s)", "  generate 5/8 (0 s)"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:9"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (torch.distributed.DistNetworkError("failed to recv"), True),
        (ValueError("row 3: no image"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_a_gone_peer_are_told_from_ones_own(error, expected):
    assert is_peers_fault(error) is expected
    own = "value" if isinstance(error, ValueError) else "error"
    assert describe(2, error).kind == ("distributed" if expected else own)


def test_the_cause_is_the_earliest_failure_that_is_no_consequence(tmp_path):
    def note(rank, at, kind):
        return Failure(rank, at, kind, kind, "")

    gone, own, later = note(0, 1.0, "distributed"), note(1, 2.0, "error"), note(2, 3.0, "error")
    assert the_cause([gone, later, own]) == own
    assert the_cause([gone, note(3, 9.0, "killed"), note(4, 0.5, "stalled")]).rank == 3
    assert the_cause([note(5, 4.0, "distributed"), gone]) == gone
    assert own.reason() == "papo: rank 1 failed: error: "


OWN = Failure(1, 2.0, "error", "RuntimeError", "a bug", "Traceback\n")


def test_what_is_no_whole_note_is_passed_over(tmp_path):
    write_failure(tmp_path, OWN)
    whole = json.loads((tmp_path / "rank_1.json").read_text())
    others = [b"", b"{", b"[]", b"7", b"null", b'"rank"', b"\xff\xfe", b"[" * 100_000, b"{}"]
    for gone in ("rank", "kind"):
        others.append(json.dumps({key: value for key, value in whole.items() if key != gone}).encode())
    wrong = {"rank": "1"}, {"time": None}, {"kind": "tired"}, {"kind": []}, {"message": 3}, {"attempt": {}}
    others += [json.dumps(whole | change).encode() for change in wrong]
    for number, text in enumerate(others, start=2):
        (tmp_path / f"rank_{number}.json").write_bytes(text)
    (tmp_path / "rank_90.json").mkdir()
    (tmp_path / "rank_91.json").symlink_to("gone")
    (tmp_path / "rank_92.json").write_text(json.dumps(whole | {"rank": 92, "of a later version": 1}))
    assert read_failures(tmp_path) == {1: OWN, 92: replace(OWN, rank=92)}
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []


def test_a_launcher_reads_what_its_ranks_reported_also_behind_a_line_cut_short():
    notes = NotesInMemory()
    notes.append(OWN)
    os.write(notes._descriptor, b'{"rank": 0, "ti\n')
    notes.append(replace(OWN, rank=2, traceback="x" * 200_000))
    assert {rank: len(note.traceback) for rank, note in notes.read().items()} == {1: 10, 2: 200_000}
    notes.close()


@pytest.fixture
def attempt() -> Iterator[Callable[[str], None]]:
    """Says which attempt this process belongs to; afterwards it belongs to the one before again."""
    before = own_attempt()
    yield belong_to
    belong_to(before)


def test_a_rank_hears_of_failures_of_its_own_attempt_alone(tmp_path, attempt):
    """Whatever the clocks say; and it goes on listening whatever lies there."""
    attempt("")
    folder = tmp_path / "failures"
    leave_note(tmp_path, replace(OWN, rank=3))
    os.utime(folder / "rank_3.json", (time.time() + 1e6, time.time() + 1e6))  # before the clock was set back
    with Heartbeat(RunConfig(dir=tmp_path, heartbeat_s=60.0), 0, lambda: "update") as heartbeat:
        assert heartbeat._failed_peer() is None
        leave_note(tmp_path, replace(OWN, rank=0))
        assert heartbeat._failed_peer() is None, "its own"
        leave_note(tmp_path, OWN)
        assert heartbeat._failed_peer() == OWN, "of a rank that failed before all had met"
        belong_to("an attempt whose last rank has just ended")
        leave_note(tmp_path, OWN)
        heartbeat.met("this attempt")
        assert heartbeat._failed_peer() is None
        leave_note(tmp_path, replace(OWN, rank=3))
        os.utime(folder / "rank_3.json", (1.0, 1.0))
        assert heartbeat._failed_peer() == replace(OWN, rank=3, attempt="this attempt")


def test_the_thread_that_gives_signs_of_life_outlives_what_it_finds(tmp_path, monkeypatch, capfd):
    asked = []

    def fails(path):
        asked.append(path)
        raise KeyError("rank")

    monkeypatch.setattr("megatron_papo.runtime.heartbeat.read_note", fails)
    with Heartbeat(RunConfig(dir=tmp_path, heartbeat_s=0.01), 0, lambda: "update"):
        leave_note(tmp_path, OWN)
        deadline = time.monotonic() + 10
        while len(asked) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads((tmp_path / "heartbeats" / "rank_0.json").read_text())["count"] > 3
    assert len(asked) >= 5 and capfd.readouterr().err.count("looking for failures: KeyError: 'rank'") == 1


def test_the_silent_rank_is_the_one_whose_sign_is_old_of_this_attempt(tmp_path, attempt):
    attempt("this attempt")
    run = RunConfig(dir=tmp_path, heartbeat_s=5.0)
    assert silent_rank(run) is None

    def sign(rank, at, attempt="this attempt"):
        path = tmp_path / "heartbeats" / f"rank_{rank}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"host": f"node{rank}", "stage": "", "attempt": attempt}))
        os.utime(path, (at, at))

    sign(0, 1000.0), sign(1, 995.0), sign(7, 10.0, attempt="an earlier one"), sign(8, 9e9, attempt="")
    (tmp_path / "heartbeats" / "rank_9.json").write_text("[]")
    assert silent_rank(run) is None
    sign(1, 969.0), sign(2, 980.0)
    found = silent_rank(run)
    assert found is not None and found.reason() == (
        "papo: rank 1 failed: dead: no sign of life from node1 for 31 s (between stages)"
    )


def test_a_renamed_metric_has_both_names_and_is_read_by_the_one_of_today(tmp_path):
    """The names of before stay for a version; what older runs wrote is read by today's."""
    now = {"time/hand_over": 2.0, "time/evaluate/hand_over": 1.0, "memory_gib/hand_over": 0.5, "reward": 1.0}
    before = {"time/hand over": 2.0, "time/evaluate/hand over": 1.0, "memory/hand over": 2.0**29}
    with Sinks(QUIET, tmp_path, "") as sinks:
        sinks.log(0, now | {"planned/time/hand_over": 3.0, "time/update": 4.0})
    (record,) = records(tmp_path)
    del record["step"], record["unix_time"]
    assert record == {**now, **before, "planned/time/hand_over": 3.0, "planned/time/hand over": 3.0, "time/update": 4.0}
    (tmp_path / "old.jsonl").write_text(json.dumps({"step": 0, "samples": "x", **before, "memory/update": 2.0**30}))
    (read,) = read_metrics(tmp_path / "old.jsonl")
    assert {name: read[name] for name in now if name != "reward"} == {key: now[key] for key in now if key != "reward"}
    assert read["memory_gib/update"] == 1.0
    limits = RunConfig.model_validate({"stage_limits_s": {"hand over": 3, "save": 4}}).stage_limits_s
    assert limits == {"hand_over": 3, "save": 4}
