"""The user's own reward function: its two forms, what it is given, what it may return, and how it may fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_papo.config import RewardConfig
from megatron_papo.rewards import Rewarder, RewardRow, asking
from megatron_papo.rewards.reward_row import metric_rows_of, rows_of
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout

HERE = "tests.unit.test_reward_function"
COLUMNS = {"level": 3}
ended: list[threading.Event] = []
"""Set at a test's end: lets go of the calls that never return."""
calls: list[list[RewardRow]] = []
"""What the functions below were given."""


def group_of(*responses: str, row: int = 0, other_answers: Sequence[str] = ()) -> Group:
    prompt = Prompt(
        f"train:{row}", row, "How many?", "3", (b"png",), ModelInputs(torch.tensor([1]), None, None),
        other_answers=tuple(other_answers), source="maths", columns=COLUMNS,
    )  # fmt: skip
    rollouts = [
        Rollout(index, (7,) * len(text), (0.0,) * len(text), text, "stop", 0) for index, text in enumerate(responses)
    ]
    return Group(prompt, tuple(rollouts))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    calls.clear()
    ended[:] = [threading.Event()]
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.001)
    yield
    ended[0].set()


def rewarded(name: str, *groups: Group, step: int | None = 5, prefix: str = "", **reward) -> tuple[list[Group], list]:
    """The groups with their rewards, and the reasons of what failed. Format counts nothing."""
    config = RewardConfig(function=f"{HERE}:{name}", **{"accuracy_weight": 1.0, "format_weight": 0.0, **reward})
    with Rewarder(config, response_prefix=prefix) as rewarder:
        found = rewarder.reward(groups, step)
        return found, [failed.reason for _, failed in rewarder.take_failures()]


def lengths(rows: list[RewardRow]) -> list[float]:
    calls.append(rows)
    return [float(len(row.response)) for row in rows]


async def lengths_later(rows: list[RewardRow]) -> list[float]:
    await asyncio.sleep(0)
    return lengths(rows)


class _Object:
    def __call__(self, rows: list[RewardRow], scale: float = 2.0, more: int = 0) -> list[float]:
        return [scale * value for value in lengths(rows)]


an_object = _Object()


def product(response: str, answer: str, problem: str) -> float:
    return len(response) * int(answer)


@pytest.mark.parametrize("name", ["lengths", "lengths_later"])
def test_a_row_has_all_that_belongs_to_a_response(name):
    (found,), failed = rewarded(name, group_of("ab", "c", other_answers=["three"]), prefix="<think>")
    assert found.rewards == (9.0, 8.0) and not failed
    assert found.reward_parts == {"accuracy": (9.0, 8.0), "format": (0.0, 0.0), "failed": (0.0, 0.0)}
    assert [len(rows) for rows in calls] == [1, 1]
    first = min((rows[0] for rows in calls), key=lambda row: row.rollout)
    assert first == RewardRow(
        response="<think>ab", answer="3", answers=("3", "three"), problem="How many?", columns=COLUMNS, source="maths",
        images=(b"png",), finish_reason="stop", num_tokens=2, prompt_id="train:0", rollout=0, step=5,
    )  # fmt: skip
    assert "png" not in repr(first), "a picture is no text for a log"


@pytest.mark.parametrize("rows_per_call, sizes", [("one", [1] * 5), ("group", [2, 3]), ("all", [5])])
def test_rows_come_one_by_one_by_group_or_all_together(rows_per_call, sizes):
    groups, _ = rewarded("lengths", group_of("a", "bb"), group_of("c", "dd", "eee"), rows_per_call=rows_per_call)
    assert [group.rewards for group in groups] == [(1.0, 2.0), (1.0, 2.0, 3.0)]
    assert [len(rows) for rows in calls] == sizes


def test_the_form_with_three_arguments_goes_on_and_takes_the_best_answer():
    (found,), failed = rewarded("product", group_of("ab", other_answers=["5"]))
    assert found.rewards == (10.0,) and not failed
    (found,), failed = rewarded("product", group_of("ab", "c", other_answers=["five"]))
    assert found.rewards == (0.0, 0.0) and found.reward_parts["failed"] == (1.0, 1.0)
    assert failed[0].startswith("failed: ValueError: invalid literal for int() with base 10: 'five' (test_reward_fun")


def test_an_argument_named_rows_says_the_form_and_other_arguments_keep_their_defaults():
    (found,), _ = rewarded("an_object", group_of("ab"))
    assert found.rewards == (4.0,)


