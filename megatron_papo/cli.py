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
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from megatron_papo.cli_arguments import parse_arguments
from megatron_papo.config import Config, ConfigError, dump_config, load_config
from megatron_papo.distributed.visible_gpus import HIDDEN, num_visible_gpus
from megatron_papo.model.shape import ModelShape, check_layout, faults_of_engine
from megatron_papo.preflight.inputs import (
    fault_of_folder,
    fault_of_run_dir,
    faults_of_data,
    faults_of_inputs,
    not_a_folder,
)
from megatron_papo.preflight.layout_faults import faults_of_fp8, faults_of_ranks, num_engine_ranks
from megatron_papo.preflight.local_ranks import faults_of_cpu, local_ranks
from megatron_papo.preflight.model_files import fault_of_processor
from megatron_papo.preflight.shared_memory import warnings_of_shared_memory
from megatron_papo.runtime.caches import caches_that_can_be_written, use_own_folders
from megatron_papo.runtime.process import command, go_on_without_readers
from megatron_papo.text.secret_values import text_without_secrets
from megatron_papo.text.untrusted import as_text

_LOCKING = ("sft", "train", "certify")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 a rank failed, 2 refused settings."""
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    if options.verb == "doctor":
        from megatron_papo.preflight.doctor import main as doctor

        return doctor()
    if options.verb == "export":
        return _export(options)
    config = None
    try:
        _check_shell()
        config = load_config(options.config, [*_implied(options), *options.overrides])
        use_own_folders(config.run, os.environ)
        if options.verb == "check":
            from megatron_papo.preflight.check import check

            if options.ranks is not None and options.ranks < 1:
                raise ConfigError(f"--ranks: {options.ranks} is no number of ranks")
            return check(options.of, config, options.ranks or config.cluster.num_ranks, options.json)
        if options.verb == "data":
            return _report_data(options, config)
        if options.cpu:
            os.environ.update(HIDDEN)
        num_ranks = _num_ranks(options, config)
        if not options.dry_run:
            _check_given(options, config)
        _raise_any(faults_of_ranks(options.verb, config, num_ranks))
        _check_layout(options, config, num_ranks - num_engine_ranks(options.verb, config))
    except ConfigError as error:
        return _refuse(error, config)
    except OSError as error:  # of this machine
        return _refuse(ConfigError(f"{error.filename}: {error.strerror}" if error.filename else str(error)), config)
    try:
        return _run(options, config, num_ranks)
    except ConfigError as error:  # of the folders that the ranks would need
        return _refuse(error, config)


def _export(options: argparse.Namespace) -> int:
    from megatron_papo.conversion.export import ExportRequest, export

    go_on_without_readers()
    names = ("source", "out", "best", "step", "dtype", "workers", "push", "public")
    try:
        return export(ExportRequest(**{name: getattr(options, name) for name in names}))
    except ValueError as error:
        return _refuse(ConfigError(str(error)), None)
    except OSError as error:
        return _refuse(ConfigError(f"{error.filename}: {error.strerror}" if error.filename else str(error)), None)


def _run(options: argparse.Namespace, config: Config, num_ranks: int) -> int:
    if not options.dry_run:
        go_on_without_readers()
    if _speaks():
        for warning in [*config.warnings(), *_doubts_of_this_machine(options)]:
            print(f"papo: warning: {as_text(warning)}", file=sys.stderr)
    if options.dry_run:
        print(dump_config(config), end="")
        return 0
    from megatron_papo.runtime.failure_notes import tell_torchrun
    from megatron_papo.runtime.launch import Work, launch
    from megatron_papo.runtime.run_lock import RunHeld

    args: tuple[Any, ...] = (config,)
    if options.verb == "score":
        args = (config, options.data, options.out)
    elif options.verb in ("train", "sft"):
        from megatron_papo.planning.measured_run import step_planner

        args = (config, step_planner)
    module = {"eval": "evaluate", "certify": "parity.run_certify"}.get(options.verb, options.verb)
    if options.verb == "train" and config.train.ahead:
        module = "train_ahead"
    work = Work(f"megatron_papo.{module}:main", args, config.run.dir, saves=options.verb in ("train", "sft"))
    try:
        with _run_lock(options.verb, config), caches_that_can_be_written(os.environ) as instead:
            if instead is not None and _speaks():
                text = f"HOME: is no folder that can be written to: caches of libraries are in {instead} until the end"
                print(f"papo: warning: {as_text(text)}", file=sys.stderr, flush=True)
            return launch(work, num_ranks)
    except RunHeld as error:  # without a note in RUN/failures, which would end the run that is there
        tell_torchrun(f"papo: error: {error}")
        if _speaks():
            print(f"papo: error: {as_text(error)}", file=sys.stderr)
        return 2


def _report_data(options: argparse.Namespace, config: Config) -> int:
    """`papo data`. Raises ConfigError for settings, options and data that cannot be read."""
    out = options.out or config.run.dir / "data.html"
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit: {options.limit} is no number of rows")
    folder = [f"--out: {out}: is a folder"] if os.path.isdir(out) else fault_of_folder("--out", out.parent)
    _raise_any([*faults_of_data(options.of, config), *folder])
    if config.model.path is not None:
        _shape_in(config.model.path, config)
    from megatron_papo.data_report import main as report_data

    try:
        return report_data(config, options.of, options.limit, out)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _doubts_of_this_machine(options: argparse.Namespace) -> list[str]:
    """What may end ranks that this command starts here; a job's first step looks for the others (`papo check`)."""
    several = not options.dry_run and _world_outside() is None and num_visible_gpus(os.environ) > 1
    return warnings_of_shared_memory() if several else []


