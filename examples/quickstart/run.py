"""The quickstart: a tiny vision-language model learns to look, from random weights, on two cores without a GPU.

Makes the data and the model, then runs four `papo` commands, each printed as one could type it: a supervised warm-up,
an evaluation, reinforcement with PAPO on two tensor-parallel ranks, the same evaluation again. Ends with a table of
before and after and with the places of what was written. The commands run in this process, so that torch and
Megatron-Core are imported once; their ranks are processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two ranks, two cores

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_papo.runtime.needed_packages import check_packages

check_packages()

from families import DEFAULT, FAMILIES
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule

from megatron_papo.cli import main as papo_main
from megatron_papo.distributed.visible_gpus import num_visible_gpus
from megatron_papo.files.small_files import STEP_NAME, read_records

HERE = Path(__file__).resolve().parent
ROWS = {
    "accuracy": "accuracy",
    "format": "format rate",
    "masked_accuracy": "accuracy, image masked",
    "gap": "gap: what seeing is worth",
    "perception_kl": "perception KL (nats a token)",
}
CURVES = {
    "reward/accuracy": "accuracy of rollouts",
    "reward/format": "format rate of rollouts",
    "perception_kl": "perception KL, nats a token",
    "eval/accuracy": "held-out accuracy",
    "eval/masked_accuracy": "held-out accuracy, image masked",
    "eval/gap": "held-out gap",
    "entropy": "entropy of sampled tokens, nats",
    "ref_kl": "KL to the reference, nats a token",
    "optim/grad_norm": "gradient norm",
}
console = Console(highlight=False)


def quickstart(out: Path, family: str, engine: str, seed: int, overrides: list[str]) -> dict[str, float]:
    """Everything; `overrides` go to every command. Returns the gains, by name of score."""
    from make_data import make_data
    from make_model import make_model

    seconds: dict[str, float] = {}
    with timed("data and model", seconds):
        for leftover in ("data", "model", "warmup", "before", "papo", "after"):
            shutil.rmtree(out / leftover, ignore_errors=True)
        paths = make_data(out / "data", seed, family=family)
        model = make_model(out / "model", seed, family)
    warmup, prompts, heldout = paths["warmup"], paths["train"], paths["heldout"]
    # one GPU has no room for two ranks, and the figures are those of two
    ranks = ["--ranks=2", *(["--cpu"] if num_visible_gpus(os.environ) == 1 and engine == "transformers" else [])]
    shared = [*ranks, f"run.seed={seed}", f"generation.engine={engine}", *overrides]
    warm, trained = out / "warmup" / "export", out / "papo" / "export"
    with timed("supervised warm-up", seconds):
        papo("sft", "sft.yaml", out / "warmup", f"model.path={model}", f"data.train={warmup}", *shared)
    with timed("evaluation before", seconds):
        papo("eval", "eval.yaml", out / "before", f"model.path={warm}", f"data.eval={heldout}", *shared)
    with timed("reinforcement with PAPO", seconds):
        papo(
            "train", "train.yaml", out / "papo",
            f"model.path={warm}", f"data.train={prompts}", f"data.eval={heldout}", *shared,
        )  # fmt: skip
    with timed("evaluation after", seconds):
        papo("eval", "eval.yaml", out / "after", f"model.path={trained}", f"data.eval={heldout}", *shared)
    return report(out, {"family": family, "seed": seed, "engine": engine, "seconds": seconds})


def papo(verb: str, config: str, folder: Path, *settings: str) -> None:
    """Runs one command of the command line; ends this program when it fails."""
    arguments = [verb, os.path.relpath(HERE / config), f"run.dir={folder}", *settings]
    console.print(f"[bold]$ papo {escape(shlex.join(arguments))}[/]", soft_wrap=True)
    code = papo_main(arguments)
    if code:
        sys.exit(code)


@contextmanager
def timed(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """A heading, and how long it took, kept under `title`."""
    console.print(Rule(title, style="dim"))
    start = time.monotonic()
    yield
    seconds[title] = round(time.monotonic() - start, 1)
    console.print(f"[dim]{title}: {seconds[title]:.0f} s[/]")


def report(out: Path, facts: dict) -> dict[str, float]:
    """Prints the table and the paths, writes curves, table and summary; the gains."""
    from megatron_papo.observe.report import before_after_table, curves_png

    before, after = (last_scores(out / name / "eval.jsonl") for name in ("before", "after"))
    gains = {name: after[name] - before[name] for name in ROWS}
    console.print(Rule("what was learned", style="dim"))
    named = [{title: scores[name] for name, title in ROWS.items()} for scores in (before, after)]
    table = before_after_table(*named, title="Held-out pictures", console=console)
    (out / "table.md").write_text(table)
    curves = curves_png(
        out / "papo" / "metrics.jsonl", out / "curves.png", list(CURVES), CURVES, "PAPO on handwritten digits"
    )
    total = sum(facts["seconds"].values())
    summary = {**facts, "before": before, "after": after, "gains": gains, "total_seconds": round(total, 1)}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for title, place in (
        ("model (Hugging Face)", out / "papo" / "export"),
        ("checkpoint (Megatron)", newest_checkpoint(out / "papo" / "checkpoints")),
        ("curves", curves),
        ("sample page", max((out / "papo" / "samples").glob("*.html"))),
        ("every number", out / "papo" / "metrics.jsonl"),
        ("summary", out / "summary.json"),
    ):
        console.print(f"  {title:<22} [bold]{escape(str(place))}[/]", soft_wrap=True)
    console.print(f"  {total / 60:.1f} minutes in all; accuracy on held-out pictures {gains['accuracy']:+.2f}")
    return gains


def last_scores(path: Path) -> dict[str, float]:
    """The scores of the newest evaluation in a file of `papo eval`."""
    return read_records(path)[-1]


def newest_checkpoint(folder: Path) -> Path:
    return max(path for path in folder.iterdir() if STEP_NAME.fullmatch(path.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=list(FAMILIES), default=DEFAULT)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="what was left there is replaced")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for all four commands")
    arguments = parser.parse_args()
    if arguments.out.is_file():
        parser.error(f"--out: {arguments.out} is a file, where a folder belongs")
    quickstart(arguments.out, arguments.family, arguments.engine, arguments.seed, arguments.overrides)


if __name__ == "__main__":
    main()
