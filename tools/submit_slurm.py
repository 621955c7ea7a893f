"""Runs as Slurm jobs: check, submit, follow, list, stop, cancel and resume.

    python tools/submit_slurm.py CONFIG [key=value ...] [--dry-run] [--follow] [--chain N]
    python tools/submit_slurm.py list
    python tools/submit_slurm.py follow RUN_DIR_OR_JOB
    python tools/submit_slurm.py stop RUN_DIR_OR_JOB
    python tools/submit_slurm.py cancel RUN_DIR_OR_JOB
    python tools/submit_slurm.py resume RUN_DIR [key=value ...] [--dry-run] [--follow] [--chain N]

The settings are those that `papo train` reads; what the job asks for is their section `cluster`. Before anything is
submitted, layout, memory, inputs, packages and disk are checked. RUN_DIR/cluster keeps the script, the settings and a
line a job. `stop` lets a job save after its step, end, and not queue itself again; `cancel` ends it at once. Exit
status: 0 done; 1 a followed job failed; 2 refused, by us or by Slurm.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

ACTIONS = ("list", "follow", "stop", "cancel", "resume")


def main() -> int:
    from megatron_papo.text.untrusted import as_text

    words = sys.argv[1:]
    action = words[0] if words and words[0] in ACTIONS else "submit"
    options = _parser(action).parse_intermixed_args(words if action == "submit" else words[1:])
    try:
        if action == "list":
            return _list()
        if action == "follow":
            return _follow(options.which)
        if action in ("stop", "cancel"):
            return _end(action, options.which)
        return _submit(action, options)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"submit: error: {as_text(line)}", file=sys.stderr)
        return 2


def _parser(action: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit_slurm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if action in ("follow", "stop", "cancel"):
        parser.add_argument("which", metavar="RUN_DIR_OR_JOB")
    if action in ("submit", "resume"):
        if action == "resume":
            parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
        parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value")
        parser.add_argument("--dry-run", action="store_true", help="check, print the script, submit nothing")
        parser.add_argument("--follow", action="store_true", help="show state and output until the job ends")
        parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs, each after the one before")
    return parser


def _submit(action: str, options: argparse.Namespace) -> int:
    from megatron_papo.cluster.submit import plan, plan_again, submit, work_dir  # not before --help
    from megatron_papo.text.secret_values import text_without_secrets
    from megatron_papo.text.untrusted import as_text

    files = [Path(word) for word in options.settings if "=" not in word]
    overrides = [word for word in options.settings if "=" in word]
    if len(files) > (action == "submit") or options.chain < 1:
        raise ValueError(f"one settings file at most: {' '.join(map(str, files))}" if files else "--chain: at least 1")
    made_from = shlex.join(["python", *sys.argv])
    if action == "resume":
        run_dir = options.run_dir.absolute()
        os.chdir(work_dir(run_dir))
        made = plan_again(run_dir, overrides, made_from, options.chain)
    else:
        made = plan(files[0] if files else None, overrides, made_from, options.chain)
    for warning in made.warnings:
        print(f"submit: warning: {as_text(warning)}", file=sys.stderr)
    print(f"submit: {made.checked}", file=sys.stderr, flush=True)
    if options.dry_run:
        print(text_without_secrets(made.script), end="")
        return 0
    jobs = submit(made, options.chain)
    print(f"submit: job{'s' * (len(jobs) > 1)} {', '.join(jobs)}, {as_text(made.run_dir)}", file=sys.stderr, flush=True)
    return _follow(jobs[0], made.run_dir) if options.follow else 0


def _follow(which: str, run_dir: Path | None = None) -> int:
    from megatron_papo.cluster.follow import follow
    from megatron_papo.cluster.run_records import find

    if run_dir is None:
        run_dir, jobs = find(which)
        living = [job for job in jobs if not job.is_over] or jobs[-1:]
        if not living:
            raise ValueError(f"{which}: Slurm has no job of it any more; its output is under {which}/cluster")
        which = living[0].id
    job = which
    try:
        return follow(job, run_dir)
    except KeyboardInterrupt:
        print(f"\nsubmit: job {job} goes on; `submit_slurm.py follow {job}` shows it again, `cancel {job}` ends it")
        return 130


def _end(action: str, which: str) -> int:
    from megatron_papo.cluster.run_records import find
    from megatron_papo.cluster.slurm import cancel
    from megatron_papo.cluster.stop import stop
    from megatron_papo.text.untrusted import as_text

    run_dir, jobs = find(which)
    living = [job for job in jobs if not job.is_over]
    if not living:
        raise ValueError(f"{which}: has no job in the queue")
    if action == "stop":
        if run_dir is None:
            raise ValueError(f"{which}: no run's folder is known of this job; `cancel` ends it without a save")
        for line in stop(run_dir, living):
            print(f"submit: {as_text(line)}")
        return 0
    cancel([job.id for job in living])
    print(f"submit: cancelled job{'s' * (len(living) > 1)} {', '.join(job.id for job in living)}")
    return 0


def _list() -> int:
    from megatron_papo.cluster.listing import listing, print_listing

    print_listing(listing())
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_papo.runtime.needed_packages import check_packages

    check_packages()
    from megatron_papo.runtime.process import command

    sys.exit(command(main))
