"""Rewards: box, rules, math-verify in its worker, the other parts, a user's function, and hostile answers."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sympy
import torch

from megatron_papo.config import OverlongConfig, RewardConfig
from megatron_papo.rewards import Rewarder
from megatron_papo.rewards.answers import MAX_ANSWER, Algebra, agree, gold_answer, last_box
from megatron_papo.rewards.numerals import number
from megatron_papo.rewards.parts import anls, format_reward, overlong, repetition
from megatron_papo.rewards.spelling import plain, spell
from megatron_papo.rewards.units import split_units
from megatron_papo.rewards.verifier import Verifier, read_line
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout

PAIRS = Path(__file__).parents[1] / "data/answer_pairs.jsonl"
"""An answer, a gold answer, what a reader would say of them, and the verdict of each grader."""


def group_of(*responses, answer="3", lengths=None):
    prompt = Prompt("train:0", 0, "How many?", answer, (), ModelInputs(torch.tensor([1]), None, None))
    lengths = lengths or [1] * len(responses)
    rollouts = tuple(
        Rollout(index, (7,) * length, (0.0,) * length, text, "stop", 0)
        for index, (text, length) in enumerate(zip(responses, lengths))
    )
    return Group(prompt, rollouts)


@pytest.mark.parametrize(
    ("says", "line"),
    [
        ("printf tr; sleep 0.1; echo ue", "true"),
        ("printf true; exec sleep 60", None),
        ("yes | tr -d '\\n'", None),
        ("printf 'true\\377\\n'", "true\ufffd"),
        ("true", None),
    ],
)
def test_a_worker_that_answers_have_taken_over_holds_nobody_up(says, line):
    with subprocess.Popen(["sh", "-c", f"exec 2>&-; {says}"], stdout=subprocess.PIPE) as worker:
        assert read_line(worker, 0.5) == line
        worker.kill()


@pytest.fixture(scope="module")
def verifier():
    with Verifier(60.0) as started:
        assert started.equal("2\\sqrt{3}", "\\sqrt{12}")
        yield started


@pytest.fixture(scope="module")
def mathruler():
    with Verifier(60.0, "mathruler") as started:
        assert started.equal("2\\sqrt{3}", "\\sqrt{12}")
        yield started


@pytest.fixture(scope="module")
def hasty():
    with Verifier(0.25) as started:
        yield started


@pytest.mark.parametrize(
    "text, box",
    [
        ("so \\boxed{3}", "3"),
        ("\\boxed{1} no, \\boxed{ 2 } .", "2"),
        ("\\boxed {\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{}", ""),
        ("no box", None),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed 5", None),
        ("\\boxed{" + "9" * MAX_ANSWER + "}", "9" * MAX_ANSWER),
        ("\\boxed{" + "9" * (MAX_ANSWER + 1) + "}", None),
        ("\\boxed{" + "{" * 11 + "1" + "}" * 11 + "}", "{" * 11 + "1" + "}" * 11),
        ("\\boxed{" + "{" * 12 + "1" + "}" * 12 + "}", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


def test_gold_answers_may_come_boxed():
    assert gold_answer("\\boxed{17^\\circ}") == "17^\\circ" and gold_answer(" 17 ") == "17"


RIGHT = [
    ("3", "3"), ("3.0", "3"), ("3.", "3"), ("1,000", "1000"), ("1{,}000", "1000"), ("1e3", "1000"), (".5", "0.5"),
    ("\\frac{1}{2}", "0.5"), ("-\\dfrac{1}{2}", "-0.5"), ("1/2", "0.50"), ("50\\%", "0.5"), ("50%", "50"),
    ("0.5", "50\\%"), ("50", "50%"), ("0.333333", "1/3"), ("0.166667", "1/6"), ("$12$", "12"), ("−4", "-4"),
    ("12 345", "12345"), ("- 3", "-3"), ("\n3\n", "3"), ("\\frac12", "0.5"), ("12 cm", "12"), ("\\text{12 cm}", "12"),
    ("120°", "120"), ("6.02\\times10^{23}", "6.02e23"), ("A", "A"), ("(A)", "A"), ("a", "A"), ("A. 30", "A"),
    ("A) 30", "(A)"), ("\\text{A}", "A"), ("A", "A. 30"), ("Red  circle", "red circle"), ("\\text{Yes}", "yes"),
    ("\\left(1,2\\right)", "(1, 2)"), ("0.05\\text{ M}", "0.05"), ("\\mathrm{Na}^{+}", "Na^+"),
    ("\\langle 1, 2 \\rangle", "(1,2)"), ("△ABC ≅ △DEF", "\\triangle ABC \\cong \\triangle DEF"),
]  # fmt: skip
WRONG = [
    ("3", "4"), ("", ""), (" ", " "), ("{}", ""), ("3", ""), ("", "3"), ("\\,", "\\;"), ("1000000", "1000001"),
    ("2e-7", "1e-7"), ("0.33", "1/3"), ("50\\%", "5000\\%"), ("B", "A"), ("B. A", "A"), ("red", "der"), ("-3", "3"),
    ("3\x00", "3"), ("\ud800", "x"), ("1e-9", "0"), ("3\x02 cm\x03", "3"),
]  # fmt: skip
ALGEBRA = [
    ("x=5", "5"), ("2\\sqrt{3}", "\\sqrt{12}"), ("x = 2\\sqrt{3}\\text{ cm}", "\\sqrt{12}"),
    ("\\{1,2\\}", "\\{2,1\\}"), ("\\pi/2", "\\frac{\\pi}{2}"), ("x^2+2x+1", "(x+1)^2"), ("x \\le 3", "(-\\infty,3]"),
    ("10!", "3628800"), ("(0.5\\cdot10^{-9}, 2)", "(\\frac{1}{2}\\cdot10^{-9},2)"),
    ("\\begin{pmatrix}1 \\\\ 2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2.0\\end{pmatrix}"),
]  # fmt: skip
NOT_ALGEBRA = [
    ("(1,2)", "(2,1)"), ("x+1", "x-1"), ("\\sqrt{2}", "1.4"), ("1/0", "5"), ("\\frac{1}{", "1"), ("A, B", "A"),
    ("2\\sqrt{2}\\cdot10^{-9}", "\\sqrt{3}\\cdot10^{-9}"), ("\\sqrt{2}\\cdot10^{-9}", "0"), ("2\\pi r h", "2\\pi r"),
    ("(10^{-9}\\sqrt{2}, 2)", "(10^{-9}\\sqrt{3}, 2)"), ("\\{10^{-9}\\sqrt{2}, 2\\}", "\\{2, 10^{-9}\\sqrt{3}\\}"),
    ("10^{-9}\\sqrt{2}x", "10^{-9}\\sqrt{3}x"), ("[0, 10^{-9}\\sqrt{2}]", "[0, 10^{-9}\\sqrt{3}]"),
    ("\\leftarrow", "\\rightarrow"),
]  # fmt: skip


def test_rules_settle_text_numbers_and_choices():
    assert [pair for pair in RIGHT if agree(*pair) is not True] == []
    assert [pair for pair in WRONG if agree(*pair) is not False] == []


def test_rules_leave_algebra_to_math_verify(verifier):
    assert [pair for pair in ALGEBRA + NOT_ALGEBRA if not isinstance(agree(*pair), Algebra)] == []
    assert [pair for pair in ALGEBRA if not verifier.equal(*agree(*pair))] == []
    assert [pair for pair in NOT_ALGEBRA if verifier.equal(*agree(*pair))] == []


@pytest.mark.parametrize("accuracy", ["math", "mathruler"])
def test_every_pair_of_the_table_has_its_verdict(accuracy, verifier, mathruler):
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 250 and len({(row["answer"], row["gold"]) for row in rows}) == len(rows)
    rewarder = Rewarder(RewardConfig(accuracy=accuracy))
    rewarder._verifier = {"math": verifier, "mathruler": mathruler}[accuracy]  # whose workers run
    groups = rewarder.reward([group_of(f"\\boxed{{{row['answer']}}}", answer=row["gold"]) for row in rows])
    found = [int(group.reward_parts["accuracy"][0]) for group in groups]
    assert [row for row, verdict in zip(rows, found) if verdict != row[accuracy]] == []
    page = (PAIRS.parents[2] / "docs/departures.md").read_text()
    same, missed, taken = (sum(row[accuracy] - row["reader"] == off for row in rows) for off in (0, -1, 1))
    differ = sum(row["math"] != row["mathruler"] for row in rows)
    assert f"has {len(rows)} pairs" in page and f"differ on {differ}." in page
    assert f"| `{accuracy}` | {same} | {missed} | {taken} |" in page, "counts on the page of departures"


@pytest.mark.parametrize(
    "answer, value, unit",
    [
        ("24\\text{ cm}^2", "24", {"cm": 2}),
        ("25\\frac{m}{s}", "25", {"m": 1, "s": -1}),
        ("9.8 m s^{-2}", "9.8", {"m": 1, "s": -2}),
        ("2.0\\times 10^{-3}\\ \\mathrm{mol\\cdot L^{-1}}", "2.0\\times 10^{-3}", {"mol": 1, "dm": -3}),
        ("8.3 J/(mol·K)", "8.3", {"kg": 1, "m": 2, "s": -2, "mol": -1, "K": -1}),
        ("3平方厘米", "3", {"cm": 2}),
        ("3 cubic feet", "3", {"ft": 3}),
        ("30^\\circ\\text{C}", "30", {"celsius": 1}),
        ("-\\$1.5 million", "-1.5 million", {"dollar": 1}),
        ("(2, 5) cm", "(2, 5)", {"cm": 1}),
        ("(2 cm, 5\\text{ cm})", "(2, 5)", {"cm": 1}),
        ("x = 5 m", "x = 5", {"m": 1}),
        ("5\\sqrt{3} m", "5\\sqrt{3}", {"m": 1}),
        ("x\\text{ cm}", "x", {"cm": 1}),
        ("3 red balls", "3", {"red ball": 1}),
        *[(text, text, None) for text in ("m", "in", "3+2m", "2\\pi h", "5t^2", "3mg", "x cm", "5 or 6", "5 squared")],
        *[(text, text, None) for text in ("4 min 30 s", "5 hundredths", "5倍", "f(m)", "A", "5^m", "abc")],
    ],
)
def test_units_are_split_from_values_and_variables_are_not(answer, value, unit):
    found, units = split_units(spell(answer))
    assert plain(found) == value
    assert [dict(each) for each in units] == ([] if unit is None else [unit])


def test_numbers_have_bounds():
    assert number("1e300") == 10**300 and number("1e301") is None and number("9" * 101) is None


HOSTILE = {
    "tower": "9^{9^{9^9}}",
    "tower with a variable": "9^{9^{9^{9}}}\\cdot x",
    "factorial": "10^{10^{8}}!",
    "many digits": "9" * 190,
    "power of many digits": "9" * 100 + "^{" + "9" * 30 + "}",
    "deep fractions": "\\frac{" * 11 + "1" + "}{2}" * 11,
    "variables in the exponent": "x" + "^{x" * 11 + "}" * 11,
    "unbalanced": "(((((((((((((1",
    "null bytes": "\x00" * 50,
    "half a surrogate": "\ud800",
    "lines": "1\n2\n3",
    "code": "__import__('os')._exit(1)",
}


ENDS_S = 30.0
"""Not a speed: what the verifier's limit of a quarter of a second did not end would take minutes to ages."""


