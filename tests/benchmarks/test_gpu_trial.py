"""What a borrowed GPU machine runs (`tools/gpu_trial`), as far as a machine without a GPU can: packs, limits, parts,
reference values. Whether the kernels that they are held against compute, only a GPU shows."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu.command import NO_TIME
from benchmarks.gpu.document import NOT_RUN, parts_of
from megatron_papo.cli import main as papo
from megatron_papo.config import load_config
from megatron_papo.preflight.inputs import faults_of_inputs
from tests.support.commands import run
from tests.support.interpreter import PYTHON
from tools.gpu_trial import colocated, smoke_te, smoke_vllm
from tools.gpu_trial.pieces import DEVICE, Gap, Wrong, gap, report

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tools" / "gpu_trial"


@pytest.fixture
def call(tmp_path):
    """A folder as a call finds it, with a kit; runs bash in the project's root and returns what it did."""
    kit = tmp_path / "packs" / "kit"
    shutil.copytree(KIT, kit, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(PYTHON)

    def bash(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
        places = {"OUT": str(tmp_path / "out"), "GPU_PACKS": str(tmp_path / "unpacked"), "KIT": str(kit)}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "-c", script], cwd=ROOT, env=os.environ | places | path | environ, capture_output=True, text=True
        )

    return bash


def _pack(kit: Path, pack: str, folder: str, files: dict[str, bytes]) -> dict[str, dict]:
    """One shard of `files` in the folder that travels; its entry in the manifest."""
    name = f"{len(files)}.tar.xz"
    place = kit.parent / folder / name
    place.parent.mkdir(exist_ok=True)
    with tarfile.open(place, "w:xz") as archive:
        for file, data in files.items():
            member = tarfile.TarInfo(file)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    digest = hashlib.sha256(place.read_bytes()).hexdigest()
    return {name: {"folder": folder, "sha256": digest, "unpacked": sum(map(len, files.values()))}}


def test_a_whole_pack_is_unpacked_once_and_an_incomplete_one_waits_for_the_rest(tmp_path, call):
    kit = tmp_path / "packs" / "kit"
    library = b"\x7fELF" + bytes(3 * 2**20) + b"code" + bytes(2**20)  # with holes, one of them at its end
    base = _pack(kit, "base", "base-1", {"made_up/__init__.py": b"WORD = 'here'\n", "made_up/library.so": library})
    te = _pack(kit, "te", "te-1", {"one.py": b""}) | _pack(kit, "te", "te-2", {"two.py": b"", "three.py": b""})
    (kit / "manifest.json").write_text(json.dumps({"base": base, "te": te}))
    shutil.move(kit.parent / "te-2", tmp_path / "later")

    done = call("bash $KIT/receive.sh")
    assert done.returncode == 0, done.stderr
    assert "te is not whole: it wants te-2" in done.stdout and "unpacked 1 shards" in done.stdout
    site = tmp_path / "unpacked" / "site-base"
    assert (site / "made_up" / "library.so").read_bytes() == library
    assert (site / "made_up" / "library.so").stat().st_mode & 0o777 == 0o755
    assert list((site / "made_up" / "__pycache__").glob("__init__.*.pyc")), "compiled to bytecode"
    assert not (tmp_path / "unpacked" / "site-te").exists()

    shutil.move(tmp_path / "later", kit.parent / "te-2")
    shutil.rmtree(kit.parent / "te-1")  # came with the first call, and was kept
    script = "BUDGET=99; source $KIT/common.sh; receive base te; python3 -c 'import made_up, two; print(made_up.WORD)'"
    done = call(script)
    assert done.returncode == 0 and done.stdout.endswith("here\n"), done.stdout + done.stderr
    assert "base is there already" in done.stdout and "unpacked 2 shards" in done.stdout
    assert "received; modules from" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_shard_that_is_not_what_was_packed_ends_the_call(tmp_path, call):
    kit = tmp_path / "packs" / "kit"
    base = _pack(kit, "base", "base-1", {"one.py": b"1\n"})
    (kit / "manifest.json").write_text(json.dumps({"base": base}))
    (kit.parent / "base-1" / "1.tar.xz").write_bytes(b"cut short")
    done = call("bash $KIT/plan_a.sh")
    assert done.returncode == 3 and "1.tar.xz is not what was packed" in done.stdout
    assert "base is not whole: the call ends" in done.stdout
    assert not (tmp_path / "unpacked" / "site-base").exists()


