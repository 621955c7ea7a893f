"""A small model certified and trained with vLLM in the trainer's rank, by the commands that a user has.

    python3 tools/gpu_trial/colocated.py REPORT      in the project's root, with PYTHONPATH=.

`papo certify` with an eager engine, whose every part can be looked at, and `papo train` for three steps with an engine
under CUDA graphs that sleeps, at the same time. The report has what each said and its steps' figures, as soon as it
ends, and of one that this process's end cuts off what it had said by then.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path.cwd()
SHARED: dict[str, Any] = {
    "model__dtype": "bfloat16",
    "generation__engine": "vllm",
    "generation__kv_cache_gib": 1.0,
    "generation__gpu_memory_fraction": 0.2,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "certify": {"generation__enforce_eager": True},
    "train": {"train__steps": 3, "parallel__distributed_optimizer": True},
}
"""Settings by verb, in addition to `SHARED`; keys have `__` for the dot."""
SHOWN = ("step", "rollout_gap", "loss/total", "optim/grad_norm", "certify/", "engine/", "time/", "memory_gib/")
"""How the names of metrics begin."""
_SAID_LINES, _OTHER_LINES, _VALUE_LETTERS = 40, 25, 60
_EVERY_S = 0.2
_GRACE_S = 1.5
"""For each to end its ranks, of the seconds between a limit's SIGTERM and its SIGKILL."""


def main(report: Path) -> int:
    """1 where one of the two did not end with 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(tempfile.mkdtemp(prefix="colocated_"))
    running = {verb: start(verb, file) for verb, file in write_settings(folder).items()}
    codes: dict[str, int | None] = {}
    try:
        while running:
            for verb, process in list(running.items()):
                if process.poll() is not None:
                    codes[verb] = running.pop(verb).returncode
                    write(report, folder, verb, codes[verb])
            time.sleep(_EVERY_S)
    finally:
        for verb, process in running.items():
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)
            process.kill()
            write(report, folder, verb, None)
    return int(any(codes.values()))


def write_settings(folder: Path) -> dict[str, Path]:
    """A settings file a verb, in `folder` beside the inputs of both and the folders of their runs."""
    sys.path.insert(0, str(ROOT))
    from megatron_papo.config import dump_config
    from tests.parallel.certify_cases import MODEL
    from tests.support.tiny_run import CERTIFIED, make_inputs, tiny_run

    inputs, files = make_inputs(folder / "inputs", **MODEL), {}
    for verb, settings in SETTINGS.items():
        files[verb] = folder / f"{verb}.yaml"
        files[verb].write_text(dump_config(tiny_run(inputs, folder / verb, **(SHARED | CERTIFIED | settings))))
    return files


def arguments(verb: str, settings: Path) -> list[str]:
    """The arguments of the command `papo`."""
    return [verb, str(settings), "--ranks", "1"]


def start(verb: str, settings: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "megatron_papo", *arguments(verb, settings)]
    with settings.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def write(report: Path, folder: Path, verb: str, code: int | None) -> None:
    """Adds to the report; the whole of what was said goes to stdout. `code`: None where it was cut off."""
    lines = (folder / f"{verb}.log").read_text(errors="replace").splitlines()
    print("\n".join(lines), flush=True)
    said = [line for line in lines if line.startswith("papo:")] or lines[-_OTHER_LINES:]
    metrics = folder / verb / "metrics.jsonl"
    with report.open("a") as file:
        file.write(f"papo {verb}: {'CUT OFF' if code is None else f'exit code {code}'}\n")
        file.writelines(f"  {line}\n" for line in said[-_SAID_LINES:])
        for line in metrics.read_text().splitlines() if metrics.exists() else ():
            shown = {name: value for name, value in json.loads(line).items() if name.startswith(SHOWN)}
            file.write("  " + ", ".join(f"{name} {value}"[:_VALUE_LETTERS] for name, value in shown.items()) + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
