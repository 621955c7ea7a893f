"""tools/convert_checkpoint.py as a user runs it."""

from __future__ import annotations

import errno
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_papo.conversion import journal as journal_module
from megatron_papo.conversion import stores, workers
from megatron_papo.conversion.journal import FOLDER, read_journal
from megatron_papo.conversion.plan import Settings, make_plan
from megatron_papo.conversion.workers import memory
from megatron_papo.model.family import FAMILIES
from tests.support import commands
from tests.support.inputs import FOR_VLLM
from tests.support.processes import interpreter
from tests.support.tiny import make_tiny_folder, tiny_config, tiny_model

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
KEY = "model.layers.1.self_attn.k_proj.weight"
SMALL = ("--file-gb", "0.0001")
"""Several files of the tiny model."""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As a user's shell: no rank's variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("hf") / "hf", "qwen2_5_vl")


def make_source(path: Path, family: str) -> Path:
    """bfloat16 in several files."""
    folder = make_tiny_folder(path, family=family, vision_intermediate=42, vocab=275, max_shard_size="200KB")
    for file in folder.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def _load_tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def run(*arguments: str | Path) -> int:
    """The tool's exit status; in this process, where torch is imported already and earlier tests have left more memory
    than a worker of its own takes."""
    before = sys.argv
    own = [] if "--memory-gib" in arguments else ["--memory-gib", "8"]
    sys.argv = [str(TOOL), *map(str, arguments), *own]
    try:
        return _load_tool().main()
    finally:
        sys.argv = before


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def assert_same_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as handle:
        handle.seek(offset)
        byte = handle.read(1)[0]
        handle.seek(offset)
        handle.write(bytes([byte ^ 1]))


