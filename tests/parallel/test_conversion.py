"""Converted checkpoints in real Megatron models of any layout, those models' checkpoints exported, and vLLM on exports.

How conversion itself behaves is in tests/system/test_convert.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_papo.accelerator import adapt_megatron
from megatron_papo.checkpoint.conversion.convert import convert
from megatron_papo.checkpoint.conversion.crew import Crew
from megatron_papo.checkpoint.conversion.plan import Settings
from megatron_papo.checkpoint.conversion.verify import verify
from megatron_papo.checkpoint.huggingface import read_hf, write_hf
from megatron_papo.checkpoint.state import TrainState
from megatron_papo.checkpoint.store import CheckpointStore
from megatron_papo.checkpoint.weights import load_weights
from megatron_papo.config import load_config
from megatron_papo.model.shape import ModelShape
from tests.ranks import run_ranks
from tests.tiny import make_tiny_folder

SHAPE = {"hidden": 64, "layers": 3, "heads": 4, "kv_heads": 2, "vision_depth": 2, "vocab": 275}
VISION = {"vision_hidden": 32, "vision_heads": 4, "vision_intermediate": 42}  # 42: padded at every layout
SMALL = Settings(file_bytes=100_000, box_bytes=5_000)
"""Several files, and most matrices in several boxes."""
MEMORY = 8 * 2**30


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(tmp_path_factory, request) -> Path:
    return make_tiny_folder(tmp_path_factory.mktemp("hf") / "hf", **SHAPE, **VISION, tie=request.param)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _model(folder: str, tensor: int, pipeline: int):
    from megatron_papo.model.policy import build_policy
    from megatron_papo.parallel import initialize

    adapt_megatron()
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    config = load_config(None, [*layout, "model.dtype=float32", "model.spec=local"])
    initialize(config.parallel)
    shape = ModelShape.from_folder(folder)
    return build_policy(config, shape), shape


def _into_a_model(source: str, checkpoint: str, tensor: int, pipeline: int, target: str) -> None:
    model, shape = _model(source, tensor, pipeline)
    load_weights(model, shape, checkpoint)
    write_hf(model, shape, target, source)


def _saved_by_a_run(source: str, folder: str, tensor: int, pipeline: int) -> None:
    model, shape = _model(source, tensor, pipeline)
    read_hf(model, shape, source)
    CheckpointStore(folder, source=source).save(7, TrainState(model, shape))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (4, 1), (2, 2)])
def test_any_layout_reads_a_converted_checkpoint_and_any_layouts_is_exported(source, tmp_path, tensor, pipeline):
    expected = _tensors(source)
    convert("hf-to-megatron", source, tmp_path / "m", SMALL, MEMORY, Crew())
    assert len(list((tmp_path / "m").glob("*.distcp"))) > 5
    run_ranks(
        _into_a_model, tensor * pipeline, str(source), str(tmp_path / "m"), tensor, pipeline, str(tmp_path / "read")
    )
    run_ranks(_saved_by_a_run, tensor * pipeline, str(source), str(tmp_path / "run"), tensor, pipeline)
    convert("megatron-to-hf", tmp_path / "run" / "step_00000007", tmp_path / "export", SMALL, MEMORY, Crew())
    for folder in ("read", "export"):
        found = _tensors(tmp_path / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), folder
    verdict = verify(tmp_path / "export", MEMORY, Crew(), tmp_path / "run" / "step_00000007")
    assert verdict.faults == [] and not verdict.inexact


CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many?"}]}]


def _vllm_answers(folder: str) -> dict[str, Any]:
    """Everything of the folder by vLLM itself: weights, tokenizer, processor, chat template, generation config."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    llm = LLM(
        model=folder, dtype="float32", max_model_len=240, enforce_eager=True, kv_cache_memory_bytes=2**26,
        limit_mm_per_prompt={"image": 1, "video": 0}, disable_log_stats=True, seed=0,
    )  # fmt: skip
    sampling = llm.get_default_sampling_params()
    found = {"temperature": sampling.temperature, "top_k": sampling.top_k}
    greedy = _changed(sampling, temperature=0.0, max_tokens=12)
    tokenizer = llm.get_tokenizer()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    (answer,) = llm.generate([{"prompt": text, "multi_modal_data": {"image": _picture()}}], greedy, use_tqdm=False)
    return found | {"prompt": list(answer.prompt_token_ids), "response": list(answer.outputs[0].token_ids)}


def _changed(sampling: Any, **changes: Any) -> Any:
    found = sampling.clone()
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def _picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8))


def _transformers_answers(folder: Path) -> dict[str, list[int]]:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    text = processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[_picture()], return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, top_k=None, max_new_tokens=12)[0].tolist()
    length = inputs["input_ids"].shape[1]
    return {"prompt": ids[:length], "response": ids[length:]}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_an_export_with_everything_beside_the_weights(tmp_path):
    source = make_tiny_folder(tmp_path / "hf", hidden=128, heads=4, kv_heads=2, std=0.12)
    file = source / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.625, "top_k": 17}))
    convert("hf-to-megatron", source, tmp_path / "m", SMALL, MEMORY, Crew())
    convert("megatron-to-hf", tmp_path / "m", tmp_path / "out", SMALL, MEMORY, Crew())
    (found,) = run_ranks(_vllm_answers, 1, str(tmp_path / "out"))
    assert (found["temperature"], found["top_k"]) == (0.625, 17)
    expected = _transformers_answers(source)
    assert found["prompt"] == expected["prompt"]
    assert found["response"] == expected["response"]
