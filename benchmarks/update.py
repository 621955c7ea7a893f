"""Tokens a second of one optimizer update: our GRPO and PAPO, TRL's GRPO, and PAPO in plain PyTorch.

4 prompts x 8 rollouts, the same weights and batches, fp32, one thread, in turns within one process. The rollouts are
given and masked pictures are made beforehand, so the time is that of packing, scoring, forward, backward and optimizer;
TRL's padding comes free. The frozen branch includes its scoring pass. TRL's micro-batches are of the size that suits
it best, as one workload shows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.agreement import check_logprobs, check_updates
from benchmarks.floor import flops_per_s, update_flops
from benchmarks.models import write_model
from benchmarks.ours import KINDS, Ours, open_ours
from benchmarks.plain_papo import PlainPapo
from benchmarks.rollouts import Workload, make_groups, num_tokens
from benchmarks.rows import Row
from benchmarks.timing import Seconds, measure
from benchmarks.trl_grpo import Trl, Variant, given_rollouts
from megatron_papo.types import Group

WORKLOADS = (
    *(Workload(prompt, response) for response in (64, 256) for prompt in (150, 600, 1200)),
    Workload(600, 256, uneven=True),
)
QUICK_WORKLOADS = (Workload(96, 16, num_prompts=2, group_size=4),)
CHECKED = Workload(100, 32, num_images=2, num_prompts=2, group_size=4, uneven=True)
"""The workload on which the sides must agree first, with padding, several pictures and several micro-batches."""
TIMED_VARIANTS = (Variant(2),)
"""The variant of TRL that is measured in every round; the others are timed on one workload."""
OTHER_VARIANTS = (
    Variant(1), Variant(4), Variant(8), Variant(16), Variant(32),
    Variant(8, checkpointing=True), Variant(8, every_logit=True),
)  # fmt: skip
VARIANTS_AT = Workload(600, 64)
PLAIN_AT = (Workload(600, 64), *QUICK_WORKLOADS)
PLAIN_SEQUENCES = 2
"""Rollouts of a forward pass of the plain side; 2 are as fast as 8 and faster than 32 at 600 tokens."""


def run(quick: bool, rounds: int | None = None) -> list[Row]:
    """The table: agreement first, then every workload. Raises SidesDiffer before anything is timed."""
    rounds = rounds or (1 if quick else 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        with open_ours(folder) as ours:
            plain = PlainPapo.from_folder(folder, PLAIN_SEQUENCES)
            rows = _check(ours, plain, folder)
            for workload in QUICK_WORKLOADS if quick else WORKLOADS:
                rows += _workload(ours, plain, folder, workload, rounds)
            return rows


def _check(ours: Ours, plain: PlainPapo, folder: Path) -> list[Row]:
    groups = make_groups(CHECKED, ours.run.processor)
    trl = _trl(folder, Variant(2), CHECKED)
    return check_logprobs(ours, plain, trl, groups) + check_updates(ours, plain, trl, groups)


def _workload(ours: Ours, plain: PlainPapo, folder: Path, workload: Workload, rounds: int) -> list[Row]:
    groups = make_groups(workload, ours.run.processor)
    trls = [_trl(folder, variant, workload) for variant in TIMED_VARIANTS]
    for side in (ours, plain):
        side.reset()
    check_logprobs(ours, plain, trls[0], groups)  # this also warms them up
    sides: dict[str, Callable[[], object]] = {kind: partial(ours.update, kind, groups) for kind in KINDS}
    sides |= _trl_sides(ours, groups, trls)
    if workload in PLAIN_AT:
        sides |= {f"plain {kind}": partial(plain.update, kind, groups) for kind in KINDS if kind != "GRPO"}
    seconds = measure(sides, rounds, workload.name)
    rows = _rows(seconds, workload, num_tokens(groups))
    rows += [_floor(seconds, workload, kind, update_flops(groups, kind, ours.run.shape)) for kind in KINDS]
    return rows + (_variants(ours, folder, groups) if workload == VARIANTS_AT else [])


def _rows(seconds: Seconds, workload: Workload, tokens: int) -> list[Row]:
    trl = min((side for side in seconds.of if side.startswith("TRL")), key=seconds.median)
    rows = []
    for kind in KINDS:
        rows += seconds.rows(f"{workload.name}: {kind} / {trl}, GRPO", kind, trl, tokens)
    for kind in KINDS:
        if f"plain {kind}" in seconds.of:
            rows += seconds.rows(f"{workload.name}: {kind} / plain {kind}", kind, f"plain {kind}", tokens)
    return rows


def _floor(seconds: Seconds, workload: Workload, kind: str, flops: int) -> Row:
    own, floor = seconds.median(kind), flops / flops_per_s()
    return Row(f"{workload.name}: {kind} / its arithmetic at the speed of a product", own, floor, own / floor, "s")


def _variants(ours: Ours, folder: Path, groups: list[Group]) -> list[Row]:
    """Rows of TRL's variants against its fastest one, which is why that one is the baseline."""
    trls = [_trl(folder, variant, VARIANTS_AT) for variant in (*TIMED_VARIANTS, *OTHER_VARIANTS)]
    seconds = measure(_trl_sides(ours, groups, trls), 1, f"{VARIANTS_AT.name}, TRL's variants")
    best, tokens = seconds.fastest(), num_tokens(groups)
    name = f"{VARIANTS_AT.name}: {{}} / fastest TRL"
    return [seconds.rows(name.format(side), side, best, tokens)[0] for side in seconds.of]


def _trl_sides(ours: Ours, groups: list[Group], trls: list[Trl]) -> dict[str, Callable[[], object]]:
    given = given_rollouts(groups, ours.run.shape.image_token_id, ours.run.processor.tokenizer.pad_token_id)
    return {f"TRL ({trl.variant.name})": partial(trl.update, given) for trl in trls}


def _trl(folder: Path, variant: Variant, workload: Workload) -> Trl:
    return Trl(
        folder,
        variant,
        batch_size=workload.num_prompts * workload.group_size,
        group_size=workload.group_size,
        max_response_tokens=workload.response_tokens,
    )
