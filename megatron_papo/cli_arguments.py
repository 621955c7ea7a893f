"""What may stand on the command line of `papo`, and the texts of its help. Leaves out what the words mean: `cli.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_papo.text.untrusted import as_text

_VERBS = {
    "sft": "supervised warm-up on the demonstrations of data.train",
    "train": "reinforcement learning: GRPO or DAPO with PAPO's perception term",
    "certify": "what Hugging Face, trainer and engine make of the same prompts, part by part, without training",
    "eval": "avg@k on data.eval, with the images and with them masked",
    "score": "log-probs, entropy and perception KL of given responses, token by token",
}
_SETTINGS_HELP = "a YAML file of settings, and settings as key.path=value, which win over the file"
_EPILOG = "`papo VERB --dry-run` prints every setting and stops"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The words as `verb`, `config` (a path or None), `overrides` and the verb's own options. Leaves the process with
    exit code 2 where they are none."""
    parser = argparse.ArgumentParser(
        prog="papo", description="Perception-aware reinforcement learning of vision-language models.", epilog=_EPILOG
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in _VERBS.items():
        _add_verb(verbs.add_parser(name, help=text, description=text, epilog=_EPILOG), name)
    _add_check(verbs)
    _add_export(verbs)
    _add_data(verbs)
    text = "what this machine has, and what each absence costs"
    verbs.add_parser("doctor", help=text, description=text)
    options, rest = parser.parse_known_args(argv)
    # argparse takes one run of positional arguments; those between and after options come back as the rest
    without_settings = options.verb in ("doctor", "export")
    unknown = [word for word in rest if word.startswith("-") or without_settings]
    if unknown:
        parser.error(as_text(f"unrecognized arguments: {' '.join(unknown)}"))
    if not without_settings:
        words = [*options.settings, *rest]
        files = [word for word in words if "=" not in word]
        if len(files) > 1:
            parser.error(as_text(f"one settings file at most, got {' '.join(files)}"))
        options.config = Path(files[0]) if files else None
        options.overrides = [word for word in words if "=" in word]
    return options


def _add_verb(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value", help=_SETTINGS_HELP)
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="local ranks to start; by default one for each GPU of this machine, and without a GPU "
        "parallel.tensor x parallel.pipeline and those of separate engines",
    )
    parser.add_argument("--cpu", action="store_true", help="use no GPU, and take a model of any size")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and stop")
    parser.set_defaults(model=None)
    if name in ("eval", "score"):
        text = "a Hugging Face folder or a Megatron checkpoint; instead of model.path"
        parser.add_argument("--model", type=Path, required=name == "score", metavar="PATH", help=text)
    if name == "score":
        text = "JSON lines with problem, images (paths) and response"
        parser.add_argument("--data", type=Path, required=True, metavar="IN.jsonl", help=text)
        text = "the same rows with tokens, policy_logprobs, masked_logprobs, entropy, perception_kl"
        parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help=text)


def _add_check(verbs: Any) -> None:
    text = "what can be known before a rank starts: settings, inputs, layout, memory, packages, room on the disk"
    parser = verbs.add_parser("check", help=text, description=text)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value", help=_SETTINGS_HELP)
    text = "ranks of the whole run; by default those of the section cluster"
    parser.add_argument("--ranks", type=int, metavar="N", help=text)
    parser.add_argument("--of", choices=("train", "sft", "eval"), default="train", help="the verb to check for")
    parser.add_argument("--json", action="store_true", help="print the resolved settings as JSON when all is well")
    parser.set_defaults(model=None)


def _add_export(verbs: Any) -> None:
    text = "a run's checkpoint as a Hugging Face folder, for transformers, vLLM and the hub"
    parser = verbs.add_parser("export", help=text, description=text)
    text = "a run's folder (its newest checkpoint is meant), a checkpoint, or a Hugging Face folder to upload"
    parser.add_argument("source", type=Path, metavar="RUN | CHECKPOINT | FOLDER", help=text)
    text = "folder to write; by default RUN/exports/step_<step>"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=text)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="of a run: the checkpoint of the best held-out accuracy")
    which.add_argument("--step", type=int, metavar="N", help="of a run: the checkpoint after N steps")
    text = "of the tensors that are written; by default the checkpoint's own"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=text)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that convert (1)")
    text = "upload the folder to the hub as this repository; the token is HF_TOKEN's or that of `hf auth login`"
    parser.add_argument("--push", metavar="OWNER/NAME", help=text)
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private otherwise")


def _add_data(verbs: Any) -> None:
    text = "what the trainer will see of the data: bad rows with reasons, lengths, pictures, a prompt in full; no ranks"
    parser = verbs.add_parser("data", help=text, description=text)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value", help=_SETTINGS_HELP)
    of = parser.add_mutually_exclusive_group()
    text = "the verb that will read the data: data.train for train and sft, data.eval for eval"
    of.add_argument("--of", choices=("train", "sft", "eval"), default="train", help=text)
    of.add_argument("--eval", action="store_const", const="eval", dest="of", help="the same as --of eval")
    parser.add_argument("--limit", type=int, metavar="N", help="read N rows, at even distances; by default all")
    parser.add_argument("--out", type=Path, metavar="PAGE.html", help="where the page goes; by default RUN/data.html")
    parser.set_defaults(model=None)
