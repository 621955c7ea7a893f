"""Jobs in containers: what is mounted, where packages are looked for, and the lines by which steps are started.

No container runs here: srun and apptainer are stand-ins that write down how they were called.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_papo.cluster.mounts import container_mounts
from megatron_papo.config import Config, ConfigError, load_config
from megatron_papo.preflight.check import check_everything, packages_are_here

REPO = Path(__file__).parents[2]
IMAGE = ("cluster.environment=container", "cluster.container=lab/papo:1")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with a model in the hub's cache, data with links, and a working folder."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1"
    for folder in (
        snapshot,
        tmp_path / "hub/models--a--b/blobs",
        tmp_path / "data/sub",
        tmp_path / "store",
        tmp_path / "work",
    ):
        folder.mkdir(parents=True)
    (tmp_path / "hub/models--a--b/blobs/x").touch()
    (snapshot / "config.json").symlink_to("../../blobs/x")
    (tmp_path / "store" / "rows.parquet").touch()
    (tmp_path / "data" / "sub" / "rows.jsonl").touch()
    (tmp_path / "data" / "linked.parquet").symlink_to(tmp_path / "store" / "rows.parquet")
    return tmp_path


def mounts(disk: Path, *words: str) -> list[str]:
    config = load_config(None, [*IMAGE, *words])
    found = container_mounts(config, Path("/opt/papo"), disk / "work")
    return [word.replace(str(disk), "") for word in found]


def both(path: str, end: str = "") -> str:
    return f"{path}:{path}{end}"


def test_what_the_settings_name_is_mounted_at_the_same_path(disk: Path):
    words = (
        f"model.path={disk}/hub/models--a--b/snapshots/1",
        f"run.dir={disk}/runs/a",
        f"data.eval={disk}/data/*.parquet",
    )
    more = (f"checkpoint.reference={disk}/ref", "data.image_roots=[../pictures]", "data.train=org/name")
    found = mounts(disk, *words, *more, "cluster.mounts=['/scratch:/scratch', '/x:/y:ro']")
    automatic = {both("/data", ":ro"), both("/store", ":ro"), both("/ref", ":ro"), both("/pictures", ":ro"),
                 both("/runs/a"), both("/hub/models--a--b", ":ro")}  # fmt: skip
    assert set(found[:-2]) == automatic and found[-2:] == ["/scratch:/scratch", "/x:/y:ro"]


def test_a_folder_within_another_needs_no_mount_of_its_own(disk: Path):
    words = (
        f"model.path={disk}/data/model",
        f"data.train={disk}/data/sub/rows.jsonl",
        f"data.image_roots=[{disk}/data]",
    )
    assert mounts(disk, *words, "run.dir=runs/a") == [both("/data", ":ro"), both("/store", ":ro")]
    # a folder that is written to is mounted though it lies in one that is read, and what is read in it is there then
    words = (f"data.image_roots=[{disk}/data]", f"run.dir={disk}/data/sub", f"model.path={disk}/data/sub/model")
    assert mounts(disk, *words) == [both("/data", ":ro"), both("/store", ":ro"), both("/data/sub")]
    assert mounts(disk, f"run.dir={disk}/a/b", f"cluster.mounts=['/other:{disk}/a']") == ["/other:/a"]


def test_entries_of_a_list_of_data_sets_are_mounted_too(disk: Path):
    entries = f"[{disk}/data/sub/rows.jsonl, org/name, 'https://host/a.jsonl', {{path: {disk}/store, weight: 2}}]"
    words = ("run.dir=a", f"data.train={entries}")
    assert mounts(disk, *words) == [both("/store", ":ro"), both("/data/sub", ":ro")]
    assert mounts(disk, "run.dir=a", f"data.train={{path: {disk}/store}}") == [both("/store", ":ro")]


def test_a_path_that_no_mount_can_be_written_with_is_refused(disk: Path):
    with pytest.raises(ConfigError, match=r"^run.dir: /a,b: a container's mounts are told apart by , and :$"):
        mounts(disk, "run.dir=/a,b")


def test_a_login_node_does_not_look_for_the_packages_of_an_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    words = ["generation.engine=vllm", "reward.function=only.in_the_image:score", f"run.dir={tmp_path}/a"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr("megatron_papo.preflight.check.find_module", lambda name: None)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)

    def lacking(config: Config) -> list[str]:
        return [
            line for line in check_everything("train", config, 8).faults if "data." not in line and "model." not in line
        ]

    inside = load_config(None, [*IMAGE, *words])
    assert lacking(inside) == [] and not packages_are_here(inside)
    assert len(lacking(load_config(None, words))) > 3
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # the job's first step, within the image
    assert len(lacking(inside)) > 3


CALLED = """#!/bin/bash
[ "$1" != --help ] || { echo "  --container-image=IMAGE"; exit; }
printf '%s\\n' "$@" >"$SAID"
echo "papo: error: model.path: as the check says" >&2
exit 3
"""


@pytest.mark.parametrize("kind", ["container", "apptainer"])
def test_the_first_step_of_a_job_checks_within_the_container(tmp_path: Path, kind: str):
    (tmp_path / "bin").mkdir()
    for name in ("srun", "apptainer"):
        (tmp_path / "bin" / name).write_text(CALLED)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "settings.yaml").touch()
    environ = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SAID": str(tmp_path / "said"), "SLURM_JOB_ID": "1",
        "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "1", "PAPO_HOME": str(REPO), "PAPO_ENVIRONMENT": kind,
        "PAPO_CONFIG": str(tmp_path / "settings.yaml"), "PAPO_CONTAINER": "papo.sif", "PAPO_MOUNTS": "/data:/data:ro",
    }  # fmt: skip
    command = ["bash", "-c", f"source {REPO}/slurm/launch.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "papo: error: model.path: as the check says\n")
    words = (tmp_path / "said").read_text().splitlines()
    check = ["python3", "-m", "megatron_papo", "check", str(tmp_path / "settings.yaml")]
    first = words.index("python3")
    assert words[first : first + 5] == check
    step = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    seen = f"{REPO}:{REPO},{tmp_path}:{tmp_path},/data:/data:ro"
    if kind == "container":
        flags = ["--container-image=papo.sif", f"--container-workdir={tmp_path}", "--no-container-mount-home",
                 f"--container-mounts={seen}", "--container-env=PYTHONPATH"]  # fmt: skip
        assert words[:first] == ["--export=ALL", *flags, *step]
    else:
        within = [f"{tmp_path}/bin/apptainer", "exec", "--nv", "--no-home", "--pwd", str(tmp_path), "--bind", seen,
                  "--env", f"PYTHONPATH={REPO}", "papo.sif"]  # fmt: skip
        assert words[:first] == ["--export=ALL", *step, *within]
