"""The file of keys and tokens: who may read it, which lines it has, and that no message holds one of its values."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_papo.cluster.secrets_file import SecretsFault, fault_of_secrets, read_secrets

REPO = Path(__file__).parents[2]


def private(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(0o600)
    return path


def test_lines_are_read_and_not_run(tmp_path: Path):
    content = """
    # of the lab
    WANDB_API_KEY=abc
    export HF_TOKEN="a b"
    JUDGE_KEY='$(touch pwned); `touch pwned` "x"'
    EMPTY=
    """
    path = private(tmp_path / "secrets", content)
    expected = {
        "WANDB_API_KEY": "abc",
        "HF_TOKEN": "a b",
        "JUDGE_KEY": '$(touch pwned); `touch pwned` "x"',
        "EMPTY": "",
    }
    assert read_secrets(path) == expected
    names = " ".join(f'"${name}"' for name in expected)
    script = f'eval "$({sys.executable} -S -m megatron_papo.cluster.secrets_file {path})"; printf "%s|" {names}'
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO)}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split("|")[:-1] == list(expected.values())
    assert [each.name for each in tmp_path.iterdir()] == ["secrets"]


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("A_KEY=hidden", 0o640, "others may read it (mode 640): chmod 600 {}"),
        ("A_KEY=hidden", 0o604, "others may read it (mode 604): chmod 600 {}"),
        ("A_KEY=hidden\nhidden", 0o600, "line 2 is not NAME=value"),
        ("export A_KEY = hidden", 0o600, "line 1 is not NAME=value"),
        (b"A_KEY=\xff", 0o600, "is no text in UTF-8"),
        ("A_KEY=\0", 0o600, "is no text in UTF-8"),
        ("A_KEY=" + "x" * 70000, 0o600, "more than 64 KiB"),
    ],
)
def test_a_file_that_is_not_taken_is_one_line_without_values(tmp_path: Path, content, mode, why):
    path = private(tmp_path / "secrets", content)
    path.chmod(mode)
    with pytest.raises(SecretsFault) as refused:
        read_secrets(path)
    assert str(refused.value) == f"cluster.secrets_file: {path}: {why.format(path)}"
    assert fault_of_secrets(path) == str(refused.value)


def test_what_is_no_file_of_ones_own_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, why in (("pipe", "is no regular file"), ("gone", "No such file or directory")):
        assert fault_of_secrets(tmp_path / name) == f"cluster.secrets_file: {tmp_path / name}: {why}"
    path = private(tmp_path / "secrets", "A_KEY=hidden")
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    assert fault_of_secrets(path) == f"cluster.secrets_file: {path}: belongs to another user"
