"""The rules of the rooms: which room may import which, and which library and which name may stand where.

The rooms of the package stand in layers (LAYERS, the one place where the order is written down): lower never imports
upper, siblings never each other, no cycles. A room is a folder such as `model/`, or a module at the root of the
package. Within a room files import each other freely, without cycles. Imports within functions count too. Everything
is read from the source, nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.source_tree import Modules, own_imports, package, reached, read_package

LAYERS = (
    ("__main__",),
    ("cli", "train_ahead", "sweep"),
    ("data_report",),
    ("train", "sft", "score", "cluster", "conversion", "planning", "cli_arguments"),
    ("parity", "evaluate", "preflight"),
    ("training",),
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
    "megatron": ("distributed", "model", "optimization", "checkpoint"),
    "vllm": ("generation.vllm", "generation.remote"),
}
"""Libraries that are imported in these rooms alone."""

PURE = ("config", "files", "text", "logprobs", "types", "algorithm", "rewards", "data", "packing")
"""Rooms that know nothing of Megatron-Core, by whatever chain of imports."""

TRAINING = ("train", "train_ahead", "sft", "evaluate", "score", "training")
APART = ("planning", "cluster", "sweep", "conversion")
"""Applications of their own: a rank that trains imports none of them."""

HEAVY = {"torch", "megatron", "transformers", "vllm", "datasets", "numpy", "sklearn"}
BEFORE_RANKS = (
    "config", "cli", "runtime.launch", "preflight.check", "cluster.submit", "cluster.supervise", "model.shape",
    "model.family", "costs.flops", "costs.memory", "planning.measured_run",
)  # fmt: skip
"""What the command line needs: it refuses a setting before any of HEAVY has been imported."""

REGISTRY = "model.family"
"""The module that names the folders of the model families, and the only one outside them that does."""


def order_of_rooms(modules: Modules) -> list[str]:
    faults = [f"{name}: has no layer" for name, module in modules.items() if name and module.room not in HEIGHT]
    if faults:
        return faults
    for name, module in modules.items():
        for other in sorted(own_imports(modules, name, "loading", "later", "never") if name else ()):
            upper, lower = HEIGHT[other.split(".")[0]], HEIGHT[module.room]
            if other.split(".")[0] == module.room or upper < lower:
                continue
            faults.append(f"{name} imports {other}: {'lower imports upper' if upper > lower else 'siblings'}")
    return faults


def no_cycles(modules: Modules) -> list[str]:
    graph = {name: own_imports(modules, name, "loading", "later", "never") for name in modules if name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"cycle: {_ring(error.args[1])}"]
    return []


def _ring(imported_to_importer: list[str]) -> str:
    """The cycle in the order of importing, from its alphabetically first module and back to it."""
    ring = imported_to_importer[:0:-1]
    first = ring.index(min(ring))
    return " → ".join([*ring[first:], *ring[:first], ring[first]])


def libraries_in_their_places(modules: Modules) -> list[str]:
    return [
        f"{name} imports {library}"
        for name, module in modules.items()
        for library, places in PLACES.items()
        if library in module.outside("loading", "later", "never")
        and not any(f"{name}.".startswith(f"{place}.") for place in places)
    ]


def pure_rooms(modules: Modules) -> list[str]:
    chains = reached(modules, [name for name in modules if modules[name].room in PURE], "loading", "later")
    return [f"{chain} → megatron" for name, chain in chains.items() if "megatron" in modules[name].outside("loading")]


def training_alone(modules: Modules) -> list[str]:
    chains = reached(modules, [name for name in modules if modules[name].room in TRAINING], "loading", "later")
    return sorted(chain for name, chain in chains.items() if modules[name].room in APART)


def families_by_name(modules: Modules) -> list[str]:
    """A family's name is the letters that its folder begins with, in whatever case. Families of one name may speak of
    each other, but none imports another."""
    folders = re.findall(r'"megatron_papo\.model\.(\w+)"', modules[REGISTRY].text)
    stems = sorted({re.sub("[^a-z].*", "", folder) for folder in folders})
    assert all(stems), folders
    of_folder = {name: folder for name in modules for folder in folders if f"{name}.".startswith(f"model.{folder}.")}
    names = [
        f"{name} names {stem}, line {line}"
        for stem in stems
        for name, module in modules.items()
        if name != REGISTRY and not of_folder.get(name, "").startswith(stem)
        for line, text in enumerate(module.text.splitlines(), 1)
        if stem in text.lower()
    ]
    imports = [
        f"{name} imports the family {other}"
        for name, folder in of_folder.items()
        for other in folders
        if other != folder and re.search(rf"megatron_papo\.model\.{other}\b", modules[name].text)
    ]
    return names + imports


def quick_start(modules: Modules) -> list[str]:
    """Chains by which importing a module of BEFORE_RANKS imports a slow library, packages' `__init__.py` included."""
    faults = set()
    for start in BEFORE_RANKS:
        for name, chain in (reached(modules, [start], "loading") if start in modules else {}).items():
            faults |= {f"{chain} → {library}" for library in modules[name].outside("loading") & HEAVY}
    return sorted(faults)


