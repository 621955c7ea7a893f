"""Which layout of a model fits a cluster, and how fast it will be.

    python tools/plan.py --model Qwen2.5-VL-72B --nodes 8 [--gpu H100] [CONFIG.yaml] [key=value ...]
    python tools/plan.py --model Qwen2.5-VL-7B --nodes 1 --explain --out layout.yaml
    python tools/plan.py --model Qwen2.5-VL-72B --nodes 8 --scale 8 64 512 --published
    python tools/plan.py ... --calibrate RUN_DIR --calibration this_cluster.json

Every way to lay the model out is estimated: memory of each GPU by part, seconds of each stage of a step. Printed are
the fastest that fit, one a layout (`--every`: all ways); `--explain` says why the rest do not, `--out` writes the best
(or --choose) as settings. Batch, group size and lengths are those of the settings; what the data is like, and with it
the seconds, is said by the options. Memory is that of `papo check`. Exit status: 0 found; 2 refused, or nothing fits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_papo.config import Config
    from megatron_papo.model.shape import ModelShape
    from megatron_papo.planning.assumptions import Assumptions


def main() -> int:
    from megatron_papo.text.untrusted import as_text

    options = _parser().parse_intermixed_args()
    try:
        return _plan(options)
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"plan: error: {as_text(line)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml | key=value", help="what `papo train` would read")
    models = "a published model (Qwen2.5-VL-7B, Qwen3-VL-8B; any other word lists all), or a Hugging Face folder"
    parser.add_argument("--model", required=True, help=models)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpu", default="H100", help="A100-40GB, A100, H100, H200, B200 or CPU")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--text-tokens", type=int, default=150, help="of a prompt, beside its images")
    parser.add_argument("--image-tokens", type=int, default=600, help="of a prompt")
    parser.add_argument("--response-tokens", type=int, help="mean; by default a quarter of the longest")
    parser.add_argument("--rows", type=int, default=10, help="layouts to print")
    parser.add_argument("--every", action="store_true", help="every way of a layout, those that do not fit too")
    parser.add_argument("--explain", action="store_true", help="say why the other layouts do not fit")
    parser.add_argument("--choose", metavar="NAME", help="another layout than the fastest, as the table names it")
    parser.add_argument("--out", type=Path, metavar="FILE.yaml", help="write the chosen layout as settings")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table there too")
    text = "the best layout of each of these numbers of nodes, with the same batch and with one that grows"
    parser.add_argument("--scale", type=int, nargs="+", metavar="NODES", help=text)
    parser.add_argument("--published", action="store_true", help="published Megatron runs beside the prediction, first")
    parser.add_argument("--calibration", type=Path, metavar="FILE.json", help="assumptions to use, or to write")
    parser.add_argument("--calibrate", type=Path, metavar="RUN_DIR", help="fit the assumptions to a run first")
    return parser


def _plan(options: argparse.Namespace) -> int:
    from megatron_papo.config import ConfigError, load_config  # not before --help
    from megatron_papo.costs.hardware import DEVICES, Cluster
    from megatron_papo.model.published_shapes import shape_named
    from megatron_papo.planning.assumptions import Assumptions
    from megatron_papo.planning.plan_page import (
        markdown,
        markdown_reasons,
        overrides_yaml,
        premises,
        print_plan,
        print_published,
    )
    from megatron_papo.planning.ranking import plan
    from megatron_papo.planning.workload import Workload

    if options.gpu not in DEVICES:
        raise ConfigError(f"--gpu: {options.gpu} is none of {', '.join(DEVICES)}")
    if options.nodes < 1 or options.gpus_per_node < 1:
        raise ConfigError("--nodes, --gpus-per-node: at least 1")
    files = [word for word in options.settings if "=" not in word]
    if len(files) > 1:
        raise ConfigError(f"one settings file at most, got {' '.join(files)}")
    defaults = ["generation.engine=vllm", "model.dtype=bfloat16"] if not files else []
    words = [word for word in options.settings if "=" in word]
    config = load_config(Path(files[0]) if files else None, [*defaults, *words])
    shape, cluster = shape_named(options.model), Cluster(DEVICES[options.gpu], options.nodes, options.gpus_per_node)
    if options.calibrate is not None:
        from megatron_papo.planning.measured_run import calibrated

        assumed = calibrated(options.calibrate, DEVICES[options.gpu])
        if options.calibration is not None:
            assumed.save(options.calibration)
    else:
        assumed = Assumptions.load(options.calibration) if options.calibration else Assumptions()
    work = Workload.of(
        config, shape, text_tokens=options.text_tokens, image_tokens=options.image_tokens,
        response_tokens=options.response_tokens,
    )  # fmt: skip
    if options.published:
        print_published(assumed)
    if options.scale:
        return _scale(options, config, shape, assumed)
    layouts = plan(config, shape, cluster, assumed, work)
    if not layouts.fitting:
        reasons = [f"{each.name}: {each.reason}" for each in layouts.reasons()]
        raise ConfigError(
            "\n".join([f"{options.model} fits {cluster.num_gpus} x {options.gpu} in no layout", *reasons])
        )
    shown = (layouts.every() if options.every else layouts.best_of_each_layout())[: options.rows]
    print_plan(layouts, shown, premises(config, shape, work), options.explain)
    chosen = layouts.best
    if options.choose is not None:
        named = [each for each in layouts.best_of_each_layout() if each.candidate.name == options.choose]
        if not named:
            raise ConfigError(f"--choose: {options.choose} is no layout that fits")
        chosen = named[0]
    if options.markdown is not None:
        options.markdown.write_text(markdown(shown) + "\n" + markdown_reasons(layouts.reasons()))
    if options.out is not None:
        options.out.write_text(overrides_yaml(chosen, cluster.gpu.memory_gib))
        print(f"plan: {chosen.candidate.name}: {options.out}")
    return 0


def _scale(options: argparse.Namespace, config: Config, shape: ModelShape, assumed: Assumptions) -> int:
    from megatron_papo.costs.hardware import DEVICES
    from megatron_papo.planning.plan_page import print_scale, scale_markdown
    from megatron_papo.planning.scale import scale

    lengths = {name: getattr(options, name) for name in ("text_tokens", "image_tokens", "response_tokens")}
    text = ""
    for weak, title in ((False, "the same batch on more GPUs"), (True, "a batch that grows with the GPUs")):
        points = scale(config, shape, DEVICES[options.gpu], options.scale, assumed, lengths, weak=weak)
        print_scale(points, title)
        text += f"{title}:\n\n{scale_markdown(points)}\n"
    if options.markdown is not None:
        options.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from megatron_papo.runtime.needed_packages import check_packages

    check_packages()
    from megatron_papo.runtime.process import command

    sys.exit(command(main))
