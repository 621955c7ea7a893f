"""Which weights of a Hugging Face folder count: as transformers reads them, or refused, by every reader alike."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from megatron_papo.checkpoint.state_file import names_checkpoint
from megatron_papo.conversion.huggingface_files import HuggingFaceFiles
from megatron_papo.conversion.stores import Files, read_rows
from megatron_papo.model.family import FAMILIES
from megatron_papo.model.parameter_map import ParametersModule, parameter_names, parameter_table
from megatron_papo.model.shape import ModelShape
from megatron_papo.weights.first_look import files_of_transformers, look
from megatron_papo.weights.held import HeldParameter
from megatron_papo.weights.transfer import fill_held
from megatron_papo.weights.weight_files import INDEX_FILE, weight_files
from tests.support.tiny import tiny_config, tiny_model

Tensors = dict[str, torch.Tensor]
HEAD = "lm_head.weight"
NAMED = ("model.language_model.", "language_model.")
"""What the language model's names begin with, where they do not begin with `model.` alone."""


@dataclass(frozen=True)
class Model:
    """A family's tiny model, and folders of it."""

    config: dict[str, Any]
    """config.json."""
    shape: ModelShape
    names: ParametersModule
    tensors: Tensors
    """The weights by published name."""

    @property
    def embedding(self) -> torch.Tensor:
        return self.tensors[self.names.EMBEDDING]

    def name(self, module: str) -> str:
        """The published name of a parameter by its name in transformers' model, without `model.`."""
        return self.names.published_name(f"model.{module}")

    def folder_of(self, path: Path, files: dict[str, Tensors], index: dict[str, str] | None = None, **config: Any):
        """Writes a folder with these files of weights and an index, and with other keys in config.json."""
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config | config))
        for name, held in files.items():
            save_file(held, path / name, metadata={"format": "pt"})
        if index is not None:
            write_index(path, index)
        return path

    def assert_read(self, folder: Path) -> None:
        """By training and conversion, and that transformers reads the same files."""
        for read in (loaded, converted):
            found = read(folder, self.shape)
            assert torch.equal(found["language.embedding.word_embeddings.weight"], self.embedding)
            norm = self.tensors[self.name("language_model.norm.weight")]
            assert torch.equal(found["language.decoder.final_layernorm.weight"], norm)
        assert {file.name for file in files_of_transformers(folder)} == {
            file.name for file in weight_files(folder).files
        }

    def assert_refused(self, folder: Path, message: str) -> None:
        for read in (loaded, converted):
            with pytest.raises(ValueError, match=message) as caught:
                read(folder, self.shape)
            assert len(str(caught.value).splitlines()) == 1


def model_of(family: str, *, tie: bool) -> Model:
    config = tiny_config(family, tie=tie)
    shape = ModelShape.from_dict(json.loads(config.to_json_string()))
    names, given = parameter_names(shape), tiny_model(config).state_dict()
    sources = [source.name for entry in parameter_table(shape).values() for source in entry.sources]
    return Model(
        json.loads(config.to_json_string()),
        shape,
        names,
        {name: given[names.module_name(name)].clone() for name in sources},
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family) -> Model:
    """With tied embeddings."""
    return model_of(family, tie=True)


@pytest.fixture(scope="module")
def tensors(model) -> Tensors:
    return model.tensors


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


def test_model_safetensors_alone_counts_whatever_lies_beside_it(model, tensors, tmp_path):
    stray = {"model_ema.safetensors": zeros(tensors), "a.safetensors": zeros(tensors)}
    folder = model.folder_of(tmp_path / "stray", {"model.safetensors": tensors, **stray})
    model.assert_read(folder)
    assert weight_files(folder).note() == (
        f"{folder}: a.safetensors, model_ema.safetensors: not read; weights are those of model.safetensors alone"
    )
    stale = model.folder_of(
        tmp_path / "stale", {"model.safetensors": tensors, **stray}, dict.fromkeys(tensors, "a.safetensors")
    )
    model.assert_read(stale)
    assert INDEX_FILE in weight_files(stale).left_out
    (stale / INDEX_FILE).write_text("{")  # not looked at
    model.assert_read(stale)


def test_without_it_the_files_of_the_index_count(model, tensors, tmp_path):
    names = sorted(tensors)
    halves = {"x.safetensors": names[::2], "y.safetensors": names[1::2]}
    files = {file: {name: tensors[name] for name in held} for file, held in halves.items()}
    index = {name: file for file, held in halves.items() for name in held}
    folder = model.folder_of(tmp_path / "index", {**files, "old.safetensors": zeros(tensors)}, index)
    model.assert_read(folder)
    assert weight_files(folder).left_out == ["old.safetensors"]
    norm, extra = (model.name(name) for name in ("language_model.norm.weight", "visual.more"))
    write_index(folder, {norm: index[norm]} | {n: f for n, f in list(index.items())[::3]})
    model.assert_read(folder)  # a tensor that the index does not name lies in a file that it names
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": {**index, extra: "y.safetensors"}}))
    model.assert_refused(folder, f"y.safetensors: {extra}: not there, though {INDEX_FILE} says so")
    write_index(folder, {**index, HEAD: "y.safetensors"})
    model.assert_read(folder)  # a tied head that was left out
    gone = model.folder_of(
        tmp_path / "gone",
        {
            "x.safetensors": files["x.safetensors"],
            "y.safetensors": {n: t for n, t in files["y.safetensors"].items() if n != names[1]},
        },
        index,
    )
    model.assert_refused(gone, rf"y.safetensors: {re.escape(names[1])} .*: missing$")


