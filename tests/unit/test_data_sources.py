"""Lists of sources: how they are written and named, which rows a filter lets pass, how often rows are drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from megatron_papo.config import Config, ConfigError, SourceConfig, dump_config, load_config
from megatron_papo.config.data_sources import source_entries
from megatron_papo.data.mixture import Mixture
from megatron_papo.data.row_filter import rows_that_pass
from megatron_papo.evaluate import with_gaps
from megatron_papo.preflight.inputs import faults_of_inputs, find_module
from megatron_papo.training.console import print_scores
from megatron_papo.training.rollout_metrics import rollout_sums
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout


def train_of(text: str) -> Config:
    return load_config(None, [f"data.train={text}"])


def test_one_plain_name_is_what_it_was(tmp_path):
    assert train_of("[a.jsonl]") == train_of("a.jsonl") and train_of("2020").data.train == "2020"
    assert train_of("{path: a.jsonl}").data.train == [SourceConfig(path="a.jsonl")]
    many = train_of("[a.jsonl, {path: b, weight: 2, columns: {images: null}, filter: {x: {min: 3}, y: [1, z]}}]")
    (tmp_path / "config.yaml").write_text(dump_config(many))
    assert load_config(tmp_path / "config.yaml") == many


def test_names_of_sources():
    def names(*entries):
        return [entry.name for entry in source_entries(entries)]

    assert names("a.jsonl", "x/b.parquet", "org/set", "shards/*.parquet", "/a/b/", "data_v1.5", "my set.csv") == [
        "a", "x_b", "set", "shards", "a_b", "data_v1.5", "my_set",
    ]  # fmt: skip
    assert names("a/train.jsonl", "b/train.jsonl", "b/train.jsonl") == ["a_train", "b_train", "b_train_2"]
    assert names(SourceConfig(function="my.data:rows"), SourceConfig(path="rows", name="x"), "x.csv") == [
        "rows",
        "x",
        "x_2",
    ]


@pytest.mark.parametrize(
    "written, fault",
    [
        ("[a, {weight: 3}]", "data.train[1]: needs either path or function"),
        ("[{path: a, function: m:f}]", "data.train[0]: needs either path or function"),
        ("[{path: a, options: {x: 1}}]", "data.train[0]: options: are arguments of function, which is not set"),
        ("[a, {path: b, weight: 0}]", "data.train[1].weight: Input should be greater than 0, got 0"),
        ("[{path: a, size: 0}]", "data.train[0].size: unknown key"),
        ("[3, b]", "data.train[0]: Input should be a valid string, got 3"),
        ("[a, [b]]", "data.train[1]: cannot be written as a list, got ['b']"),
        ("[{path: a, name: x y}]", "data.train[0].name: 'x y': at most 64 letters, digits, `_`, `-` and `.`, "),
        ("[{path: a, name: x}, {path: b, name: x}]", "data.train[1].name: 'x' is the name of another entry too"),
        ("[a, {path: b, columns: {ask: x}}]", "data.train[1].columns: unknown key ask, known are problem, answer"),
        ("[{path: a, preset: virl39k, columns: {problem: x}}]", "data.train[0]: columns: preset=virl39k names the"),
        ("[{path: a, filter: {x: {matches: '('}}}]", "data.train[0].filter.x.matches: '(' is no regular expression"),
        ("[{path: a, filter: {x: {}}}]", "data.train[0].filter.x: a condition needs min, max or matches"),
    ],
)
def test_what_is_written_wrong_is_one_line(written, fault):
    with pytest.raises(ConfigError) as caught:
        train_of(written)
    assert str(caught.value).startswith(fault) and "\n" not in str(caught.value)


def test_what_is_not_there_shows_before_a_run():
    written = (
        "[gone.jsonl, {function: examples.data_source.squares:rows, filter: examples.data_source:x}, {function: f}]"
    )
    assert list(faults_of_inputs("sft", load_config(None, [f"data.train={written}", "model.path=/"]))) == [
        "data.train[0]: gone.jsonl: no such file or folder",
        "data.train[2].function: 'f' is not written module:function",
    ]
    spec = find_module("examples.data_source.squares")
    assert spec is not None and spec.origin is not None and spec.origin.endswith("squares.py")
    assert find_module("examples.data_source.circles") is None


def test_evaluation_has_no_weights():
    with pytest.raises(ConfigError, match=r"^data.eval\[0\].weight: evaluation reads every row once"):
        load_config(None, ["data.eval=[{path: a, weight: 2}]"])


def test_columns_of_an_entry_lie_over_those_of_the_section():
    data = load_config(
        None,
        ["data.train=[a, {path: b, columns: {images: null}}, {path: c, preset: virl39k}]", "data.columns.answer=gold"],
    ).data
    found = [data.columns_of(entry) for entry in data.sources("train")]
    assert [preset for preset, _ in found] == ["none", "none", "virl39k"]
    assert [(columns.answer, columns.images) for _, columns in found[:2]] == [("gold", "images"), ("gold", None)]


ROWS = Dataset.from_dict(
    {
        "level": [1, 2, 3, None], "text": ["1", "2.0", "x", None], "done": [True, False, True, None],
        "topic": ["algebra", "geometry", "graphs", ""],
    }
)  # fmt: skip


@pytest.mark.parametrize(
    "conditions, kept",
    [
        ({"level": 2}, [1]),
        ({"level": [1, 3]}, [0, 2]),
        ({"level": None}, [3]),
        ({"level": "2"}, [1]),
        ({"text": 2}, [1]),
        ({"text": [1, "x"]}, [0, 2]),
        ({"done": True}, [0, 2]),
        ({"done": "false"}, [1]),
        ({"level": {"min": 2}}, [1, 2]),
        ({"text": {"min": 0, "max": 1.5}}, [0]),
        ({"topic": {"matches": "^g"}}, [1, 2]),
        ({"topic": {"matches": "^g"}, "level": {"max": 2}}, [1]),
    ],
)
def test_conditions(conditions, kept):
    source = SourceConfig.model_validate({"path": "x", "filter": conditions})
    assert rows_that_pass(ROWS, source.filter, "data.train[0].filter", "x") == kept


def test_a_true_cell_is_not_the_number_one():
    with pytest.raises(ValueError, match=r"^data.train.filter: none of the 4 rows of x passes$"):
        rows_that_pass(ROWS, {"done": 1}, "data.train.filter", "x")


def test_weights_count_rows_of_an_epoch():
    mixture, rows = Mixture((10, 4, 3), (1.0, 2.5, 0.5)), np.arange(17)
    epochs = [mixture.epoch_rows(rows, 7, epoch) for epoch in range(40)]
    assert all((np.diff(epoch) >= 0).all() and len(epoch) == 10 + 10 + 2 for epoch in epochs)
    counts = [Counter(epoch.tolist()) for epoch in epochs]
    assert all(counts[0][row] == 1 for row in range(10))
    assert all(sorted(count[row] for row in range(10, 14)) == [2, 2, 3, 3] for count in counts)
    assert all(sorted(count[row] for row in range(14, 17)) == [0, 1, 1] for count in counts)
    assert len({tuple(epoch) for epoch in epochs}) > 10, "each epoch chooses anew"
    assert (mixture.epoch_rows(rows, 7, 3) == epochs[3]).all() and (mixture.epoch_rows(rows, 8, 3) != epochs[3]).any()
    assert mixture.epoch_rows(np.array([0, 12, 15]), 7, 0).tolist()[0] == 0, "of a part of the rows"
    assert len(mixture.epoch_rows(np.array([12, 15]), 7, 0)) == 2 + 1, "at least one row of each"
    assert Mixture((2, 2), (1.0, 1.0)).is_plain and not mixture.is_plain


def group(source: str, accuracy: tuple[float, ...], length: int = 1) -> Group:
    prompt = Prompt("x", 0, "?", "3", (), ModelInputs(torch.tensor([1, 2]), None, None), source=source)
    rollouts = tuple(Rollout(index, (5,) * length, (-1.0,) * length, "", "length", 0) for index in range(len(accuracy)))
    return Group(prompt, rollouts, accuracy, {"accuracy": accuracy})


def test_metrics_of_each_source_stand_beside_those_of_all():
    groups = [group("a", (1.0, 1.0)), group("b c", (0.0, 0.0), 3), group("a", (0.0, 1.0))]
    sums = rollout_sums(groups, merge_unit=4)
    assert sums["reward"] == (3.0, 6.0) and sums["source/a/reward"] == (3.0, 4.0)
    assert sums["source/b_c/reward/accuracy"] == (0.0, 2.0) and sums["source/b_c/response_tokens"] == (6.0, 2.0)
    assert sums["source/a/group/all_right"] == (1.0, 2.0) and sums["source/b_c/group/all_wrong"] == (1.0, 1.0)
    assert sums["source/a/cut_off"] == (4.0, 4.0)
    plain = rollout_sums([replace(each, prompt=replace(each.prompt, source="")) for each in groups], merge_unit=4)
    assert plain == {name: value for name, value in sums.items() if not name.startswith("source/")}


def test_the_table_of_an_evaluation_has_a_column_a_source(capsys):
    parts = {"accuracy": 0.5, "seen_accuracy": 0.6, "masked_accuracy": 0.2}
    scores = with_gaps(
        {**parts, **{f"source/a/{name}": value / 2 for name, value in parts.items()}, "source/b/accuracy": 1.0}
    )
    assert scores["gap"] == pytest.approx(0.4) and scores["source/a/gap"] == pytest.approx(0.2)
    assert not any("seen_" in name for name in scores)
    print_scores(scores)
    told = capsys.readouterr().out
    assert all(word in told for word in ("all", " a ", " b ", "0.400", "0.200", "1.000"))
