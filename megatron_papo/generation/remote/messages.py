"""The messages between the trainer's ranks and separate engines: typed values, encoded as msgpack.

Decoding makes these types and no others, so that no bytes that come in can run code. Floats, ids and pixels are exact.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from msgspec import Struct
from PIL import Image

from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.generation.vllm.vllm_requests import VllmPrompt

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

_LONGEST_REASON = 200


class _Message(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A message; on the wire it carries the name of its type."""


class Generate(_Message, frozen=True):
    """To the engine: rollouts to make."""

    call: int
    """Number of the call; every call has another."""
    requests: tuple[RolloutRequest, ...]
    prompts: dict[int, VllmPrompt]
    """`prompt_index` of the requests -> the prompt."""
    sampling: Sampling


class GenerationProgress(_Message, frozen=True):
    """From the engine, about twice a second: how many rollouts of a call are done."""

    call: int
    done: int
    total: int


class Answers(_Message, frozen=True):
    """From the engine: all rollouts of a call."""

    call: int
    answers: tuple[Answer, ...]
    policy_version: int
    seconds: float
    """Seconds from the call's arrival to its last answer."""
    prefix_cached: tuple[float, float]
    """(prompt tokens whose keys and values were cached, all prompt tokens)."""


class Load(_Message, frozen=True):
    """To the engine, from rank 0 alone: weights follow by the broadcast of this name, one `BucketMessage` a bucket."""

    policy_version: int
    broadcast: str


class BucketMessage(_Message, frozen=True):
    """To the engine: the tensors that the next broadcast holds, one after the other."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype


class Loaded(_Message, frozen=True):
    """To the engine, after the last bucket; and back from it, with what was wrong with the weights."""

    fault: str | None = None


class Bye(_Message, frozen=True):
    """To the engine: this rank closes its channel, and nothing is wrong."""


class Stop(_Message, frozen=True):
    """To the engine, from rank 0 alone: no more calls will come."""


Message = Generate | GenerationProgress | Answers | Load | BucketMessage | Loaded | Bye | Stop


def encode(message: Message) -> bytes:
    """The message as bytes."""
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """The message in `data`. Raises ValueError for anything but one whole message."""
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
    """A dtype or a picture. Raises ValueError, of which msgspec makes one line with the place in the message."""
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
