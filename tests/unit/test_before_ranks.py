"""What `papo check` says of the model folder's files, of the disk, and of the hub and wandb, asked on this machine."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import constants

from megatron_papo.config import Config, load_config
from megatron_papo.costs.memory import checkpoint_bytes
from megatron_papo.model.published_shapes import shape_named
from megatron_papo.model.shape import ModelShape
from megatron_papo.preflight import network
from megatron_papo.preflight.disk import disk_need, faults_of_disk
from megatron_papo.preflight.inputs import faults_of_inputs
from megatron_papo.preflight.model_files import fault_of_missing_model, fault_of_processor, faults_of_model_files
from megatron_papo.preflight.network import ask_network, is_hub_name
from tests.support.tiny import tiny_config

HEADER = json.dumps({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
SHARD = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    "preprocessor_config.json": b"{}",
    "model-1.safetensors": SHARD,
    "model-2.safetensors": SHARD,
    "model.safetensors.index.json": json.dumps(
        {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    ).encode(),
}


FAMILIES = {
    "Qwen2.5-VL": ("qwen2_5_vl", {"patch_size": 14, "merge_size": 2, "processor_class": "Qwen2_5_VLProcessor"}),
    "Qwen3-VL": ("qwen3_vl", {"patch_size": 16, "merge_size": 2, "processor_class": "Qwen3VLProcessor"}),
}
"""The keys of preprocessor_config.json as the published folders have them."""


def write_rows(rows: Dataset, file: Path) -> None:
    kinds = {".csv": rows.to_csv, ".parquet": rows.to_parquet, ".jsonl": rows.to_json}
    if file.suffix == ".json":
        file.write_text(json.dumps(rows.to_list(), indent=1))
    else:
        kinds[file.suffix](file)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def of(folder: Path, *words: str) -> list[str]:
    faults = faults_of_model_files("train", load_config(None, [f"model.path={folder}", *words]))
    return [fault.replace(f"{folder}/", "").replace(str(folder), "FOLDER") for fault in faults]


def test_a_whole_folder_has_no_fault(folder):
    assert of(folder) == []
    (folder / "tokenizer_config.json").write_text("{}")
    assert of(folder) == [
        "model.path: FOLDER: lacks a chat template: neither chat_template.jinja nor the key in tokenizer_config.json"
    ]
    (folder / "chat_template.json").write_text("{}")
    assert of(folder) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model-2.safetensors", None, "model.safetensors.index.json: names files that are not there: model-2.safetens"),
        ("model-2.safetensors", SHARD[:-3], f"model-2.safetensors: has {len(SHARD) - 3} bytes where its header tells"),
        ("model-1.safetensors", SHARD + b"x", f"model-1.safetensors: has {len(SHARD) + 1} bytes where its header"),
        ("model-1.safetensors", SHARD[:30], "model-1.safetensors: no whole safetensors file: 30 bytes"),
        ("model-1.safetensors", b"version https://git-lfs.github.com/spec/v1\n", ": 43 bytes: a pointer of git-lfs"),
        ("model-1.safetensors", (4).to_bytes(8, "little") + b"[1]]", "its header is not readable: download it again"),
        ("model.safetensors.index.json", None, "FOLDER: holds neither model.safetensors nor model.safetensors.index"),
        ("tokenizer.json", None, "FOLDER: lacks a tokenizer: none of tokenizer.json, vocab.json, tokenizer.model"),
        ("preprocessor_config.json", None, "FOLDER: lacks an image processor: none of preprocessor_config.json, "),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_named(folder, name, content, said):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    (fault,) = of(folder)
    assert fault.startswith("model.path: ") and said in fault


PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


@pytest.mark.parametrize(
    ("model", "file", "changes", "said"),
    [
        ("Qwen3-VL", PREPROCESSOR, {}, None),
        ("Qwen2.5-VL", PREPROCESSOR, {}, None),
        ("Qwen3-VL", PREPROCESSOR, {"processor_class": "OneOfMyOwn"}, None),
        ("Qwen3-VL", PREPROCESSOR, {"patch_size": 14}, "patch_size: is 14, the vision tower of config.json takes 16"),
        ("Qwen2.5-VL", PREPROCESSOR, {"patch_size": 16}, "patch_size: is 16, the vision tower of config.json takes 14"),
        ("Qwen3-VL", PREPROCESSOR, {"merge_size": "2"}, "merge_size: is '2', the vision tower of config.json takes 2"),
        ("Qwen3-VL", PROCESSOR, {"image_processor": {"patch_size": 14}}, "patch_size: is 14, the vision tower of"),
        (
            "Qwen3-VL", PREPROCESSOR, {"processor_class": "Qwen2_5_VLProcessor"},
            "processor_class: is Qwen2_5_VLProcessor, of qwen2_5_vl; config.json is of qwen3_vl, whose folders name",
        ),
        (
            "Qwen2.5-VL", PROCESSOR, {"processor_class": "Qwen3VLProcessor"},
            "processor_class: is Qwen3VLProcessor, of qwen3_vl; config.json is of qwen2_5_vl, whose folders name",
        ),
    ],
)  # fmt: skip
def test_a_processor_of_another_family_is_named(folder, model, file, changes, said):
    """The file that transformers reads, and its key; a class that no family has is transformers' to refuse."""
    family, published = FAMILIES[model]
    (folder / PREPROCESSOR).write_text(json.dumps(published))
    (folder / file).write_text(json.dumps(published | changes))
    shape = ModelShape.from_dict(tiny_config(family).to_dict())
    fault = fault_of_processor(load_config(None, [f"model.path={folder}"]), shape)
    assert fault is None if said is None else fault.startswith(f"model.path: {folder / file}: {said}")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"problem": "?", "videos": "0.mp4"}, "in column 'videos'"),
        ({"problem": "?", "video": "0.mp4"}, "in column 'video'"),
        ({"problem": "<video>?", "videos": ""}, "<video> in the text"),
        ({"problem": "<image>?", "images": "0.MP4"}, "a video's file in column 'images'"),
        ({"problem": "<image>?", "images": "0.png", "videos": ""}, None),
    ],
)
def test_a_data_set_of_videos_is_told_by_its_first_rows(tmp_path, suffix, cells, said):
    file = tmp_path / f"rows.{suffix}"
    rows = Dataset.from_list([dict.fromkeys(cells, "") | {"problem": "?"}, cells])
    write_rows(rows, file)
    wanted = [] if said is None else [f"data.eval: {file}: row 1: video ({said}: only pictures are read)"]
    for words in ((), ("data.on_bad_row=skip",), (f"data.eval={{path: {file}, filter: {{problem: '?'}}}}",)):
        config = load_config(None, ["model.path=/", f"data.eval={file}", *words])
        assert faults_of_inputs("eval", config, packages=False) == ([] if words else wanted)


