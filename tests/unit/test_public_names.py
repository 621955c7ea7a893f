"""What tests may import: public names of the project alone, and the benchmarks only where they are what is tested.

A test that reaches a private name holds the way that something is written and not what it does.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("megatron_papo", "benchmarks", "tools", "examples")
MAY_IMPORT_BENCHMARKS = ("tests/benchmarks/", "tests/gpu/test_fp8.py")
"""The tests of the benchmarks; and one that runs on a GPU what the GPU check measures there."""


def faults_of(place: str, source: str) -> Iterator[str]:
    """What the file `place` with this text imports or reads, and should not: one line each."""
    tree = ast.parse(source)
    modules: set[str] = set()
    """Names in this file that may be modules of the project."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [each.name for each in node.names]
        origins = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        ours = [origin for origin in origins if origin.partition(".")[0] in OURS]
        if any(origin.startswith("benchmarks") for origin in ours) and not place.startswith(MAY_IMPORT_BENCHMARKS):
            yield f"{place}:{node.lineno} imports {ours[0]}"
        if ours:
            modules |= {each.asname or each.name for each in node.names}
            private = {name for name in (*origins, *names) if any(map(_is_private, name.split(".")))}
            yield from (f"{place}:{node.lineno} imports the private {name}" for name in sorted(private))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and ast.unparse(node.value) in modules:
            yield f"{place}:{node.lineno} reads the private {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _names_private(node.value):
            yield f"{place}:{node.lineno} names the private {node.value}"


def _names_private(text: str) -> bool:
    return text.startswith("megatron_papo.") and " " not in text and any(map(_is_private, text.split(".")))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_tests_import_public_names_alone():
    files = sorted((ROOT / "tests").rglob("*.py"))
    faults = [fault for file in files for fault in faults_of(file.relative_to(ROOT).as_posix(), file.read_text())]
    assert not faults, "\n".join(faults)


def test_every_way_to_a_private_name_is_seen():
    for source in (
        "from megatron_papo.train import _look",
        "import megatron_papo._train",
        "from megatron_papo import train\ntrain._look()",
        "patch('megatron_papo.train._look')",
        "def test():\n    from benchmarks.rows import Row",
    ):
        assert len(list(faults_of("tests/unit/test_x.py", source))) == 1, source
    for source in ("from torch import _C", "from megatron_papo.train import main\nmain().x._look", "from a import b"):
        assert not list(faults_of("tests/unit/test_x.py", source)), source
    assert not list(faults_of("tests/benchmarks/test_x.py", "from benchmarks.rows import Row"))