def test_hostile_answers_are_ended_by_the_limit(hasty):
    for name, answer in HOSTILE.items():
        start = time.monotonic()
        assert not hasty.equal(answer, "\\sqrt{2}"), name
        assert time.monotonic() - start < ENDS_S, name
    assert hasty.equal("3\\sqrt{2}", "\\sqrt{18}")  # and the worker goes on


def test_mathruler_runs_no_program_that_an_answer_spells(tmp_path, mathruler):
    """By the numbers of its letters: mathruler evaluates the text, which has two letters that it does not know."""
    file = tmp_path / "written"
    program = "".join(f"\\textbackslash{{}}{ord(letter):03o}" for letter in f"open({str(file)!r},'w')")
    assert not mathruler.equal(f"ln('{program}')", "\\sqrt{2}") and not file.exists()
    assert not mathruler.equal("'9'*9**99", "5")
    assert mathruler.equal("x+y", "y+x"), "and the worker goes on"


def test_mathruler_runs_no_program_of_letters_cut_from_an_attribute(mathruler):
    """`d` and `c` as Roman numerals are no letters for mathruler, and in Python's names they are `d` and `c`."""
    for text in ("sqrt.__\u217eo\u217d__", "sqrt.\\\n__\u217eo\u217d__", "(sqrt.#\n__\u217eo\u217d__)"):
        places = {letter: place for place, letter in enumerate(sympy.sqrt.__doc__)}
        program = "+".join(f"{text}[{places[one]}:{places[one] + 1}]" for one in "__import__('os').mkdir('made')")
        assert len(program) < 1000 and not mathruler.equal("\\frac{1}{2}", f"1),({program}),(1")
    assert not Path("made").exists()


