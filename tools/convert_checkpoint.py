"""Hugging Face folders to checkpoints and back, tensor by tensor, and the proof of either.

    python tools/convert_checkpoint.py hf-to-megatron HF_FOLDER CHECKPOINT [--dtype bfloat16] [--workers 4]
    python tools/convert_checkpoint.py megatron-to-hf CHECKPOINT HF_FOLDER
    python tools/convert_checkpoint.py verify FOLDER [--source SOURCE]    a converted folder, from its manifest
    python tools/convert_checkpoint.py verify HF_FOLDER CHECKPOINT        any two folders, bit for bit

A checkpoint does not depend on a layout: any tensor and pipeline parallelism loads it. Runs on the CPU, with any
number of workers here, or as one of those that srun or torchrun started over several machines. Interrupted, the same
command goes on where it was. Exit status: 0 done, or the same weights; 1 different weights; 2 what cannot be read or
written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

GIB, GB = 2**30, 10**9


def main() -> int:
    arguments = _parser().parse_args()
    from megatron_papo.runtime.process import go_on_without_readers
    from megatron_papo.text.untrusted import LINES, as_text

    go_on_without_readers()
    try:
        return _run(arguments)
    except (ValueError, OSError) as error:
        from megatron_papo.conversion.workers import reason_of

        print(as_text(reason_of(error), LINES), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (1); under srun "
                        "or torchrun their tasks are the workers")  # fmt: skip
    shared.add_argument("--memory-gib", type=float, default=2.0, metavar="GIB",
                        help="most memory that a worker takes, libraries included (2)")  # fmt: skip
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the target; by default the source's own. "
                         "To float32 is exact, to bfloat16 rounds to nearest, ties to even")  # fmt: skip
    writing.add_argument("--file-gb", type=float, default=2.0, metavar="GB",
                         help="most that a file of the target holds, but one parameter at least (2)")  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    into = verbs.add_parser("hf-to-megatron", parents=[shared, writing], help="a Hugging Face folder as a checkpoint")
    into.add_argument(
        "first", type=Path, metavar="source", help="folder with config.json and model.safetensors or its index"
    )
    into.add_argument("second", type=Path, metavar="target", help="checkpoint folder to write")
    back = verbs.add_parser("megatron-to-hf", parents=[shared, writing],
                            help="a checkpoint's weights as a Hugging Face folder")  # fmt: skip
    back.add_argument("first", type=Path, metavar="source", help="checkpoint folder (a step_... folder of a run)")
    back.add_argument("second", type=Path, metavar="target", help="folder to write")
    back.add_argument("--source", dest="files", type=Path, help="where config, tokenizer and processor come from; "
                      "by default the checkpoint itself")  # fmt: skip
    same = verbs.add_parser("verify", parents=[shared], help="prove a converted folder, or compare two folders")
    same.add_argument("first", type=Path, metavar="folder")
    same.add_argument("second", type=Path, metavar="other", nargs="?", help="compare with this one, bit for bit")
    same.add_argument("--source", dest="files", type=Path, help="hash what was converted, too")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # after the parser: --help does not wait for torch
    from megatron_papo.conversion.run_conversion import ConversionRequest, run_conversion

    given = {"dtype": arguments.dtype, "file_bytes": int(arguments.file_gb * GB)} if "dtype" in arguments else {}
    memory_bytes, files = int(arguments.memory_gib * GIB), getattr(arguments, "files", None)
    request = ConversionRequest(arguments.verb, arguments.first, arguments.second, memory_bytes, files=files, **given)
    return run_conversion(request, arguments.workers)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_papo.runtime.needed_packages import check_packages

    check_packages()
    from megatron_papo.runtime.process import command

    sys.exit(command(main))