def _run_lock(verb: str, config: Config) -> AbstractContextManager[None]:
    """The lock of run.dir, for the verbs that write what a later run goes on with; the others look at it."""
    from megatron_papo.runtime.launch import outer_rank
    from megatron_papo.runtime.run_lock import Holder, exclusive_run

    outer = outer_rank(os.environ)
    environ = os.environ | (outer or {})
    first = outer is None or environ["RANK"] == "0"
    mine = Holder.here(verb, environ, config.run.heartbeat_limit_s)
    return exclusive_run(config.run.dir, mine, takes=first and verb in _LOCKING)


def _implied(options: argparse.Namespace) -> list[str]:
    """Settings that an option stands for: `--model X` also takes back what a file says of other weights."""
    if options.model is None:
        return []
    if not os.path.isdir(options.model):
        raise ConfigError(f"--model: {options.model} {not_a_folder(options.model)}")
    for override in options.overrides:
        if override.partition("=")[0] in ("model.path", "model.checkpoint", "model.random_init"):
            raise ConfigError(f"--model: names the weights, and {override} others; give one of the two")
    return [f"model.path={options.model}", "model.checkpoint=null", "model.random_init=false"]


def _num_ranks(options: argparse.Namespace, config: Config) -> int:
    """Ranks of the whole run: what torchrun or srun started, else those of this machine."""
    world_size = _world_outside()
    if world_size is not None:
        if options.ranks is not None and options.ranks != world_size:
            raise ConfigError(f"--ranks: {options.ranks} asked for, but {world_size} were started from outside")
        return world_size
    num_gpus = 0 if options.dry_run else num_visible_gpus(os.environ)
    return local_ranks(options.verb, config, options.ranks, num_gpus)


def _world_outside() -> int | None:
    """Ranks that torchrun or srun started, this one among them; None where they did not."""
    from megatron_papo.runtime.launch import outer_rank

    try:
        outer = outer_rank(os.environ)
        if outer is None:
            return None
        rank, world_size = (int(outer.get(name) or os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    except ValueError as error:
        raise ConfigError(f"the variables of torchrun or srun (RANK, WORLD_SIZE, SLURM_...): {error}") from None
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK={rank} is none of WORLD_SIZE={world_size} ranks")
    return world_size


def _check_shell() -> None:
    try:
        Path.cwd()
    except OSError:
        raise ConfigError("the working folder is not there any more: cd to another one") from None


def _check_given(options: argparse.Namespace, config: Config) -> None:
    """Refuses a verb that lacks what it works on, names what is not there, or cannot write what it makes."""
    faults = []
    if options.verb == "score" and not os.path.isfile(options.data):
        faults.append(f"--data: {options.data}: no such file")
    if options.verb == "score":
        folder = os.path.isdir(options.out)
        faults += [f"--out: {options.out}: is a folder"] if folder else fault_of_folder("--out", options.out.parent)
    faults += faults_of_inputs(options.verb, config)
    if _world_outside() is None:  # a job has checked it on one node; on another it may be there at the next attempt
        faults += fault_of_run_dir(config)
    _raise_any(faults)


def _raise_any(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def _check_layout(options: argparse.Namespace, config: Config, num_ranks: int) -> None:
    """Refuses a layout of the trainer's ranks or of an engine's that the model's shape does not allow, and a machine
    without a GPU for a large model."""
    verb = options.verb
    if config.model.path is None:
        return
    shape = _shape_in(config.model.path, config)
    check_layout(config, shape, num_ranks)
    if not (options.cpu or options.dry_run or num_visible_gpus(os.environ)) and _world_outside() is None:
        _raise_any(list(faults_of_cpu(verb, config, shape, num_ranks)))
    _raise_any(faults_of_fp8(config, shape))
    if verb in ("train", "certify", "eval"):
        _raise_any(faults_of_engine(config, shape))


def _shape_in(folder: Path, config: Config) -> ModelShape:
    """The shape of the model in `folder`, which is model.path. Raises ConfigError for a model that is not trained here,
    and for a processor of another model."""
    try:
        shape = ModelShape.from_folder(folder)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from None
    _raise_any([fault] if (fault := fault_of_processor(config, shape)) else [])
    return shape


def _speaks() -> bool:
    """False on all but one of the ranks that were started from outside."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _refuse(error: ConfigError, config: Config | None) -> int:
    """Prints why settings are refused; returns the exit code. A task of srun leaves a note too: what it lacks may be
    there on the node of rank 0, which speaks for all."""
    from megatron_papo.runtime.failure_notes import leave_note, tell_torchrun
    from megatron_papo.runtime.failures import Failure
    from megatron_papo.runtime.launch import outer_rank

    said = text_without_secrets(str(error))
    tell_torchrun(f"papo: error: {said}")
    with suppress(ValueError):  # of variables that are no numbers, which may be what is refused
        outer = outer_rank(os.environ) if "SLURM_STEP_ID" in os.environ else None
        if outer is not None and config is not None:
            rank = int(outer.get("RANK") or os.environ["RANK"])
            leave_note(config.run.dir, Failure(rank, time.time(), "config", type(error).__name__, said))
    if _speaks():
        for line in said.splitlines():
            print(f"papo: error: {as_text(line)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(command(main))
