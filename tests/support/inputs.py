"""What a tiny run reads (model, pictures, questions), as a fixture: written once a session for each shape of model.

A test file whose model is not the usual one names its shape in `MODEL`, the arguments of
`tests.support.tiny.make_tiny_folder`. Nobody writes into these folders; who needs to copies them or makes his own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_run import make_inputs

FOR_VLLM: dict[str, Any] = {"hidden": 128, "heads": 4, "kv_heads": 2, "std": 0.12}
"""A model that vLLM loads as well: its heads are 32 wide."""


@pytest.fixture(scope="session")
def inputs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`inputs_of(**shape)`: the folder with a model of this shape, made when it is first asked for."""
    made: dict[tuple, Path] = {}

    def folder_of(**shape: Any) -> Path:
        key = tuple(sorted(shape.items()))
        if key not in made:
            made[key] = make_inputs(tmp_path_factory.mktemp("inputs"), **shape)
        return made[key]

    return folder_of


@pytest.fixture(scope="module")
def inputs(request: pytest.FixtureRequest, inputs_of: Callable[..., Path]) -> Path:
    """The folder with the model that the test file's `MODEL` describes; the usual tiny one where it has none."""
    return inputs_of(**getattr(request.module, "MODEL", {}))
