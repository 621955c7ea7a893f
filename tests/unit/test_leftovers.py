"""What lies in a run's folder by accident, of a process that was killed, a broken disk or its user, costs no checkpoint
and no later start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_papo.checkpoint.survey import next_serial, survey
from megatron_papo.cluster import run_records
from megatron_papo.cluster.attempts import read_attempts
from megatron_papo.cluster.ranks import RankWatch
from megatron_papo.files.atomic_folder import publish, recover, remove
from megatron_papo.files.small_files import STEP_NAME, make_way, set_aside
from megatron_papo.observe.report import read_metrics
from megatron_papo.observe.sinks import keep_steps_before
from megatron_papo.runtime.failure_notes import read_failures
from megatron_papo.runtime.progress import read_progress
from megatron_papo.sweep.points import Sweep
from megatron_papo.sweep.states import read_refused, state_of_local_run
from megatron_papo.weights.publishing import write_folder
from tests.support.small_disk import small_disk

STATE = {
    "format": 1, "step": 6, "serial": 3, "metric": None, "layout": {}, "optimizer_step": 6, "schedule_steps": 6,
    "random_states": True, "cursor": {}, "config": {},
}  # fmt: skip
DAMAGED = (b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b"{}", b'{"step": "6", "serial": 3}', b"[" * 9999)


def checkpoint(folder: Path, name: str, **facts) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({**STATE, **facts}))
    (path / "__0_0.distcp").write_bytes(b"tensors")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_what_a_run_has_written_is_taken_for_a_checkpoint(tmp_path):
    ours = checkpoint(tmp_path, "step_00000006"), checkpoint(tmp_path, "step_123456789", serial=2)
    waiting = checkpoint(tmp_path, "step_00000007.old", serial=4)  # killed while it was being replaced
    for name in ("step_00000006_backup", "step_6", "step_00000006.bak", "step_00000006.damaged", "step_00000006.old",
                 "step_00000008.tmp", "my_step_00000006", "step_0000000x"):  # fmt: skip
        checkpoint(tmp_path, name, serial=9)
    (tmp_path / "step_00000009").mkdir()  # somebody's notes
    (tmp_path / "step_00000010").write_text("a file")
    (tmp_path / "step_00000011").symlink_to(tmp_path / "gone")
    found = survey(tmp_path)
    assert [path for path, _ in found.whole] == [ours[1], ours[0], waiting]
    assert not found.damaged and not found.foreign and next_serial(tmp_path) == 5
    assert survey(tmp_path, but={waiting}).newest() == (ours[0], json.loads((ours[0] / "state.json").read_text()))
    assert survey(tmp_path / "none").newest() is None


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_state_file_costs_its_checkpoint_alone(tmp_path, content):
    whole = checkpoint(tmp_path / "checkpoints", "step_00000004", step=4, serial=2)
    broken = checkpoint(tmp_path / "checkpoints", "step_00000006")
    (broken / "state.json").write_bytes(content)
    found = survey(tmp_path / "checkpoints")
    assert [path for path, _ in found.whole] == [whole]
    (reason,) = found.damaged.values()
    assert reason.startswith(f"{broken / 'state.json'}: ") and "\n" not in reason
    assert read_progress(tmp_path).steps_saved == 4


def test_a_state_file_that_is_gone_or_of_another_version(tmp_path):
    (checkpoint(tmp_path, "step_00000006") / "state.json").unlink()
    checkpoint(tmp_path, "step_00000004", format=2)
    found = survey(tmp_path)
    assert list(found.damaged) == [tmp_path / "step_00000006"]
    assert found.foreign == [f"{tmp_path / 'step_00000004' / 'state.json'}: format 2, this version reads 1"]


def test_what_a_killed_process_left_is_cleared_and_what_is_not_ours_stays(tmp_path):
    checkpoint(tmp_path, "step_00000006")
    checkpoint(tmp_path, "step_00000006.old")
    checkpoint(tmp_path, "step_00000004.old")
    checkpoint(tmp_path, "step_00000008.tmp")
    elsewhere = checkpoint(tmp_path / "elsewhere", "step_00000009")
    (tmp_path / "step_00000009.tmp").symlink_to(elsewhere)
    (tmp_path / "step_00000010.old").write_text("a file")
    checkpoint(tmp_path, "step_6.tmp")
    checkpoint(tmp_path, "step_00000006.bak.tmp")
    told: list[str] = []
    recover(tmp_path, STEP_NAME, told.append)
    assert names(tmp_path) == [
        "elsewhere", "step_00000004", "step_00000006", "step_00000006.bak.tmp", "step_00000009.tmp",
        "step_00000010.old", "step_6.tmp",
    ]  # fmt: skip
    assert elsewhere.is_dir() and told == []


def test_a_leftover_that_cannot_be_removed_is_told_of_and_the_next_save_goes_on(tmp_path):
    told: list[str] = []
    stuck = checkpoint(tmp_path, "step_00000004.tmp")
    with small_disk(stuck / "busy", 0.1):  # a folder that is in use elsewhere: neither the owner nor root removes it
        recover(tmp_path, STEP_NAME, told.append)
        assert told == [f"{stuck}: left by a process that was killed, and cannot be removed: Device or resource busy"]
        make_way(stuck, told.append)  # the same step is saved again
        assert not stuck.exists() and "set aside as step_00000004.tmp.aside" in told[1]
        (tmp_path / "step_00000004.tmp.aside").rename(stuck)


def test_a_name_that_cannot_be_freed_costs_the_save_that_wants_it_and_says_which(tmp_path):
    with small_disk(tmp_path / "step_00000004.tmp", 0.1) as stuck, pytest.raises(OSError, match="busy") as error:
        make_way(stuck)
    assert str(stuck) in str(error.value)


IN_THE_WAY = ("file", "link to a folder", "link to nothing", "folder")


def _put(path: Path, kind: str, elsewhere: Path) -> None:
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(elsewhere if kind == "link to a folder" else elsewhere / "none")


@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_whatever_has_a_name_that_is_wanted_gives_way_and_nothing_of_a_user_is_lost(tmp_path, kind, capsys):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    checkpoint(tmp_path, "elsewhere")
    folder.mkdir()
    for name in ("export", "export.tmp", "export.old"):
        _put(folder / name, kind, elsewhere)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    write_folder(_tensors(), folder / "export", source)
    assert (folder / "export" / "model.safetensors").is_file() and not (folder / "export").is_symlink()
    assert names(elsewhere) == ["__0_0.distcp", "state.json"]
    kept = [path.read_text() for path in folder.iterdir() if path.is_file()]
    assert kept == (["mine"] * 3 if kind == "file" else [])
    assert len(capsys.readouterr().err.splitlines()) == (0 if kind == "folder" else 3)


def _tensors():
    import torch

    return [("weight", torch.zeros(2))]


def test_a_folder_is_replaced_and_removed_beside_leftovers_of_its_own(tmp_path):
    told: list[str] = []
    for name in ("step_00000006", "step_00000006.old", "step_00000006.tmp"):
        checkpoint(tmp_path, name)
    publish(tmp_path / "step_00000006.tmp", tmp_path / "step_00000006", told.append)
    assert names(tmp_path) == ["step_00000006"]
    (tmp_path / "step_00000006.tmp").write_text("mine")
    remove(tmp_path / "step_00000006", told.append)
    assert names(tmp_path) == ["step_00000006.tmp.aside"] and len(told) == 1


def test_a_name_to_set_aside_is_never_one_that_is_taken(tmp_path):
    for text in "abc":
        (tmp_path / "step_00000006").write_text(text)
        set_aside(tmp_path / "step_00000006", "damaged")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {f"step_00000006.damaged{end}": text for end, text in zip(("", "-2", "-3"), "abc")}


RECORD = b'{"step": 0, "unix_time": 1.0}\n'
SPOILT = (b"", b"\xff\xfe", b"\0" * 40, b"[]", b"null", b"7", b"{}", b'{"step": null}', b'{"step": "1"}', b"[" * 9999)


@pytest.mark.parametrize("line", SPOILT, ids=range(len(SPOILT)))
def test_a_spoilt_line_of_the_record_costs_itself_alone(tmp_path, line):
    file, told = tmp_path / "metrics.jsonl", []
    last = b'{"step": 2, "unix_time": 3.0, "reward": 0.5, "note": null}\n'
    file.write_bytes(RECORD + line + b"\n" + last)
    assert read_progress(tmp_path).steps_done == 3
    assert read_metrics(file)[-1] == {"step": 2, "unix_time": 3.0, "reward": 0.5}
    keep_steps_before(file, 2, told.append)
    assert file.read_bytes() == RECORD and told == [], "as usual: what is done again goes with the spoilt"
    file.write_bytes(RECORD + line + b"\n" + last)
    keep_steps_before(file, 3, told.append)
    assert file.read_bytes() == RECORD + last
    assert told == [f"{file}: 1 lines are no records: left out, and the file kept as metrics.jsonl.damaged"]
    file.write_bytes(line)
    assert read_progress(tmp_path).steps_done == 0


def test_an_older_record_that_was_set_aside_is_never_written_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for _ in range(2):
        file.write_bytes(RECORD)
        keep_steps_before(file, 0)
    file.mkdir()
    keep_steps_before(file, 0)
    assert names(tmp_path) == ["metrics.jsonl.old", "metrics.jsonl.old-2", "metrics.jsonl.old-3"]


@pytest.mark.parametrize("content", SPOILT, ids=range(len(SPOILT)))
def test_no_small_file_of_a_run_ends_a_later_start(tmp_path, content):
    sweep = Sweep(name="s", dir=tmp_path, scaling="weak", points=[{"ranks": 1}])
    run = tmp_path / "run"
    for name in ("attempts.jsonl", "cluster/jobs.jsonl", "cluster/local.json", "failures/rank_0.json",
                 "heartbeats/rank_0.json", "heartbeats/rank_x.json", "certificate/step_00000001.json"):  # fmt: skip
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    (tmp_path / "refused.json").write_bytes(content)
    assert read_attempts(run) == [] and read_failures(run / "failures") == {} and run_records.submissions(run) == []
    watch = RankWatch(run, 1, 60.0, 60.0)
    assert watch.dead_rank(but=set()) is None and watch.rank_on("node1") == 0
    assert state_of_local_run(run, 3).word == "interrupted"
    assert set(read_refused(sweep)) <= {"step"}
    submission = run_records.Submission("7", 1.0, 1, 1, 1, "/")
    run_records.record(run, submission)
    assert run_records.submissions(run) == [submission], "behind a line that was cut short"
