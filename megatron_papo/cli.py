"""`papo VERB [CONFIG.yaml] [key=value ...]`: reads and checks the settings, then starts the ranks.

Everything that can be refused is refused here, before any rank starts. Imports neither torch nor the verbs at the
top, so that `papo --help` and a refusal take a fraction of a second. Leaves out all work: each verb is a module.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from megatron_papo.config import Config, ConfigError, dump_config, load_config
from megatron_papo.process import command, go_on_without_readers
from megatron_papo.refuse import faults_of_fp8, faults_of_inputs, faults_of_ranks, num_engine_ranks

_VERBS = {
    "sft": "supervised warm-up on the demonstrations of data.train",
    "train": "reinforcement learning: GRPO or DAPO with PAPO's perception term",
    "certify": "what Hugging Face, trainer and engine make of the same prompts, part by part, without training",
    "eval": "avg@k on data.eval, with the images and with them masked",
    "score": "log-probs, entropy and perception KL of given responses, token by token",
}
_LOCKING = ("sft", "train", "certify")
_SETTINGS_HELP = "a YAML file of settings, and settings as key.path=value, which win over the file"
_EPILOG = "`papo VERB --dry-run` prints every setting and stops"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code: 0 done, 1 a rank failed, 2 refused settings."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    if options.verb == "doctor":
        from megatron_papo.doctor import main as doctor

        return doctor()
    config = None
    try:
        config = load_config(options.config, [*_implied(options), *options.overrides])
        if options.verb == "check":
            from megatron_papo.check import check

            if options.ranks is not None and options.ranks < 1:
                raise ConfigError(f"--ranks: {options.ranks} is no number of ranks")
            return check(options.of, config, options.ranks or config.cluster.num_ranks, options.json)
        num_ranks = _num_ranks(options.verb, config, options.ranks)
        if not options.dry_run:
            _check_given(options, config)
        _raise_any(faults_of_ranks(options.verb, config, num_ranks))
        _check_layout(options.verb, config, num_ranks - num_engine_ranks(options.verb, config))
    except ConfigError as error:
        return _refuse(error, config)
    return _run(options, config, num_ranks)


def _run(options: argparse.Namespace, config: Config, num_ranks: int) -> int:
    if not options.dry_run:
        go_on_without_readers()
    if _speaks():
        for warning in config.warnings():
            print(f"papo: warning: {warning}", file=sys.stderr)
    if options.dry_run:
        print(dump_config(config), end="")
        return 0
    from megatron_papo.launch import Work, launch
    from megatron_papo.observe.lock import RunHeld
    from megatron_papo.observe.notes import tell_torchrun

    args = (config, options.data, options.out) if options.verb == "score" else (config,)
    module = {"eval": "evaluate", "certify": "certify.command"}.get(options.verb, options.verb)
    if options.verb == "train" and config.train.ahead:
        module = "train_ahead"
    work = Work(f"megatron_papo.{module}:main", args, config.run.dir)
    try:
        with _alone(options.verb, config):
            return launch(work, num_ranks)
    except RunHeld as error:  # without a note in RUN/failures, which would end the run that is there
        tell_torchrun(f"papo: error: {error}")
        if _speaks():
            print(f"papo: error: {error}", file=sys.stderr)
        return 2


def _alone(verb: str, config: Config) -> AbstractContextManager[None]:
    """The lock of run.dir, for the verbs that write what a later run goes on with; the others look at it."""
    from megatron_papo.launch import outer_rank
    from megatron_papo.observe.lock import Holder, alone_in

    outer = outer_rank(os.environ)
    environ = os.environ | (outer or {})
    first = outer is None or environ["RANK"] == "0"
    mine = Holder.here(verb, environ, config.run.heartbeat_limit_s)
    return alone_in(config.run.dir, mine, takes=first and verb in _LOCKING)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="papo", description="Perception-aware reinforcement learning of vision-language models.", epilog=_EPILOG
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in _VERBS.items():
        _add_verb(verbs.add_parser(name, help=text, description=text, epilog=_EPILOG), name)
    _add_check(verbs)
    text = "what this machine has, and what each absence costs"
    verbs.add_parser("doctor", help=text, description=text)
    options, rest = parser.parse_known_args(argv)
    # argparse takes one run of positional arguments; those between and after options come back as the rest
    unknown = [word for word in rest if word.startswith("-") or options.verb == "doctor"]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.verb != "doctor":
        words = [*options.settings, *rest]
        files = [word for word in words if "=" not in word]
        if len(files) > 1:
            parser.error(f"one settings file at most, got {' '.join(files)}")
        options.config = Path(files[0]) if files else None
        options.overrides = [word for word in words if "=" in word]
    return options


def _add_verb(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value", help=_SETTINGS_HELP)
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="local ranks to start; by default parallel.tensor x parallel.pipeline, and those of separate engines",
    )
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


def _implied(options: argparse.Namespace) -> list[str]:
    """Settings that an option stands for: `--model X` also takes back what a file says of other weights."""
    if options.model is None:
        return []
    if not options.model.is_dir():
        raise ConfigError(f"--model: {options.model} is not a folder")
    for override in options.overrides:
        if override.partition("=")[0] in ("model.path", "model.checkpoint", "model.random_init"):
            raise ConfigError(f"--model: names the weights, and {override} others; give one of the two")
    return [f"model.path={options.model}", "model.checkpoint=null", "model.random_init=false"]


def _num_ranks(verb: str, config: Config, asked: int | None) -> int:
    """Ranks of the whole run: what torchrun or srun started, else `asked`, else what the layout needs."""
    from megatron_papo.launch import outer_rank

    outer = outer_rank(os.environ)
    if outer is not None:
        world_size = int(outer.get("WORLD_SIZE") or os.environ["WORLD_SIZE"])
        if asked is not None and asked != world_size:
            raise ConfigError(f"--ranks: {asked} asked for, but {world_size} were started from outside")
        return world_size
    needed, engines = config.parallel.tensor * config.parallel.pipeline, num_engine_ranks(verb, config)
    if engines:  # how many are too few is for faults_of_ranks to say
        return needed + engines if asked is None else asked
    if asked is not None and (asked < 1 or asked % needed):
        raise ConfigError(
            f"--ranks: {asked} is no multiple of parallel.tensor={config.parallel.tensor} "
            f"x parallel.pipeline={config.parallel.pipeline}"
        )
    return asked or needed


def _check_given(options: argparse.Namespace, config: Config) -> None:
    """Refuses a verb that lacks what it works on, or names what is not there."""
    if options.verb == "score" and not options.data.is_file():
        raise ConfigError(f"--data: {options.data}: no such file")
    _raise_any(faults_of_inputs(options.verb, config))


def _raise_any(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def _check_layout(verb: str, config: Config, num_ranks: int) -> None:
    """Refuses a layout that the model's shape does not allow: of the trainer's ranks, and of an engine's."""
    if config.model.path is None:
        return
    from megatron_papo.model.shape import ModelShape, check_layout, faults_of_engine

    try:
        shape = ModelShape.from_folder(config.model.path)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from None
    check_layout(config, shape, num_ranks)
    _raise_any(faults_of_fp8(config, shape))
    if verb in ("train", "certify", "eval"):
        _raise_any(faults_of_engine(config, shape))


def _speaks() -> bool:
    """False on all but one of the ranks that were started from outside."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _refuse(error: ConfigError, config: Config | None) -> int:
    """A task of srun leaves a note too: what it lacks may be there on the node of rank 0, which speaks for all."""
    from megatron_papo.launch import outer_rank
    from megatron_papo.observe.failures import Failure
    from megatron_papo.observe.notes import leave_note, tell_torchrun

    tell_torchrun(f"papo: error: {error}")
    outer = outer_rank(os.environ) if "SLURM_STEP_ID" in os.environ else None
    if outer is not None and config is not None:
        rank = int(outer.get("RANK") or os.environ["RANK"])
        leave_note(config.run.dir, Failure(rank, time.time(), "config", type(error).__name__, str(error)))
    if _speaks():
        for line in str(error).splitlines():
            print(f"papo: error: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(command(main))
