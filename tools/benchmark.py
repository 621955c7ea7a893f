"""Measures the package on this machine, and what it can be compared with beside it.

    python tools/benchmark.py update     one optimizer update, against TRL's GRPO and PAPO in plain PyTorch
    python tools/benchmark.py step       a whole step, against TRL's
    python tools/benchmark.py head       the language-model head, against logits that are made whole
    python tools/benchmark.py families   an update of each model family, against PAPO in plain PyTorch
    python tools/benchmark.py growth     an update against group size, prompt length and number of pictures
    python tools/benchmark.py handover   weights from shards to whole tensors, in buckets
    python tools/benchmark.py ahead      a step whose rollouts are made while the step before trains; needs vLLM
    python tools/benchmark.py save       training with checkpoints in the background, against training without
    python tools/benchmark.py look       the first look at a model's weights, against their load
    python tools/benchmark.py convert    checkpoint conversion against cp, 1 to 17 GB; needs 34 GB of disk
    python tools/benchmark.py fp8        what emulated FP8 does to log-probs, and which layers it comes from
    python tools/benchmark.py plan       the planner, fitted to one rank, against updates in several layouts
    python tools/benchmark.py overheads  what commands cost before they work, and a report of progress within a stage
    python tools/benchmark.py gpu        all that a GPU is for, part by part; --write: into docs/benchmarks.md

`update` and `step` need TRL: `make bench` installs it. All but `gpu` runs on one thread a rank without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.which in ("update", "step") and find_spec("trl") is None:
        parser.error(f"{arguments.which} needs TRL: `make bench` installs it")
    from benchmarks.quiet import quieten
    from benchmarks.table import print_rows, write_rows

    quieten()
    if arguments.which == "gpu":
        return _gpu(parser, arguments)
    module = importlib.import_module(f"benchmarks.{arguments.which}")
    options = {} if arguments.which == "head" else {"rounds": arguments.rounds}
    if arguments.which == "growth":
        options["plot"] = arguments.plot
    if arguments.which == "convert":
        options |= {"folder": arguments.folder, "sizes": arguments.sizes_gb}
    if arguments.which == "fp8":
        options["model"] = arguments.model
    rows = module.run(arguments.quick, **options)
    print_rows(rows, f"{arguments.which}{' (quick)' if arguments.quick else ''}")
    if arguments.json:
        write_rows(rows, arguments.json)
    return 0


def _gpu(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.command import DOCUMENT, Targets, Wanted, run
    from benchmarks.gpu.fitting import MODES
    from benchmarks.gpu.one_part import PARTS
    from benchmarks.gpu.rows import SHAPES, Options

    on_gpu = torch.cuda.is_available()
    shape = arguments.shape or ("3b" if on_gpu else "tiny")
    try:
        parts = [Wanted.parse(part) for part in arguments.part or PARTS]
    except ValueError as error:
        parser.error(f"--part {error}")
    if arguments.recompute not in (None, *MODES):
        parser.error(f"--recompute {arguments.recompute}: there are {', '.join(MODES)}")
    if arguments.write and not on_gpu:
        parser.error(f"--write needs a GPU: {DOCUMENT.name} holds what a GPU measured, and there is none here")
    if shape not in SHAPES:
        parser.error(f"--shape {shape}: there are {', '.join(SHAPES)}")
    if not (shape.startswith("tiny") or on_gpu):
        parser.error(f"--shape {shape} needs a GPU: take tiny or tiny-qwen3")
    rounds = arguments.rounds or (1 if arguments.quick else 5 if arguments.budget is None else 3)
    options = Options(shape, arguments.quick, rounds, arguments.recompute)
    targets = Targets(arguments.json, DOCUMENT if arguments.write else None)
    return run(parts, options, targets, arguments.budget)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = "update step head families growth handover ahead save look convert fp8 plan overheads gpu"
    parser.add_argument("which", choices=sides.split())
    parser.add_argument("--quick", action="store_true", help="small and few: within a minute, to see that it runs")
    parser.add_argument("--rounds", type=int, help="times that every side is measured, in turns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="growth: draw the curves there, as PNG")
    parser.add_argument("--folder", type=Path, help="convert: the disk to measure, by default that of /tmp")
    parser.add_argument("--sizes-gb", type=float, nargs="+", metavar="GB", help="convert: these instead of 1, 2, 4, 8 "
                        "and the whole 7B model")  # fmt: skip
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="fp8: measure this Hugging Face folder")
    parser.add_argument("--part", action="append", metavar="NAME[=S][:quick]", help="gpu: this part alone, small, or "
                        "in S seconds where time is short; may be given again")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="S", help="gpu: seconds of all parts together; one for which "
                        "too few are left is not begun")  # fmt: skip
    parser.add_argument("--shape", help="gpu: 3b or tiny of Qwen2.5-VL, 4b or tiny-qwen3 of Qwen3-VL; by default 3b "
                        "with a GPU, else tiny")  # fmt: skip
    parser.add_argument("--recompute", metavar="MODE", help="gpu: update and fp8 measure this recomputation alone, and "
                        "do not look for the least that fits")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="gpu: write the parts' tables into docs/benchmarks.md")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # this folder's package, whatever else is installed
    from megatron_papo.runtime.needed_packages import check_packages

    check_packages()
    from megatron_papo.runtime.process import command

    sys.exit(command(main))
