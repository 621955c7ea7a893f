"""The order of rows: every row once an epoch, the same for every number of ranks, resumable, with replacements."""

import json
from itertools import chain

import pytest

from megatron_papo.data import DataCursor, share_of
from megatron_papo.data.order import positions_for_step, random_state

GOLDEN = [9, 4, 1, 6, 5, 7, 8, 2, 0, 3, 6, 9, 2, 7, 3, 8, 5, 1, 0, 4]
GOLDEN_DRAWS = [856, 802, 735, 909]


def flat(chunks):
    return list(chain.from_iterable(chunks))


def test_golden_order():
    cursor = DataCursor(num_rows=10, seed=3)
    assert [cursor.row(position) for position in range(20)] == GOLDEN
    assert [DataCursor(num_rows=10, seed=3, shuffle=False).row(position) for position in range(12)] == [
        *range(10),
        0,
        1,
    ]


def test_every_epoch_is_another_permutation():
    cursor = DataCursor(num_rows=100, seed=0)
    epochs = [[cursor.row(100 * epoch + place) for place in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [DataCursor(num_rows=100, seed=1).row(place) for place in range(100)] != epochs[0]


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
        assert sorted(cursor.row(position, attempt) for attempt in range(num_rows)) == list(range(num_rows))
    with pytest.raises(ValueError, match=f"no good row among {num_rows}"):
        cursor.row(0, num_rows)


def test_first_replacement_is_half_an_epoch_away():
    cursor = DataCursor(num_rows=100, seed=0)
    assert cursor.row(7, attempt=1) == cursor.row(57) and cursor.row(7, attempt=2) == cursor.row(58)


def test_prompts_that_do_not_divide():
    with pytest.raises(ValueError, match="25 prompts do not divide into 3 updates"):
        positions_for_step(DataCursor(num_rows=50, seed=0), 25, 3, 0, 1)


def test_random_state_is_the_same_everywhere():
    assert random_state("mask", 0, 1, "train:2", 3).randint(0, 1000, 4).tolist() == GOLDEN_DRAWS
    assert random_state("a", 12).randint(1 << 30) != random_state("a1", 2).randint(1 << 30)
