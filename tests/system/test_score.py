"""`papo score` against transformers on the same weights, from both kinds of folder and in several layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_papo.config import Config, load_config
from tests.support.commands import papo
from tests.support.ranks import run_ranks
from tests.support.tiny_run import make_inputs, tiny_run

LAYOUTS = {
    "1 rank": (1, {}),
    "TP2 SP": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "TP2 PP2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "DP2": (2, {}),
}


def _score(config: Config, data: Path, out: Path) -> None:
    from megatron_papo.score import main

    main(config, data, out)


def _config(inputs: Path, model: Path, run_dir: Path, **settings) -> Config:
    keys = {
        "run.dir": run_dir,
        "model.path": model,
        "model.dtype": "float32",
        "data.instruction": "",
        "observe.console": False,
        "train.tokens_per_micro_batch": 300,
        **settings,
    }
    return load_config(None, [f"{key}={value}" for key, value in keys.items()])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """With weights beside the model's that transformers does not read, and no area of pictures but the folder's."""
    made = make_inputs(tmp_path_factory.mktemp("inputs"), tie=True)
    weights = load_file(made / "model" / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(zeros, made / "model" / "model_ema.safetensors", metadata={"format": "pt"})
    return made


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(inputs) -> list[dict]:
    """Transformers' own processor call, forward and log-softmax, a row at a time."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(inputs / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(inputs / "model", use_fast=True)
    found = []
    for row in _rows(inputs / "rows.jsonl"):
        question = row["problem"].replace("<image>", "")
        content = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [Image.open(inputs / name) for name in row["images"]] or None
        batch = processor(text=[text], images=images, return_tensors="pt")
        tokens = processor.tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        ids = torch.cat([batch["input_ids"], torch.tensor([tokens])], dim=1)
        pixels = {key: batch[key] for key in ("pixel_values", "image_grid_thw") if key in batch}
        types = {"mm_token_type_ids": (ids == model.config.image_token_id).int()}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, **types).logits[0]
        logprobs = logits[-len(tokens) - 1 : -1].log_softmax(-1)
        chosen = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        found.append({"tokens": tokens, "policy_logprobs": chosen.tolist(), "entropy": entropy.tolist()})
    return found


def _compare(found: list[dict], expected: list[dict], inputs: Path) -> None:
    for row, got, want in zip(_rows(inputs / "rows.jsonl"), found, expected, strict=True):
        assert {key: got[key] for key in row} == row, "the row itself comes back, in order"
        assert got["tokens"] == want["tokens"]
        for name in ("policy_logprobs", "entropy"):
            torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(want[name]), rtol=0, atol=1e-4)
        if not row["images"]:
            assert got["masked_logprobs"] is None and got["perception_kl"] is None
            continue
        policy, masked = torch.tensor(got["policy_logprobs"]), torch.tensor(got["masked_logprobs"])
        gap = masked - policy
        torch.testing.assert_close(torch.tensor(got["perception_kl"]), gap.exp() - gap - 1, rtol=1e-3, atol=1e-5)
        assert gap.abs().max() > 1e-4, "masking changed nothing"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_transformers_in_every_layout(layout, inputs, expected, tmp_path):
    num_ranks, settings = LAYOUTS[layout]
    config = _config(inputs, inputs / "model", tmp_path / "run", **settings)
    run_ranks(_score, num_ranks, config, inputs / "rows.jsonl", tmp_path / "out.jsonl")
    _compare(_rows(tmp_path / "out.jsonl"), expected, inputs)


def _save_checkpoint(config: Config) -> None:
    from megatron_papo.sft import main

    main(config)


@pytest.mark.fast
def test_the_command_reads_a_megatron_checkpoint(inputs, expected, tmp_path):
    """Saved by TP 2 after a step that changes nothing (the rate is as good as zero), scored by PP 2."""
    settings = {"parallel__tensor": 2, "optim__lr": 1e-30, "sft__steps": 1, "sft__batch_size": 4}
    run_ranks(_save_checkpoint, 2, tiny_run(inputs, tmp_path / "sft", **settings))
    words = [
        "--model", tmp_path / "sft" / "checkpoints" / "step_00000001",
        "--data", inputs / "rows.jsonl", "--out", tmp_path / "out.jsonl",
        "data.instruction=", "model.dtype=float32", "parallel.pipeline=2", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = papo("score", *words)
    assert done.returncode == 0, done.stderr
    _compare(_rows(tmp_path / "out.jsonl"), expected, inputs)
