"""Short curves of every recipe under examples/, on a tiny model: a change that is not about numbers must not move them.

The tiny model is of the family of the recipe's own. The recorded curves lie in curves.json. After a change that is
about numbers, look at what moved and why, then record them anew: `python -m tests.golden.test_recipes`, with the names
of new recipes behind it to record these alone.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from megatron_papo.config import ClusterConfig, Config, RunConfig, load_config
from megatron_papo.model.published_shapes import shape_named
from tests.support.processes import open_session
from tests.support.ranks import run_ranks
from tests.support.tiny import PIXELS
from tests.support.tiny_run import make_inputs, metrics, tiny_run

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
    "generation__tensor": 1,
    "generation__gpu_memory_fraction": 0.5,
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


def _train(config: Config) -> None:
    from megatron_papo.train import main

    main(config)


class Curves:
    """Of recipes as a tiny run, each trained in a folder of its own; recipes that are then alike, once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._inputs: dict[str, Path] = {}
        self._found: dict[str, list[dict[str, float]]] = {}

    def of(self, recipe: str) -> list[dict[str, float]]:
        file = EXAMPLES / f"{recipe}.yaml"
        family = shape_named(str(load_config(file, []).model.path)).model_type
        if family not in self._inputs:
            self._inputs[family] = make_inputs(self._folder / family, family=family)
        least, most = PIXELS[family]
        pixels = {"data__min_pixels": least, "data__max_pixels": most}
        config = tiny_run(self._inputs[family], self._folder / recipe, file, **SETTINGS, **pixels)
        alike = config.model_copy(update={"run": RunConfig(), "cluster": ClusterConfig()})
        if alike.model_dump_json() not in self._found:
            run_ranks(_train, 1, config)
            lines = [
                {name: value for name, value in line.items() if name != "step"} for line in metrics(config.run.dir)
            ]
            self._found[alike.model_dump_json()] = lines
        return self._found[alike.model_dump_json()]


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> Curves:
    return Curves(tmp_path_factory.mktemp("curves"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_curve_of(recipe, curves):
    """Metrics that have been added since the curves were recorded are not compared."""
    expected = json.loads(CURVES.read_text())[recipe]
    found = curves.of(recipe)
    assert not [set(want) - set(got) for want, got in zip(expected, found, strict=True) if set(want) - set(got)]
    moved = {
        (step, name): (want[name], got[name])
        for step, (want, got) in enumerate(zip(expected, found, strict=True))
        for name in want
        if not math.isclose(want[name], got[name], rel_tol=1e-3, abs_tol=1e-4)
    }
    assert not moved


def record(recipes: Sequence[str]) -> None:
    """Records the curves of these recipes, the others staying as they are."""
    with ExitStack() as stack:
        stack.callback(open_session(isolated=False))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        curves = Curves(Path(folder))
        found = json.loads(CURVES.read_text()) | {recipe: curves.of(recipe) for recipe in recipes}
    CURVES.write_text(json.dumps({recipe: found[recipe] for recipe in RECIPES}, indent=1) + "\n")


if __name__ == "__main__":
    from tests.golden import test_recipes

    test_recipes.record(sys.argv[1:] or RECIPES)  # by the module's own name, by which ranks import what they run
