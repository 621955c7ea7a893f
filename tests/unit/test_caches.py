"""Where libraries keep their caches: under HOME, or among temporary files where nothing can be written there."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from megatron_papo.config import ConfigError, load_config
from megatron_papo.preflight.shared_memory import warnings_of_shared_memory
from megatron_papo.runtime.caches import caches_that_can_be_written, use_own_folders


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


def test_caches_lie_where_the_settings_say_kernels_by_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.chdir(tmp_path)
    environ = {"WANDB_CACHE_DIR": "/mine"}
    use_own_folders(load_config(None, ["run.cache_dir=caches"]).run, environ)
    assert environ["HF_HUB_CACHE"] == f"{tmp_path}/caches/hub" and environ["WANDB_CACHE_DIR"] == "/mine"
    assert environ["TRITON_CACHE_DIR"] == f"{tmp_path}/caches/nodes/{socket.gethostname()}/triton"
    assert not {"HF_HOME", "HF_HUB_OFFLINE", "TMPDIR"} & environ.keys()
    with caches_that_can_be_written(environ) as folder:
        assert folder is None, "every library has its place"


def test_offline_and_temporary_files_as_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", "/found/before")
    environ = {"HF_HUB_OFFLINE": "0"}
    use_own_folders(load_config(None, ["run.offline=true", "run.tmp_dir=/tmp/papo_test_tmp"]).run, environ)
    assert environ["HF_HUB_OFFLINE"] == environ["TRANSFORMERS_OFFLINE"] == environ["HF_DATASETS_OFFLINE"] == "1"
    assert environ["WANDB_MODE"] == "offline" and environ["TMPDIR"] == "/tmp/papo_test_tmp"
    assert tempfile.tempdir is None
    Path("/tmp/papo_test_tmp").rmdir()
    with pytest.raises(ConfigError, match=r"^run.tmp_dir: /proc/x: No such file or directory$"):
        use_own_folders(load_config(None, ["run.tmp_dir=/proc/x"]).run, {})
    for words, why in (
        ([f"run.tmp_dir=/{'n' * 70}"], "longer than 70 letters, sockets find no room"),
        (["run.offline=true", "observe.wandb=online"], "observe.wandb=online needs a network"),
    ):
        with pytest.raises(ConfigError, match=why):
            load_config(None, words)


def test_little_shared_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (line,) = warnings_of_shared_memory(tmp_path / "gone")
    assert line == f"{tmp_path}/gone: No such file or directory: ranks on one machine exchange values by it"
    for mib, said in ((64, "/dev/shm: 0.06 GiB are free, NCCL and vLLM may need 1: "), (4096, None)):
        monkeypatch.setattr("os.statvfs", lambda path, mib=mib: type("", (), {"f_bavail": mib * 256, "f_frsize": 4096}))
        assert [line.startswith(said or "") for line in warnings_of_shared_memory()] == ([True] if said else [])
