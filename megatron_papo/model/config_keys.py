"""Keys of config.json that several families write alike: rotary settings, numbers of heads, ids of special tokens.

A family's module `shape` reads them with these functions, which raise ValueError naming the key at fault. Imports no
torch.
"""

from __future__ import annotations

from typing import Any

from megatron_papo.files.json_keys import Keys, shown


def vision_token_ids(root: Keys) -> dict[str, int]:
    """The fields of a ModelShape for the tokens that stand for pictures and videos, and around them."""
    return {
        "image_token_id": root.index("image_token_id", 151655),
        "video_token_id": root.index("video_token_id", 151656),
        "vision_start_token_id": root.index("vision_start_token_id", 151652),
        "vision_end_token_id": root.index("vision_end_token_id", 151653),
    }


def rotary_keys(keys: Keys) -> Keys:
    """The rotary settings of a language model: `rope_parameters`, or `rope_scaling` as published files have it."""
    return keys.section("rope_parameters" if keys.tree.get("rope_parameters") else "rope_scaling")


def mrope_fields(keys: Keys, head_dim: int, *, sections: list[int], theta: float) -> dict[str, Any]:
    """The fields rope_theta and mrope_section of a LanguageShape with heads of `head_dim`, from the rotary settings, or
    from a `rope_theta` beside them. `sections` and `theta` hold where the keys are missing."""
    rope = rotary_keys(keys)
    kind = rope.tree.get("rope_type", rope.tree.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise rope.fault("rope_type", f"is {shown(kind)}; only M-RoPE without scaling is supported")
    section = rope.counts("mrope_section", sections)
    if len(section) != 3:
        raise rope.fault("mrope_section", f"is {list(section)}, not a count each of time, height and width")
    if sum(section) * 2 != head_dim:
        raise rope.fault("mrope_section", f"{list(section)} do not sum to half of a head of {head_dim}")
    source = rope if "rope_theta" in rope.tree else keys
    return {"rope_theta": source.positive("rope_theta", theta), "mrope_section": section}


def vision_rope_theta(keys: Keys) -> float:
    """The base of the rotary frequencies of a vision tower."""
    rope = keys.section("rope_parameters") if keys.tree.get("rope_parameters") else keys
    return rope.positive("rope_theta", 10000.0)


def check_head_count(keys: Keys, key: str, hidden_size: int, num_heads: int) -> None:
    """Refuses `num_heads` attention heads, the value of `key`, that do not share `hidden_size` equally."""
    if hidden_size % num_heads:
        raise keys.fault(key, f"hidden_size {hidden_size} does not divide by {num_heads} heads")


def check_key_value_heads(keys: Keys, num_heads: int, num_kv_heads: int) -> None:
    """Refuses key-value heads that do not have equally many query heads each."""
    if num_heads % num_kv_heads:
        raise keys.fault("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads")


def check_vision_heads(keys: Keys, hidden_size: int, num_heads: int) -> None:
    """Refuses heads of a vision tower that do not share its width equally, or have no halves for rows and columns."""
    check_head_count(keys, "num_heads", hidden_size, num_heads)
    head_dim = hidden_size // num_heads
    if head_dim % 4:
        raise keys.fault("num_heads", f"a head of {head_dim} does not divide by 4 for the 2-D rotary embedding")
