"""The parts of conversion that need no weights: rows and spans, frames of boxes, headers, plans of the true shapes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_papo.checkpoint.archive import frame, values_offset
from megatron_papo.conversion.checkpoint_files import CheckpointFiles
from megatron_papo.conversion.convert import chunk_for
from megatron_papo.conversion.huggingface_files import HuggingFaceFiles, plan_file
from megatron_papo.conversion.journal import Journal, JournalEntry, read_journal
from megatron_papo.conversion.plan import Settings, plan_target
from megatron_papo.conversion.stores import in_order, num_values, source_spans, spans, width
from megatron_papo.conversion.stream import Hasher
from megatron_papo.conversion.workers import memory
from megatron_papo.model.family import FAMILIES
from megatron_papo.model.parameter_map import ParameterEntry, fill_shard, parameter_table
from megatron_papo.model.published_shapes import published_config, published_models
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.safetensors_header import read_header
from tests.support.tiny import tiny_config

TABLES = {
    family: parameter_table(
        ModelShape.from_dict(json.loads(tiny_config(family, vision_intermediate=42, vocab=275).to_json_string()))
    )
    for family in FAMILIES
}
UNORDERED = {f"vision.decoder.layers.{layer}.self_attention.linear_qkv.{kind}"
             for layer in range(2) for kind in ("weight", "bias")}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def table(request) -> dict[str, ParameterEntry]:
    return TABLES[request.param]


def _whole(entry: ParameterEntry) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A parameter as the name table makes it, and its sources, as matrices."""
    sources = [torch.randn(source.shape[0], width(entry)) for source in entry.sources]
    named = {source.name: tensor for source, tensor in zip(entry.sources, sources)}
    whole = torch.empty(entry.shape)
    fill_shard(entry, whole, 0, lambda name, index: named[name][index])
    return whole.reshape(entry.shape[0], -1), sources


def test_spans_are_the_name_table_row_by_row(table):
    assert {name for name, entry in table.items() if not in_order(entry)} == UNORDERED
    for entry in table.values():
        whole, sources = _whole(entry)
        for start in range(0, entry.shape[0], 37):
            stop = min(start + 37, entry.shape[0])
            found = torch.cat([sources[s.source][s.start : s.start + s.length] for s in spans(entry, start, stop)])
            assert torch.equal(found, whole[start:stop])
        for index, tensor in enumerate(sources):
            found = torch.cat([whole[s.row : s.row + s.length] for s in source_spans(entry, index, 0, len(tensor))])
            assert torch.equal(found, tensor), "and back"


def test_hashes_of_both_forms_are_those_of_the_plain_bytes(table):
    import hashlib

    def plain(tensor: torch.Tensor) -> str:
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    for entry in table.values():
        whole, sources = _whole(entry)
        hasher = Hasher(entry, 4)
        for start in range(0, entry.shape[0], 50):
            for call in hasher.updates(
                start, min(start + 50, len(whole)), memoryview(whole[start : start + 50].numpy().tobytes())
            ):
                call()
        forms = hasher.finish(
            lambda span, whole=whole: memoryview(whole[span.row : span.row + span.length].numpy().tobytes()), 1000
        )
        assert forms.parameter == (plain(whole),)
        assert forms.sources == tuple(map(plain, sources)), entry.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (64, 128)])
def test_a_framed_box_is_what_torch_saves(shape, dtype):
    values = torch.randn(shape).to(dtype)
    parts = frame(shape, dtype)
    blob = parts.before + values.view(torch.uint8).numpy().tobytes() + parts.behind
    loaded = torch.load(io.BytesIO(blob), weights_only=True)
    assert loaded.dtype == dtype and torch.equal(loaded, values)
    assert values_offset(io.BytesIO(blob), shape, dtype) == len(parts.before)
    saved = io.BytesIO()  # with check sums, as a run writes it
    torch.save(values, saved)
    assert values_offset(saved, shape, dtype) == len(parts.before), "the same place"


