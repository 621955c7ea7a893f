"""The line to a separate engine: what may be said over it, who gets one, and where its key is kept."""

from __future__ import annotations

import os
import pickle
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import numpy
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from megatron_papo.generation.generator import Sampling
from megatron_papo.generation.remote import handshake
from megatron_papo.generation.remote.channel import Channel, Inbox
from megatron_papo.generation.remote.engine_store import EngineStore
from megatron_papo.generation.remote.handshake import ConnectionListener, connect
from megatron_papo.generation.remote.messages import (
    Answers,
    BucketMessage,
    Bye,
    Generate,
    GenerationProgress,
    Load,
    Loaded,
    Message,
    Stop,
    decode,
    encode,
)
from megatron_papo.generation.remote.run_key import fingerprint, make_key, offered_key, read_key
from megatron_papo.generation.requests import Answer, RolloutRequest
from megatron_papo.generation.vllm.vllm_requests import VllmPrompt

KEY = b"k" * 32


def _picture(width: int, height: int) -> Image.Image:
    random = numpy.random.default_rng(width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=numpy.uint8), mode="RGB")


REQUESTS = (RolloutRequest(0, 0, 2**63 - 1), RolloutRequest(0, 1, 0), RolloutRequest(7, 0, 1))
SAMPLING = Sampling(
    group_size=2, temperature=0.1 + 0.2, top_p=1.0, top_k=0, max_response_tokens=6, seed=2**40, masked=True
)
PROMPTS = {
    0: VllmPrompt([5, 151_655, 7], [5, 151_655, 151_655, 7], [_picture(56, 28), _picture(28, 84)]),
    7: VllmPrompt([1, 2], [1, 2], []),
}
ANSWERS = (Answer(REQUESTS[0], (3, 4), (-1e-300, -0.1), "stop"), Answer(REQUESTS[1], (), (), "length"))
MESSAGES = [
    Generate(4, REQUESTS, PROMPTS, SAMPLING),
    GenerationProgress(4, 1, 3),
    Answers(4, ANSWERS, 2, 0.1, (0, 1e9)),
    Load(2**31, "weights_0_1"),
    *(BucketMessage(("a", "b"), ((2, 3), ()), dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    Loaded(),
    Loaded("w: misshapen"),
    Bye(),
    Stop(),
]


def _types(value: Any) -> Any:
    """Of the value and of all within: equal numbers may be of different types."""
    if isinstance(value, list | tuple):
        return type(value), [_types(each) for each in value]
    if isinstance(value, dict):
        return type(value), {name: _types(each) for name, each in value.items()}
    names = getattr(value, "__struct_fields__", None) or getattr(value, "__dataclass_fields__", ())
    return type(value), {name: _types(getattr(value, name)) for name in names}


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Message):
    found = decode(encode(message))
    assert found == message, "pictures are compared pixel by pixel"
    if not isinstance(message, Answers):  # whole numbers where floats stand arrive as floats
        assert _types(found) == _types(message)


def test_vllm_gets_the_prompts_it_always_got():
    assert PROMPTS[7].as_input() == {"prompt_token_ids": [1, 2]}
    prompt = PROMPTS[0].as_input()
    assert prompt == {"prompt_token_ids": [5, 151_655, 7], "multi_modal_data": {"image": PROMPTS[0].pictures}}


class _Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def _with(message: Message, **changes: Any) -> bytes:
    """A message of ours with fields that are not."""
    return msgspec.msgpack.encode(msgspec.to_builtins(msgspec.msgpack.decode(encode(message))) | changes)


NO_PICTURE = {"compact_ids": [], "full_ids": [], "pictures": [[9, 9, b"x"]]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (encode(Stop()) * 2, "trailing"),
        (encode(MESSAGES[0])[:-1], "truncated"),
        (msgspec.msgpack.encode({"type": "Line"}), "Invalid value 'Line'"),
        (msgspec.msgpack.encode(["Stop"]), "Expected `object`, got `array`"),
        (_with(Stop(), now=True), "unknown field `now`"),
        (_with(MESSAGES[0], sampling={}), "missing required field `group_size`"),
        (_with(MESSAGES[0], requests=[[1, 2, "3"]]), "Expected `object`, got `array`"),
        (_with(MESSAGES[4], dtype="Tensor"), "unknown dtype"),
        (_with(MESSAGES[4], dtype=[]), "unhashable"),
        (_with(MESSAGES[0], prompts={0: NO_PICTURE}), "1 bytes are no picture of 9 x 9"),
        (b"\x91" * 100_000, "no message"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(data, reason):
    with pytest.raises(ValueError, match=r"^no message: ") as refused:
        decode(data)
    assert reason in str(refused.value)


@pytest.fixture
def admitted() -> SimpleQueue[Connection]:
    return SimpleQueue()


@pytest.fixture
def listener(admitted) -> ConnectionListener:
    return ConnectionListener("127.0.0.1", KEY, admitted.put)


def test_a_line_reads_while_nobody_asks_and_says_when_it_ends(listener, admitted):
    mine: Inbox = SimpleQueue()
    theirs: Inbox = SimpleQueue()
    ended = threading.Event()
    near = Channel(connect(listener.host, listener.port, KEY), mine)
    far = Channel(admitted.get(timeout=10), theirs, ended.set)
    large = Loaded("x" * 2**24)  # more than the sockets hold: sending it would wait if nobody read
    near.send(large)
    near.send(Stop())
    near.close()
    assert [theirs.get(timeout=10) for _ in range(3)] == [(far, large), (far, Stop()), (far, None)] and ended.is_set()
    assert mine.get(timeout=10) == (near, None)
    far.send(Bye())  # into the void


def test_a_pickle_runs_nothing_and_ends_the_line(listener, admitted, tmp_path, capfd):
    stranger = connect(listener.host, listener.port, KEY)  # who even knows the key
    inbox: Inbox = SimpleQueue()
    line = Channel(admitted.get(timeout=10), inbox)
    stranger.send_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    assert inbox.get(timeout=10) == (line, None)
    assert not (tmp_path / "ran").exists()
    assert "papo: warning: what came over a line ends it: no message: " in capfd.readouterr().err


def test_a_message_that_says_it_is_endless_ends_the_line(listener, admitted):
    stranger = connect(listener.host, listener.port, KEY)
    inbox: Inbox = SimpleQueue()
    line = Channel(admitted.get(timeout=10), inbox)
    os.write(stranger.fileno(), struct.pack("!iQ", -1, 2**60))
    assert inbox.get(timeout=10) == (line, None)


def _strangers(listener: ConnectionListener) -> Iterator[bytes]:
    """What strangers say who do not know the key."""
    yield b""
    yield b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n"
    yield struct.pack("!iQ", -1, 2**60)
    yield struct.pack("!i", 16) + b"0" * 16  # as an answer by HMAC-MD5
    yield struct.pack("!i", 200) + pickle.dumps(_Runs(Path("/nowhere/at/all")))


def _hears_the_end(end: socket.socket) -> None:
    end.settimeout(10)
    with suppress(ConnectionResetError):
        while end.recv(2**10):
            pass


def test_strangers_hold_nobody_up_and_fill_no_log(listener, admitted, monkeypatch, capfd):
    monkeypatch.setattr(handshake, "_MOST_PENDING", 20)
    monkeypatch.setattr(handshake, "_LIMIT_S", 1000.0)
    strangers = []
    for said in [*_strangers(listener), *[b""] * 40]:
        strangers.append(socket.create_connection((listener.host, listener.port)))
        strangers[-1].sendall(said)
    with pytest.raises(AuthenticationError):
        connect(listener.host, listener.port, b"another key")
    rank = connect(listener.host, listener.port, KEY)
    rank.send_bytes(b"in")
    assert admitted.get(timeout=10).recv_bytes(2) == b"in" and admitted.empty()
    for stranger in strangers[:20]:  # those had to go, or said what is no answer
        _hears_the_end(stranger)
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("papo: warning: a connection from 127.0.0.1 to this engine's port ")


def test_a_silent_stranger_has_to_go_after_a_while(listener, monkeypatch):
    monkeypatch.setattr(handshake, "_LIMIT_S", 0.2)
    with socket.create_connection((listener.host, listener.port)) as stranger:
        stranger.sendall(b"\0")  # slow rather than silent
        _hears_the_end(stranger)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises((OSError, EOFError)),
    ):
        connect(*silent.getsockname(), KEY)


def test_an_engines_challenge_cannot_be_passed_on_to_a_rank(listener, admitted):
    """By whoever puts his own address in the store: the rank takes him for an engine and would answer for him."""
    with socket.create_server(("127.0.0.1", 0)) as relay:

        def pass_on() -> None:
            rank, _ = relay.accept()
            with rank, socket.create_connection((listener.host, listener.port)) as engine:
                for source, target in [(engine, rank), (rank, engine)] * 3:
                    target.sendall(source.recv(2**10))

        threading.Thread(target=pass_on, daemon=True).start()
        with pytest.raises((AuthenticationError, OSError, EOFError)):
            connect(*relay.getsockname(), KEY)
    assert admitted.empty()


def test_the_key_is_its_users_alone_and_gone_in_the_end(tmp_path):
    folder, store, previous = tmp_path / "run", dist.HashStore(), os.umask(0)
    try:
        with offered_key(folder, store):
            file = folder / "engines.key"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            told = EngineStore(store).key_fingerprint()
            key = read_key(folder, told, 0)
            assert len(key) == 32 and key.hex() not in told and fingerprint(key) == told
            assert make_key(folder) != key, "another start's"
            with pytest.raises(ValueError, match=r"engines\.key: is not this start's"):
                read_key(folder, told, 0)
    finally:
        os.umask(previous)
    assert list(folder.iterdir()) == []
    with pytest.raises(ValueError, match=r"engines\.key: does not appear here: run\.dir has to be on a disk that all"):
        read_key(folder, told, 0.2)


@pytest.mark.parametrize("leftover", ["open to all", "link", "pipe", "draft that is a link"])
def test_what_was_left_under_the_keys_name_is_neither_read_nor_written(leftover, tmp_path):
    file, elsewhere = tmp_path / "engines.key", tmp_path / "elsewhere"
    elsewhere.write_bytes(KEY)
    elsewhere.chmod(0o600)
    if leftover == "open to all":
        file.write_bytes(KEY)
        file.chmod(0o644)
    elif leftover == "pipe":
        os.mkfifo(file, 0o600)
    else:
        (tmp_path / "engines.key.tmp" if leftover == "draft that is a link" else file).symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"engines\.key: (is not a file of this user alone|Too many|does not appear)"):
        read_key(tmp_path, fingerprint(KEY), 0)
    key = make_key(tmp_path)
    assert read_key(tmp_path, fingerprint(key), 0) == key
    assert elsewhere.read_bytes() == KEY and stat.S_ISREG(file.lstat().st_mode)
