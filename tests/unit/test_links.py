"""What pages, docstrings and comments name is there: files by their paths, pages that links lead to and their headings.

A path may begin anywhere: `losses.py` names any file of that name. `*` stands for whatever, capital letters
(`NAME.py`, `RUN/page.md`) for what the reader puts there. A path with line numbers behind it, or one that begins with
the name of another library, is that library's. The log and the changelog tell of files that are gone, so they are left
out. In docs/troubleshooting.md also settings and metrics: a remedy that names a setting which is not there is none.
"""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest
from pydantic import BaseModel

from megatron_papo.config import Config
from tests.support.metric_names import undocumented

REPOSITORY = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "docs/*.md", ".github/*.md")
SOURCES = ("Makefile", "megatron_papo/*.py", "tools/*.py", "benchmarks/*.py", "examples/*.py", "slurm/*")
OF_THE_PAST = ("docs/log.md",)
LIBRARIES = ("vllm", "megatron", "transformer_engine", "transformers")

FILE = re.compile(r"(?<![\w./*-])(?:(?:[\w*-]+/)*[\w*-]+\.py|(?:[\w*-]+/)+[\w*-]+\.md)\b(?![\w/(]|:\d)")
PLACEHOLDER = re.compile(r"[A-Z]{2,}(_[A-Z]+)*(\.\w+)?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.M)
WALK = re.compile(r"^\| `([\w/]+\.py)` \| ([^|]*) \|", re.M)
"""A step of a walk in docs/design.md: a file of the package, and functions and classes that it defines."""
FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def _texts(root: Path, *patterns: str) -> dict[str, str]:
    """Path and text of the files under `root` that git knows or would know; where there is no git, of all."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    names = listed.stdout.splitlines() or [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]
    chosen = [name for name in names if (root / name).is_file() and any(fnmatch(name, each) for each in patterns)]
    return {name: (root / name).read_text(errors="replace") for name in chosen}


def missing_files(texts: dict[str, str], files: list[str]) -> list[str]:
    """Lines of `texts` that name a file which is not among `files`."""
    endings = {"/".join(parts[start:]) for parts in (name.split("/") for name in files) for start in range(len(parts))}
    return [
        f"{name}:{number}: no file {named}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        for named in FILE.findall(line)
        if not _is_foreign(named)
        and named not in endings
        and not ("*" in named and any(fnmatch(ending, named) for ending in endings))
    ]


def _is_foreign(named: str) -> bool:
    parts = named.split("/")
    of_library = len(parts) > 1 and parts[0] in LIBRARIES
    return of_library or any(PLACEHOLDER.fullmatch(part) for part in parts)


def broken_links(texts: dict[str, str], root: Path) -> list[str]:
    """Links of `texts` that lead to no file under `root`, or to a heading that its page does not have."""
    faults = []
    for name, text in texts.items():
        for link in LINK.findall(FENCE.sub("", text)):
            target, _, heading = link.partition("#")
            if ":" in target:
                continue
            path = (root / PurePosixPath(name).parent / target) if target else root / name
            if not path.exists():
                faults.append(f"{name}: no {link}")
            elif heading and heading not in _headings(path.read_text()):
                faults.append(f"{name}: no heading {link}")
    return faults


def _headings(text: str) -> set[str]:
    """Headings of a page as links name them."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(FENCE.sub("", text)))
    return {title.strip().replace(" ", "-") for title in titles}


@pytest.fixture(scope="module")
def repository() -> dict[str, str]:
    return _texts(REPOSITORY, "*")


SETTING = re.compile(r"([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:=.*)?")
NAME = re.compile(r"[a-z_0-9]+(?:/[a-z_0-9<>]+)*")
OTHER_WORDS = {
    "dmesg", "filter", "frozen", "full", "joint", "none", "reward", "silent", "skip", "stalled", "stop",
}  # fmt: skip
"""Backticked words of the page that are values of settings, words of messages, or commands."""


def unknown_names(page: str, sources: str, settings: type[BaseModel]) -> list[str]:
    """Names in backticks that are neither settings nor metrics of docs/metrics.md nor stages that `sources` open;
    commands, paths and texts of messages are passed over."""
    stages = set(re.findall(r'clock\.stage\("(\w+)"', sources)) | OTHER_WORDS
    faults = []
    for span in re.findall(r"`([^`]+)`", FENCE.sub("", page)):
        for word in span.split() if SETTING.match(span) else [span]:
            if (setting := SETTING.fullmatch(word)) and setting[1].partition(".")[0] in settings.model_fields:
                faults += [] if _is_setting(setting[1], settings) else [f"no setting {word}"]
            elif word == span and NAME.fullmatch(word) and word not in stages and undocumented([word]):
                faults.append(f"no metric {word}")
    return faults


def _is_setting(path: str, settings: type[BaseModel]) -> bool:
    section: object = settings
    for name in path.split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel) and name in section.model_fields):
            return False
        section = section.model_fields[name].annotation
    return True


