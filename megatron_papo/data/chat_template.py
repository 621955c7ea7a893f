"""A chat template at arm's length: rendered by `template_worker`, which never takes long or much.

The worker is a fresh Python, not a fork: a process that holds torch and gloo threads must not fork. It starts with the
first conversation, is shared by whoever renders the same template in this process, and ends with it.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

LIMIT_S = 5.0
"""Processor time of one conversation, which takes a ten-thousandth of it."""
_START_S = 120.0
_WALL_S = 60.0
"""For the same on a busy machine."""
_MOST_BYTES = 128 * 2**20
"""Most bytes of a reply; the worker by itself sends less."""
_MOST_LETTERS = 2**20
"""Most letters of a template."""


class TemplateFailed(ValueError):
    """The template does not render a conversation, or not what is in it."""


class TemplateTookTooMuch(TemplateFailed):
    """It took too long or too much memory, and would again."""


@cache
def chat_template(text: str) -> ChatTemplate:
    """The one of this process. Raises TemplateFailed for a text that is too long."""
    if len(text) > _MOST_LETTERS:
        raise TemplateFailed(f"has {len(text)} letters, at most {_MOST_LETTERS} are read")
    return ChatTemplate(text)


class ChatTemplate:
    """Renders conversations as transformers does. May be called from any thread."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._worker: _Worker | None = None
        self._lock = threading.Lock()

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, **more: Any) -> str:
        """`more`: what else the template may read, by name: the tokenizer's special tokens. Raises TemplateFailed."""
        given = {"tools": None, "documents": None, **more, "messages": messages}
        with self._lock:
            if self._worker is None or not self._worker.usable():
                self._worker = _Worker()
                self._ask(self._text, _START_S)
            return self._ask({**given, "add_generation_prompt": add_generation_prompt}, _WALL_S)

    def _ask(self, what: Any, wall_s: float) -> str:
        assert self._worker is not None
        reply = self._worker.ask(json.dumps(what, ensure_ascii=False).encode("utf-8", "surrogatepass"), wall_s)
        if reply is None:
            self._worker = None
            raise TemplateTookTooMuch(f"takes more than {LIMIT_S:g} s or too much memory")
        told = json.loads(reply.decode("utf-8", "surrogatepass"))
        if "error" in told:
            if what is self._text:
                self._worker = None
            raise TemplateFailed(told["error"])
        return str(told["text"])


class _Worker:
    """The process, of the process that started it: ranks may be forked from that one."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("template_worker.py")
        command = [sys.executable, str(script), str(LIMIT_S)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._owner = os.getpid()
        self._end = weakref.finalize(self, _end, self._process, self._owner)

    def usable(self) -> bool:
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, line: bytes, wall_s: float) -> bytes | None:
        """The reply to a line; None when there was none in time, and then the worker is ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
            reply = self._read_line(time.monotonic() + wall_s)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self._end()
        return reply

    def _read_line(self, until: float) -> bytes | None:
        assert self._process.stdout is not None
        descriptor, received = self._process.stdout.fileno(), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if len(received) > _MOST_BYTES or not selector.select(max(0.0, until - time.monotonic())):
                    return None
                piece = os.read(descriptor, 2**20)
                if not piece:
                    return None
                received += piece
        return bytes(received)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
    process.wait()