def test_a_part_of_a_turn_that_is_a_video_is_told(tmp_path):
    turn = {"role": "user", "content": [{"type": "video", "video": "0.mp4"}, {"type": "text", "text": "?"}]}
    (tmp_path / "test-0.jsonl").write_text(json.dumps({"problem": [turn]}) + "\n{\n")
    (tmp_path / "train-0.jsonl").write_text('{"problem": "?"}\n')
    for split, faults in (("test", 1), ("train", 0)):
        config = load_config(None, ["model.path=/", f"data.train={tmp_path}", f"data.split={split}"])
        found = faults_of_inputs("sft", config, packages=False)
        assert found == [
            f"data.train: {tmp_path}/test-0.jsonl: row 0: video (a part of a turn: only pictures are read)"
        ] * faults  # fmt: skip


def test_weights_are_looked_for_only_where_they_are_read(folder):
    (folder / "model-1.safetensors").unlink()
    assert of(folder, "model.random_init=true") == of(folder, f"model.checkpoint={folder}") == []
    reference = f"checkpoint.reference={folder}"
    (fault,) = of(folder, "model.random_init=true", reference, "loss.reference_coef=0.01")
    assert fault.startswith("checkpoint.reference: model.safetensors.index.json: ")
    assert of(folder, "model.random_init=true", reference, "loss.reference_coef=0") == []