def test_hostile_responses_are_rewarded_zero_and_never_raise():
    responses = [
        "\\boxed{" + "{" * 1_000_000,
        "\\boxed{" * 150_000,
        "{}" * 500_000,
        "\\boxed{" + "9" * 1_000_000 + "}",
        "\\boxed{\\frac" + "{1}" * 300_000 + "}",
        "\x00" * 1_000_000 + "\\boxed{\x00}",
        "<think>" * 150_000,
        "\\boxed{" + "\ufdfa" * MAX_ANSWER + "}",  # eighteen letters each
        "\\boxed{}",
        "",
    ]
    with Rewarder(RewardConfig(repetition_weight=0.0)) as rewarder:
        for response in responses:
            start = time.monotonic()
            (group,) = rewarder.reward([group_of(response)])
            assert group.rewards == (0.0,)
            assert time.monotonic() - start < ENDS_S


def test_worker_has_one_thread_no_torch_and_is_replaced_when_killed(hasty):
    worker = hasty._worker
    assert "libtorch" not in Path(f"/proc/{worker.pid}/maps").read_text()
    assert "\nThreads:\t1\n" in Path(f"/proc/{worker.pid}/status").read_text()
    worker.kill()
    worker.wait()
    assert hasty.equal("y+y", "2y") and hasty._worker is not worker
    last = hasty._worker
    hasty.close()
    assert last.poll() is not None


