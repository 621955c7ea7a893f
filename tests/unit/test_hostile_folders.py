"""Model folders made to harm: indexes and headers that lie, links to secrets, code beside the weights, odd numbers."""

import ast
import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_papo.checkpoint.weight_loading import check_weights
from megatron_papo.conversion.huggingface_files import HuggingFaceFiles
from megatron_papo.model.family import FAMILIES
from megatron_papo.model.parameter_map import parameter_table
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.publishing import check_side_files, copy_side_files
from megatron_papo.weights.safetensors_header import read_header
from tests.support.tiny import tiny_config

CONFIGS = {family: json.loads(tiny_config(family).to_json_string()) for family in FAMILIES}
SHAPE = CONFIGS["qwen2_5_vl"]
INDEX = "model.safetensors.index.json"


def weights(config=SHAPE):
    table = parameter_table(ModelShape.from_dict(config))
    return {source.name: torch.zeros(source.shape) for entry in table.values() for source in entry.sources}


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def both_readers_refuse(folder, message, config=SHAPE):
    """The one that loads and the one that converts, with the same line."""
    shape = ModelShape.from_dict(config)
    for read in (lambda: check_weights(shape, folder), lambda: HuggingFaceFiles.read(folder, shape)):
        with pytest.raises(ValueError, match=message) as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + 2 * len(str(folder))


@pytest.fixture
def folder(tmp_path):
    """A folder of two files with an index, and a file of the same name and other weights in a folder within."""
    tensors = weights()
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for inner, value in ((tmp_path / "model", 0.0), (tmp_path / "model/inner", 1.0)):
        inner.mkdir()
        for file, held in halves.items():
            save_file({name: tensors[name] + value for name in held}, inner / file)
    write_index(tmp_path / "model", {name: file for file, held in halves.items() for name in held})
    (tmp_path / "model/config.json").write_text(json.dumps(SHAPE))
    return tmp_path / "model"


def test_an_index_names_files_beside_it_alone(folder):
    first = sorted(weights())[0]
    good = json.loads((folder / INDEX).read_text())["weight_map"]
    shape = ModelShape.from_dict(SHAPE)
    assert HuggingFaceFiles.read(folder, shape).tensors.keys() == weights().keys()
    outside = shutil.copyfile(folder / "a.safetensors", folder.parent / "a.safetensors")
    for name in ("inner/a.safetensors", "../a.safetensors", str(outside), "./a.safetensors", "a.bin", "..", "", 7, None,
                 ["a.safetensors"], "x\n/a.safetensors"):  # fmt: skip
        write_index(folder, {**good, first: name})
        both_readers_refuse(folder, rf"^{re.escape(str(folder / INDEX))}: {re.escape(first)}: said to lie in ")
    for text in (
        "[]",
        "{}",
        '{"weight_map": {"a": "a.safetensors"}}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "[" * 100_000,
        "{",
        "\0",
    ):
        (folder / INDEX).write_text(text)
        both_readers_refuse(folder, rf"^{re.escape(str(folder / INDEX))}: ")


def test_a_tensor_lies_in_one_place_and_where_the_index_says(folder):
    first, *_, last = sorted(weights())
    good = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, {**good, first: "b.safetensors"})
    both_readers_refuse(folder, rf"a.safetensors: {re.escape(first)}: lies here, but in b.safetensors by {INDEX}$")
    for beside in ({first: weights()[first]}, {"model.visual." + last.removeprefix("visual."): weights()[last]}):
        write_index(folder, {**good, "x": "c.safetensors"})
        save_file({"x": torch.zeros(1), **beside}, folder / "c.safetensors")
        name = re.escape(next(iter(beside)))
        there = good[first if first in beside else last]
        told = f"lies here, but in {there} by {INDEX}$" if first in beside else f"lies in {there} already$"
        both_readers_refuse(folder, rf"c.safetensors: {name}: {told}")


def test_weights_are_regular_files_also_behind_a_link(folder, tmp_path):
    shutil.move(folder / "a.safetensors", tmp_path / "blob")
    (folder / "a.safetensors").symlink_to(tmp_path / "blob")  # as the hub's cache has them
    assert HuggingFaceFiles.read(folder, ModelShape.from_dict(SHAPE)).tensors.keys() == weights().keys()
    (tmp_path / "blob").unlink()
    os.mkfifo(tmp_path / "blob")
    both_readers_refuse(folder, "a.safetensors: not a regular file")
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").symlink_to("/dev/zero")
    both_readers_refuse(folder, "a.safetensors: not a regular file")
    shutil.rmtree(folder)
    folder.mkdir()
    torch.save(weights(), folder / "pytorch_model.bin")
    both_readers_refuse(folder, rf"model: holds neither model.safetensors nor {INDEX}$")
    os.mkfifo(folder / "model.safetensors")
    both_readers_refuse(folder, "model.safetensors: not a regular file")


