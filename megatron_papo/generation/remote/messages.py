"""What the trainer's ranks and separate engines say to each other, and how it travels: typed values as msgpack.

Reading makes these types and no others, so that whatever bytes come in run no code. Floats, ids and pixels are exact.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from msgspec import Struct
from PIL import Image

from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.generation.vllm.vllm_requests import VllmRequest

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

_LONGEST_REASON = 200


class _Message(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Named by its type."""


class Generate(_Message, frozen=True):
    """To the engine: rollouts to make. A later call is another number."""

    call: int
    jobs: tuple[RolloutRequest, ...]
    requests: dict[int, VllmRequest]
    """By the jobs' prompt_index."""
    sampling: Sampling


class GenerationProgress(_Message, frozen=True):
    """From the engine, now and then."""

    call: int
    done: int
    total: int


class Answers(_Message, frozen=True):
    """From the engine: all of a call."""

    call: int
    answers: tuple[Answer, ...]
    policy_version: int
    seconds: float
    """From the call's arrival to its last answer."""
    prefix_cached: tuple[float, float]
    """Prompt tokens that were read before, of all."""


class Load(_Message, frozen=True):
    """To the engine, from rank 0 alone: weights follow over the bridge of this name, as `BucketMessage`s say."""

    policy_version: int
    broadcast: str


class BucketMessage(_Message, frozen=True):
    """To the engine: what the next broadcast over the bridge holds, laid end to end."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype


class Loaded(_Message, frozen=True):
    """To the engine, after the last bucket; and its answer, with what was wrong with the weights."""

    fault: str | None = None


class Bye(_Message, frozen=True):
    """To the engine: this rank hangs up and nothing is wrong."""


class Stop(_Message, frozen=True):
    """To the engine, from rank 0 alone: nobody will ask any more."""


Message = Generate | GenerationProgress | Answers | Load | BucketMessage | Loaded | Bye | Stop


def encode(message: Message) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Raises ValueError for anything but one whole message."""
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"no message: {str(error)[:_LONGEST_REASON]}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    assert isinstance(value, Image.Image) and value.mode == "RGB", value
    return (*value.size, value.tobytes())


def _made(kind: type, plain: Any) -> Any:
    """msgspec makes one line of a ValueError, with the place in the message."""
    if kind is torch.dtype:
        if plain not in _DTYPES:
            raise ValueError("unknown dtype")
        return _DTYPES[plain]
    width, height, pixels = msgspec.convert(plain, tuple[int, int, bytes])
    if min(width, height) < 1 or len(pixels) != 3 * width * height:
        raise ValueError(f"{len(pixels)} bytes are no picture of {width} x {height}")
    return Image.frombytes("RGB", (width, height), pixels)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message, dec_hook=_made)
