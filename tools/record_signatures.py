"""Records the parameters of other projects' functions, from their source. A test compares our calls with releases that
cannot be installed beside each other, or not without a GPU.

    python tools/record_signatures.py vllm FOLDER > tests/data/signatures/vllm-0.32.0.json

FOLDER is an unpacked wheel (`pip download --no-deps vllm==0.32.0`, then unzip). Nothing is imported. What is recorded
stands in `recorded_calls.py`.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.recorded_calls import ABSTRACT, CALLS, NAMES

Function = ast.FunctionDef | ast.AsyncFunctionDef


def record(project: str, folder: Path) -> dict[str, Any]:
    """What a release, unpacked in `folder`, has of the symbols of `project`. Raises LookupError for one that it
    lacks."""
    source = Source(folder)
    symbols = {symbol for call in CALLS[project] for symbol in call.symbols}
    return {
        "takes": {symbol: source.takes(symbol) for symbol in sorted(symbols)},
        "names": {symbol: sorted(set(names) & source.names(symbol)) for symbol, names in NAMES[project].items()},
        "abstract": {symbol: source.abstract(symbol) for symbol in ABSTRACT[project]},
    }


class Source:
    """Modules below a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tree = cache(self._tree)

    def takes(self, symbol: str) -> dict[str, Any]:
        """The parameters of a function or of a class's constructor. A class without one takes its annotated fields."""
        module, node = self.find(symbol)
        if isinstance(node, ast.ClassDef):
            constructor = self._member(module, node, "__init__")
            if constructor is None:
                fields = [name for _, each in self._lineage(module, node) for name in _fields(each)]
                passed_over = self._is_of_pydantic(module, node)
                return {
                    "positional": [],
                    "required": 0,
                    "keyword": sorted(fields),
                    "args": False,
                    "kwargs": passed_over,
                }
            node = constructor
        assert isinstance(node, Function), symbol
        given = node.args
        positional = [each.arg for each in (*given.posonlyargs, *given.args) if each.arg not in ("self", "cls")]
        return {
            "positional": positional,
            "required": max(len(positional) - len(given.defaults), 0),
            "keyword": sorted(each.arg for each in given.kwonlyargs),
            "args": given.vararg is not None,
            "kwargs": given.kwarg is not None,
        }

    def _is_of_pydantic(self, module: str, node: ast.ClassDef) -> bool:
        """Whether the class is one of pydantic's dataclasses, which ignore arguments that they do not know."""
        imports = [each for each in self.tree(module).body if isinstance(each, ast.ImportFrom)]
        theirs = [each for each in imports if each.module == "pydantic.dataclasses"]
        return bool(theirs) and "dataclass" in _decorators(node)

    def names(self, symbol: str) -> set[str]:
        """The names that a module or a class has, those of its base classes included."""
        if ":" not in symbol:
            return _bound(self.tree(symbol).body)
        module, node = self.find(symbol)
        assert isinstance(node, ast.ClassDef), symbol
        return {name for _, each in self._lineage(module, node) for name in _bound(each.body) | _own(each)}

    def abstract(self, symbol: str) -> list[str]:
        _, node = self.find(symbol)
        assert isinstance(node, ast.ClassDef), symbol
        marked = [each for each in node.body if isinstance(each, Function) and "abstractmethod" in _decorators(each)]
        return sorted(each.name for each in marked)

    def find(self, symbol: str) -> tuple[str, ast.AST]:
        """(module, node) of `module:name` or `module:Class.method`, imports and base classes followed."""
        module, _, name = symbol.partition(":")
        first, _, method = name.partition(".")
        for node in ast.walk(self.tree(module)):
            if isinstance(node, ast.ClassDef | Function) and node.name == first:
                if not method:
                    return module, node
                member = self._member(module, node, method)
                if member is not None:
                    return module, member
                break
            if isinstance(node, ast.ImportFrom) and first in [each.asname or each.name for each in node.names]:
                return self.find(f"{self._absolute(module, node)}:{name}")
        raise LookupError(f"{symbol}: not below {self.folder}")

    def _tree(self, module: str) -> ast.Module:
        file = self.folder / module.replace(".", "/")
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if not file.is_file():
            raise LookupError(f"{module}: not below {self.folder}")
        return ast.parse(file.read_text())

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        if not (self.folder / module.replace(".", "/")).is_dir():
            parts.pop()  # a module's own package
        return ".".join([*parts[: len(parts) + 1 - node.level], *([node.module] if node.module else [])])

    def _lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and those of its base classes that the folder has."""
        yield module, node
        for base in node.bases:
            name = base.value if isinstance(base, ast.Subscript) else base
            try:
                parent = self.find(f"{module}:{ast.unparse(name)}")
            except LookupError:  # of another project
                continue
            if isinstance(parent[1], ast.ClassDef):
                yield from self._lineage(*parent)  # type: ignore[arg-type]

    def _member(self, module: str, node: ast.AST, name: str) -> Function | None:
        assert isinstance(node, ast.ClassDef)
        for _, each in self._lineage(module, node):
            for member in each.body:
                if isinstance(member, Function) and member.name == name:
                    return member
        return None


def _decorators(node: Function | ast.ClassDef) -> str:
    return " ".join(ast.unparse(each) for each in node.decorator_list)


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]


def _bound(body: list[ast.stmt]) -> set[str]:
    """Names that statements bind: definitions, imports and assignments."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | Function):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for each in targets if isinstance(each, ast.Name)}
    return names


def _own(node: ast.ClassDef) -> set[str]:
    """Attributes that methods of the class assign to `self`."""
    return {
        each.attr
        for each in ast.walk(node)
        if isinstance(each, ast.Attribute)
        and isinstance(each.ctx, ast.Store)
        and isinstance(each.value, ast.Name)
        and each.value.id == "self"
    }


def written(recorded: dict[str, dict[str, Any]]) -> str:
    """The record as JSON, with a line for each symbol."""
    parts = [
        f' "{part}": {{\n' + ",\n".join(f"  {json.dumps(key)}: {json.dumps(each[key])}" for key in each) + "\n }"
        for part, each in recorded.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}"


if __name__ == "__main__":
    print(written(record(sys.argv[1], Path(sys.argv[2]))))