def test_a_name_of_the_hub_is_told_how_to_be_downloaded():
    def said(path: str) -> str | None:
        return fault_of_missing_model(load_config(None, [f"model.path={path}"]))

    assert said("Qwen/Qwen2.5-VL-7B-Instruct") == (
        "model.path: Qwen/Qwen2.5-VL-7B-Instruct: no such folder, and a name of the hub is not downloaded by itself: "
        "`hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir Qwen2.5-VL-7B-Instruct`, then "
        "model.path=Qwen2.5-VL-7B-Instruct"
    )
    assert "`hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir " in (said("Qwen2.5-VL-3B-Instruct") or "")
    assert said("/gone/model") == "model.path: /gone/model: no such folder" and said("/tmp") is None


@pytest.mark.parametrize(
    ("words", "checkpoints", "each", "exports"),
    [
        ([], 3, 14, 1),  # two that are kept and the one that is written
        (["data.eval=rows.jsonl"], 4, 14, 1),  # and the best
        (["data.eval=rows.jsonl", "checkpoint.keep_best=false", "checkpoint.keep_last=4"], 5, 14, 1),
        (["checkpoint.save_every=0", "checkpoint.export_at_end=false"], 1, 14, 0),
        (["train.steps=60"], 2, 14, 1),  # as many as are ever saved
        (["checkpoint.contents=weights", "checkpoint.export_every=20"], 3, 2, 11),
        (["checkpoint.contents=none", "checkpoint.export_every=20", "checkpoint.keep_exports=2"], 0, 0, 3),
        (["checkpoint.contents=none", "checkpoint.export_at_end=false"], 0, 0, 0),
        (["train.epochs=2", "train.steps=null", "checkpoint.export_every=20"], 3, 14, 2),  # at least two exports
    ],
)
def test_the_disk_is_counted_for_all_that_may_stand(words, checkpoints, each, exports):
    config, shape = load_config(None, ["model.dtype=bfloat16", *words]), shape_named("Qwen2.5-VL-3B")
    need = disk_need("train", config, shape)
    assert (need.checkpoints, need.checkpoint_bytes, need.exports) == (checkpoints, each * 3_754_622_976, exports)
    assert need.total == (checkpoints * each + exports * 2) * 3_754_622_976
    said = {(3, 1): "up to 3 checkpoints of 49.0 GiB and an export of 7.0", (1, 0): "a checkpoint of 49.0 GiB"}
    assert need.in_words().startswith({**said, (0, 0): "nothing saved"}.get((checkpoints, exports), "up to "))


def test_a_disk_that_holds_one_checkpoint_and_not_all_is_refused(tmp_path, monkeypatch):
    words = ["model.dtype=bfloat16", f"run.dir={tmp_path / 'run'}", "data.eval=rows.jsonl"]
    config, shape = load_config(None, words), shape_named("Qwen2.5-VL-3B")
    free = disk_need("train", config, shape).total - 1
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert list(faults_of_disk("train", config, shape)) == [
        f"run.dir: {tmp_path / 'run'}: up to 4 checkpoints of 49.0 GiB and an export of 7.0 GiB: 202.8 GiB of disk, "
        "202.8 GiB are free there: what helps is checkpoint.keep_last=1 or checkpoint.keep_best=false or "
        "checkpoint.contents=weights or checkpoint.export_at_end=false or a run.dir on another disk"
    ]
    standing = tmp_path / "run" / "checkpoints" / "step_1"
    standing.mkdir(parents=True)
    (standing / "weights").write_bytes(b"12")  # of an earlier attempt: it takes part in the count
    assert list(faults_of_disk("train", config, shape)) == []
    assert checkpoint_bytes(config, shape) < free