async def three(response: str, answer: str, problem: str) -> float:
    return 1.0


def test_an_async_function_takes_rows():
    with pytest.raises(ValueError, match=rf"^reward.function: {HERE}:three is async and must take \(rows\)$"):
        Rewarder(RewardConfig(function=f"{HERE}:three"))


PARTS = {"judge": torch.tensor(0.5), "brevity": True}


def parts_by_name(rows: list[RewardRow]) -> list[dict[str, object]]:
    given = {"judge": PARTS, "exact": {"accuracy": 1, "judge": 0.5}, "form": {"accuracy": 0.25, "format": 1.0}}
    return [given[row.response] for row in rows]


def test_named_parts_are_added_with_their_weights_and_reported():
    (found,), _ = rewarded(
        "parts_by_name", group_of("judge", "exact", "form"), accuracy_weight=0.9, format_weight=0.1,
        weights={"judge": 0.8, "brevity": -0.1},
    )  # fmt: skip
    assert found.rewards == pytest.approx((0.3, 0.9 + 0.4, 0.9 * 0.25 + 0.1))
    assert found.reward_parts == {
        "accuracy": (pytest.approx(0.3), 1.0, 0.25), "format": (0.0, 0.0, 1.0), "judge": (0.5, 0.5, 0.0),
        "brevity": (1.0, 0.0, 0.0), "failed": (0.0, 0.0, 0.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"format": 1.0}, "reward.weights.format: this part's weight is reward.format_weight"),
        ({"judge": float("nan")}, "reward.weights.judge: nan is not finite"),
    ],
)
def test_weights_are_of_own_parts(weights, message):
    with pytest.raises(ValidationError, match=message):
        RewardConfig(weights=weights)


FAULTS = {
    "raises": "failed: ZeroDivisionError: division by zero",
    "an error": "failed: ValueError: no verdict",
    "exits": "failed: SystemExit: 3",
    "none": "returned None",
    "text": "returned '1.0'",
    "nan": "returned nan",
    "infinite": "returned -inf for the part judge",
    "two numbers": "failed: ",
    "a name": "returned a part named 'a b', which is no name for a part",
    "failed": "returned a part named 'failed', which is no name for a part",
    "no parts": "returned a mapping without parts",
    "many lines": "failed: OSError: a\\nb",
}


def faulty(rows: list[RewardRow]) -> list[object]:
    entries = {
        "raises": lambda: 1 / 0,
        "an error": lambda: ValueError("no verdict"),
        "exits": lambda: exit(3),
        "none": lambda: None,
        "text": lambda: "1.0",
        "nan": lambda: float("nan"),
        "infinite": lambda: {"judge": float("-inf")},
        "two numbers": lambda: torch.ones(2),
        "a name": lambda: {"a b": 1.0},
        "failed": lambda: {"failed": 1.0},
        "no parts": lambda: {},
        "many lines": lambda: OSError("a\nb" + "c" * 1000),
    }
    return [entries[row.response]() if row.response in entries else 1.0 for row in rows]


async def faulty_later(rows: list[RewardRow]) -> list[object]:
    return faulty(rows)


@pytest.mark.parametrize("name", ["faulty", "faulty_later"])
def test_a_row_that_fails_costs_only_itself(name):
    faults = {fault: reason for fault, reason in FAULTS.items() if (name, fault) != ("faulty_later", "exits")}
    (found,), failed = rewarded(name, group_of("good", *faults), format_weight=0.5)
    assert found.rewards == (1.0, *[0.0] * len(faults))
    assert found.reward_parts["failed"] == (0.0, *[1.0] * len(faults))
    for reason, expected in zip(failed, faults.values(), strict=True):
        assert reason.startswith(expected) and len(reason) < 400 and "\n" not in reason


def wrong_length(rows: list[RewardRow]) -> list[float]:
    return [1.0] * 2


def no_list(rows: list[RewardRow]) -> float:
    return 1.0


def test_what_is_no_list_of_the_right_length_fails_all_rows_of_the_call():
    group = group_of("a", "b", "c")
    assert rewarded("wrong_length", group, rows_per_call="all")[1] == ["returned 2 entries for 3 rows"] * 3
    assert rewarded("no_list", group)[1] == ["returned float, not a list with one entry a row"] * 3
    one, other = rewarded("faulty", group_of("good", "raises"), rows_per_call="all")[1]
    assert one == other and one.startswith(FAULTS["raises"] + " (test_reward_function.py:")


