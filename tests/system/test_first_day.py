"""docs/first_day.md as it is typed: every command of its code blocks that this machine can run, in order, with the
small model in place of 7B."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support import commands

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/first_day.md").read_text()
BLOCKS = [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S) if not kind]
SMALL = " ".join(next(block for block in BLOCKS if block.startswith("model.path=models/small")).split())
ELSEWHERE = "python tools/submit_slurm.py"
"""What needs a cluster; tests/system/test_submit.py submits jobs."""


def typed() -> list[str]:
    """The commands of the page, without outputs."""
    lines = [line for block in BLOCKS for line in block.splitlines()]
    return [line for line in lines if line.startswith(("papo ", "python ")) and not line.startswith(ELSEWHERE)]


def test_the_settings_of_the_page_are_those_of_the_file():
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    file = (ROOT / "examples/first_day/own_run.yaml").read_text()
    for line in filter(None, shown.splitlines()):
        assert line in file, line


@pytest.mark.slow
def test_the_walk_as_typed(tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    lines = typed()
    model = next(line for line in lines if "make_model.py" in line)
    for line in [model, *(line for line in lines if line != model)]:
        program, *words = line.split()
        argv = ["-m", "megatron_papo", *words] if program == "papo" else words
        if program == "papo" and words[0] not in ("doctor", "export"):
            argv += [word for word in SMALL.split() if "--model" not in words or not word.startswith("model.path")]
        done = commands.run(*argv, cwd=tmp_path, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    steps = [json.loads(line) for line in (tmp_path / "runs/first_day/metrics.jsonl").read_text().splitlines()]
    trained = next(step for step in steps if step["step"] == 0)
    assert {"reward/close", "source/few/reward", "source/many/reward"} <= trained.keys()
    assert (tmp_path / "runs/first_day/exports").is_dir() and (tmp_path / "runs/first_day/data.html").is_file()
