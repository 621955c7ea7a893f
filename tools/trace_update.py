"""Traces updates on a fake H100, without a GPU: what memory they take at their peak, and where the host waits.

    python tools/trace_update.py                                      one row of both views, for each recomputation
    python tools/trace_update.py --recompute full --rows 4 --frozen
    python tools/trace_update.py --model Qwen3-VL-4B --layers 3 model.spec=local optim.precision_aware=false

Beside what is traced stands what `megatron_papo.costs.memory` counts, the figure that `papo check` and the planner go
by. A whole 3B takes a minute or two on one core. See `tools/fake_gpu` for what such a trace can and cannot show.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

from rich.console import Console
from rich.table import Table

from megatron_papo.config import ModelConfig
from megatron_papo.costs.memory import GIB
from megatron_papo.model.published_shapes import published_models
from tools.fake_gpu.cases import BENCHMARK, counted, shape_tree, update_case
from tools.fake_gpu.libraries import NoFakeGpu
from tools.fake_gpu.trace import Case, FakeGpu, Traced

MODES = get_args(ModelConfig.model_fields["recompute"].annotation)
COLUMNS = ("states", "passes", "counted", "optimizer's step", "counted", "waits")


def main() -> int:
    arguments = _arguments()
    work = replace(BENCHMARK, joint=not arguments.frozen, num_rows=arguments.rows)
    tree = shape_tree(arguments.model, arguments.layers, arguments.layers)
    settings = dict(each.split("=", 1) for each in arguments.settings)
    table = Table("recompute", *COLUMNS, title=f"{arguments.model}, rows of {work.row_tokens} tokens, GiB")
    waits: dict[str, int] = {}
    try:
        with FakeGpu() as gpu:
            for mode in arguments.recompute:
                case = update_case(tree, work, model__recompute=mode, **settings)
                traced = gpu.trace(case)
                waits |= traced.waits
                table.add_row(mode, *_cells(case, traced))
                print(f"traced recompute {mode}", file=sys.stderr, flush=True)
    except (NoFakeGpu, RuntimeError) as error:
        print(f"trace_update: {error}", file=sys.stderr)
        return 1
    Console().print(table)
    for line, times in sorted(waits.items()):
        print(f"{times:5d}  {line}")
    return 0


def _cells(case: Case, traced: Traced) -> list[str]:
    said = counted(case)
    values = (traced.states, traced.passes_peak, said.passes, traced.step_peak, said.step)
    return [*(f"{value / GIB:.2f}" for value in values), str(sum(traced.waits.values()))]


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-VL-3B", choices=published_models(), help="a published model")
    parser.add_argument("--layers", type=int, help="of language model and tower, instead of all")
    parser.add_argument("--recompute", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--rows", type=int, default=1, help="of the update, each a prompt with eight responses")
    parser.add_argument("--frozen", action="store_true", help="rows of one view, the masked one scored beforehand")
    parser.add_argument("settings", nargs="*", help="of the run, as behind `papo train`")
    return parser.parse_args()


if __name__ == "__main__":
    from megatron_papo.runtime.process import command

    sys.exit(command(main))
