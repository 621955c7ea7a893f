"""Hugging Face folders to checkpoints and back, and their comparison, bit for bit.

    python tools/convert_checkpoint.py hf-to-megatron HF_FOLDER CHECKPOINT
    python tools/convert_checkpoint.py megatron-to-hf CHECKPOINT HF_FOLDER
    python tools/convert_checkpoint.py verify HF_FOLDER CHECKPOINT

A checkpoint does not depend on a layout: any tensor and pipeline parallelism loads it. Runs in one process on the CPU.
Exit status: 0 done, or the same weights; 1 different weights; 2 a folder that cannot be read.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return _run(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    into = verbs.add_parser("hf-to-megatron", help="a Hugging Face folder as a checkpoint")
    into.add_argument("source", type=Path, help="folder with config.json and *.safetensors")
    into.add_argument("target", type=Path, help="checkpoint folder to write")
    back = verbs.add_parser("megatron-to-hf", help="a checkpoint's weights as a Hugging Face folder")
    back.add_argument("source", type=Path, help="checkpoint folder (a step_... folder of a run)")
    back.add_argument("target", type=Path, help="folder to write")
    back.add_argument("--source", dest="files", type=Path, help="where config, tokenizer and processor come from; "
                      "by default the checkpoint itself")  # fmt: skip
    same = verbs.add_parser("verify", help="compare the weights of two folders, each of either kind")
    same.add_argument("first", type=Path)
    same.add_argument("second", type=Path)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", module="megatron")  # of what it would do on a GPU
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from megatron_papo.accelerator import adapt_megatron  # after the parser: --help does not wait for torch
    from megatron_papo.checkpoint.convert import checkpoint_to_hf, differences, hf_to_checkpoint
    from megatron_papo.config import ParallelConfig
    from megatron_papo.parallel import initialize, shutdown

    adapt_megatron()
    initialize(ParallelConfig())
    try:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(arguments.verb, total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            if arguments.verb == "verify":
                found = differences(arguments.first, arguments.second, progress=progress)
            elif arguments.verb == "hf-to-megatron":
                hf_to_checkpoint(arguments.source, arguments.target, progress)
            else:
                checkpoint_to_hf(arguments.source, arguments.target, arguments.files, progress)
    finally:
        shutdown()
    if arguments.verb != "verify":
        print(f"wrote {arguments.target}")
        return 0
    print("\n".join(found) if found else "the same, bit for bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
