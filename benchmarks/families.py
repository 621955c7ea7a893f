"""Tokens a second of one optimizer update of each model family, against PAPO in plain PyTorch on the same weights.

The models have the same widths and depths (`benchmarks/models.py`), the prompts the same tokens and image tokens. fp32,
one thread, all sides in turns within one process; log-probs and one update of each side are compared first. The two
families differ by their own work: patches of 16 pixels instead of 14, attention over whole frames instead of windows,
levels of DeepStack, norms of queries and keys.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.agreement import check_logprobs, check_updates
from benchmarks.models import TOWERS, write_model
from benchmarks.ours import Ours, beside, open_ours
from benchmarks.plain_papo import PlainPapo
from benchmarks.rollouts import Workload, make_groups, num_tokens
from benchmarks.rows import Row
from benchmarks.timing import Seconds, measure

WORKLOAD, QUICK_WORKLOAD = Workload(600, 64), Workload(96, 16, num_prompts=2, group_size=4)
CHECKED = Workload(100, 32, num_images=2, num_prompts=2, group_size=4, uneven=True)
KIND = "PAPO joint"
PLAIN_SEQUENCES = 2
"""Rollouts of a forward pass of the plain side, as in `update.py`."""


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    """Agreement first, then each family against its plain side, and the families beside each other. Raises SidesDiffer
    before anything is timed."""
    workload = QUICK_WORKLOAD if quick else WORKLOAD
    with tempfile.TemporaryDirectory() as name:
        folders = {family: Path(name) / family for family in TOWERS}
        for family, folder in folders.items():
            write_model(folder / "model", family=family)
        first, *others = folders
        with open_ours(folders[first]) as ours:
            models = {first: ours} | {family: beside(ours, folders[family]) for family in others}
            plains = {family: PlainPapo.from_folder(folder, PLAIN_SEQUENCES) for family, folder in folders.items()}
            rows = [row for family in models for row in _agreement(family, models[family], plains[family])]
            groups = {family: make_groups(workload, model.run.processor) for family, model in models.items()}
            sides: dict[str, Callable[[], object]] = {}
            for family in models:
                sides[family] = partial(models[family].update, KIND, groups[family])
                sides[f"{family}, plain"] = partial(plains[family].update, KIND, groups[family])
            for update in sides.values():
                update()  # to warm up
            seconds = measure(sides, rounds or (1 if quick else 5), workload.name)
            return rows + _rows(seconds, workload, num_tokens(groups[first]))


def _agreement(family: str, ours: Ours, plain: PlainPapo) -> list[Row]:
    groups = make_groups(CHECKED, ours.run.processor)
    found = check_logprobs(ours, plain, None, groups) + check_updates(ours, plain, None, groups)
    return [Row(f"{family}: {row.name}", row.value, row.baseline, row.ratio, row.unit) for row in found]


def _rows(seconds: Seconds, workload: Workload, tokens: int) -> list[Row]:
    first, *others = TOWERS
    rows = []
    for family in TOWERS:
        name = f"{workload.name}: {KIND}, {family} / plain"
        rows += seconds.rows(name, family, f"{family}, plain", tokens)
    for family in others:
        rows += seconds.rows(f"{workload.name}: {KIND}, {family} / {first}", family, first, tokens)
    return rows
