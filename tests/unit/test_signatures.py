"""What we call of vLLM, Transformer Engine and Megatron-Core is there and takes what we pass, by the sources alone.

Held against the releases in `tests/data/signatures`, which `tools/record_signatures.py` recorded from wheels for CUDA,
and against what is installed. Our arguments are read from our calls, so a changed call is checked as it stands. Values
and meanings are not looked at, nor calls through variables.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tools.record_signatures import record
from tools.recorded_calls import ABSTRACT, CALLS, NAMES, Call

ROOT = Path(__file__).parents[2]
RECORDED = sorted((ROOT / "tests" / "data" / "signatures").glob("*.json"))
TE_VERSION = (2, 20, 2)


def _site(module: str) -> Path | None:
    """The folder that `module` is installed in."""
    spec = importlib.util.find_spec(module)
    places = None if spec is None else spec.submodule_search_locations
    return None if not places else Path(next(iter(places))).parent


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_releases_take_what_we_pass(file: Path):
    assert _faults(file.stem.partition("-")[0], json.loads(file.read_text())) == []


@pytest.mark.parametrize("project", CALLS)
def test_what_is_installed_takes_what_we_pass(project: str):
    site = _site(project)
    if site is None:
        pytest.skip(f"{project} is not installed")
    assert _faults(project, record(project, site)) == []


def test_a_call_that_does_not_fit_is_told():
    takes = {"positional": ["prompts", "level"], "required": 1, "keyword": ["seed"], "args": False, "kwargs": False}
    written = {
        "f(a, level=1, seed=2)": None,
        "f(a, b, c)": "passes 3 positional arguments",
        "f(a, mode=1)": "passes mode",
        "f(seed=1)": "leaves out prompts",
        "f(**more)": None,
    }
    for text, fault in written.items():
        call = ast.parse(text).body[0].value  # type: ignore[attr-defined]
        assert _unfit(_passed(call), [takes]) == fault, text


def _faults(project: str, recorded: dict[str, Any]) -> list[str]:
    found = []
    for call in CALLS[project]:
        passed = list(_calls(call))
        assert passed, f"{call.file} does not call {call.name}: the table is old"
        takes = [recorded["takes"][symbol] for symbol in call.symbols]
        found += [f"{call.file}: {call.name} {fault}" for each in passed if (fault := _unfit(each, takes))]
    for symbol, names in NAMES[project].items():
        found += [f"{symbol} has no {name}" for name in names if name not in recorded["names"][symbol]]
    for symbol, (file, ours) in ABSTRACT[project].items():
        (node,) = [each for each in ast.walk(_source(file)) if isinstance(each, ast.ClassDef) and each.name == ours]
        defined = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        found += [f"{ours} does not define {name}" for name in recorded["abstract"][symbol] if name not in defined]
    return found


Passed = tuple[int, set[str], bool]
"""Positional arguments, names of the others, and whether there are more that are not written out."""


def _unfit(passed: Passed, takes: list[dict[str, Any]]) -> str | None:
    num_positional, keywords, more = passed
    first = takes[0]
    if num_positional > len(first["positional"]) and not first["args"]:
        return f"passes {num_positional} positional arguments"
    known = {name for each in takes for name in (*each["positional"], *each["keyword"])}
    unknown = sorted(keywords - known)
    if unknown and not takes[-1]["kwargs"]:
        return f"passes {', '.join(unknown)}"
    missing = [name for name in first["positional"][num_positional : first["required"]] if name not in keywords]
    return f"leaves out {', '.join(missing)}" if missing and not more else None


def _passed(call: ast.Call) -> Passed:
    starred = any(isinstance(each, ast.Starred) for each in call.args)
    keywords = {each.arg for each in call.keywords if each.arg is not None}
    return len(call.args) - starred, keywords, starred or len(keywords) < len(call.keywords)


def _calls(call: Call) -> Iterator[Passed]:
    tree: ast.AST = _source(call.file)
    name, _, is_super = call.name.partition(":")
    if not is_super:
        yield from (_passed(each) for each in ast.walk(tree) if isinstance(each, ast.Call) and _name(each) == name)
        return
    (node,) = [each for each in ast.walk(tree) if isinstance(each, ast.ClassDef) and each.name == name]
    more = set(_later_keywords(node.body))
    for each in ast.walk(node):
        if isinstance(each, ast.Call) and ast.unparse(each.func) == "super().__init__":
            num_positional, keywords, starred = _passed(each)
            yield num_positional, keywords | more, starred


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _later_keywords(body: list[ast.stmt]) -> Iterator[str]:
    """Of `extra_kwargs[...] = ...`, in the branches that this release of Transformer Engine takes."""
    for node in body:
        if isinstance(node, ast.If):
            taken = _is_taken(node.test)
            yield from _later_keywords([*(node.body if taken else []), *(node.orelse if taken is not True else [])])
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "extra_kwargs":
                    assert isinstance(target.slice, ast.Constant)
                    yield str(target.slice.value)
        elif isinstance(node, ast.FunctionDef | ast.With | ast.For):
            yield from _later_keywords(node.body)


def _is_taken(test: ast.expr) -> bool | str:
    """Of a branch for a release: whether it is this one's; of any other: "maybe"."""
    text = ast.unparse(test)
    wanted = text.partition('"')[2] if '"' in text else text.partition("'")[2]
    version = tuple(int(part) for part in wanted.split(".")[:3] if part.isdigit())
    if text.startswith("is_te_min_version("):
        return version <= TE_VERSION
    if text.startswith("get_te_version() <"):
        return version > TE_VERSION
    return "maybe"


def _source(file: str) -> ast.Module:
    folder = ROOT / "megatron_papo"
    if file.startswith("megatron/"):
        site = _site("megatron")
        assert site is not None
        folder = site
    return ast.parse((folder / file).read_text())
