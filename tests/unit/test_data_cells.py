"""Cells as questions and answers: every type that a file may give them, and the reward of several answers."""

import datetime
from decimal import Decimal

import datasets
import numpy as np
import pytest
import torch

from megatron_papo.config import RewardConfig
from megatron_papo.data.cells import MOST_ANSWERS, BadCell, answers_of, question_of, system_of
from megatron_papo.rewards import Rewarder
from megatron_papo.types import ModelInputs, Prompt, Rollout

ANSWERS = [
    ("as it is ", "as it is "), (3, "3"), (-3, "-3"), (3.0, "3"), (0.1, "0.1"), (1e-9, "1e-09"), (True, "True"),
    (float("nan"), None), (float("inf"), None), (None, None), ("", None), (" ", None), ([], None), ([None], None),
    (Decimal("5.00"), "5"), (Decimal("2.50"), "2.5"), (Decimal("100"), "100"), (Decimal("NaN"), None),
    (np.float32(0.1), "0.1"), (np.int64(7), "7"), (np.float64(7), "7"),
    (datetime.date(2020, 5, 17), "2020-05-17"), (datetime.datetime(2020, 5, 17), "2020-05-17"),
    (datetime.datetime(2020, 5, 17, 10, 30), "2020-05-17 10:30:00"), (datetime.time(10, 30), "10:30:00"),
    (b"nan", "nan"), ("½".encode(), "½"),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "text"), ANSWERS, ids=lambda value: repr(value)[:30])
def test_an_answer_is_what_its_author_wrote(cell, text):
    assert answers_of(cell) == (() if text is None else (text,))


def test_alternatives_keep_their_order_and_are_named_once():
    assert answers_of(["one", 1, 1.0, None, " ", "one", Decimal("2.0")]) == ("one", "1", "2")


def test_the_columns_type_names_classes_and_narrow_fractions():
    shapes = datasets.ClassLabel(names=["square", "disc"])
    assert answers_of(1, shapes) == ("disc",) and answers_of([0, 1], datasets.List(shapes)) == ("square", "disc")
    assert answers_of(-1, shapes) == (), "how the library writes that there is no label"
    assert answers_of(0.1, datasets.Value("float64")) == ("0.1",)
    narrow = float(np.float32(0.1))
    assert answers_of(narrow, datasets.Value("float32")) == ("0.1",) and answers_of(narrow) != ("0.1",)


NO_ANSWERS = {
    "a dict": {"value": "1"}, "a list": [["1"]], "timedelta": datetime.timedelta(1), "no UTF-8": b"\xff\xd8",
}  # fmt: skip


@pytest.mark.parametrize("told", NO_ANSWERS)
def test_what_is_no_text_is_no_answer(told):
    for cell in (NO_ANSWERS[told], [NO_ANSWERS[told], "1"]):
        with pytest.raises(BadCell, match=told) as caught:
            answers_of(cell if told != "a list" else NO_ANSWERS[told])
        assert caught.value.reason == "answer is no text"


def test_answers_have_an_end():
    for cell in (["x"] * (MOST_ANSWERS + 1), ["x" * 40_000, "y" * 40_000]):
        with pytest.raises(BadCell) as caught:
            answers_of(cell)
        assert caught.value.reason == "answer too long"


def user(content):
    return {"role": "user", "content": content}


IMAGE, TEXT = {"type": "image", "text": None}, {"type": "text", "text": "how many?"}


@pytest.mark.parametrize(
    ("cell", "system"),
    [
        ("<image>how many?", None),
        (b"<image>how many?", None),
        ([user("<image>how many?")], None),
        ([user([IMAGE, TEXT])], None),
        ([user([{"type": "image_url", "image_url": None}, TEXT])], None),
        ([{"role": "system", "content": "Be brief."}, user("<image>how many?")], "Be brief."),
        ([{"role": "system", "content": ""}, user(["<image>", "how many?"])], None),
        ([{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, user([IMAGE, TEXT])], "Be kind."),
    ],
)
def test_a_question_is_text_or_one_turn_of_the_user_behind_the_rows_system_turn(cell, system):
    question, told = question_of(cell)
    assert (question, system_of(None, told)) == ("<image>how many?", system)


@pytest.mark.parametrize(
    ("cell", "told", "expected"),
    [
        (None, None, None),
        ("", " ", None),
        ("Be brief.", None, "Be brief."),
        (b"Be brief.", "", "Be brief."),
        ("Be brief.", "Be brief.", "Be brief."),
        ("Be brief.", "Be kind.", "'Be kind.' in the conversation, 'Be brief.' in the column"),
        (3, None, "a number, not text"),
        ("Look at <image>.", None, "pictures belong to the question"),
        (None, "<video>", "pictures belong to the question"),
        (b"\xff", None, "no UTF-8"),
    ],
)
def test_a_system_turn_is_the_text_of_the_column_or_of_the_conversation(cell, told, expected):
    try:
        assert system_of(cell, told) == expected
    except BadCell as bad:
        assert bad.reason == "system turn" and str(expected) in str(bad)


@pytest.mark.parametrize(
    ("cell", "reason", "told"),
    [
        (None, "no problem", ""),
        ("  ", "no problem", ""),
        ([], "no problem", ""),
        ([user(" ")], "no problem", ""),
        ([user(None)], "no problem", ""),
        (["how", "many"], "problem is no text", "a list, not text"),
        ({"text": "how many?"}, "problem is no text", "a dict, not text"),
        (3, "problem is no text", "a number, not text"),
        (b"\xff", "problem is no text", "no UTF-8"),
        ([user("a"), {"role": "assistant", "content": "b"}], "problem is no text", "user, assistant"),
        ([{"role": "system", "content": "a"}], "problem is no text", "a conversation of nothing"),
        ([user([{"type": "image", "image": "0.png"}])], "problem is no text", "a picture within a turn"),
        ([user([{"type": "audio"}])], "problem is no text", "'audio'"),
        ([user([{"type": "video", "video": "0.mp4"}])], "video", "only pictures are read"),
        ("<video>what happens?", "video", "only pictures are read"),
    ],
)
def test_other_questions_are_named_shortly(cell, reason, told):
    with pytest.raises(BadCell, match=told or "^$") as caught:
        question_of(cell)
    assert caught.value.reason == reason and len(str(caught.value)) < 160


def test_a_question_of_lists_in_lists_is_named_however_deep():
    cell: list = []
    for _ in range(5000):
        cell = [cell]
    with pytest.raises(BadCell, match="a list, not text"):
        question_of(cell)


def test_any_of_several_answers_is_right():
    prompt = Prompt("x", 0, "?", "one", (), ModelInputs(torch.zeros(1), None, None), other_answers=("1", "uno"))
    with Rewarder(RewardConfig(accuracy="exact")) as rewarder:
        given = {text: Rollout(0, (1,), (0.0,), f"\\boxed{{{text}}}", "stop", 0) for text in ("one", "uno", "two")}
        found = [rewarder.parts(prompt, rollout)["accuracy"] for rollout in given.values()]
    assert found == [1.0, 1.0, 0.0]
