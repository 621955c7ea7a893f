"""The package as its source says it: imports, classes and functions of every module, each file parsed once.

Nothing is imported. Only statements are looked at, within functions and classes too, never expressions, so that a
package of three hundred files takes well under a second.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parents[2] / "megatron_papo"
PREFIX = "megatron_papo."

When = Literal["loading", "later", "never"]
"""When an import is executed: as its module is loaded, in a call of a function, or by type checkers alone."""


@dataclass
class Module:
    """One file of the package."""

    name: str
    """Dotted, without the package's own name; a folder's name stands for its `__init__.py`, "" for the outermost."""
    path: Path
    text: str
    docstring: str = ""
    imports: list[tuple[str, When]] = field(default_factory=list)
    """Full dotted names; `from a import b` gives a.b, for b may be a module."""
    classes: list[str] = field(default_factory=list)
    functions: list[tuple[str, int]] = field(default_factory=list)
    """Name and number of lines, decorators left out."""

    @property
    def room(self) -> str:
        """The outermost folder, or the module itself where it stands at the root of the package."""
        return self.name.split(".")[0]

    def outside(self, *whens: When) -> set[str]:
        """Top-level names of the other libraries that are imported then."""
        return {name.split(".")[0] for name, when in self.imports if when in whens}


Modules = dict[str, Module]


@functools.cache
def package() -> Modules:
    """The modules of megatron_papo itself."""
    return read_package(PACKAGE)


def read_package(root: Path) -> Modules:
    """Every module under `root` by its name. SyntaxError where a file is none of Python."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = _read(name, path)
    return modules


def _read(name: str, path: Path) -> Module:
    text = path.read_text()
    tree = ast.parse(text, str(path))
    module = Module(name, path, text, ast.get_docstring(tree) or "")
    for statement, when in _statements(tree.body, "loading"):
        if isinstance(statement, ast.Import):
            module.imports += [(alias.name, when) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level == 0 and statement.module, f"{path}: relative imports hide the order"
            module.imports += [(f"{statement.module}.{alias.name}", when) for alias in statement.names]
        elif isinstance(statement, ast.ClassDef):
            module.classes.append(statement.name)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            assert statement.end_lineno is not None
            module.functions.append((statement.name, statement.end_lineno - statement.lineno + 1))
    return module


def _statements(body: list[ast.stmt], when: When) -> Iterator[tuple[ast.stmt, When]]:
    """All statements of `body` and those within them, each with when it is executed."""
    for statement in body:
        yield statement, when
        inner = when
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and when == "loading":
            inner = "later"
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in (_name(statement.test)):
            inner = "never"
        for part in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, part, []), inner)
        for holder in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
            yield from _statements(holder.body, inner)


def _name(test: ast.expr) -> str:
    return test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else ""


def own_imports(modules: Modules, name: str, *whens: When) -> set[str]:
    """Modules of the package that the module `name` imports then; a name within a module counts as that module."""
    imported = set()
    for full, when in modules[name].imports:
        if when not in whens or not full.startswith(PREFIX):
            continue
        inner = full.removeprefix(PREFIX)
        while inner and inner not in modules:
            inner = inner.rpartition(".")[0]
        imported.add(inner)
    return imported - {name, ""}


def reached(modules: Modules, starts: Iterable[str], *whens: When) -> dict[str, str]:
    """Every module that importing `starts` imports in the end, packages' `__init__.py` included.

    By its name, with the chain of imports that leads to it: `cli → model → model.shape`.
    """
    chains = {outer: start for start in starts for outer in _with_parents(start) if outer in modules}
    pending = list(chains)
    while pending:
        name = pending.pop()
        for imported in sorted(own_imports(modules, name, *whens)):
            for outer in _with_parents(imported):
                if outer in modules and outer not in chains:
                    chains[outer] = f"{chains[name]} → {outer}"
                    pending.append(outer)
    return chains


def _with_parents(name: str) -> list[str]:
    """The module and the packages around it, the outermost ("") too: importing it runs their `__init__.py`."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