@pytest.mark.fast
def test_there_and_back_as_a_command(source, tmp_path):
    for verb, *folders in (("hf-to-megatron", source, "checkpoint"), ("megatron-to-hf", "checkpoint", "again")):
        done = commands.run(TOOL, verb, *folders, cwd=tmp_path)
        lines = done.stdout.splitlines()
        assert (done.returncode, lines[-1]) == (0, f"wrote {folders[-1]}"), done.stderr
        assert lines[0].startswith(f"{verb}: 377.6 kB of 377.6 kB, ") and "peak memory of a worker" in lines[-2]
    assert_same_weights(tmp_path / "again", tensors_of(source))
    side = {file.name for file in source.iterdir() if file.suffix != ".safetensors"} - {"model.safetensors.index.json"}
    assert {file.name for file in (tmp_path / "again").iterdir()} == side | {"model.safetensors", "manifest.json"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again", "checkpoint"], "nothing else is left"


def test_help_does_not_wait_for_torch(tmp_path):
    command = [sys.executable, "-X", "importtime", str(TOOL), "--help"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "megatron-to-hf" in shown.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "argparse" in imported and not {"torch", "transformers", "megatron"} & imported


def test_any_number_of_workers_writes_the_same_bytes(source, tmp_path):
    for number in ("1", "3"):
        assert run("hf-to-megatron", source, tmp_path / f"m{number}", "--workers", number, *SMALL) == 0
        assert run("megatron-to-hf", tmp_path / "m1", tmp_path / f"h{number}", "--workers", number, *SMALL) == 0
    assert len(list((tmp_path / "m3").glob("*.distcp"))) > 3, "more files than workers"
    assert len(list((tmp_path / "h3").glob("*.safetensors"))) > 3
    assert content(tmp_path / "m1") == content(tmp_path / "m3")
    assert content(tmp_path / "h1") == content(tmp_path / "h3")
    assert_same_weights(tmp_path / "h3", tensors_of(source))
    assert run("verify", tmp_path / "h3", "--source", tmp_path / "m1", "--workers", "3") == 0


def test_under_srun_the_tasks_of_two_nodes_are_the_workers(slurm, source, tmp_path):
    assert run("hf-to-megatron", source, tmp_path / "alone", *SMALL) == 0
    command = [interpreter(), TOOL, "hf-to-megatron", source, tmp_path / "m", *SMALL]
    done = slurm.call("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("peak memory of a worker") == 1 and f"wrote {tmp_path / 'm'}" in done.stdout
    assert content(tmp_path / "m") == content(tmp_path / "alone")


def test_two_folders_are_compared_bit_for_bit(source, tmp_path, capsys):
    assert run("hf-to-megatron", source, tmp_path / "m") == 0
    other = tmp_path / "other"
    shutil.copytree(source, other)
    file = next(file for file in other.glob("*.safetensors") if KEY in load_file(file))
    tensors = load_file(file)
    tensors[KEY][3] = 9.0
    broken = next(name for name in tensors if name != KEY)
    tensors[broken].view(-1)[1] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    assert run("verify", source, tmp_path / "m") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "the same, bit for bit"
    for number in ("1", "2"):
        capsys.readouterr()
        assert run("verify", tmp_path / "m", other, "--workers", number) == 1
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vision_config": config["vision_config"] | {"depth": 1}}))
    assert run("verify", source, other) == 2
    assert "another model: num_layers of the vision tower is 1, not 2" in capsys.readouterr().err
    (other / "config.json").unlink()  # weights alone can be compared
    # the last of two workers prints to the real standard output, so the line is read of one
    assert run("verify", tmp_path / "m", other) == 1
    said = capsys.readouterr().out
    assert f"{KEY}: 64 of 2048 values differ, by at most 9" in said
    assert f"{broken}: 1 of {tensors[broken].numel()} values differ, by at most nan" in said


def test_casts_are_to_nearest_and_counted(source, tmp_path, capsys):
    exact = tensors_of(source)
    assert run("hf-to-megatron", source, tmp_path / "wide", "--dtype", "float32") == 0
    assert run("megatron-to-hf", tmp_path / "wide", tmp_path / "back", "--dtype", "bfloat16") == 0
    assert_same_weights(tmp_path / "back", exact)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    for folder in ("wide", "back"):
        assert run("verify", tmp_path / folder) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-3].endswith("from the target its source, bit for bit"), "float32 holds every bfloat16"
    assert out[-1].endswith("from the target its source as it was cast; the cast rounded")
    wide, back = (json.loads((tmp_path / name / "manifest.json").read_text())["casts"] for name in ("wide", "back"))
    count = sum(tensor.numel() for tensor in exact.values())
    assert wide == [{"from": "bfloat16", "to": "float32", "exact": True, "how": "every value kept",
                     "values": count, "values_changed": 0}]  # fmt: skip
    assert back[0]["values_changed"] == 0 and not back[0]["exact"]

    full = make_tiny_folder(tmp_path / "full", vision_intermediate=42, vocab=275)
    assert run("hf-to-megatron", full, tmp_path / "narrow", "--dtype", "bfloat16", "--workers", "2") == 0
    assert run("megatron-to-hf", tmp_path / "narrow", tmp_path / "rounded") == 0
    values = tensors_of(full)
    assert_same_weights(tmp_path / "rounded", {name: tensor.bfloat16() for name, tensor in values.items()})
    (cast,) = json.loads((tmp_path / "narrow" / "manifest.json").read_text())["casts"]
    changed = sum(int((tensor.bfloat16().float() != tensor).sum()) for tensor in values.values())
    assert cast["values_changed"] == changed > 0.9 * count
    assert run("verify", tmp_path / "narrow", "--source", full) == 0


def test_a_flipped_bit_is_found_and_its_tensor_named(source, tmp_path, capsys):
    copy = tmp_path / "hf"
    shutil.copytree(source, copy)
    assert run("hf-to-megatron", copy, tmp_path / "m", *SMALL) == 0
    assert run("megatron-to-hf", tmp_path / "m", tmp_path / "back", *SMALL) == 0
    plan = make_plan("hf-to-megatron", copy, tmp_path / "x", Settings(file_bytes=100_000), None)
    entry = next(entry for entry in plan.table.values() if KEY in [source.name for source in entry.sources])
    strip = next(plan.target.strips(entry, 0, entry.shape[0]))
    at_home = plan.source.tensors[KEY]  # type: ignore[attr-defined]
    flip(tmp_path / "m" / strip.file, strip.offset + 40)
    flip(copy / at_home.file, at_home.offset + 5)
    back = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())["weight_map"][KEY]
    flip(tmp_path / "back" / back, (tmp_path / "back" / back).stat().st_size - 1)
    capsys.readouterr()
    for folder, name, file, more in (
        ("m", entry.name, strip.file, ()), ("m", KEY, at_home.file, ("--source", copy)), ("back", "", back, ()),
    ):  # fmt: skip
        assert run("verify", tmp_path / folder, *more) == 1
        printed = capsys.readouterr().out
        assert f"{file}: {name}" in printed and "its hash differs from the manifest's" in printed
    tree = json.loads((tmp_path / "back" / "manifest.json").read_text())
    del tree["target"][KEY]
    (tmp_path / "back" / "manifest.json").write_text(json.dumps(tree))
    assert run("verify", tmp_path / "back") == 2
    assert f"manifest.json: {KEY}: in the manifest or in the model" in capsys.readouterr().err


def _without(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.pop(KEY))


def _more(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({"model.layers.7.input_layernorm.weight": torch.ones(3)}))


def _misshapen(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({KEY: tensors[KEY][:-1].clone()}))


def _integers(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int8)}))