def test_weights_under_another_name_are_refused(model, tensors, tmp_path):
    folder = model.folder_of(tmp_path / "other", {"model-00001-of-00001.safetensors": tensors})
    told = f"holds neither model.safetensors nor {INDEX_FILE}; model-00001-of-00001.safetensors would not be read"
    model.assert_refused(folder, told)
    with pytest.raises(ValueError, match="transformers finds no weights"):
        files_of_transformers(folder)
    with pytest.raises(ValueError, match="transformers_weights: "):
        ModelShape.from_folder(model.folder_of(tmp_path / "named", {}, transformers_weights="ema.safetensors"))


def test_an_adapter_beside_the_weights_is_refused(model, tensors, tmp_path):
    folder = model.folder_of(tmp_path / "adapter", {"model.safetensors": tensors})
    (folder / "adapter_config.json").write_text("{}")
    model.assert_refused(folder, r"adapter_config.json: an adapter, which transformers adds where it can")


def test_a_checkpoint_with_a_stray_file_is_a_checkpoint(model, tensors, tmp_path):
    folder = model.folder_of(tmp_path / "checkpoint", {"ema.safetensors": tensors})
    (folder / "state.json").write_text("{}")
    assert names_checkpoint(folder)
    (folder / "model.safetensors").touch()
    assert not names_checkpoint(folder)


def test_a_head_beside_tied_embeddings_is_the_embedding_or_refused(family, model, tensors, tmp_path):
    words = model.embedding
    model.assert_read(model.folder_of(tmp_path / "same", {"model.safetensors": tensors | {HEAD: words.clone()}}))
    for name, head, told in (
        ("other", words + 1e-3, "lm_head.weight: differs from the word embedding"),
        ("rounded", words.bfloat16(), "lm_head.weight: differs from the word embedding"),
        ("narrow", torch.zeros(3, 3), r"lm_head.weight: expected shape \(272, 64\), found \(3, 3\)"),
    ):
        model.assert_refused(model.folder_of(tmp_path / name, {"model.safetensors": tensors | {HEAD: head}}), told)
    untied = model_of(family, tie=False)
    folder = untied.folder_of(tmp_path / "untied", {"model.safetensors": untied.tensors})
    assert not torch.equal(untied.tensors[HEAD], untied.embedding)
    untied.assert_read(folder)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    untied.assert_refused(folder, r"lm_head.weight \(272, 64\): missing")


@pytest.mark.parametrize("outer", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_embeddings_are_tied_where_transformers_ties_them(model, tmp_path, outer, inner):
    tree = copy.deepcopy(model.config)
    for section, value in ((tree, outer), (tree["text_config"], inner)):
        section.pop("tie_word_embeddings")
        if value is not None:
            section["tie_word_embeddings"] = value
    (tmp_path / "config.json").write_text(json.dumps(tree))
    theirs = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False).tie_word_embeddings
    assert ModelShape.from_folder(tmp_path).tie_word_embeddings == theirs
    assert theirs or not outer, "the text's own key counts in some families alone"


@pytest.mark.parametrize(
    ("family", "text", "vision"),
    [
        *(("qwen2_5_vl", text, vision) for text in ("model.", *NAMED) for vision in ("visual.", "model.visual.")),
        *(("qwen3_vl", text, vision) for text in NAMED for vision in ("visual.", "model.visual.")),
    ],
    indirect=["family"],
)
def test_names_of_every_age_are_read(model, tensors, tmp_path, text, vision):
    def named(name: str) -> str:
        name = model.names.module_name(name)
        return name.replace("model.visual.", vision).replace("model.language_model.", text)

    files = {"model.safetensors": {named(name): tensor for name, tensor in tensors.items()}}
    model.assert_read(model.folder_of(tmp_path / "named", files))


def test_the_first_look_finds_what_was_not_loaded_as_it_is(family, model, tensors, tmp_path):
    folder, shape = model.folder_of(tmp_path / "model", {"model.safetensors": tensors}), model.shape
    table = parameter_table(shape)
    held = {name: HeldParameter(entry, torch.empty(entry.shape)) for name, entry in table.items()}
    fill_held(held, shape, folder, tensor_rank=0)
    look(folder, shape, held, tensor_rank=0)
    held["vision.merger.linear_fc2.weight"].tensor.zero_()
    source = table["vision.merger.linear_fc2.weight"].sources[0].name
    with pytest.raises(ValueError, match=rf"{re.escape(source)}: row 0 was not loaded as it is there"):
        look(folder, shape, held, tensor_rank=0)
    with pytest.raises(ValueError, match=r"lm_head.weight: \(272, 64\) here, None in transformers' model"):
        look(folder, model_of(family, tie=False).shape, held, tensor_rank=0)