def test_a_step_has_its_limit_and_what_is_left(tmp_path, call):
    script = """
    BUDGET=60; source $KIT/common.sh
    step good 9 echo said; step bad 9 bash -c 'exit 4'; echo "code $?"
    step late 1 bash -c 'echo began; sleep 30'; echo "code $?"
    BUDGET=$((SECONDS + 2)); step large 30 echo never; echo "code $?"
    BUDGET=$SECONDS; step none 2 echo never; echo "code $?"
    """
    done = call(script)
    assert [line for line in done.stdout.splitlines() if "code" in line] == ["code 4", "code 124", "code 9", "code 9"]
    summary = (tmp_path / "out" / "summary.txt").read_text()
    for text in ("good: ok", "bad: FAILED with 4", "late: CUT OFF after", "large: no time left", "none: no time left"):
        assert text in summary
    logs = (tmp_path / "out" / "logs.txt").read_text()
    assert "said" in logs and "began" in logs and "never" not in logs


@pytest.mark.parametrize("name", [file.name for file in sorted(KIT.glob("*.sh"))])
def test_the_shell_scripts_parse_and_name_what_is_there(name):
    text = (KIT / name).read_text()
    assert subprocess.run(["bash", "-n", KIT / name]).returncode == 0
    for word in text.replace('"', " ").split():
        if word.startswith("$kit/"):
            assert (KIT / word.removeprefix("$kit/")).is_file(), word
        if word.startswith("tests/gpu"):
            assert list(ROOT.glob(word)), word
    from benchmarks.gpu.command import Wanted

    if "parts.py" in text:
        wanted = text.partition("parts.py")[2].partition("\n\n")[0].replace("\\\n", " ").split("\n")[0].split()
        named = [Wanted.parse(word) for word in wanted if "=" in word]
        assert named and all(each.usual_s <= 150 for each in named)