LEVEL = "model.visual.deepstack_merger_list.1.linear_fc2.weight"
BEYOND = LEVEL.replace(".1.", ".2.")
PLACES = "model.visual.pos_embed.weight"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({LEVEL: None}, rf"{LEVEL} \(64, 128\): missing"),
        ({LEVEL: torch.zeros(64, 127)}, rf"{LEVEL}: expected shape \(64, 128\), found \(64, 127\)"),
        ({BEYOND: torch.zeros(64, 128)}, rf"{BEYOND} \(64, 128\): no such tensor"),
        ({PLACES: None}, rf"{PLACES} \(36, 32\): missing"),
        ({PLACES: torch.zeros(49, 32)}, rf"{PLACES}: expected shape \(36, 32\), found \(49, 32\)"),
        ({"model.visual.pos_embed.bias": torch.zeros(32)}, r"model.visual.pos_embed.bias \(32,\): no such tensor"),
    ],
)
def test_levels_and_position_embeddings_that_do_not_fit(tmp_path, changes, told):
    config = CONFIGS["qwen3_vl"]
    tensors = {name: tensor for name, tensor in (weights(config) | changes).items() if tensor is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    both_readers_refuse(tmp_path, rf"^{re.escape(str(tmp_path))}(/model.safetensors)?: {told}", config)


def header_file(path, tree, num_bytes=64):
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def tensor(start, stop, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LIES = {
    "overlap": ({"x": tensor(0, 16), "y": tensor(8, 24), "z": tensor(24, 64, [10])}, "y: begins at byte .* overlaps"),
    "the same place": ({"x": tensor(0, 16), "y": tensor(0, 16), "z": tensor(16, 64, [12])}, "y: .* overlaps"),
    "hole": ({"x": tensor(0, 16), "y": tensor(32, 64, [8])}, "y: begins at byte .* leaves a gap"),
    "hole before": ({"x": tensor(16, 64, [12])}, "x: begins at byte .* leaves a gap"),
    "rest": ({"x": tensor(0, 16)}, "48 bytes follow the last tensor"),
    "negative": ({"x": tensor(-16, 0)}, "x: its header is not readable"),
    "backwards": ({"x": tensor(16, 0, [-4])}, "x: its header is not readable"),
    "negative shape": ({"x": tensor(0, 64, [-4, -4])}, "x: its header is not readable"),
    "true": ({"x": tensor(0, 64, [True, 16])}, "x: its header is not readable"),
    "fraction": ({"x": tensor(0, 64, [16.0])}, "x: its header is not readable"),
    "true offset": ({"x": tensor(False, 64, [16])}, "x: its header is not readable"),
    "huge": ({"x": tensor(0, 64, [10**18, 10**18])}, "x: 64 bytes are not F32"),
    "beyond": ({"x": tensor(0, 10**18, [10**18 // 4])}, "x: truncated"),
    "many axes": ({"x": tensor(0, 64, [1] * 1000)}, "x: its header is not readable"),
    "shape of text": ({"x": tensor(0, 64, "16")}, "x: its header is not readable"),
    "dtype of lists": ({"x": tensor(0, 64, [16], ["F32"])}, "x: is "),
    "no facts": ({"x": None}, "x: its header is not readable"),
    "three offsets": ({"x": {**tensor(0, 64, [16]), "data_offsets": [0, 1, 2]}}, "x: its header is not readable"),
    "list": ([1], "no mapping"),
    "twice": (b'{"x": {}, "x": {}}', "twice"),
    "nested": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not readable"),
    "digits": (b'{"x": ' + b"9" * 10_000 + b"}", "not readable"),
    "a name of two lines": ({"a\nb\x1b[2J": None}, r"'a\\nb\\x1b\[2J': its header"),
    "no text": (b"\xff\xfe", "not readable"),
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path, lie):
    tree, message = LIES[lie]
    file = header_file(tmp_path / "a.safetensors", tree)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert read_header(header_file(tmp_path / "b.safetensors", {"x": tensor(0, 64, [2, 8])}))["x"].shape == (2, 8)


def test_side_files_are_no_way_to_other_files(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a key")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "own.txt").write_text("own")
    (folder / "notes.txt").symlink_to(secret)
    (folder / "inner.txt").symlink_to("own.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.json")
    (folder / "large.json").write_text("")
    os.truncate(folder / "large.json", 2**40)
    (tmp_path / "out").mkdir()
    copy_side_files(folder, tmp_path / "out")
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {
        "config.json": "{}",
        "own.txt": "own",
    }
    said = check_side_files(folder)
    assert [line.split(": ")[0].rpartition("/")[2] for line in said] == [
        "gone.txt", "inner.txt", "large.json", "notes.txt", "pipe.json", "zero.json",
    ]  # fmt: skip
    for name in ("tokenizer.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        for check in (check_side_files, lambda folder: copy_side_files(folder, tmp_path / "out")):
            with pytest.raises(
                ValueError, match=rf"model/(config|{name}): a link to .*secret; only what|config.json: a"
            ):
                check(folder)


def test_the_hubs_cache_keeps_working(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0f", tmp_path / "models--a--b/blobs"
    for folder in (snapshot, blobs, tmp_path / "out"):
        folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (blobs / name[:3]).write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/{name[:3]}")
    (tmp_path / "token").write_text("a key")
    (snapshot / "x.txt").symlink_to(tmp_path / "token")
    (tmp_path / "mine").symlink_to(snapshot)
    copy_side_files(tmp_path / "mine", tmp_path / "out")
    assert {file.name: file.read_text() for file in (tmp_path / "out").iterdir()} == {
        "config.json": "config.json", "tokenizer.json": "tokenizer.json",
    }  # fmt: skip
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


NUMBERS = [-1, 0, True, 1.5, 10**18, 10**400, "64", [64], {}, float("nan"), float("inf")]


KEYS = (
    "text_config.hidden_size", "text_config.num_hidden_layers", "text_config.vocab_size", "text_config.rms_norm_eps",
    "text_config.num_attention_heads", "text_config.rope_parameters.rope_theta", "vision_config.depth",
    "vision_config.patch_size", "image_token_id", "tie_word_embeddings",
)  # fmt: skip
OWN_KEYS = {
    "qwen2_5_vl": ["vision_config.window_size"],
    "qwen3_vl": ["vision_config.num_position_embeddings", "vision_config.deepstack_visual_indexes"],
}


@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family in FAMILIES for key in (*KEYS, *OWN_KEYS[family])]
)
def test_numbers_that_no_model_has(tmp_path, family, key):
    *sections, last = key.split(".")
    allowed = {"rms_norm_eps": (1.5,), "rope_theta": (1.5, 10**18), "image_token_id": (0,)}.get(last, ())
    for value in NUMBERS:
        if value in allowed or (last == "tie_word_embeddings" and value is True):
            continue
        tree = copy.deepcopy(CONFIGS[family])
        inner = tree
        for section in sections:
            inner = inner[section]
        inner[last] = value
        (tmp_path / "config.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/config.json: .*{last}: ") as caught:
            ModelShape.from_folder(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    sections = json.dumps({"model_type": family, "vision_config": 7, "text_config": []})
    for text in ("[" * 100_000, "[1]", "\xff", sections):
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=r"config.json: ") as caught:
            ModelShape.from_folder(tmp_path)
        assert "\n" not in str(caught.value)


def test_whatever_opens_strangers_files_says_what_it_opens():
    """No call is forgotten: formats of pictures by name, no code of a model folder."""
    found = {"formats": 0, "trust_remote_code": 0}
    root = Path(__file__).parents[2]
    for path in (
        file
        for folder in ("megatron_papo", "tools", "benchmarks", "examples")
        for file in (root / folder).rglob("*.py")
    ):
        text = path.read_text()
        if not any(word in text for word in ("Image.open", "LLM(", "from_pretrained")):
            continue
        for node in ast.walk(ast.parse(text)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            needed = "formats" if called == "Image.open" else "trust_remote_code"
            if called in ("Image.open", "LLM") or called.endswith(".from_pretrained"):
                assert needed in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}: {called}"
                found[needed] += 1
    assert found["formats"] >= 1 and found["trust_remote_code"] >= 6
