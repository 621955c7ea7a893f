"""Short curves of every recipe under examples/, on a tiny model: a change that is not about numbers must not move them.

The recorded curves lie in curves.json. After a change that is about numbers, look at what moved and why, then record
them anew: `python -m tests.golden.test_recipes`.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import processes
from tests.ranks import run_ranks
from tests.tiny_run import make_inputs, metrics, tiny_run

EXAMPLES = Path(__file__).parents[2] / "examples"
CURVES = Path(__file__).with_name("curves.json")
RECIPES = sorted(path.stem for path in EXAMPLES.glob("*.yaml") if not path.stem.startswith("_"))
SETTINGS = {
    "parallel__tensor": 1,
    "parallel__pipeline": 1,
    "parallel__sequence": False,
    "parallel__distributed_optimizer": False,
    "data__preset": "none",
    "data__eval": "null",
    "model__spec": "auto",
    "optim__precision_aware": False,
    "generation__engine": "transformers",
    "generation__placement": "colocated",
    "generation__engines": 1,
    "train__ahead": False,
    "optim__warmup_steps": 0,
    "optim__eps": 1e-4,
    "reward__overlong__enabled": False,
    "train__dynamic_sampling__high": 1.0,
    "train__dynamic_sampling__prompts_per_round": 2,
}
"""What a recipe says of its machine and its data is replaced; what it says of the objective stays.

Adam's first step has the size of the rate wherever a gradient is far above its epsilon, be it rounding alone: with the
recipes' 1e-8 one of the rollouts after it was another on another processor.
"""


def _train(recipe: str, inputs: Path, folder: Path) -> None:
    from megatron_papo.train import main

    main(tiny_run(inputs, folder, EXAMPLES / f"{recipe}.yaml", **SETTINGS))


def _curve(recipe: str, inputs: Path, folder: Path) -> list[dict[str, float]]:
    run_ranks(_train, 1, recipe, inputs, folder)
    return [{name: value for name, value in line.items() if name != "step"} for line in metrics(folder)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_curve_of(recipe, inputs, tmp_path):
    expected = json.loads(CURVES.read_text())[recipe]
    found = _curve(recipe, inputs, tmp_path)
    assert [set(step) for step in found] == [set(step) for step in expected]
    moved = {
        (step, name): (want[name], got[name])
        for step, (want, got) in enumerate(zip(expected, found, strict=True))
        for name in want
        if not math.isclose(want[name], got[name], rel_tol=1e-3, abs_tol=1e-4)
    }
    assert not moved


def _record() -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.callback(processes.open_session(isolated=False))
        made = make_inputs(Path(folder))
        curves = {recipe: _curve(recipe, made, Path(folder) / recipe) for recipe in RECIPES}
    CURVES.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    from tests.golden import test_recipes  # whose functions a rank finds by the name of their module

    test_recipes._record()