def _mixed(folder: Path) -> None:
    _change(folder, lambda tensors: tensors.update({KEY: tensors[KEY].float()}))


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = next(file for file in folder.glob("*.safetensors") if KEY in load_file(file))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    file = next(file for file in folder.glob("*.safetensors") if KEY in load_file(file))
    os.truncate(file, file.stat().st_size - 10)


def _no_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _other_config(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    tree["text_config"]["vocab_size"] = 280
    (folder / "config.json").write_text(json.dumps(tree))


def _index_leaves(folder: Path) -> None:
    """The file of the same name in a folder within would be taken for the one beside the index, and proved."""
    (folder / "inner").mkdir()
    for file in folder.glob("*.safetensors"):
        shutil.copy(file, folder / "inner")
    index = folder / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    tree["weight_map"][KEY] = "inner/" + tree["weight_map"][KEY]
    index.write_text(json.dumps(tree))


BAD_FOLDERS = {
    "missing": (_without, rf"model-0000\d-of-0000\d.safetensors: {KEY} \(32, 64\): missing"),
    "extra": (_more, r"model-\S+: model.layers.7.input_layernorm.weight \(3,\): no such tensor in the model"),
    "misshapen": (_misshapen, rf"model-\S+: {KEY}: expected shape \(32, 64\), found \(31, 64\)"),
    "integers": (_integers, rf"model-\S+: {KEY}: is I8; F32, BF16, F16 are what can be read"),
    "two dtypes": (_mixed, rf"model-\S+: {KEY}: is torch.float32, model.layers.1.self_attn.q_proj.weight is "),
    "truncated": (_cut, r"model-\S+: \S+: truncated: not a whole safetensors file"),
    "a file gone": (_no_shard, r"model.safetensors.index.json: names files that are not there: model-00002-of"),
    "another folder": (_index_leaves, rf"index.json: {KEY}: said to lie in 'inner/model\S+', which is no"),
    "another config": (_other_config, r"model-\S+: lm_head.weight: expected shape \(280, 64\), found \(275, 64\)"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_line_with_file_and_tensor(source, tmp_path, capsys, case):
    spoil, told = BAD_FOLDERS[case]
    shutil.copytree(source, tmp_path / "bad")
    spoil(tmp_path / "bad")
    assert run("hf-to-megatron", tmp_path / "bad", tmp_path / "out") == 2
    errors = capsys.readouterr().err
    import re

    assert re.search(told, errors.splitlines()[0]), errors
    assert len(errors.splitlines()) == (2 if case == "another config" else 1)
    assert [file.name for file in tmp_path.iterdir()] == ["bad"]


def test_a_bad_checkpoint_is_one_line_with_file_and_tensor(source, tmp_path, capsys):
    good = tmp_path / "good"
    assert run("hf-to-megatron", source, good, *SMALL) == 0
    name = "language.decoder.layers.1.mlp.linear_fc2.weight"

    def check(*told: str) -> None:
        capsys.readouterr()
        assert run("megatron-to-hf", tmp_path / "bad", tmp_path / "out") == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1 and all(part in errors[0] for part in told), errors
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.tmp", ignore_errors=True)
        shutil.rmtree(tmp_path / "bad")
        shutil.copytree(good, tmp_path / "bad")

    (tmp_path / "bad").mkdir()
    check("state.json: no such file: not a checkpoint of this package")
    (tmp_path / "bad" / ".metadata").write_bytes(b"nothing")
    check(".metadata: not what was written: its checksum differs")
    last = max((tmp_path / "bad").glob("*.distcp"), key=lambda file: file.stat().st_size)
    ends = last.stat().st_size
    last.unlink()
    check(f"{last.name}: ", ": no such file")
    os.truncate(last, ends - 200)
    check(f"{last.name}: ", f": truncated: its box ends at byte {ends}, the file at {ends - 200}")
    with last.open("r+b") as file:  # a bit of a value
        file.seek(ends // 2)
        (byte,) = file.read(1)
        file.seek(ends // 2)
        file.write(bytes([byte ^ 1]))
    check(f"{last.name}: ", ": not what was written: its checksum differs")
    os.truncate(last, 100)
    os.truncate(last, ends)  # zeros
    check(f"{last.name}: ", ": not a tensor that torch.save wrote")
    tree = json.loads((good / "config.json").read_text())
    tree["text_config"]["num_hidden_layers"] = 1
    shutil.copytree(source, tmp_path / "files")
    (tmp_path / "files" / "config.json").write_text(json.dumps(tree))
    capsys.readouterr()
    assert run("megatron-to-hf", good, tmp_path / "out", "--source", tmp_path / "files") == 2
    assert f".metadata: {name} (64, 128): no such parameter in the model" in capsys.readouterr().err


def test_a_disk_too_small_is_said_before_the_first_byte(source, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        for number in ("1", "2"):
            assert run("hf-to-megatron", source, small / "out", "--workers", number) == 2
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
    assert f"{small}: 0.07 GB are needed there, 0.00 GB are free" in capsys.readouterr().err


def test_what_is_there_already_is_not_overwritten(source, tmp_path, capsys):
    assert run("hf-to-megatron", source, tmp_path / "out") == 0
    before = content(tmp_path / "out")
    assert run("hf-to-megatron", source, tmp_path / "out") == 0
    assert "there already, from the same source with the same settings" in capsys.readouterr().out
    assert run("hf-to-megatron", source, tmp_path / "out", "--dtype", "float32") == 2
    assert f"{tmp_path / 'out'}: exists already" in capsys.readouterr().err
    assert content(tmp_path / "out") == before


# --- killed and resumed


def _in_a_process(work: Callable[..., object], *arguments: object) -> int:
    """Exit code of a forked process that calls `work`."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _dying(after: int, log: Path, arguments: tuple[str, ...]) -> None:
    """Runs the tool with every write logged and SIGKILL before write number `after`; another file call may be it."""
    calls, chance = 0, random.Random(after)
    pwrite, replace, write = os.pwrite, Path.rename, os.write

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)

    def logged(handle: int, data: memoryview, offset: int) -> int:
        count()
        if len(data) > 1 and chance.random() < 0.3:
            data = data[: len(data) // 2]  # a disk may take a part
        done = pwrite(handle, data, offset)
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        with log.open("a") as file:
            file.write(f"{name} {offset} {done}\n")
        return done

    def renamed(self: Path, target: Path) -> Path:
        count()
        return replace(self, target)

    def written(handle: int, data: bytes) -> int:
        count()
        return write(handle, data)

    stores.os.pwrite, stores.os.write = logged, written  # type: ignore[attr-defined]
    Path.rename = renamed  # type: ignore[method-assign,assignment]
    os._exit(run(*arguments))


def _finished(partial: Path) -> set[str]:
    files = (partial / FOLDER).glob("*.jsonl") if partial.exists() else []
    return {record.name for file in files for record in read_journal(file).records}


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_killed_at_any_moment_it_goes_on_without_redoing_a_tensor(source, tmp_path, direction):
    first = source
    if direction == "megatron-to-hf":
        first = tmp_path / "m"
        assert run("hf-to-megatron", source, first) == 0
    assert run(direction, first, tmp_path / "whole", *SMALL) == 0
    plan = make_plan(direction, first, tmp_path / "out.tmp", Settings(file_bytes=100_000), None)  # type: ignore[arg-type]
    values = {
        name: [(strip.file, strip.offset, strip.offset + strip.length * strip.width * 2)
               for strip in plan.target.strips(entry, 0, entry.shape[0])]
        for name, entry in plan.table.items()
    }  # fmt: skip
    moments, kills, code = random.Random(7), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        before, log = _finished(tmp_path / "out.tmp"), tmp_path / "log"
        log.write_text("")
        after = moments.randrange(1, 60) if kills < 12 else 10**9
        code = _in_a_process(_dying, after, log, (direction, str(first), str(tmp_path / "out"), *SMALL))
        kills += 1
        writes = [
            (name, int(at), int(at) + int(size)) for name, at, size in map(str.split, log.read_text().splitlines())
        ]
        again = {
            name
            for name in before
            for file, start, stop in values[name]
            for written, at, end in writes
            if written == file and at < stop and end > start
        }
        assert not again, "a finished tensor was written again"
        assert (tmp_path / "out").exists() == (code == 0), "whole or not at all"
        if code:
            assert before <= _finished(tmp_path / "out.tmp") or not (tmp_path / "out.tmp" / FOLDER).exists()
    assert code == 0 and kills > 5
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not list(tmp_path.glob("out.*"))


def test_any_other_number_of_workers_goes_on_and_doubtful_bytes_are_read_again(source, tmp_path, capfd):
    assert run("hf-to-megatron", source, tmp_path / "whole", *SMALL) == 0
    out = tmp_path / "out"
    arguments = ("hf-to-megatron", str(source), str(out), *SMALL)
    partial = tmp_path / "out.tmp"
    for after in range(60, 200, 7):  # until one dies between a line of the journal and forcing its bytes to disk
        shutil.rmtree(partial, ignore_errors=True)
        assert _in_a_process(_dying, after, tmp_path / "log", arguments) == -signal.SIGKILL
        plan = make_plan("hf-to-megatron", source, partial, Settings(file_bytes=100_000), None)
        journals = {unit.file: read_journal(partial / FOLDER / f"{unit.file}.jsonl") for unit in plan.units}
        doubts = [file for file, found in journals.items() if len(found.records) > found.num_synced]
        if doubts:
            break
    unit, journal = doubts[0], journals[doubts[0]]
    num_finished = sum(len(found.records) for found in journals.values())
    doubtful = plan.table[journal.records[-1].name]
    strip = next(plan.target.strips(doubtful, 0, doubtful.shape[0]))
    flip(partial / unit, strip.offset)  # as if this page had not reached the disk when the machine went down
    capfd.readouterr()
    assert run(*arguments, "--workers", "3") == 0
    printed = capfd.readouterr().out
    assert f"{partial}: going on with it" in printed
    assert f"{num_finished - 1} parameters were there already" in printed
    assert content(out) == content(tmp_path / "whole")


def test_another_source_or_setting_starts_anew_and_says_so(source, tmp_path, capsys):
    copy = tmp_path / "hf"
    shutil.copytree(source, copy)
    arguments = ("hf-to-megatron", str(copy), str(tmp_path / "out"), *SMALL)
    for change in (lambda: None, lambda: os.utime(next(copy.glob("*.safetensors")))):
        assert _in_a_process(_dying, 120, tmp_path / "log", arguments) == -signal.SIGKILL
        change()
        more = () if change() is None and "begun" in str(change) else ("--dtype", "float32")
        capsys.readouterr()
        assert run(*arguments, *more) == 0
        assert "was begun from another source or with other settings: starting anew" in capsys.readouterr().out
        assert run("verify", tmp_path / "out", "--source", copy) == 0
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_target_that_cannot_be_made_is_one_line(source, tmp_path, capfd, workers):
    (tmp_path / "file").write_text("no folder")
    assert run("hf-to-megatron", source, tmp_path / "file" / "m", "--workers", workers) == 2
    # torch's C++ may say more of a peer that is gone
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "Not a directory" in line)
    assert str(tmp_path / "file") in line and "Traceback" not in line


def test_bytes_that_the_disk_lost_in_the_background_end_the_conversion(source, tmp_path, capsys, monkeypatch):
    """The kernel tells of them once: the sync at a file's end would succeed."""
    told = []

    def lossy(self: stores.Files, name: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            told.append(name)
            raise OSError(errno.EIO, "Input/output error", name)

    monkeypatch.setattr(journal_module, "SYNC_BYTES", 60_000)  # once a file
    monkeypatch.setattr(stores.Files, "sync", lossy)
    assert run("hf-to-megatron", source, tmp_path / "m", *SMALL) == 2
    assert told and "Input/output error" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_two_conversions_of_one_target_are_refused(source, tmp_path, capsys):
    import fcntl

    arguments = ("hf-to-megatron", str(source), str(tmp_path / "out"), *SMALL)
    assert _in_a_process(_dying, 50, tmp_path / "log", arguments) == -signal.SIGKILL
    with (tmp_path / "out.tmp" / FOLDER / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(*arguments) == 2
    assert "out.tmp: another conversion is writing it" in capsys.readouterr().err
    assert run(*arguments) == 0


@pytest.fixture
def rank_one_cannot_read(monkeypatch) -> None:
    read = stores.Files.read

    def fails(self: stores.Files, name: str, offset: int, into: memoryview, what: str) -> None:
        if os.environ.get("RANK") == "1":
            raise ValueError(f"{self.folder / name}: {what}: Input/output error")
        read(self, name, offset, into, what)

    monkeypatch.setattr(stores.Files, "read", fails)  # the workers are forked


def test_a_worker_that_fails_ends_all_with_its_reason(source, tmp_path, capfd, rank_one_cannot_read):
    assert run("hf-to-megatron", source, tmp_path / "out", "--workers", "3", *SMALL) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("papo: error: ") and last.endswith("Input/output error")
    assert not (tmp_path / "out").exists()
    assert run("hf-to-megatron", source, tmp_path / "out", *SMALL) == 0, "one worker alone can go on with it"


def _a_task(rank: int, port: int, arguments: tuple[str, ...]) -> None:
    """As one of two tasks that srun started."""
    os.environ |= {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if rank == 0:
        workers.UPDATE_S = 0.0
    os._exit(run(*arguments))


def _two_tasks(*arguments: str) -> list[int | None]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
    context = multiprocessing.get_context("fork")
    tasks = [context.Process(target=_a_task, args=(rank, port, arguments)) for rank in range(2)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join(60)
    return [task.exitcode for task in tasks]


def test_tasks_that_srun_started_are_the_workers(source, tmp_path, capfd):
    assert run("hf-to-megatron", source, tmp_path / "alone", *SMALL) == 0
    assert _two_tasks("hf-to-megatron", str(source), str(tmp_path / "out"), *SMALL) == [0, 0]
    assert content(tmp_path / "out") == content(tmp_path / "alone")
    assert "starting" not in capfd.readouterr().err


def test_tasks_of_srun_end_with_the_reason_of_the_one_that_fails(source, tmp_path, capfd, rank_one_cannot_read):
    assert _two_tasks("hf-to-megatron", str(source), str(tmp_path / "out"), *SMALL) == [2, 2]
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("papo: error")]
    assert len(errors) == 2 and len(set(errors)) == 1 and errors[0].endswith("Input/output error")


# --- memory


def _bounded(source: Path, target: Path, budget: int, out: Path) -> None:
    """Converts within `budget` bytes beyond what this process holds now; writes what it took at most."""
    from megatron_papo.conversion.convert import convert

    before = memory("VmRSS"), memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")
    report = convert("hf-to-megatron", source, target, Settings(), before[0] + budget, workers.Workers())
    out.write_text(f"{report.peak_bytes - before[0]} {report.peak_anonymous_bytes - before[1]} {report.num_bytes}")
    os._exit(0)


def test_memory_stays_below_its_bound_whatever_the_size(tmp_path):
    """22 buffers of some 150 KiB, and what libraries take while they work, for tensors of up to 20 MB, 130 in all."""
    config = tiny_config(hidden=512, layers=3, heads=16, kv_heads=2, vocab=26_000)
    config.text_config.intermediate_size = 8192
    tiny_model(config).bfloat16().save_pretrained(tmp_path / "hf")
    budget = 58 * 2**20
    assert _in_a_process(_bounded, tmp_path / "hf", tmp_path / "m", budget, tmp_path / "took") == 0
    resident, anonymous, num_bytes = map(int, (tmp_path / "took").read_text().split())
    assert num_bytes > 2 * budget
    assert resident < budget and anonymous < budget / 2
    assert run("verify", tmp_path / "m") == 0


# --- others load it


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_an_export_with_the_same_logits(family, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoVideoProcessor, GenerationConfig

    source = make_source(tmp_path / "source", family)
    assert run("hf-to-megatron", source, tmp_path / "m") == 0
    assert run("megatron-to-hf", tmp_path / "m", tmp_path / "out", *SMALL) == 0
    assert run("verify", tmp_path / "out", "--source", tmp_path / "m") == 0
    ids = torch.arange(5, 40)[None]
    logits = []
    for folder in (source, tmp_path / "out"):
        model, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, trust_remote_code=False
        )
        assert not any(report.values()) and model.config.model_type == family
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    for kind in (AutoProcessor, AutoVideoProcessor, GenerationConfig):
        before, after = (kind.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "out"))
        assert before == after
    templates = {AutoProcessor.from_pretrained(folder).chat_template for folder in (source, tmp_path / "out")}
    assert len(templates) == 1 and None not in templates


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_an_export_with_its_own_loader_and_answers_as_transformers(tmp_path):
    """Weights, processor, tokenizer, generation config and chat template, by a question about a picture."""
    exports = []
    for family in FAMILIES:
        root, exports = tmp_path / family, [*exports, tmp_path / family / "out"]
        source = make_tiny_folder(root / "hf", family=family, **FOR_VLLM)
        assert run("hf-to-megatron", source, root / "m") == 0
        assert run("megatron-to-hf", root / "m", root / "out") == 0
    environ = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = commands.run("-m", "tests.system.vllm_loads", *exports, environ=environ, vllm=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-len(exports) :]:
        answers = json.loads(line)
        assert len(set(answers["vllm"])) > 3 and answers["vllm"] == answers["transformers"]