def test_settings_and_metrics_of_remedies_exist(repository: dict[str, str]):
    sources = "".join(_of(repository, "megatron_papo/*.py").values())
    assert unknown_names(repository["docs/troubleshooting.md"], sources, Config) == []
    bad = "`optim.lrr=1 loss.entropy_coef=2` `no_metric` `time/update` `time/<stage>` `update` `papo x`"
    assert unknown_names(bad, sources, Config) == ["no setting optim.lrr=1", "no metric no_metric"]


def _of(repository: dict[str, str], *patterns: str) -> dict[str, str]:
    chosen = {name: text for name, text in repository.items() if any(fnmatch(name, each) for each in patterns)}
    return {name: text for name, text in chosen.items() if name not in OF_THE_PAST}


def test_files_that_are_named_exist(repository: dict[str, str]):
    faults = missing_files(_of(repository, *PAGES, *SOURCES), list(repository))
    assert not faults, "\n".join(faults)


def test_links_lead_somewhere(repository: dict[str, str]):
    faults = broken_links(_of(repository, *PAGES), REPOSITORY)
    assert not faults, "\n".join(faults)


def test_the_index_has_every_page(repository: dict[str, str]):
    pages = {name.removeprefix("docs/") for name in _of(repository, "docs/*.md")} - {"README.md"}
    linked = {link.partition("#")[0] for link in LINK.findall(repository["docs/README.md"])}
    assert sorted(pages - linked) == []


def test_the_walks_lead_from_function_to_function(repository: dict[str, str]):
    walks = repository["docs/design.md"].split("## Four walks")[1].split("\n## ")[0]
    steps = WALK.findall(walks)
    assert len(steps) > 40
    faults = [
        f"{file}: no {name}"
        for file, names in steps
        for name in re.findall(r"`(\w+)`", names)
        if not re.search(rf"^ *(?:def|class) {name}\b", repository.get(f"megatron_papo/{file}", ""), re.M)
    ]
    assert not faults, "\n".join(faults)


def test_what_is_not_there_is_named(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/there.md").write_text("# A page: of one\n```\n# no heading\n```\n")
    page = "[a](there.md#a-page-of-one) [b](gone.md) [c](there.md#no-heading) [d](https://example.org) [e](../docs/)"
    links = broken_links({"docs/page.md": page}, tmp_path)
    assert links == ["docs/page.md: no gone.md", "docs/page.md: no heading there.md#no-heading"]
    files = ["room/losses.py", "room/test_losses.py"]
    good = "losses.py room/losses.py test_*.py vllm/envs.py gumbel.py:9 RUN/page.md room/NAME.py my.python"
    assert missing_files({"page": good}, files) == []
    bad = missing_files({"page": "\nnames.py room/l.py gone_*.py"}, files)
    assert bad == ["page:2: no file names.py", "page:2: no file room/l.py", "page:2: no file gone_*.py"]
