"""What vLLM and transformers answer, each with its own loader, to one question about one picture.

python -m tests.system.vllm_loads FOLDER...   a last line of JSON for each folder: the greedy tokens of either
"""

from __future__ import annotations

import base64
import io
import json
import sys

import numpy as np
from PIL import Image

NUM_TOKENS = 8


def main(folders: list[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    answers = [{"transformers": _transformers(each, picture), "vllm": _vllm(each, picture)} for each in folders]
    print("\n".join(map(json.dumps, answers)))


def _transformers(folder: str, picture: Image.Image) -> list[int]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def _vllm(folder: str, picture: Image.Image) -> list[int]:
    from vllm import LLM, SamplingParams

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    llm = LLM(
        model=folder, dtype="float32", max_model_len=256, kv_cache_memory_bytes=64 * 2**20, enforce_eager=True,
        limit_mm_per_prompt={"image": 1, "video": 0}, disable_log_stats=True,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
    (found,) = llm.chat([{"role": "user", "content": content}], greedy, use_tqdm=False)
    return list(found.outputs[0].token_ids)


if __name__ == "__main__":
    main(sys.argv[1:])
