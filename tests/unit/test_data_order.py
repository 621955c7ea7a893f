"""The order of rows: every row once an epoch, the same for every number of ranks, resumable, with replacements."""

import json
import math
from itertools import chain

import numpy as np
import pytest

from megatron_papo.config import Config, DataConfig, load_config
from megatron_papo.data import DataCursor, PromptDataset, share_of
from megatron_papo.data.mixture import Mixture
from megatron_papo.data.order import positions_for_step
from megatron_papo.data.random_state import random_state
from megatron_papo.data.settings_order import first_cursor

GOLDEN = [9, 4, 1, 6, 5, 7, 8, 2, 0, 3, 6, 9, 2, 7, 3, 8, 5, 1, 0, 4]
GOLDEN_DRAWS = [856, 802, 735, 909]


def row(cursor, position):
    return next(cursor.rows(position))


def flat(chunks):
    return list(chain.from_iterable(chunks))


def test_golden_order():
    cursor = DataCursor(num_rows=10, seed=3)
    assert [row(cursor, position) for position in range(20)] == GOLDEN
    assert [row(DataCursor(num_rows=10, seed=3, shuffle=False), position) for position in range(12)] == [
        *range(10),
        0,
        1,
    ]


def test_every_epoch_is_another_permutation():
    cursor = DataCursor(num_rows=100, seed=0)
    epochs = [[row(cursor, 100 * epoch + place) for place in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [row(DataCursor(num_rows=100, seed=1), place) for place in range(100)] != epochs[0]


@pytest.mark.parametrize("data_size", [1, 2, 3, 5, 8])
def test_updates_do_not_depend_on_the_number_of_ranks(data_size):
    cursor = DataCursor(num_rows=50, seed=0, position=30)  # runs over the end of an epoch
    whole = positions_for_step(cursor, 24, 3, 0, 1)
    shares = [positions_for_step(cursor, 24, 3, rank, data_size) for rank in range(data_size)]
    for update in range(3):
        assert flat(share[update] for share in shares) == list(whole[update])
        sizes = [len(share[update]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    assert [len(chunk) for chunk in whole] == [8, 8, 8] and flat(whole) == list(range(30, 54))


def test_more_ranks_than_prompts_leaves_some_empty():
    assert [list(share_of([7, 8], rank, 4)) for rank in range(4)] == [[], [7], [], [8]]


def test_cursor_resumes_through_json():
    cursor = DataCursor(num_rows=50, seed=0)
    state = json.loads(json.dumps(cursor.advance(24).advance(24).state_dict()))
    resumed = DataCursor(num_rows=50, seed=0).load_state_dict(state)
    assert resumed.position == 48 and resumed == cursor.advance(48)


def test_cursor_of_another_order_is_refused():
    state = DataCursor(num_rows=50, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"run.seed: the checkpoint has 0, this run 1"):
        DataCursor(num_rows=50, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rows of data.train: the checkpoint has 50, this run 49"):
        DataCursor(num_rows=49, seed=0).load_state_dict(state)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 10, 11])
def test_replacements_name_every_other_row_once(num_rows):
    cursor = DataCursor(num_rows=num_rows, seed=0)
    for position in (0, num_rows - 1, num_rows + num_rows // 2):
        assert sorted(cursor.rows(position)) == list(range(num_rows))


def test_first_replacement_is_half_an_epoch_away():
    cursor = DataCursor(num_rows=100, seed=0)
    assert list(cursor.rows(7))[1:3] == [row(cursor, 57), row(cursor, 58)]


def test_prompts_that_do_not_divide():
    with pytest.raises(ValueError, match="25 prompts do not divide into 3 updates"):
        positions_for_step(DataCursor(num_rows=50, seed=0), 25, 3, 0, 1)


def test_random_state_is_the_same_everywhere():
    assert random_state("mask", 0, 1, "train:2", 3).randint(0, 1000, 4).tolist() == GOLDEN_DRAWS
    assert random_state("a", 12).randint(1 << 30) != random_state("a1", 2).randint(1 << 30)


LEVELS = [3, 1, None, 2, 1, 3, math.nan, 2]


class Rows:
    """What an order reads of a data set: its length, its columns and the weights of its sources."""

    def __init__(self, weights=(1.0,), **columns):
        self.columns = columns
        share = len(self) // len(weights)
        self.mixture = Mixture((share,) * len(weights), weights)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def rows_passing(self, conditions, key):
        if conditions is None:
            return np.arange(len(self))
        return np.array([place for place, level in enumerate(self.columns["level"]) if level == conditions["level"]])

    def column_values(self, name, key="data.train"):
        if name not in self.columns:
            raise ValueError(f"{key}: has no column {name!r}")
        return self.columns[name]


def ordered(num_positions, columns=None, seed=0, weights=(1.0,), **data):
    rows = Rows(weights, **(columns or {"level": LEVELS}))
    cursor = first_cursor(DataConfig(**data), rows, seed, prompts_per_step=3)
    return [row(cursor, position) for position in range(num_positions)]


def test_rows_sorted_by_a_column_are_shuffled_among_equals():
    assert ordered(8, order_by="level", shuffle=False) == [1, 4, 3, 7, 0, 5, 2, 6]
    assert ordered(8, order_by="level", order_descending=True, shuffle=False) == [0, 5, 3, 7, 1, 4, 2, 6]
    seen = {tuple(ordered(16, order_by="level", seed=seed)[8:]) for seed in range(8)}
    assert len(seen) > 1 and {tuple(sorted(order[:2])) for order in seen} == {(1, 4)}
    words = {"level": ["b", "a", "c"]}
    assert ordered(4, words, order_by="level", shuffle=False) == [1, 0, 2, 1]
    for values, fault in (
        ([1, "a"], r"values that have no order \(int, str\)"),
        ([[1], [2]], r"no order \(list\)"),
        ([None, None], "no row has a value in column 'level'"),
    ):
        with pytest.raises(ValueError, match=rf"data\.order_by: .*{fault}"):
            ordered(1, {"level": values}, order_by="level")


def easy_first(num_rows, epoch, seed, column):
    """Rows of level 1, with one more of them in each epoch."""
    easy = [place for place, level in enumerate(column("level")) if level == 1]
    return np.array(easy + easy[:epoch])


GIVEN = {
    "nothing": [],
    "outside": [0, 8],
    "negative": [-1],
    "fractions": [0.5],
    "nested": [[1, 2]],
    "texts": ["a"],
    "none": None,
}


def gives_what_epoch_says(num_rows, epoch, seed, column):
    return GIVEN[column("level")[0]]


def test_a_sampler_says_the_rows_of_every_epoch():
    name = "tests.unit.test_data_order:easy_first"
    assert ordered(8, sampler=name) == [1, 4, 1, 4, 1, 1, 4, 1], "epochs of 2, 3 and 4 rows"
    cursor = first_cursor(DataConfig(sampler=name), Rows(level=LEVELS), 0, 3)
    assert [cursor.order.num_prompts(epochs) for epochs in (0.5, 1, 2, 2.5)] == [1, 2, 5, 7]
    for kind, fault in (
        ("nothing", "no rows"), ("outside", "row 8, and data.train has rows 0 to 7"), ("negative", "row -1"),
        ("fractions", "float64"), ("nested", r"shape \[1, 2\]"), ("texts", "whole numbers"), ("none", "NoneType"),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=rf"data\.sampler: {__name__}:gives_what_epoch_says gave epoch 0 .*{fault}"
        ):
            ordered(1, {"level": [kind] * 8}, sampler=f"{__name__}:gives_what_epoch_says")
    with pytest.raises(ValueError, match=r"failed for epoch 0: ValueError: data.train: has no column 'level'"):
        ordered(1, {"other": [1]}, sampler=name)
    with pytest.raises(ValueError, match=r"does not take \(num_rows, epoch, seed, column\)"):
        ordered(1, sampler="tests.unit.test_data_order:flat")


def test_the_epoch_of_a_sampler_is_compared_on_resuming():
    def at(position, levels):
        cursor = first_cursor(DataConfig(sampler="tests.unit.test_data_order:easy_first"), Rows(level=levels), 0, 3)
        return cursor.advance(position)

    state = json.loads(json.dumps(at(2, LEVELS).state_dict()))
    assert at(0, LEVELS).load_state_dict(state).position == 2
    changed = [*LEVELS[:-1], 1]
    with pytest.raises(ValueError, match=r"other rows, or another order of them.* a data\.sampler must give the same"):
        at(0, changed).load_state_dict(state)
    resumed = at(0, changed).load_state_dict(state, other_data=True)
    assert (resumed.position, resumed.where()) == (2, "epoch 0, row 2 of 3")
    assert at(0, changed).order_fingerprint() != at(0, LEVELS).order_fingerprint() == at(5, LEVELS).order_fingerprint()


def stages(*stages):
    return [{"filter": {"level": level}, **length} for level, length in stages]


def test_a_stage_draws_from_its_rows_as_long_as_it_lasts():
    """Rows of level 1 are 1 and 4, of level 3 are 0 and 5, of level 2 are 3 and 7."""
    curriculum = [*stages((1, {"epochs": 2}), (3, {"steps": 1})), {}]
    drawn = ordered(15, shuffle=False, curriculum=curriculum)
    assert drawn == [1, 4, 1, 4, 0, 5, 0, 0, 1, 2, 3, 4, 5, 6, 7], "the second stage ends after one step of 3"
    shuffled = ordered(15, curriculum=curriculum)
    assert [set(shuffled[:2]), set(shuffled[2:4]), set(shuffled[4:7])] == [{1, 4}, {1, 4}, {0, 5}]
    assert sorted(shuffled[7:]) == list(range(8))
    # with weights, an order and a sampler
    curriculum = [*stages((1, {"epochs": 1})), {}]
    assert ordered(4, weights=(2.0, 1.0), shuffle=False, curriculum=curriculum)[:3] == [1, 1, 4], "row 1 counts twice"
    assert ordered(5, shuffle=False, order_by="level", curriculum=curriculum) == [1, 4, 1, 4, 3]
    assert ordered(5, sampler=f"{__name__}:backwards", curriculum=curriculum) == [4, 1, 7, 6, 5]
    cursor = first_cursor(DataConfig(curriculum=curriculum), Rows(level=LEVELS), 0, 3)
    assert [cursor.order.num_prompts(epochs) for epochs in (1, 1.5, 2)] == [2, 6, 10]
    with pytest.raises(ValueError, match=r"data\.sampler: none of the rows .* epoch 0 .* data\.curriculum\[0\]"):
        ordered(1, sampler=f"{__name__}:easy_first", curriculum=[*stages((3, {"epochs": 1})), {}])


def backwards(num_rows, epoch, seed, column):
    return range(num_rows - 1, -1, -1)


def test_an_order_of_its_own_resumes_anywhere():
    """Whatever is combined: a cursor that is moved to a position names the rows that one from the start names there."""
    data = DataConfig(
        order_by="level",
        curriculum=[*stages((1, {"epochs": 3}), (3, {"steps": 2})), {}],
        train=[{"path": "a", "weight": 1.5}, {"path": "b", "weight": 0.5}],
    )

    def start():
        return first_cursor(data, Rows((1.5, 0.5), level=LEVELS), 5, 3)

    whole = [list(start().rows(position)) for position in range(40)]
    once = start()
    assert [list(once.rows(position)) for position in reversed(range(40))] == whole[::-1]
    moved = start().load_state_dict(json.loads(json.dumps(start().advance(17).state_dict())))
    assert [list(moved.rows(position)) for position in range(17, 40)] == whole[17:]


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ([{}, {}], r"data\.curriculum\[0\]: needs epochs or steps"),
        ([{"epochs": 1, "steps": 1}, {}], r"data\.curriculum\[0\]: needs epochs or steps"),
        ([{"epochs": 1}, {"steps": 1}], r"data\.curriculum\[1\]: the last stage goes on"),
        ([{"epochs": 0}, {}], r"data\.curriculum\[0\]\.epochs: Input should be greater"),
        ([{"filter": {"level": {"low": 1}}}], r"data\.curriculum\[0\]\.filter\.level\.low: unknown key"),
    ],
)
def test_stages_that_cannot_be(stages, fault):
    with pytest.raises(ValueError, match=fault):
        load_config(None, [f"data.curriculum={json.dumps(stages)}"])


def test_settings_of_an_order_that_contradict_each_other():
    for words, fault in (
        (["data.sampler=a:b", "data.order_by=c"], r"data\.order_by=c: data\.sampler says the order"),
        (["data.sampler=a:b", "data.train=[{path: a, weight: 2}]"], "leave the weights out"),
        (["train.epochs=1", "data.curriculum=[{steps: 3}, {}]"], r"train\.epochs: a stage of data\.curriculum lasts"),
    ):
        with pytest.raises(ValueError, match=fault):
            load_config(None, words)


def test_columns_and_filters_of_several_sources(tmp_path):
    for name, levels in (("a", [1, 2]), ("b", [2, 3, 2])):
        rows = [{"problem": "?", "answer": "1", "level": level} for level in levels]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], columns={"images": None})
    dataset = PromptDataset(data, "train", None)
    assert dataset.column_values("level") == [1, 2, 2, 3, 2]
    passing = [dataset.rows_passing(filter, "key").tolist() for filter in ({"level": 2}, {"level": [3]}, None)]
    assert passing == [[1, 2, 4], [3], [0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"key: none of the 5 rows of .*a\.jsonl, .*b\.jsonl passes"):
        dataset.rows_passing({"level": 9}, "key")
    with pytest.raises(ValueError, match=r"data\.train\[0\]: .*a\.jsonl has no column 'hard'"):
        dataset.column_values("hard")


def test_steps_follow_from_epochs_and_the_smaller_number_counts():
    cursor = DataCursor(num_rows=10, seed=0)
    assert [cursor.order.num_prompts(epochs) for epochs in (1, 0.25, 1.2, 3)] == [10, 3, 12, 30]
    assert Config(train={"epochs": 2}).train.steps is None
    assert Config(train={"epochs": 2}).train.lasting(7).num_steps == 7
    assert Config(sft={"epochs": 2, "steps": 5}).sft.lasting(7).num_steps == 5
    assert Config(train={"epochs": 2, "steps": 9}).train.lasting(7).num_steps == 7
    assert Config().train.num_steps == 202
    for given, fault in (
        ({"steps": None}, "steps: null needs epochs"),
        ({"epochs": 1, "dynamic_sampling": {"enabled": True}}, r"train\.epochs=1: with train\.dynamic_sampling"),
        ({"epochs": math.inf}, "less than or equal to 10000"),
    ):
        with pytest.raises(ValueError, match=fault):
            Config(train=given)
