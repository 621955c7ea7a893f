"""What a run will reach through the network: data sets on the Hugging Face hub, and wandb's server with its key.

All questions are asked at once, each with a short time limit. A name that the hub does not have is a fault; whatever
the network leaves open is a warning, since the nodes may see what this machine does not. Nothing is downloaded. With
HF_HUB_OFFLINE the hub is not asked. No key is printed. Imports no torch.
"""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from megatron_papo.config import Config
from megatron_papo.files.data_suffixes import BUILDERS
from megatron_papo.runtime.daemon_thread import in_daemon_thread
from megatron_papo.text.secret_values import text_without_secrets

LIMIT_S = 4.0
"""Seconds for one question."""
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WANDB = "https://api.wandb.ai"


@dataclass(frozen=True)
class Reply:
    """A line that begins with the setting's path."""

    text: str
    is_fault: bool = False


Question = Callable[[], Reply | None]


def ask_network(verb: str, config: Config, data: Mapping[str, str]) -> list[Reply]:
    """What is wrong or unknown of the services that `verb` needs. `data`: key of the settings -> name of a data set;
    local ones are passed over."""
    names = {name: key for key, name in data.items() if is_hub_name(name)}
    questions: list[tuple[str, Question]] = [
        (f"{key}: {name}: the hub", lambda name=name, key=key: ask_hub(key, name))  # type: ignore[misc]
        for name, key in names.items()
    ]
    if verb in ("train", "sft") and config.observe.wandb == "online":
        questions.append((f"observe.wandb: {_wandb_url(os.environ)}", lambda: _ask_wandb(os.environ)))
    return [finding for finding in answers_of(questions) if finding is not None]


def is_hub_name(name: str) -> bool:
    """Whether the name of a data set can only be one of the hub: nothing of that name is here, and it is neither a
    file's name nor a pattern or address."""
    return bool(_HUB_NAME.fullmatch(name)) and Path(name).suffix not in BUILDERS and not os.path.exists(name)


def answers_of(questions: Sequence[tuple[str, Question]]) -> list[Reply | None]:
    """The answers, in order, of questions that are asked at once: a name service that does not answer holds up a
    thread, which is then left behind."""
    asked = [in_daemon_thread("ask the network", question) for _, question in questions]
    wait(asked, LIMIT_S + 1)
    return [_reply(what, answer) for (what, _), answer in zip(questions, asked, strict=True)]


def _reply(what: str, answer: Future[Reply | None]) -> Reply | None:
    if not answer.done():
        return Reply(f"{what} did not answer within {LIMIT_S:.0f} s")
    error = answer.exception()
    return answer.result() if error is None else Reply(f"{what} could not be asked ({_shortly(error)})")


@cache
def ask_hub(key: str, name: str) -> Reply | None:
    from huggingface_hub import HfApi, constants, errors  # slow to import, and not needed where data is local

    if constants.HF_HUB_OFFLINE:
        cached = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
        missing = f"HF_HUB_OFFLINE is set and {constants.HF_HUB_CACHE} has no data set of this name"
        return None if cached.is_dir() else Reply(f"{key}: {name}: {missing}")
    try:
        HfApi().dataset_info(name, timeout=LIMIT_S)
    except errors.GatedRepoError:
        return Reply(f"{key}: {name}: its owner lets in who has asked: accept the terms on its page, `hf auth login`")
    except errors.RepositoryNotFoundError:
        return Reply(
            f"{key}: {name}: neither a file or folder here nor a data set on the hub that this account sees "
            "(`hf auth login` for a private one)",
            is_fault=True,
        )
    except Exception as error:  # of the network, of many types
        return Reply(f"{key}: {name}: the hub could not be asked ({_shortly(error)}): is it in the nodes' cache?")
    return None


def _ask_wandb(environ: Mapping[str, str]) -> Reply | None:
    url = _wandb_url(environ)
    host = urlsplit(url).hostname or url
    key = environ.get("WANDB_API_KEY") or _netrc_key(environ, host)
    if key is None:
        remedy = "`wandb login`, the variable WANDB_API_KEY, or observe.wandb=offline"
        return Reply(f"observe.wandb: no key for {host} in the environment or in ~/.netrc: {remedy}")
    request = urllib.request.Request(
        f"{url}/graphql",
        data=json.dumps({"query": "query { viewer { username } }"}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Basic {base64.b64encode(f'api:{key}'.encode()).decode()}",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
            viewer = json.loads(answer.read(65536)).get("data", {}).get("viewer")
    except urllib.error.HTTPError as error:
        refused = error.code in (401, 403)
        said = "does not take this key" if refused else f"answered with HTTP status {error.code}"
        return Reply(f"observe.wandb: {host} {said}")
    except (OSError, ValueError, AttributeError) as error:
        return Reply(f"observe.wandb: {host} could not be asked ({_shortly(error)}): observe.wandb=offline needs none")
    return None if viewer else Reply(f"observe.wandb: {host} does not take this key")


def _wandb_url(environ: Mapping[str, str]) -> str:
    return (environ.get("WANDB_BASE_URL") or _WANDB).rstrip("/")


def _netrc_key(environ: Mapping[str, str], host: str) -> str | None:
    """The password for `host` in the file that wandb writes it to; None where there is none, or it cannot be read."""
    file = Path(environ.get("NETRC") or Path.home() / ".netrc")
    try:
        found = netrc.netrc(str(file)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return found[2] if found else None


def _shortly(error: BaseException) -> str:
    reason = str(getattr(error, "reason", error)).strip().splitlines() or [""]
    return text_without_secrets(f"{type(error).__name__}: {reason[0]}"[:160])
