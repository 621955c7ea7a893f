"""Which weights of a Hugging Face folder count: as transformers reads them, or refused, by every reader alike."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.conversion.huggingface_files import HuggingFaceFiles
from megatron_papo.conversion.stores import Files, read_rows
from megatron_papo.model.parameter_map import parameter_table
from megatron_papo.model.qwen2_5_vl.parameters import EMBEDDING, HEAD, module_name
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.first_look import files_of_transformers, look
from megatron_papo.weights.held import HeldParameter
from megatron_papo.weights.transfer import fill_held
from megatron_papo.weights.weight_files import INDEX_FILE, weight_files
from tests.support.tiny import tiny_config, tiny_model

CONFIG = tiny_config(tie=True)
SHAPE = ModelShape.from_dict(json.loads(CONFIG.to_json_string()))


@pytest.fixture(scope="module")
def tensors():
    """Of a tied model, by published name."""
    given = tiny_model(CONFIG).state_dict()
    return {
        source.name: given[module_name(source.name)].clone()
        for entry in parameter_table(SHAPE).values()
        for source in entry.sources
    }


def folder_of(path, files, index=None, **config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(json.loads(CONFIG.to_json_string()) | config))
    for name, held in files.items():
        save_file(held, path / name, metadata={"format": "pt"})
    if index is not None:
        write_index(path, index)
    return path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def zeros(tensors):
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def loaded(folder, shape):
    """Published name -> tensor, as training loads it into one rank, looked at as a verb does."""
    table = parameter_table(shape)
    held = {name: HeldParameter(entry, torch.empty(entry.shape)) for name, entry in table.items()}
    fill_held(held, shape, folder, tensor_rank=0)
    look(folder, shape, held, tensor_rank=0)
    return {name: part.tensor for name, part in held.items()}


def converted(folder, shape):
    """The same as a conversion reads it."""
    store, found = HuggingFaceFiles.read(folder, shape), {}
    with Files(folder) as files:
        for name, entry in parameter_table(shape).items():
            data = torch.empty(
                entry.shape[0] * entry.shape[-1] * 4 if len(entry.shape) > 1 else entry.shape[0] * 4, dtype=torch.uint8
            )
            read_rows(files, store, entry, 0, entry.shape[0], data)
            found[name] = data.view(torch.float32).view(entry.shape)
    return found


def assert_read(folder, expected, shape=SHAPE):
    """By training and conversion, and that transformers reads the same files."""
    for read in (loaded, converted):
        found = read(folder, shape)
        assert torch.equal(found["language.embedding.word_embeddings.weight"], expected[EMBEDDING])
        assert torch.equal(found["language.decoder.final_layernorm.weight"], expected["model.norm.weight"])
    assert {file.name for file in files_of_transformers(folder)} == {file.name for file in weight_files(folder).files}


def assert_refused(folder, message, shape=SHAPE):
    for read in (loaded, converted):
        with pytest.raises(ValueError, match=message) as caught:
            read(folder, shape)
        assert len(str(caught.value).splitlines()) == 1


def test_model_safetensors_alone_counts_whatever_lies_beside_it(tensors, tmp_path):
    stray = {"model_ema.safetensors": zeros(tensors), "a.safetensors": zeros(tensors)}
    folder = folder_of(tmp_path / "stray", {"model.safetensors": tensors, **stray})
    assert_read(folder, tensors)
    assert weight_files(folder).note() == (
        f"{folder}: a.safetensors, model_ema.safetensors: not read; weights are those of model.safetensors alone"
    )
    stale = folder_of(
        tmp_path / "stale", {"model.safetensors": tensors, **stray}, dict.fromkeys(tensors, "a.safetensors")
    )
    assert_read(stale, tensors)
    assert INDEX_FILE in weight_files(stale).left_out
    (stale / INDEX_FILE).write_text("{")  # not looked at
    assert_read(stale, tensors)


def test_without_it_the_files_of_the_index_count(tensors, tmp_path):
    names = sorted(tensors)
    halves = {"x.safetensors": names[::2], "y.safetensors": names[1::2]}
    files = {file: {name: tensors[name] for name in held} for file, held in halves.items()}
    index = {name: file for file, held in halves.items() for name in held}
    folder = folder_of(tmp_path / "index", {**files, "old.safetensors": zeros(tensors)}, index)
    assert_read(folder, tensors)
    assert weight_files(folder).left_out == ["old.safetensors"]
    write_index(folder, {"model.norm.weight": index["model.norm.weight"]} | {n: f for n, f in list(index.items())[::3]})
    assert_read(folder, tensors)  # a tensor that the index does not name lies in a file that it names
    (folder / INDEX_FILE).write_text(
        json.dumps({"metadata": {}, "weight_map": {**index, "visual.more": "y.safetensors"}})
    )
    assert_refused(folder, f"y.safetensors: visual.more: not there, though {INDEX_FILE} says so")
    write_index(folder, {**index, HEAD: "y.safetensors"})
    assert_read(folder, tensors)  # a tied head that was left out
    gone = folder_of(
        tmp_path / "gone",
        {
            "x.safetensors": files["x.safetensors"],
            "y.safetensors": {n: t for n, t in files["y.safetensors"].items() if n != names[1]},
        },
        index,
    )
    assert_refused(gone, rf"y.safetensors: {re.escape(names[1])} .*: missing$")


def test_weights_under_another_name_are_refused(tensors, tmp_path):
    folder = folder_of(tmp_path / "other", {"model-00001-of-00001.safetensors": tensors})
    told = f"holds neither model.safetensors nor {INDEX_FILE}; model-00001-of-00001.safetensors would not be read"
    assert_refused(folder, told)
    with pytest.raises(ValueError, match="transformers finds no weights"):
        files_of_transformers(folder)
    with pytest.raises(ValueError, match="transformers_weights: "):
        ModelShape.from_folder(folder_of(tmp_path / "named", {}, transformers_weights="ema.safetensors"))


def test_an_adapter_beside_the_weights_is_refused(tensors, tmp_path):
    folder = folder_of(tmp_path / "adapter", {"model.safetensors": tensors})
    (folder / "adapter_config.json").write_text("{}")
    assert_refused(folder, r"adapter_config.json: an adapter, which transformers adds where it can")


def test_a_checkpoint_with_a_stray_file_is_a_checkpoint(tensors, tmp_path):
    folder = folder_of(tmp_path / "checkpoint", {"ema.safetensors": tensors})
    (folder / "state.json").write_text("{}")
    assert names_checkpoint(folder)
    (folder / "model.safetensors").touch()
    assert not names_checkpoint(folder)


def test_a_head_beside_tied_embeddings_is_the_embedding_or_refused(tensors, tmp_path):
    words = tensors[EMBEDDING]
    assert_read(folder_of(tmp_path / "same", {"model.safetensors": tensors | {HEAD: words.clone()}}), tensors)
    for name, head, told in (
        ("other", words + 1e-3, "lm_head.weight: differs from the word embedding"),
        ("rounded", words.bfloat16(), "lm_head.weight: differs from the word embedding"),
        ("narrow", torch.zeros(3, 3), r"lm_head.weight: expected shape \(272, 64\), found \(3, 3\)"),
    ):
        assert_refused(folder_of(tmp_path / name, {"model.safetensors": tensors | {HEAD: head}}), told)
    untied = ModelShape.from_dict(json.loads(tiny_config().to_json_string()))
    folder = folder_of(
        tmp_path / "untied",
        {"model.safetensors": tensors | {HEAD: words + 1}},
        **json.loads(tiny_config().to_json_string()),
    )
    assert_read(folder, tensors, untied)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    assert_refused(folder, r"lm_head.weight \(272, 64\): missing", untied)


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_embeddings_are_tied_where_transformers_ties_them(tmp_path, outer, inner):
    from transformers import Qwen2_5_VLConfig

    tree = json.loads(CONFIG.to_json_string())
    for section, value in ((tree, outer), (tree["text_config"], inner)):
        section.pop("tie_word_embeddings")
        if value is not None:
            section["tie_word_embeddings"] = value
    (tmp_path / "config.json").write_text(json.dumps(tree))
    theirs = Qwen2_5_VLConfig.from_pretrained(tmp_path).tie_word_embeddings
    assert ModelShape.from_folder(tmp_path).tie_word_embeddings == theirs == bool(outer or inner)


@pytest.mark.parametrize("text", ["model.", "model.language_model.", "language_model."])
@pytest.mark.parametrize("vision", ["visual.", "model.visual."])
def test_names_of_every_age_are_read(tensors, tmp_path, text, vision):
    named = {
        (
            vision + name.removeprefix("visual.") if name.startswith("visual.") else text + name.removeprefix("model.")
        ): each
        for name, each in tensors.items()
    }
    assert_read(folder_of(tmp_path / "named", {"model.safetensors": named}), tensors)


def test_the_first_look_finds_what_was_not_loaded_as_it_is(tensors, tmp_path):
    folder = folder_of(tmp_path / "model", {"model.safetensors": tensors})
    table = parameter_table(SHAPE)
    held = {name: HeldParameter(entry, torch.empty(entry.shape)) for name, entry in table.items()}
    fill_held(held, SHAPE, folder, tensor_rank=0)
    look(folder, SHAPE, held, tensor_rank=0)
    held["vision.merger.linear_fc2.weight"].tensor.zero_()
    with pytest.raises(ValueError, match=r"visual.merger.mlp.2.weight: row 0 was not loaded as it is there"):
        look(folder, SHAPE, held, tensor_rank=0)
    untied = ModelShape.from_dict(json.loads(tiny_config().to_json_string()))
    with pytest.raises(ValueError, match=r"lm_head.weight: \(272, 64\) here, None in transformers' model"):
        look(folder, untied, held, tensor_rank=0)