def hangs(rows: list[RewardRow]) -> list[float]:
    if rows[0].response == "slow":
        ended[0].wait(60)
    return [1.0] * len(rows)


async def hangs_later(rows: list[RewardRow]) -> list[float]:
    if rows[0].response == "slow":
        await asyncio.sleep(60)
    return [1.0] * len(rows)


async def hangs_in_a_thread(rows: list[RewardRow]) -> list[float]:
    return await asyncio.to_thread(hangs, rows)


@pytest.mark.parametrize("name", ["hangs", "hangs_later", "hangs_in_a_thread"])
def test_a_call_that_takes_too_long_has_failed_and_the_others_go_on(name):
    (found,), failed = rewarded(name, group_of("a", "slow", "b"), function_timeout_s=0.2)
    assert found.rewards == (1.0, 0.0, 1.0)
    assert failed == ["failed: TimeoutError: no answer within reward.function_timeout_s=0.2"]


def test_a_thread_that_never_returns_keeps_no_process_from_ending():
    group = group_of("slow")
    for name in ("hangs", "hangs_in_a_thread"):
        rewarded(name, group, function_timeout_s=0.05)
    left = [thread for thread in threading.enumerate() if thread.name == "reward.function"]
    assert left and all(thread.daemon for thread in left)


def fails_twice(rows: list[RewardRow]) -> list[float]:
    calls.append(rows)
    if len(calls) == 1:
        raise ConnectionError("refused")
    if len(calls) == 2:
        return [1.0, None, float("nan")]  # type: ignore[list-item]
    return [2.0] * len(rows)


def test_rows_that_failed_are_asked_for_again():
    group = group_of("a", "b", "c")
    (found,), failed = rewarded("fails_twice", group, rows_per_call="all", retries=2)
    assert found.rewards == (1.0, 2.0, 2.0) and not failed
    assert [[row.response for row in rows] for rows in calls] == [["a", "b", "c"], ["a", "b", "c"], ["b", "c"]]
    calls.clear()
    (found,), failed = rewarded("fails_twice", group, rows_per_call="all", retries=1)
    assert found.rewards == (1.0, 0.0, 0.0) and failed == ["returned None", "returned nan"]


most = [0, 0]


async def counts(rows: list[RewardRow]) -> list[float]:
    most[0] += 1
    most[1] = max(most)
    await asyncio.sleep(0.02)
    most[0] -= 1
    return [1.0]


class _Counts:
    """Calls that run at the same time, in threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, rows: list[RewardRow]) -> list[float]:
        with self.lock:
            most[0] += 1
            most[1] = max(most)
        time.sleep(0.02)
        with self.lock:
            most[0] -= 1
        return [1.0]


counts_in_threads = _Counts()


@pytest.mark.parametrize(
    "name, concurrency, expected",
    [("counts", 3, 3), ("counts", None, 8), ("counts_in_threads", 3, 3), ("counts_in_threads", None, 1)],
)
def test_so_many_calls_are_made_at_a_time(name, concurrency, expected):
    most[:] = [0, 0]
    (found,), _ = rewarded(name, group_of(*"abcdefgh"), concurrency=concurrency)
    assert found.rewards == (1.0,) * 8 and most[1] == expected


def test_a_wait_returns_in_time_and_tells_how_far_it_is():
    config = RewardConfig(function=f"{HERE}:hangs", concurrency=2)
    with Rewarder(config) as rewarder:
        asked = rewarder.ask([group_of("slow", "a", "b")])
        assert asked is not None and not asked.wait(0.3) and asked.progress == (2, 3)
        ended[0].set()
        assert asked.wait(30) and asked.progress == (3, 3)
    assert Rewarder(RewardConfig()).ask([group_of("a")]) is None


def test_the_examples_of_the_guide_run():
    page = (Path(__file__).parents[2] / "docs/guides/plug_ins.md").read_text()
    names: dict[str, Any] = {}
    for block in page.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    group = replace(group_of("\\boxed{3}", "wait"), rewards=(1.0, 0.0), advantages=(1.0, -1.0))
    assert names["short_and_right"](rows_of(group, "", 0)) == [
        {"accuracy": 1.0, "brevity": -0.009}, {"accuracy": 0.0, "brevity": -0.004},
    ]  # fmt: skip
    rows = metric_rows_of(replace(group, reward_parts={"accuracy": (1.0, 0.0)}), "", 0)
    assert names["of_right_answers"](rows) == {"waits": 0.5, "right_tokens": (9, 1)}
