"""The form of the package: sizes of files and functions, names that are there once, folders that say their purpose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.support.source_tree import Modules, package, read_package

MOST_LINES = 300
MOST_LINES_OF_A_FUNCTION = 60
MOST_AT_THE_ROOT = 10


def short_files(modules: Modules) -> list[str]:
    lines = {name: len(module.text.splitlines()) for name, module in modules.items()}
    return [f"{name}: {number} lines" for name, number in lines.items() if number > MOST_LINES]


def short_functions(modules: Modules) -> list[str]:
    return [
        f"{name}.{function}: {lines} lines"
        for name, module in modules.items()
        for function, lines in module.functions
        if lines > MOST_LINES_OF_A_FUNCTION
    ]


def few_at_the_root(modules: Modules) -> list[str]:
    root = [name for name, module in modules.items() if name == module.room and module.path.name != "__init__.py"]
    return [f"{len(root)} modules at the root"] if len(root) > MOST_AT_THE_ROOT else []


def folders_say_what_they_are_for(modules: Modules) -> list[str]:
    folders = {module.path.parent for module in modules.values()}
    told = {module.path.parent for module in modules.values() if module.path.name == "__init__.py" and module.docstring}
    return [f"{folder.name}/__init__.py: no docstring" for folder in sorted(folders - told)]


def classes_once(modules: Modules) -> list[str]:
    return _more_than_once((name, owner) for owner, module in modules.items() for name in module.classes)


def files_once(modules: Modules) -> list[str]:
    """At the root and in the rooms. Deeper, families and engines have files of the same names on purpose, and what a
    family's file must have is written down in the room's file of that name."""
    files = [(module.path.name, name) for name, module in modules.items() if module.path.name != "__init__.py"]
    return _more_than_once((file, name) for file, name in files if name.count(".") < 2)


def _more_than_once(names: Iterable[tuple[str, str]]) -> list[str]:
    owners = defaultdict(list)
    for name, owner in names:
        owners[name].append(owner)
    return [f"{name}: in {' and '.join(sorted(where))}" for name, where in sorted(owners.items()) if len(where) > 1]


RULES = (
    short_files, short_functions, few_at_the_root, folders_say_what_they_are_for, classes_once, files_once,
)  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_the_package_has_the_form(rule: Callable[[Modules], list[str]]):
    faults = rule(package())
    assert not faults, "\n".join(faults)


CLEAN = {
    "__init__": '"""A package."""\n',
    "model.__init__": '"""The model."""\n',
    "model.norm": "class Norm:\n    pass\n",
    "model.alpha.__init__": '"""A family."""\n',
    "model.alpha.layers": "",
    "model.beta.__init__": '"""Another."""\n',
    "model.beta.layers": "",
    "costs.__init__": '"""Counts."""\n',
    "costs.memory": "",
}


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({}, []),
        ({"model.norm": "\n" * 301}, ["model.norm: 301 lines"]),
        ({"model.norm": "class Norm:\n    def f():\n" + "        0\n" * 60}, ["model.norm.f: 61 lines"]),
        ({f"verb_{number}": "" for number in range(11)}, ["11 modules at the root"]),
        ({"costs.__init__": "from megatron_papo import model\n"}, ["costs/__init__.py: no docstring"]),
        ({"data.order": ""}, ["data/__init__.py: no docstring"]),
        ({"costs.memory": "def f():\n    class Norm:\n        pass\n"}, ["Norm: in costs.memory and model.norm"]),
        ({"model.memory": ""}, ["memory.py: in costs.memory and model.memory"]),
    ],
)
def test_a_planted_fault_is_named(tmp_path: Path, changes: dict[str, str], faults: list[str]):
    for module, text in (CLEAN | changes).items():
        path = tmp_path / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert [fault for rule in RULES for fault in rule(read_package(tmp_path))] == faults