@pytest.mark.parametrize(
    "response, value",
    [
        ("<think> 3 1 </think> \\boxed{ 2 }", 1.0),
        ("  <think>a</think>b \\boxed{2} c", 1.0),
        ("\\boxed{2} <think>a</think>", 0.0),
        ("<think> \\boxed{2} </think>", 0.0),
        ("<think> 3 \\boxed{2}", 0.0),
        ("I <think>a</think> \\boxed{2}", 0.0),
        ("<think>a</think> \\boxed{}", 0.0),
        ("", 0.0),
    ],
)
def test_format(response, value):
    assert format_reward(response) == value


def test_a_think_block_that_the_template_opens_counts(user_module):
    responses = ["3 1 </think> \\boxed{3}", "\\boxed{3}", "<think>x</think> \\boxed{3}"]
    with Rewarder(RewardConfig(), response_prefix="<think>\n") as rewarder:
        (rewarded,) = rewarder.reward([group_of(*responses)])
    assert rewarded.reward_parts == {"accuracy": (1.0, 1.0, 1.0), "format": (1.0, 0.0, 1.0)}
    with Rewarder(RewardConfig(function="my_rewards:length"), response_prefix="<think>\n") as rewarder:
        (rewarded,) = rewarder.reward([group_of("ab")])
    assert rewarded.reward_parts["accuracy"] == (8 + 2 + 1 + 9,), "a user's function reads the block too"


def test_anls():
    assert anls("Hello World", "hello  world") == 1.0
    assert anls("hallo", "hello") == pytest.approx(0.8)
    assert anls("abcd", "abxy") == 0.5 and anls("abcd", "axyz") == 0.0
    assert anls("", "") == 0.0 and anls("a", "a" * 1_000_000) == 0.0


def test_repetition():
    assert repetition("a b c d e", 2) == 0.0
    assert repetition("a b a b a b", 2) == pytest.approx(1 - 2 / 5)  # ab ba ab ba ab
    assert repetition("a b", 4) == 0.0


def test_overlong():
    config = OverlongConfig(enabled=True, buffer=10, penalty=2.0)
    assert [overlong(length, 100, config) for length in (1, 90, 95, 100, 105)] == [0, 0, -1.0, -2.0, -2.0]


