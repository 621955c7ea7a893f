"""The rooms of the package stand in layers: lower never imports upper, siblings never each other, no cycles.

Read from the source with `ast`, imports within functions included, so nothing is imported here. A room is a package
such as `model/`, or a module at the root of the package. Within a room files import each other freely, without cycles.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_papo"

LAYERS = (
    ("__main__",),
    ("cli", "train_ahead", "sweep"),
    ("train", "sft", "score", "cluster", "conversion"),
    ("parity", "evaluate", "preflight"),
    ("training",),
    ("planning",),
    ("checkpoint", "observe"),
    ("weights",),
    ("generation", "optimization", "costs"),
    ("packing",),
    ("model", "rewards"),
    ("runtime",),
    ("distributed", "data", "algorithm"),
    ("logprobs",),
    ("config", "types", "files"),
    ("text",),
)
HEIGHT = {room: -depth for depth, layer in enumerate(LAYERS) for room in layer}
PLACES = {
    "megatron": {"distributed", "model", "optimization", "checkpoint"},
    "vllm": {"generation"},
}
HEAVY = {"torch", "megatron", "transformers", "vllm", "datasets", "numpy", "sklearn"}


def _modules(root: Path) -> dict[str, Path]:
    """Dotted name within the package → file; a package's own name stands for its `__init__.py`."""
    found = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, at_import_time_only: bool = False) -> Iterator[str]:
    """Full dotted names; `from a import b` gives a.b, for b may be a module."""
    pending: list[ast.AST] = [ast.parse(path.read_text(), str(path))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative imports hide the order"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (at_import_time_only and (function or for_types)):
            pending += ast.iter_child_nodes(node)


def _own_imports(modules: dict[str, Path], module: str, at_import_time_only: bool = False) -> set[str]:
    """Modules of the package that `module` imports by name; a name within a module counts as that module."""
    prefix = "megatron_papo."
    names = {name[len(prefix) :] for name in _imports(modules[module], at_import_time_only) if name.startswith(prefix)}
    found = set()
    for name in names:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {module, ""}


def violations(root: Path) -> list[str]:
    """One line a fault in the order of imports of the package under `root`."""
    modules = _modules(root)
    graph = {module: _own_imports(modules, module) for module in modules if module}
    found = [f"{module}: has no layer" for module in graph if module.split(".")[0] not in HEIGHT]
    if found:
        return found
    for module, imported in graph.items():
        room = module.split(".")[0]
        for name in sorted(imported):
            other = name.split(".")[0]
            if room == other:
                continue
            if HEIGHT[other] > HEIGHT[room]:
                found.append(f"{module} imports {name}: lower imports upper")
            elif HEIGHT[other] == HEIGHT[room]:
                found.append(f"{module} imports {name}: siblings")
        outside = {name.split(".")[0] for name in _imports(modules[module])}
        found += [f"{module} imports {name}" for name in PLACES if name in outside and room not in PLACES[name]]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {_ring(error.args[1])}")
    return found


def _ring(imported_to_importer: list[str]) -> str:
    """The cycle in the order of importing, from its alphabetically first module and back to it."""
    ring = imported_to_importer[:0:-1]
    first = ring.index(min(ring))
    return " → ".join([*ring[first:], *ring[:first], ring[first]])


def heavy_at_start(root: Path, start: str) -> list[str]:
    """Chains by which importing `start` imports a slow library, packages' `__init__.py` included."""
    modules = _modules(root)
    chains = {name: start for name in _with_parents(start)}
    pending, found = list(chains), []
    while pending:
        module = pending.pop()
        outside = {name.split(".")[0] for name in _imports(modules[module], at_import_time_only=True)}
        found += [f"{chains[module]} → {name}" for name in sorted(outside & HEAVY)]
        for name in _own_imports(modules, module, at_import_time_only=True):
            for reached in _with_parents(name):
                if reached in modules and reached not in chains:
                    chains[reached] = f"{chains[module]} → {reached}"
                    pending.append(reached)
    return found


def _with_parents(module: str) -> list[str]:
    """The module and the packages around it, the outermost ("") too: importing it runs their `__init__.py`."""
    parts = module.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def test_the_package_keeps_the_order():
    assert violations(PACKAGE) == []


BEFORE_RANKS = (
    "config", "cli", "runtime.launch", "preflight.check", "cluster.submit", "cluster.supervise", "model.shape",
    "costs.flops", "costs.memory",
)  # fmt: skip


@pytest.mark.parametrize("start", BEFORE_RANKS)
def test_nothing_slow_is_imported_before_a_rank_starts(start: str):
    assert heavy_at_start(PACKAGE, start) == []


CLEAN = {
    "__init__": "",
    "train": "from megatron_papo.training.session import Run\nfrom megatron_papo.optimization.pipeline import update\n",
    "training.session": "from megatron_papo.config import Config\n",
    "optimization.pipeline": "import megatron.core\nfrom megatron_papo.model.policy import Policy\n",
    "model.__init__": "",
    "model.policy": "from megatron_papo.model.rotary import rotate\nfrom megatron_papo.types import Group\n",
    "model.rotary": "",
    "algorithm.losses": "from megatron_papo.types import Group\n",
    "types": "import torch\n",
    "config": "",
    "distributed.accelerator": "import megatron.core\n",
    "data.order": "",
    "packing.rows": "",
    "generation.vllm_engine": "def build():\n    import vllm\n",
}


def _plant(root: Path, changes: dict[str, str]) -> Path:
    for module, text in (CLEAN | changes).items():
        path = root / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        (
            {"config": "from megatron_papo.packing import rows\n"},
            ["config imports packing.rows: lower imports upper"],
        ),
        (
            {"algorithm.losses": "def late():\n    import megatron_papo.model.policy\n"},
            ["algorithm.losses imports model.policy: lower imports upper"],
        ),
        (
            {"algorithm.losses": "from megatron_papo.data.order import rows\n"},
            ["algorithm.losses imports data.order: siblings"],
        ),
        ({"algorithm.losses": "from megatron.core import mpu\n"}, ["algorithm.losses imports megatron"]),
        ({"train": "import vllm\n"}, ["train imports vllm"]),
        ({"helpers": ""}, ["helpers: has no layer"]),
        (
            {"training.session": "from megatron_papo.train import main\n"},
            [
                "training.session imports train: lower imports upper",
                "cycle: train → training.session → train",
            ],
        ),
        (
            {"model.rotary": "import megatron_papo.model.policy\n"},
            ["cycle: model.policy → model.rotary → model.policy"],
        ),
    ],
)
def test_a_planted_fault_is_caught(tmp_path: Path, changes: dict[str, str], faults: list[str]):
    assert violations(_plant(tmp_path, changes)) == faults


def test_a_planted_slow_import_is_caught_with_its_chain(tmp_path: Path):
    root = _plant(
        tmp_path,
        {"cli": "from megatron_papo.model.rotary import rotate\n", "model.__init__": "import torch\n"},
    )
    assert heavy_at_start(root, "cli") == ["cli → model → torch"]
    outermost = _plant(tmp_path, {"__init__": "import numpy\n", "model.__init__": ""})
    assert heavy_at_start(outermost, "model.rotary") == ["model.rotary → numpy"]
    quiet = {"cli": "def late():\n    import torch\n", "model.__init__": ""}
    assert heavy_at_start(_plant(tmp_path, quiet), "cli") == []
