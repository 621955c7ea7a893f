"""tools/convert_checkpoint.py as a user runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.ranks import run_ranks
from tests.tiny import make_tiny_folder

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def _tool(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def _spoilt(source: Path, target: Path, name: str, change) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _main(folder: str, *calls: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """On a rank, where torch is imported already: exit status, output and errors of each call of the tool."""
    os.chdir(folder)
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found = []
    for call in calls:
        sys.argv = [str(TOOL), *call]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            status = tool.main()
        found.append((status, out.getvalue(), errors.getvalue()))
    return found


def test_there_and_back_and_verified(tmp_path):
    source = make_tiny_folder(tmp_path / "hf", vision_intermediate=42, vocab=275)
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, source / "model.safetensors")

    wrote = _tool("hf-to-megatron", "hf", "checkpoint", cwd=tmp_path)
    assert (wrote.returncode, wrote.stdout.splitlines()[-1]) == (0, "wrote checkpoint"), wrote.stderr
    assert "hf-to-megatron" in wrote.stdout and "43/43" in wrote.stdout, "progress is shown"

    name = "model.layers.1.self_attn.k_proj.weight"
    _spoilt(source, tmp_path / "other", name, lambda tensor: tensor.index_fill(0, torch.tensor([3]), 9.0))
    ((back, same, differs),) = run_ranks(
        _main, 1, str(tmp_path),
        ("megatron-to-hf", "checkpoint", "again"), ("verify", "again", "checkpoint"), ("verify", "checkpoint", "other"),
    )  # fmt: skip
    assert back[0] == 0, back[2]
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert {f.name for f in (tmp_path / "again").iterdir()} == {f.name for f in source.iterdir()}
    for name_, tensor in tensors.items():
        assert again[name_].dtype == torch.bfloat16
        assert torch.equal(again[name_], tensor.bfloat16()), name_
    assert (same[0], same[1].splitlines()[-1]) == (0, "the same, bit for bit")
    assert differs[0] == 1
    assert differs[1].splitlines()[-1].startswith(f"{name}: 64 of 2048 values differ, by at most 9"), differs[1]


def test_what_cannot_be_read_is_named(tmp_path):
    source = make_tiny_folder(tmp_path / "hf")
    _spoilt(source, tmp_path / "bad", "visual.merger.ln_q.weight", lambda tensor: tensor[:-1].clone())
    (found,) = run_ranks(
        _main, 1, str(tmp_path),
        ("hf-to-megatron", "bad", "out"), ("verify", "hf", "bad"), ("megatron-to-hf", "hf", "out"),
        ("hf-to-megatron", "nowhere", "out"),
    )  # fmt: skip
    assert [status for status, _, _ in found] == [2, 2, 2, 2]
    for _, _, errors in found[:2]:
        assert "model.safetensors: visual.merger.ln_q.weight: expected shape (32,), found (31,)" in errors
    assert "hf/state.json: no such file: not a checkpoint of this package" in found[2][2]
    assert "nowhere/config.json: no such file" in found[3][2]
    assert not (tmp_path / "out").exists()


def test_help_does_not_wait_for_torch(tmp_path):
    began = os.times().children_user
    shown = _tool("--help", cwd=tmp_path)
    spent = os.times().children_user - began
    assert shown.returncode == 0 and "megatron-to-hf" in shown.stdout
    assert spent < 1.0, f"{spent:.2f} s of processor time"