def test_weighted_sum_and_parts():
    config = RewardConfig(repetition_weight=0.5, repetition_ngram=1, overlong=OverlongConfig(enabled=True, buffer=4))
    full, wrong, bare = "<think>x</think> \\boxed{3}", "<think>x</think> \\boxed{4}", "\\boxed{3} y y y y"
    group = group_of(full, wrong, bare, lengths=[2, 8, 10])
    with Rewarder(config, max_response_tokens=10) as rewarder:
        (rewarded,) = rewarder.reward([group])
        assert rewarder.reward([group]) == [rewarded]  # pure
    parts = rewarded.reward_parts
    assert parts["accuracy"] == (1.0, 0.0, 1.0) and parts["format"] == (1.0, 1.0, 0.0)
    assert parts["overlong"] == (0.0, -0.5, -1.0)
    repeated = [2 / 12, 2 / 12, 3 / 9]  # < think > x </ think > \ boxed { 3 }, and \ boxed { 3 } y y y y
    assert parts["repetition"] == pytest.approx(repeated)
    assert rewarded.rewards == pytest.approx(
        (1.0 - 0.5 * repeated[0], 0.1 - 0.5 * repeated[1] - 0.5, 0.9 - 0.5 * repeated[2] - 1.0)
    )
    assert rewarded.prompt is group.prompt and rewarded.rollouts is group.rollouts


def test_defaults_are_the_papers():
    responses = ["<think>x</think> \\boxed{3}", "\\boxed{3}", "<think>x</think> \\boxed{4}", "3"]
    with Rewarder(RewardConfig()) as rewarder:
        (rewarded,) = rewarder.reward([group_of(*responses)])
    assert rewarded.rewards == (1.0, 0.9, 0.1, 0.0) and set(rewarded.reward_parts) == {"accuracy", "format"}


def test_other_kinds_of_accuracy():
    with Rewarder(RewardConfig(accuracy="exact")) as rewarder:
        (rewarded,) = rewarder.reward([group_of("\\boxed{3}", "\\boxed{3.0}", "\\boxed{ $3$ }")])
        assert rewarded.reward_parts["accuracy"] == (1.0, 0.0, 1.0)
    with Rewarder(RewardConfig(accuracy="anls")) as rewarder:
        (rewarded,) = rewarder.reward([group_of("\\boxed{hallo}", "\\boxed{xyz}", "hello", answer="hello")])
        assert rewarded.reward_parts["accuracy"] == (pytest.approx(0.8), 0.0, 0.0)


def test_overlong_needs_the_limit():
    config = RewardConfig(overlong=OverlongConfig(enabled=True, buffer=10))
    with pytest.raises(ValueError, match=r"reward.overlong: needs generation.max_response_tokens"):
        Rewarder(config)
    with pytest.raises(ValueError, match=r"reward.overlong.buffer=10 exceeds generation.max_response_tokens=5"):
        Rewarder(config, max_response_tokens=5)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(response, answer, problem):\n    return len(response) + len(answer) + len(problem)\n"
        "def two(response, answer):\n    return 1.0\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield
    sys.modules.pop("my_rewards", None)


def test_a_users_function_replaces_accuracy(user_module):
    with Rewarder(RewardConfig(function="my_rewards:length")) as rewarder:
        (rewarded,) = rewarder.reward([group_of("ab", "<think></think>\\boxed{1}")])
    assert rewarded.reward_parts["accuracy"] == (2 + 1 + 9, 24 + 1 + 9)
    assert rewarded.rewards == pytest.approx((0.9 * 12, 0.9 * 34 + 0.1))


@pytest.mark.parametrize(
    "name, message",
    [
        ("my_rewards", "'my_rewards' is not written module:function"),
        ("no_such_module:f", "cannot import no_such_module:f: No module named 'no_such_module'"),
        ("my_rewards:gone", "cannot import my_rewards:gone: module 'my_rewards' has no attribute 'gone'"),
        ("my_rewards:number", "my_rewards:number is no function"),
        (
            "my_rewards:two",
            r"does not take \(response, answer, problem\) or \(rows\): too many positional arguments",
        ),
    ],
)
def test_a_users_function_is_checked_at_the_start(user_module, name, message):
    with pytest.raises(ValueError, match=f"^reward.function: .*{message}"):
        Rewarder(RewardConfig(function=name))