RULES = (
    order_of_rooms, no_cycles, libraries_in_their_places, pure_rooms, training_alone, families_by_name, quick_start,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rules(rule: Callable[[Modules], list[str]]):
    faults = rule(package())
    assert not faults, "\n".join(faults)


CLEAN = {
    "__init__": "",
    "train": "from megatron_papo.training.session import Run\nfrom megatron_papo.optimization.pipeline import update\n",
    "training.session": "from megatron_papo.config import Config\n",
    "optimization.pipeline": "import megatron.core\nfrom megatron_papo.model.policy import Policy\n",
    "model.__init__": "",
    "model.family": 'FAMILIES = {"llama4": "megatron_papo.model.llama4"}\n',
    "model.llama4.layers": "class Llama4Layer:\n    pass\n",
    "model.policy": "from megatron_papo.model.rotary import rotate\nfrom megatron_papo.types import Group\n",
    "model.rotary": "",
    "algorithm.losses": "from megatron_papo.types import Group\n",
    "types": "import torch\n",
    "config": "",
    "cli": "def late():\n    import torch\n",
    "planning.scale": "from megatron_papo.config import Config\n",
    "distributed.accelerator": "import megatron.core\n",
    "data.order": "",
    "packing.rows": "",
    "generation.vllm.engine": "def build():\n    import vllm\n",
}


def _planted(root: Path, changes: dict[str, str]) -> list[str]:
    """What all rules find in a package of CLEAN modules with these changes."""
    for module, text in (CLEAN | changes).items():
        path = root / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    modules = read_package(root)
    return [fault for rule in RULES for fault in rule(modules)]


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        (
            {"config": "from megatron_papo.packing import rows\n"},
            ["config imports packing.rows: lower imports upper"],
        ),
        (
            {"algorithm.losses": "def late():\n    import megatron_papo.packing.rows\n"},
            ["algorithm.losses imports packing.rows: lower imports upper"],
        ),
        (
            {"algorithm.losses": "from megatron_papo.data.order import rows\n"},
            ["algorithm.losses imports data.order: siblings"],
        ),
        ({"helpers": ""}, ["helpers: has no layer"]),
        (
            {"training.session": "from megatron_papo.train import main\n"},
            ["training.session imports train: lower imports upper", "cycle: train → training.session → train"],
        ),
        (
            {"model.rotary": "import megatron_papo.model.policy\n"},
            ["cycle: model.policy → model.rotary → model.policy"],
        ),
        (
            {"algorithm.losses": "from megatron.core import mpu\n"},
            ["algorithm.losses imports megatron", "algorithm.losses → megatron"],
        ),
        (
            {"packing.rows": "def late():\n    from megatron_papo.distributed import accelerator\n"},
            ["packing.rows → distributed.accelerator → megatron"],
        ),
        ({"train": "import vllm\n"}, ["train imports vllm"]),
        ({"generation.sampling": "import vllm\n"}, ["generation.sampling imports vllm"]),
        (
            {"training.session": "def late():\n    from megatron_papo.planning.scale import best\n"},
            ["training.session imports planning.scale: lower imports upper", "training.session → planning.scale"],
        ),
        ({"packing.rows": "# as a LLaMA has it\n"}, ["packing.rows names llama, line 1"]),
        (
            {
                "model.family": 'FAMILIES = ["megatron_papo.model.llama4", "megatron_papo.model.llama5"]\n',
                "model.llama4.layers": "# as Llama 5 has it\nfrom megatron_papo.model.llama5 import layers\n",
                "model.llama5.layers": "",
            },
            ["model.llama4.layers imports the family llama5"],
        ),
        (
            {"cli": "from megatron_papo.model.rotary import rotate\n", "model.__init__": "import torch\n"},
            ["cli → model → torch", "model.family → torch"],
        ),
        ({"__init__": "import numpy\n", "config": ""}, ["cli → numpy", "config → numpy", "model.family → numpy"]),
    ],
)
def test_a_planted_fault_is_named(tmp_path: Path, changes: dict[str, str], faults: list[str]):
    assert _planted(tmp_path, changes) == faults
