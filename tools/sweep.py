"""Strong and weak scaling: one recipe at several numbers of ranks, as Slurm job arrays.

    python tools/sweep.py SWEEP.yaml [key=value ...] [--dry-run] [--wait] [--retry]
    python tools/sweep.py SWEEP.yaml --gather
    python tools/sweep.py SWEEP.yaml --gather --compare OTHER.yaml ...
    python tools/sweep.py SWEEP.yaml --local

Every point is checked, and all that ask for the same resources are one job array; points that are done are kept, so
the same command goes on with an interrupted sweep. A point that cannot be, that Slurm refuses or that fails is a row of
the table with its reason. Exit status: 0 all points done, or submitted; 1 some are not; 2 refused. See
docs/planning.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path


def main() -> int:
    from megatron_papo.text.untrusted import as_text

    options = _parser().parse_intermixed_args()
    try:
        return _sweep(options)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"sweep: error: {as_text(line)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        told = "the same command goes on" if options.local else "jobs go on; --gather shows how far they are"
        print(f"\nsweep: {told}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all points, behind the file's")
    parser.add_argument("--dry-run", action="store_true", help="check, print what would be submitted, write nothing")
    parser.add_argument("--wait", action="store_true", help="show states until all points are over, then the table")
    parser.add_argument("--gather", action="store_true", help="submit nothing; table and plot of what there is")
    parser.add_argument(
        "--compare", nargs="+", type=Path, default=[], metavar="OTHER.yaml", help="those sweeps in one figure with it"
    )
    parser.add_argument("--local", action="store_true", help="without Slurm: one after the other on this machine")
    parser.add_argument("--retry", action="store_true", help="failed points again")
    return parser


def _sweep(options: argparse.Namespace) -> int:
    from megatron_papo.sweep.points import load_sweep, points_of
    from megatron_papo.sweep.run_sweep import begin, finish, wait  # not before --help

    sweep = load_sweep(options.sweep, options.overrides)
    points = points_of(sweep)
    others = [load_sweep(path) for path in options.compare]
    if not options.gather:
        made_from = shlex.join(["python", *sys.argv])
        all_well = begin(sweep, points, made_from, dry_run=options.dry_run, local=options.local, retry=options.retry)
        if options.dry_run or not (options.wait or options.local):
            return 0 if all_well else 1
        if options.wait:
            wait(sweep, points)
    return finish(sweep, points, others)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_papo.runtime.needed_packages import check_packages

    check_packages()
    from megatron_papo.runtime.process import command

    sys.exit(command(main))