def test_a_box_of_another_kind_is_refused():
    def stored(thing: object) -> io.BytesIO:
        sink = io.BytesIO()
        torch.save(thing, sink)
        return sink

    for thing in (
        torch.zeros(5, 3),
        torch.zeros(3, 5).bfloat16(),
        torch.zeros(5, 3).T,
        torch.zeros(4, 5)[1:],
        {"a": 1},
    ):
        with pytest.raises(ValueError, match=r"not a tensor|not \(3, 5\)"):
            values_offset(stored(thing), (3, 5), torch.float32)
    with pytest.raises(ValueError, match=re.escape("not a tensor that torch.save wrote")):
        values_offset(io.BytesIO(b"x" * 200), (3, 5), torch.float32)


def test_a_planned_safetensors_file_is_what_the_library_reads(table, tmp_path):
    entry = table["language.decoder.layers.1.self_attention.linear_qkv.weight"]
    places, header = plan_file("model.safetensors", [entry], {entry.name: torch.bfloat16})
    tensors = {source.name: torch.randn(source.shape).bfloat16() for source in entry.sources}
    file = tmp_path / "model.safetensors"
    file.write_bytes(header + b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values()))
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert read_header(file) == places


def test_headers_that_lie_are_refused_with_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(4, 4), "y": torch.zeros(2)}, file)
    whole = file.read_bytes()
    for data, told in (
        (whole[:-3], "y: truncated"), (whole[:5], "end within its header"), (whole[:40], "end within its header"),
        (whole.replace(b"F32", b"I32", 1), "is I32; F32, BF16, F16 are what can be read"),
        (whole.replace(b"[4,4]", b"[4,5]"), "x: 64 bytes are not F32 (4, 5)"),
        (whole.replace(b'"dtype"', b'"dtypo"'), "its header is not readable"),
    ):  # fmt: skip
        file.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            read_header(file)
        assert str(caught.value).startswith(f"{file}: ") and told in str(caught.value)


def test_a_journal_survives_a_line_cut_short(tmp_path):
    file = tmp_path / "a.jsonl"
    first, second = (JournalEntry(name, ("1",), ("2",), ("3", "4"), 5) for name in ("a", "b"))
    journal = Journal(file, [])
    journal.append(first)
    journal.mark_synced(1)
    journal.append(second)
    journal.close()
    assert (read_journal(file).records, read_journal(file).num_synced) == ([first, second], 1)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    assert (read_journal(file).records, read_journal(file).num_synced) == ([first], 1)
    file.write_bytes(whole[:-20] + bytes(19) + b"\n")  # the page never reached the disk
    assert read_journal(file).records == [first]
    journal = Journal(file, [second])
    journal.close()
    assert read_journal(file).records == [second]
    assert read_journal(tmp_path / "none").records == []


@pytest.mark.parametrize("name", published_models())
def test_plans_of_the_published_shapes(name):
    """Parameters counted by transformers' own model, on no memory; every byte has one place, no file is too large."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = published_config(name)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    table = parameter_table(ModelShape.from_dict(config))
    count = sum(num_values(entry) for entry in table.values())
    assert count == sum(parameter.numel() for parameter in model.parameters()) == published_models()[name]
    dtypes = dict.fromkeys(table, torch.bfloat16)
    most = max(2 * num_values(entry) for entry in table.values())
    for direction, names in (
        ("hf-to-megatron", "__{}_0.distcp"),
        ("megatron-to-hf", "model-{:05d}-of-{:05d}.safetensors"),
    ):
        store, units = plan_target(direction, Path("target"), table, dtypes, Settings())
        assert [entry.name for unit in units for entry in unit.entries] == list(table)
        assert [unit.file for unit in units] == [
            names.format(i + (direction == "megatron-to-hf"), len(units)) for i in range(len(units))
        ]
        around = sum(len(data) for unit in units for _, data in unit.around)
        assert sum(unit.num_bytes for unit in units) == 2 * count + around
        assert max(unit.num_bytes for unit in units) < max(2e9, most) + 2e6
        assert around < 5e6
        assert isinstance(store, CheckpointFiles | HuggingFaceFiles)
        if isinstance(store, CheckpointFiles):
            sizes = [box.size for boxes in store.boxes.values() for box in boxes]
            assert max(sizes) <= 128 * 2**20 + 4096, "whoever loads it holds no more at once"
    assert chunk_for(memory("VmRSS") + 2**30, table, store) == 2 * 2**20
    with pytest.raises(ValueError, match=re.escape("--memory-gib: 0.010 GiB are too little")):
        chunk_for(int(0.01 * 2**30), table, store)
