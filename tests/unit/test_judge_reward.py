"""The judge of the examples against a local server that fails now and then: no network."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from examples.judge_reward import score_of
from megatron_papo.config import RewardConfig
from megatron_papo.rewards import Rewarder, asking
from megatron_papo.types import Group, ModelInputs, Prompt, Rollout

PNG = b"\x89PNG and more"


class Server(ThreadingHTTPServer):
    """Replies by the text it is asked about, and by how often it was asked about it."""

    daemon_threads = True
    request_queue_size = 32

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    def asked(self, answer: str) -> int:
        """How often it was asked about this answer."""
        return sum(f"<answer>\n{answer}\n" in body["messages"][1]["content"][-1]["text"] for body in self.bodies)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
        answer = body["messages"][1]["content"][-1]["text"].split("<answer>\n")[1].split("\n</answer>")[0]
        status, said = REPLIES[answer](self.server.asked(answer), self.server)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def says(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def _slow(_: int, server: Server) -> tuple[int, bytes]:
    server.ended.wait(30)
    return 200, says("Score: 10")


REPLIES = {
    "good": lambda _, __: (200, says("Right.\nScore: 10")),
    "half": lambda _, __: (200, says("Half right.\n**Score: 5/10**")),
    "away at first": lambda asked, _: (500, b"") if asked < 3 else (200, says("Score: 7")),
    "busy at first": lambda asked, _: (429, b"later") if asked < 2 else (200, says("Score: 1")),
    "garbage at first": lambda asked, _: (200, b"<html>") if asked < 2 else (200, says("score: 2")),
    "never sure": lambda _, __: (200, says("I cannot say. Score: 11")),
    "odd": lambda _, __: (200, b'{"choices": []}'),
    "slow": _slow,
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(asking, "FIRST_PAUSE_S", 0.001)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
        monkeypatch.setenv("JUDGE_MODEL", "judge")
        monkeypatch.setenv("JUDGE_API_KEY", "a key")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.ended.set()
        server.shutdown()


def _asked(answers: list[str], **reward: Any) -> tuple[Group, list[str]]:
    """A group of these answers with its rewards, and why some have none."""
    prompt = Prompt("train:0", 0, "how many?", "3", (PNG,), ModelInputs(torch.tensor([1]), None, None))
    group = Group(prompt, tuple(Rollout(index, (7,), (0.0,), text, "stop", 0) for index, text in enumerate(answers)))
    with Rewarder(RewardConfig(function="examples.judge_reward:judge", format_weight=0.0, **reward)) as rewarder:
        (found,) = rewarder.reward([group])
        return found, [failed.reason for _, failed in rewarder.take_failures()]


def test_a_judge_that_fails_now_and_then_costs_only_the_rows_that_it_never_judges(server):
    found, reasons = _asked(list(REPLIES)[:-1], concurrency=8, retries=2)
    assert found.reward_parts["judge"] == (1.0, 0.5, 0.7, 0.1, 0.2, 0.0, 0.0)
    assert found.reward_parts["failed"] == (0.0,) * 5 + (1.0,) * 2 and found.rewards == found.reward_parts["judge"]
    assert "no score from 0 to 10" in reasons[0] and "no chat completion" in reasons[1]
    assert [server.asked(answer) for answer in REPLIES] == [1, 1, 3, 2, 2, 3, 3, 0]
    assert server.keys == {"Bearer a key"} and server.bodies[0]["model"] == "judge"
    picture, text = server.bodies[0]["messages"][1]["content"]
    assert picture["image_url"]["url"] == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert text["text"].startswith("Question:\nhow many?\n\nRight answer: 3\n")


def test_a_judge_that_is_slow_is_not_waited_for(server):
    _, reasons = _asked(["slow"], retries=1, function_timeout_s=0.2)
    assert reasons == ["failed: TimeoutError: no answer within reward.function_timeout_s=0.2"]
    assert server.asked("slow") == 2


def test_a_judge_without_an_address_is_named(monkeypatch):
    monkeypatch.delenv("JUDGE_MODEL", raising=False)
    _, (reason,) = _asked(["good"])
    assert reason.startswith("failed: ValueError: the environment variable JUDGE_MODEL is not set")


@pytest.mark.parametrize(
    "reply, score",
    [
        ("Score: 3", 0.3), ("fine\n\n**Score:** 10.", 1.0), ("SCORE = 7.5", 0.75), ("Score: 8/10\n", 0.8),
        ("", None), ("Score: 10\nor not", None), ("Score: 100", None), ("Score: -3", None), ("ten", None),
    ],
)  # fmt: skip
def test_a_score_is_read_from_the_last_line_alone(reply, score):
    if score is None:
        with pytest.raises(ValueError, match="no score from 0 to 10"):
            score_of(reply)
    else:
        assert score_of(reply) == score
