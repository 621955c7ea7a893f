"""Keys, tokens and passwords in settings: which names ask for one, which texts are one, and a text without them.

Settings are copied: into RUN/config.yaml, TensorBoard, wandb, every checkpoint. So a variable that is named after a
secret is refused (`fault_of_variable`), and a value that looks like one is left out wherever settings, or errors that
quote them, are shown or kept (`without_secrets`). Imports the standard library only, for Python 3.9 too: the supervisor
of a cluster job uses it. Leaves out secrets that look like any other text.
"""

from __future__ import annotations

import re

LEFT_OUT = "<secret_left_out>"
"""Stands for what was left out; `load_config` takes no setting that holds it."""

_SECRET_WORDS = frozenset(
    ("KEY", "APIKEY", "TOKEN", "SECRET", "SECRETS", "PASSWORD", "PASSWD", "PASSPHRASE", "PASS", "PAT", "CREDENTIAL",
     "CREDENTIALS", "AUTH")
)  # fmt: skip
_PLACE_WORDS = frozenset(("FILE", "PATH", "DIR", "HOME", "SOCK", "SOCKET", "METHOD", "MODE", "TYPE"))
"""Last words of names that say where or how: SSH_AUTH_SOCK, HF_TOKEN_PATH."""
_PLACES = frozenset(("GOOGLE_APPLICATION_CREDENTIALS",))
"""Names of files, though they do not end so."""
_NO_SECRET = re.compile(r"(?i)\d{0,6}|true|false|yes|no|on|off")
"""HF_HUB_DISABLE_IMPLICIT_TOKEN=1 is a switch, NUM_KEY_VALUE_HEADS=8 a number."""

_ASSIGNED = re.compile(r"""(?:^|[\s;&|(])([A-Za-z_]\w*)=("[^"]*"|'[^']*'|[^\s;&|)]*)""")

_PREFIXED = (
    r"hf_[A-Za-z0-9]{20,}", r"sk-(?=[\w-]{0,200}\d)(?=[\w-]{0,200}[A-Z])[\w-]{20,}", r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    r"gh[oprsu]_[A-Za-z0-9]{30,}", r"github_pat_\w{20,}", r"glpat-[\w-]{20,}", r"xox[abeprs]-[\w-]{10,}",
    r"wandb_v1_\w{20,}",
)  # fmt: skip
_VALUES = (
    (re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(_PREFIXED)})"), LEFT_OUT),
    # wandb's older keys; commits look the same, and stand in the path of a snapshot or behind an @
    (re.compile(r"(?<![\w/@.-])[0-9a-f]{40}(?![\w/.-])"), LEFT_OUT),
    (re.compile(r"(?<=://)[^\s/?#@:]{0,200}:[^\s/?#]{0,500}(?=@)"), LEFT_OUT),
    (re.compile(r"(?i)([?&][\w.-]*(?:token|key|secret|signature|sig|password)=)[^&#\s]+"), rf"\1{LEFT_OUT}"),
    (re.compile(r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"), LEFT_OUT),
)


def without_secrets(value: object) -> object:
    """A tree of values, every text in it without what looks like a secret. Paths stay: files are looked for by them."""
    if isinstance(value, dict):
        return {key: without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(inner) for inner in value]
    return text_without_secrets(value) if isinstance(value, str) else value


def text_without_secrets(text: str) -> str:
    """With `LEFT_OUT` in place of each."""
    for pattern, instead in _VALUES:
        text = pattern.sub(instead, text)
    return text


def names_a_secret(name: str) -> bool:
    """Whether whole words of an environment variable's name say so: WANDB_API_KEY, not TOKENIZERS_PARALLELISM."""
    words = name.upper().split("_")
    return name.upper() not in _PLACES and words[-1] not in _PLACE_WORDS and not _SECRET_WORDS.isdisjoint(words)


def assigned(line: str) -> list[tuple[str, str]]:
    """The variables that a line of shell sets to texts written there, with them; not what it sets to `$(cat FILE)`."""
    assignments = ((name, value.strip("\"'")) for name, value in _ASSIGNED.findall(line))
    return [(name, value) for name, value in assignments if not value.startswith(("$", "`", "/", "~"))]


def fault_of_variable(key: str, name: str, value: str) -> str:
    """Why the setting `key` may not hold this variable; empty when it may."""
    if not names_a_secret(name) or _NO_SECRET.fullmatch(value):
        return ""
    return (
        f"{key}: {name} is named like a secret, and settings are kept in config.yaml, TensorBoard, wandb "
        f"and checkpoints; write `{name}=...` into a file that is yours alone (chmod 600) and name it by "
        "cluster.secrets_file, or export it in the shell that submits; for wandb and the hub `wandb login` and "
        "`hf auth login` do"
    )
