"""Runs and conversions of older versions of this package are still of use: today's code resumes the one and proves
the other.

`tests/data/old_runs/DATE.tar.xz` holds what the code of that day wrote: `run/`, the folder of a run that was stopped
after two steps, with a checkpoint that has an optimizer; `continued.jsonl`, the metrics of the next two steps;
`converted/`, a Hugging Face folder as a checkpoint in bfloat16, with its manifest. The rows and the first weights of
the runs are those of `_inputs`, which are drawn anew: they have been the same since.

Both `continued.jsonl` are of the code of 2026-11-30, which resumed both runs. The run of 2026-11-25 had other numbers
when the code of its own day continued it: what is drawn for a rollout has depended on the visit of its row since then.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest

from megatron_papo.conversion.run_conversion import ConversionRequest, perform
from megatron_papo.conversion.workers import Workers
from tests.support.commands import papo
from tests.support.tiny_run import make_inputs, metrics

ARCHIVES = sorted(Path(__file__).parents[1].glob("data/old_runs/*.tar.xz"))
MEMORY_BYTES = 2 * 2**30


def _inputs(folder: Path) -> Path:
    """The smallest model there is, so that a checkpoint with an optimizer takes few bytes."""
    return make_inputs(
        folder, hidden=16, layers=1, heads=2, kv_heads=1, vision_depth=1, vision_hidden=8, vision_heads=1,
        vision_intermediate=8, vocab=264,
    )  # fmt: skip


@pytest.fixture(params=ARCHIVES, ids=[file.name.removesuffix(".tar.xz") for file in ARCHIVES])
def old(request, tmp_path: Path) -> Path:
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def _steps(lines: list[dict]) -> dict[int, dict]:
    return {line["step"]: line for line in lines}


def test_an_old_run_goes_on_with_the_same_numbers(old):
    """Within rounding, so that any machine may run this test; the machine that wrote the archives finds the same bits.

    Metrics may have been added or left out since; those that both know are compared.
    """
    _inputs(old / "inputs")
    (old / "steps.yaml").write_text((old / "run/config.yaml").read_text())
    resumed = papo(
        "train", "steps.yaml", "--ranks=1", "train.steps=4", "certify.at_start=false", "certify.after_hand_over=false",
        "reward.function=tests.support.tiny_run:share_of_even_bytes", cwd=old,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed from run/checkpoints/step_00000002, step 2" in resumed.stdout + resumed.stderr
    today = _steps(metrics(old / "run"))
    assert sorted(today) == [0, 1, 2, 3]
    (old / "metrics.jsonl").write_text((old / "continued.jsonl").read_text())
    for step, then in _steps(metrics(old)).items():
        both = then.keys() & today[step].keys()
        assert {"reward", "loss/total", "optim/grad_norm", "perception_kl", "ratio", "entropy"} <= both
        wrong = {
            name: (then[name], today[step][name])
            for name in both
            if not math.isclose(then[name], today[step][name], rel_tol=2e-4, abs_tol=2e-5)
        }
        assert not wrong, f"step {step}"


def test_an_old_conversion_is_proved_and_an_old_checkpoint_is_converted(old, capsys):
    def tool(verb: str, first: Path, second: Path | None = None) -> str:
        assert perform(ConversionRequest(verb, first, second, MEMORY_BYTES), Workers()) == 0  # type: ignore[arg-type]
        return capsys.readouterr().out

    assert "59 hashes hold" in tool("verify", old / "converted")
    checkpoint, exported = old / "run/checkpoints/step_00000002", old / "exported"
    tool("megatron-to-hf", checkpoint, exported)
    assert "the same, bit for bit" in tool("verify", exported, checkpoint)
    assert json.loads((exported / "manifest.json").read_text())["casts"] == []
