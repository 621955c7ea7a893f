"""`papo export`: a run's checkpoint as a Hugging Face folder, and that folder through the hub's own client to a server
here that answers as the hub does for small files."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_papo.checkpoint.state_file import read_state_file, write_state_tree
from megatron_papo.conversion.export import ExportRequest, export
from tests.support import commands
from tests.support.commands import papo
from tests.support.tiny import make_tiny_folder

TOOL = Path(__file__).parents[2] / "tools/convert_checkpoint.py"
TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """The five requests by which the client uploads small files; what was committed, by repository."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.committed: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.fails_at_commit = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        self._answer(200, {"name": "me", "type": "user", "id": "1", "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            self.server.private[name] = wanted.get("private", wanted.get("visibility") == "private")
            return self._answer(200, {"url": f"{self.server.address}/{name}", "id": name, "name": name})
        _, _, _, owner, name, verb, *_ = self.path.split("/")
        if verb == "preupload":
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return self._answer(200, {"files": [each | {"shouldIgnore": False} for each in files]})
        if self.server.fails_at_commit:
            return self._answer(403, {"error": "storage limit reached"})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        self.server.committed[f"{owner}/{name}"] = files
        url = f"{self.server.address}/{owner}/{name}"
        self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": f"{url}/commit/1", "hookOutput": ""})

    def _answer(self, status: int, tree: dict[str, Any]) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run with the checkpoints of steps 1 and 2; that of step 1 is the best. They are of different families, which a
    run's never are, so that one run shows the export of both."""
    folder = tmp_path_factory.mktemp("run")
    for step, metric, family in ((1, 0.5, "qwen2_5_vl"), (2, 0.25, "qwen3_vl")):
        source = make_tiny_folder(folder / f"model_{step}", family=family, seed=step)
        target = folder / f"run/checkpoints/step_{step:08d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        done = commands.run(TOOL, "hf-to-megatron", source, target)
        assert done.returncode == 0, done.stderr
        state = {key: value for key, value in read_state_file(target).items() if key not in ("xxh3", "checksums")}
        write_state_tree(target, {**state, "step": step, "serial": step, "metric": metric})
    return folder / "run"


def _same_weights(folder: Path, source: Path) -> bool:
    wanted, written = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    return wanted.keys() == written.keys() and all(
        torch.equal(tensor, written[name]) for name, tensor in wanted.items()
    )


def test_the_newest_the_best_and_a_steps_checkpoint(run_dir, tmp_path):
    for options, step in (((), 2), (("--best",), 1), (("--step", 1, "--out", tmp_path / "own"), 1)):
        done = papo("export", run_dir, *options)
        folder = tmp_path / "own" if "--out" in options else run_dir / f"exports/step_{step:08d}"
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"wrote {folder}"), done.stderr
        source = run_dir.parent / f"model_{step}"
        assert _same_weights(folder, source)
        assert {file.name for file in folder.iterdir()} == {file.name for file in source.iterdir()} | {"manifest.json"}
    done = papo("export", run_dir / "checkpoints/step_00000002", "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert done.returncode == 0 and json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("source", "options", "line"),
    [
        ("none", {}, "{root}/none: no such folder"),
        (".", {}, "{root}/.: neither a checkpoint nor the folder of a run that has one"),
        ("run", {"step": 7}, "--step: {root}/run has no checkpoint of step 7, has 1, 2"),
        (
            "run/checkpoints/step_00000001",
            {"best": True},
            "--best, --step: {root}/run/checkpoints/step_00000001 is one ",
        ),
        ("model_1", {}, "{root}/model_1 is a Hugging Face folder already: nothing to write without --push"),
        ("model_1", {"out": Path("y")}, "--out: {root}/model_1 is a Hugging Face folder already"),
        ("model_1", {"push": "a/b/c"}, "--push: "),
    ],
)
def test_what_cannot_be_exported_is_said(run_dir, source, options, line):
    root = run_dir.parent
    with pytest.raises(ValueError) as refused:
        export(ExportRequest(Path(f"{root}/{source}"), **options))
    assert str(refused.value).startswith(line.format(root=root).replace("/.", ""))


def _push(hub: Hub, *words: object, **environ: str) -> Any:
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return papo("export", *words, environ={**os.environ, **own, **environ})


def test_a_folder_goes_to_the_hub(run_dir, hub, tmp_path):
    checkpoint = run_dir / "checkpoints/step_00000002"
    done = _push(hub, checkpoint, "--out", tmp_path / "out", "--push", "me/papo-tiny")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"papo: uploaded to {hub.address}/me/papo-tiny")
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert hub.committed["me/papo-tiny"] == written and hub.private["me/papo-tiny"]
    done = _push(hub, tmp_path / "out", "--push", "team/papo-tiny", "--public")
    assert done.returncode == 0 and hub.committed["team/papo-tiny"] == written and not hub.private["team/papo-tiny"]


def test_a_hub_that_refuses_is_one_line_and_the_folder_stays(run_dir, hub, tmp_path):
    out = tmp_path / "out"
    for environ, reason in (
        ({"HF_TOKEN": "hf_wrong"}, f"--push: the hub at {hub.address}: "),
        ({"HF_TOKEN": "", "HF_HOME": str(tmp_path)}, "--push: no token for the hub: set HF_TOKEN"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "--push: the hub at http://127.0.0.1:9: "),
    ):
        done = _push(hub, run_dir, "--out", out, "--push", "me/refused", **environ)
        assert done.returncode == 2 and done.stderr.startswith(f"papo: error: {reason}"), done.stderr
        assert len(done.stderr.splitlines()) == 1 and not out.exists(), "before anything is converted"
        assert "hf_wrong" not in done.stderr
    hub.fails_at_commit = True
    try:
        done = _push(hub, run_dir, "--out", out, "--push", "me/refused")
    finally:
        hub.fails_at_commit = False
    assert done.returncode == 2 and "storage limit reached" in done.stderr.splitlines()[-1], done.stderr
    assert (out / "model.safetensors").exists(), "the same command goes on with the upload"
    shutil.rmtree(out)