class Service(BaseHTTPRequestHandler):
    """The hub and wandb's server in one: a data set `there/rows`, a gated one, and the key `right`."""

    def do_GET(self) -> None:
        status = {"/api/datasets/there/rows": 200, "/api/datasets/gated/rows": 403}.get(self.path, 404)
        self.send_response(status)
        if status != 200:
            self.send_header("X-Error-Code", "GatedRepo" if status == 403 else "RepoNotFound")
        self._end({"id": "there/rows", "tags": [], "siblings": []})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers["Authorization"] == "Basic YXBpOnJpZ2h0"  # api:right
        self.send_response(200)
        self._end({"data": {"viewer": {"username": "one"} if known else None}})

    def _end(self, tree: dict[str, object]) -> None:
        body = json.dumps(tree).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service(monkeypatch, tmp_path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    _reach(monkeypatch, url, tmp_path)
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


def _reach(monkeypatch: pytest.MonkeyPatch, url: str, home: Path) -> None:
    """Hub and wandb are looked for at `url` alone, and nothing is known of this machine's own keys."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: _HfApi(url))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    network.ask_hub.cache_clear()


def _HfApi(url: str) -> object:
    from huggingface_hub.hf_api import HfApi

    return HfApi(endpoint=url, token=False)


def said(config: Config, **data: str) -> list[str]:
    return [f"{each.text}{' FAULT' * each.is_fault}" for each in ask_network("train", config, data)]


def test_the_hub_is_asked_for_names_alone(service, tmp_path, monkeypatch):
    (tmp_path / "local").mkdir()
    monkeypatch.chdir(tmp_path)
    names = ("a/b", "a", "local", "rows.jsonl", "https://x/y", "a/*", "/a/b", "a/b/c")
    assert [name for name in names if is_hub_name(name)] == ["a/b", "a"]
    found = said(load_config(None, []), train="there/rows", here="local", eval="gone/rows", more="gated/rows")
    assert [line.partition(" (`hf")[0] for line in found] == [
        "eval: gone/rows: neither a file or folder here nor a data set on the hub that this account sees",
        "more: gated/rows: its owner lets in who has asked: accept the terms on its page, `hf auth login`",
    ]
    assert found[0].endswith(" FAULT") and not found[1].endswith("FAULT")


def test_wandb_is_asked_whether_it_takes_the_key(service, tmp_path, monkeypatch):
    online = load_config(None, ["observe.wandb=online"])
    (line,) = said(online)
    assert line.startswith("observe.wandb: no key for 127.0.0.1 in the environment or in ~/.netrc: `wandb login`, ")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password wrong\n")
    (tmp_path / "netrc").chmod(0o600)
    assert said(online) == ["observe.wandb: 127.0.0.1 does not take this key"]
    monkeypatch.setenv("WANDB_API_KEY", "right")
    assert said(online) == said(load_config(None, ["observe.wandb=offline"])) == []


def test_without_a_network_names_and_keys_are_warned_of(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        _reach(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path)
        monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
        hub, wandb = said(load_config(None, ["observe.wandb=online"]), train="there/rows")
    assert hub.startswith("train: there/rows: the hub could not be asked (") and hub.endswith(
        ": is it in the nodes' cache?"
    )
    assert wandb.startswith("observe.wandb: 127.0.0.1 could not be asked (") and "secret" not in hub + wandb


def test_an_answer_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(network, "LIMIT_S", -0.9)  # a tenth of a second with the second that threads get
    never = threading.Event()
    questions = [("key: the hub", lambda: types.SimpleNamespace(text=never.wait(5)))]
    (answer,) = network.answers_of(questions)
    never.set()
    assert answer == network.Reply("key: the hub did not answer within -1 s")


def test_offline_a_name_has_to_be_in_the_cache(tmp_path, monkeypatch):
    _reach(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "datasets--there--rows").mkdir()
    (line,) = said(load_config(None, []), train="gone/rows", eval="there/rows")
    assert line.startswith("train: gone/rows: HF_HUB_OFFLINE is set and ")
