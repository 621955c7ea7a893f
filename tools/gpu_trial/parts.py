"""Parts of the GPU check one after another, within a time for all of them: `tools/benchmark.py gpu`, with its results
in one folder.

    python3 tools/gpu_trial/parts.py OUT SECONDS PART[=LIMIT][:quick]...      in the project's root

A part for which less than a third of its limit is left does not start. OUT/rows.json has each row as soon as it is
made, OUT/tables.txt and OUT/benchmarks.md (the project's page with the new tables) each part. The variable ROUNDS: how
often every side is measured, by default three times; SHAPE: of the model, by default 3b (4b is Qwen3-VL-4B).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

ROOT = Path.cwd()
_BEGAN = time.monotonic()
"""Imports take seconds of what there is."""


def main(out: Path, seconds: float, wanted: list[str]) -> int:
    """The exit code of the GPU check: 1 where a part did not come to its end or a test failed."""
    sys.path.insert(0, str(ROOT))
    import torch

    from benchmarks.gpu.command import DOCUMENT, Targets, Wanted, run
    from benchmarks.gpu.rows import Options
    from benchmarks.quiet import quieten

    quieten()
    parts = [Wanted.parse(each) for each in wanted]
    page = out / "benchmarks.md"
    if not page.exists():
        page.write_text(DOCUMENT.read_text())
    shape = os.environ.get("SHAPE", "3b" if torch.cuda.is_available() else "tiny")
    options = Options(shape, rounds=int(os.environ.get("ROUNDS", "3")))
    left = seconds - (time.monotonic() - _BEGAN)
    return run(parts, options, Targets(out / "rows.json", page, out / "tables.txt"), left)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
