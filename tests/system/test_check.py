"""`papo check` as a user types it: all faults at once, the settings as JSON, one line when all is well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_papo.config import load_config
from megatron_papo.model.published_shapes import published_config
from tests.support.commands import papo
from tests.support.tiny_run import make_inputs
from tests.unit.test_memory import published

EXAMPLES = Path(__file__).parents[2] / "examples"


def check(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return papo("check", *words, **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    return [f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}", f"run.dir={folder / 'run'}"]


@pytest.fixture
def big(tmp_path) -> list[str]:
    """What the 72B recipe reads, as far as it can be known before a rank starts."""
    return _without_weights(tmp_path, published("72B"))


def _without_weights(folder: Path, tree: dict[str, Any]) -> list[str]:
    """The settings of a run that starts from random weights of the model with this config.json."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(tree))
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / "model" / name).touch()
    return [f"model.path={folder / 'model'}", f"run.dir={folder / 'run'}", "model.random_init=true"]


@pytest.mark.fast
def test_all_is_well_in_one_line(inputs):
    done = check(*inputs, "--ranks", 2, "parallel.tensor=2", "train.tokens_per_micro_batch=16384")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("papo: check: 2 ranks (tensor 2 x pipeline 1 x data 1), 0.0 of 79.6 GiB a GPU (")
    assert len(done.stdout.splitlines()) == 1


def test_the_settings_as_json_and_nothing_else_on_standard_output(inputs):
    words = [*inputs, "cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "cluster.nodes=2", "train.steps=7"]
    done = check(*words, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads(load_config(None, words).model_dump_json())
    assert done.stderr == (
        "papo: check: 2 ranks (tensor 1 x pipeline 1 x data 2), a checkpoint of 2.5 MiB and an export of 0.4 MiB: "
        "2.9 MiB of disk\n"
    )


def test_every_fault_is_told_at_once(big, tmp_path):
    words = ["cluster.nodes=6", "parallel.pipeline=3", "data.eval=null", "generation.tensor=5"]
    done = check(EXAMPLES / "papo_g_72b.yaml", *big, *words, "run.dir=/dev/null/run", "data.train=gone.jsonl", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "papo: error: generation.tensor: 5 does not divide the 48 ranks",
        "papo: error: generation.tensor: 64 attention heads do not divide by 5",
        "papo: error: generation.tensor: 8 key-value heads and 5 ranks do not divide",
        "papo: error: generation.tensor: 16 heads of the vision tower do not divide by 5",
        "papo: error: generation.tensor: 29568 columns of the language model's MLP do not divide by 5",
        "papo: error: generation.tensor: 3456 columns of the vision tower's MLP do not divide by 5",
        "papo: error: data.train: gone.jsonl: no such file or folder",
        "papo: error: run.dir: /dev/null/run: /dev/null is no folder that can be written to",
    ]


def test_ranks_that_do_not_divide(big):
    done = check(EXAMPLES / "papo_g_72b.yaml", *big, "cluster.nodes=5")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "papo: error: parallel: 40 ranks do not divide by parallel.tensor 8 x parallel.pipeline 4"
    )


def test_memory_heads_and_disk(big):
    done = check(EXAMPLES / "papo_g_72b.yaml", *big, "parallel.pipeline=1", "data.eval=null")
    assert done.returncode == 2
    memory, disk = done.stderr.splitlines()
    assert memory == (
        "papo: error: generation.gpu_memory_fraction: 0.45 of 79.6 GiB is 35.8, and stage 0 of the trainer keeps 64.1 "
        "on the same GPU (weights 17.1, gradients 34.2, optimizer 12.8): the engine could neither wake after an update "
        "nor be started again; none would do, its weights alone take 17.1: what helps is more ranks, "
        "optim.offload_fraction or generation.placement=separate"
    )
    assert disk.startswith("papo: error: run.dir: ")
    assert ": up to 3 checkpoints of 957.2 GiB and an export of 136.7 GiB: 3,008.2 GiB of disk, " in disk
    done = check(EXAMPLES / "papo_g_72b.yaml", *big, "parallel.tensor=32", "parallel.pipeline=1")
    assert "papo: error: parallel.tensor: 16 heads of the vision tower do not divide by 32" in done.stderr.splitlines()


def test_pipeline_splits_and_taps_of_deepstack(tmp_path):
    """One layer on the first stage is enough, though three layers add image tokens."""
    tree = published_config("Qwen3-VL-4B")
    words = ["cluster.nodes=1", "data.eval=null", f"data.train={__file__}", "loss.masked_entropy_coef=0"]
    words += ["parallel.tensor=2", "parallel.pipeline=2", "checkpoint.contents=none", *_without_weights(tmp_path, tree)]
    done = check(EXAMPLES / "papo_g_7b.yaml", *words, "parallel.pipeline_layers=[1,35]")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("papo: check: 8 ranks (tensor 2 x pipeline 2 x data 2), ")
    tree["vision_config"]["deepstack_visual_indexes"] = [5, 11, 24]
    (tmp_path / "model" / "config.json").write_text(json.dumps(tree))
    done = check(EXAMPLES / "papo_g_7b.yaml", *words, "parallel.pipeline_layers=[1,36]")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        [
            f"papo: error: model.path: {tmp_path / 'model'}/config.json: vision_config.deepstack_visual_indexes: layer "
            "24 of a tower of 24 layers, which count from 0"
        ],
    )


def test_a_model_that_is_not_there_or_not_whole_is_told_with_what_helps(inputs, tmp_path):
    done = check(*inputs, "model.path=Qwen/Qwen2.5-VL-3B-Instruct")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "a name of the hub is not downloaded by itself: `hf download Qwen/Qwen2.5-VL-3B-Instruct " in done.stderr
    model = tmp_path / "model"
    shutil.copytree(inputs[0].partition("=")[2], model)
    (weights,) = model.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    (model / "tokenizer.json").unlink()
    done = check(*inputs, f"model.path={model}")
    tokenizer, shard = done.stderr.splitlines()
    assert tokenizer.startswith(f"papo: error: model.path: {model}: lacks a tokenizer: none of tokenizer.json, ")
    assert shard.startswith(f"papo: error: model.path: {weights}: has ") and shard.endswith(": download it again")


def test_a_package_that_is_not_there(inputs, tmp_path):
    """An interpreter with nothing but what the command line itself needs, past the look that `papo` takes first."""
    for name in ("pydantic", "pydantic_core", "annotated_types", "typing_extensions.py", "typing_inspection", "yaml"):
        found = next(Path(entry) / name for entry in sys.path if entry and (Path(entry) / name).exists())
        (tmp_path / name).symlink_to(found)
    environ = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}", "PATH": os.environ["PATH"]}
    begin = "import sys; from megatron_papo.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-S", "-c", begin, "check", *inputs]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    missing = [line.split(":")[2].split()[-1] for line in done.stderr.splitlines() if ": package " in line]
    assert missing[:3] == ["torch", "megatron.core", "transformers"] and "pydantic" not in missing