def test_parts_write_rows_as_they_come_and_leave_out_what_has_no_time(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for seconds, part in ((300, "head=40:quick"), (5, "update=130")):
        done = run(KIT / "parts.py", out, seconds, part, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((out / "rows.json").read_text())
    assert [row["part"] for row in rows] == ["head"] * (len(rows) - 1) + ["update"]
    assert [row["unit"] for row in rows if row["value"]] == ["ms", "ms"] and rows[-1]["note"] == NO_TIME
    parts = parts_of((out / "benchmarks.md").read_text())
    assert "gpu --part head --shape tiny --rounds 1 --quick" in parts["head"]
    assert parts["update"] in (NOT_RUN, parts_of((ROOT / "docs" / "benchmarks.md").read_text())["update"])
    assert (out / "tables.txt").read_text().count("gpu, ") == 2
    assert not (out / "rows.json.new").exists()


def test_parts_refuse_what_there_is_not(tmp_path):
    done = run(KIT / "parts.py", tmp_path, 60, "heads=40", cwd=ROOT)
    assert done.returncode != 0 and "heads=40: there are smoke, checks, update" in done.stderr


def test_the_two_commands_beside_an_engine_are_accepted(tmp_path, capsys):
    files = colocated.write_settings(tmp_path)
    assert list(files) == ["certify", "train"]
    for verb, file in files.items():
        config = load_config(file, [])
        assert config.generation.engine == "vllm" and config.certify.at_start and config.run.dir == tmp_path / verb
        assert papo([*colocated.arguments(verb, file), "--dry-run"]) == 0
        if find_spec("vllm") is not None:
            assert faults_of_inputs(verb, config) == []
    assert capsys.readouterr().out.count("gpu_memory_fraction: 0.2") == 2


def test_the_report_has_what_was_said_and_of_each_step_what_counts(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.log").write_text("loading\npapo: certified\nmore\n")
    step = {"step": 1, "loss/total": 0.5, "certify/gap": 0.01, "unix_time": 9.0}
    (tmp_path / "train" / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (tmp_path / "certify.log").write_text("loading\n")
    colocated.write(tmp_path / "report", tmp_path, "train", 0)
    colocated.write(tmp_path / "report", tmp_path, "certify", None)
    assert (tmp_path / "report").read_text() == (
        "papo train: exit code 0\n  papo: certified\n  step 1, loss/total 0.5, certify/gap 0.01\n"
        "papo certify: CUT OFF\n  loading\n"
    )


def test_reference_values_are_torchs():
    torch.manual_seed(0)
    x, weight, bias, grad = (torch.randn(*size, dtype=torch.double) for size in ((5, 3), (4, 3), (4,), (5, 4)))
    x.requires_grad_(), weight.requires_grad_()
    F.linear(x, weight, bias).backward(grad)
    found = smoke_te.linear_expected(x.detach(), weight.detach(), bias, grad)
    for value, expected in zip(found, (F.linear(x, weight, bias), x.grad, weight.grad)):
        torch.testing.assert_close(value, expected.detach())

    q, k, v = (torch.randn(7, heads, 8) for heads in (4, 2, 2))
    for last in (7, 1):  # a whole sequence, and its last token over a cache
        whole = F.scaled_dot_product_attention(
            *(each.double().transpose(0, 1) for each in (q, k, v)), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        torch.testing.assert_close(smoke_vllm.attended(q[-last:], k, v), whole[-last:])

    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

    angles = torch.randn(7, 4).double()
    both = torch.cat((angles, angles), -1)[:, None]
    torch.testing.assert_close(
        smoke_vllm.turned(q.double(), angles), q.double() * both.cos() + rotate_half(q.double()) * both.sin()
    )
    assert gap(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]).double()) == pytest.approx(1 / 18**0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="the part smoke has it")
def test_pieces_that_are_wrong_or_missing_are_told(capsys):
    """Torch's own classes play Transformer Engine's: what is compared, and that too little and too much is seen."""

    class Linear(torch.nn.Linear):
        def __init__(self, *sizes: int, params_dtype: torch.dtype, device: str, bias: bool = True):
            super().__init__(*sizes, bias=bias, dtype=params_dtype, device=device)

    class Engine:
        @staticmethod
        def autocast(enabled: bool, recipe: object) -> object:
            return torch.no_grad() if recipe == "lost" else torch.enable_grad()

    Engine.Linear = Linear
    assert smoke_te.linear(Engine, None).value < 1e-2
    with pytest.raises(Wrong, match="this was no FP8"):
        smoke_te.linear(Engine, "a recipe")
    assert smoke_te.adam(torch.optim.AdamW).value == 0
    with pytest.raises(Wrong, match=r"allowed 1\.0e-05"):
        smoke_te.adam(torch.optim.SGD)
    with pytest.raises(Wrong):
        Gap(float("nan"), 1.0).checked()

    pieces = {"good": lambda: Gap(0.1, 0.2), "lost": lambda: smoke_te.linear(Engine, "lost")}
    assert report("a library", lambda: pieces) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("ok", "FAIL"))]
    assert lines[0].startswith("ok   a library (") and lines[1].startswith("ok   good (") and "gap 1.0e-01" in lines[1]
    assert lines[2].startswith("FAIL lost: RuntimeError")
    assert report("a library", lambda: {"good": pieces["good"]}) == 0
    assert report("nothing", lambda: __import__("no_such_library")) == 1


@pytest.mark.skipif(find_spec("vllm") is None or DEVICE == "cuda", reason="vLLM's kernels for CPUs")
def test_vllms_kernels_for_cpus_compute():
    done = run(KIT / "smoke_vllm.py", cwd=ROOT, vllm=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:4] for line in done.stdout.splitlines()].count("ok  ") == 4
