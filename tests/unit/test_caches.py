"""Where libraries keep their caches: under HOME, or among temporary files where nothing can be written there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_papo.runtime.caches import caches_that_can_be_written


@pytest.mark.parametrize("home", ["/proc", "/dev/null", "{tmp}/file/below"])
def test_a_home_that_takes_nothing_is_left_alone(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", home.format(tmp=tmp_path))
    environ = {"VLLM_CACHE_ROOT": "/mine"}
    with caches_that_can_be_written(environ) as folder:
        assert folder is not None and folder.is_dir()
        assert environ["HF_DATASETS_CACHE"].startswith(f"{folder}/") and environ["VLLM_CACHE_ROOT"] == "/mine"
    assert not folder.exists() and environ == {"VLLM_CACHE_ROOT": "/mine"}


def test_a_home_that_can_be_written_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    environ: dict[str, str] = {}
    with caches_that_can_be_written(environ) as folder:
        assert folder is None and environ == {}
    with caches_that_can_be_written({"XDG_CACHE_HOME": "/proc/x"}) as folder:
        assert folder is not None
