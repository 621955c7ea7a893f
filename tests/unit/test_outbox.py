"""What a run records of itself on a disk that fills up: whole, in order, and complete once there is room again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_papo.config import ObserveConfig
from megatron_papo.files.small_files import write_atomically
from megatron_papo.observe import outbox
from megatron_papo.observe.outbox import Outbox
from megatron_papo.observe.samples import SampleRow
from megatron_papo.observe.sinks import Sinks, keep_steps_before
from tests.support.small_disk import fill, make_room, small_disk

ROW = SampleRow("how many?", "2", "two", 1.0)


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 1) as folder:
        yield folder


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_full_disk_loses_no_step_and_tears_no_line(disk):
    said: list[str] = []
    with Sinks(ObserveConfig(console=False), disk / "run", "run: {}\n", warn=said.append) as sinks:
        sinks.log(0, {"reward": 0.0})
        fill(disk)
        for step in range(1, 40):  # some find room in the last page of the file
            sinks.log(step, {"reward": float(step), **dict.fromkeys("abcdefghij", 1 / 3)})
            assert steps(disk / "run") == list(range(len(steps(disk / "run"))))
        assert 1 <= len(steps(disk / "run")) < 40
        page = sinks.samples(39, [ROW])
        assert page is not None and not page.exists()
        assert len(said) == 1 and said[0].startswith("No space left on device: ")
        make_room(disk)
        sinks.log(40, {"reward": 40.0})
        assert steps(disk / "run") == list(range(41))
    assert "how many?" in page.read_text()
    assert (disk / "run" / "config.yaml").read_text() == "run: {}\n"
    assert said[1:] == ["what the run had recorded of itself has been written, now that there is room"]
    board = EventAccumulator(str(disk / "run" / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [(n, float(n)) for n in range(41)]


def test_a_run_may_start_and_end_on_a_full_disk_and_says_what_is_lost(disk):
    said: list[str] = []
    fill(disk)
    with Sinks(ObserveConfig(console=False, tensorboard=False), disk / "run", "", warn=said.append) as sinks:
        sinks.log(0, {"reward": 0.0})
    run = disk / "run"
    assert said[1:] == [f"{run / 'metrics.jsonl'}: the last 1 records could not be written"]


def test_a_resumed_run_drops_what_it_logs_again_also_on_a_full_disk(disk):
    file = disk / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)) + '{"step": 5, "rew')
    fill(disk)
    keep_steps_before(file, 3)
    assert steps(disk) == [0, 1, 2]


def test_a_file_that_finds_no_room_stays_as_it_was(disk):
    write_atomically(disk / "page", b"old")
    fill(disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/page'"):
        write_atomically(disk / "page", bytes(20_000))
    assert (disk / "page").read_bytes() == b"old"
    assert not (disk / "page.tmp").exists()


def test_of_whole_files_the_newest_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(outbox, "MAX_FILES", 2)
    (tmp_path / "folder").write_text("a file where the folder should be")
    box = Outbox(warn=[].append)
    for name in "abca":
        box.put(tmp_path / "folder" / name, name.encode())
    box.flush()
    assert box.blocked
    (tmp_path / "folder").unlink()
    box.flush()
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["a", "c"]
