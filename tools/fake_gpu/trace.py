"""Traces updates of a policy on a fake H100: memory at its peak, waits of the host, dtypes of products.

A process of its own that was started with the fake GPU answers every case on a line of JSON. Without pipeline the
update is the real one, from rows on the host to the optimizer's step (`optimization/pipeline.py`); of a pipeline's
stage its forward passes, then as many backward passes, and the step, since a schedule would wait for stages that are
not there. Kernels that are compiled at run time are left out (`_no_kernels`); what else torch.compile would fuse is
counted by its parts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tools.fake_gpu.libraries import build, environment
from tools.fake_gpu.rows import Work

ROOT = Path(__file__).resolve().parents[2]
_ANSWER = "traced "


@dataclass(frozen=True)
class Case:
    tree: dict[str, Any]
    """The tree of the model's config.json."""
    work: Work
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings by key, e.g. {"model.recompute": "full"}."""
    num_ranks: int = 1
    rank: int = 0
    in_flight: int = 1
    """Number of rows that a pipeline stage has in flight at a time."""


@dataclass(frozen=True)
class Traced:
    """Bytes on the GPU, and what else was seen of one update, with the optimizer's states there before."""

    weights_and_gradients: int
    states: int
    """Bytes that stay between updates: weights, gradients, the optimizer's states."""
    scoring_peak: int
    """Peak while the log-probs of a frozen masked branch are scored; 0 where none are."""
    passes_peak: int
    """Peak of forward and backward."""
    passes_peak_in: str
    step_peak: int
    """Peak of the optimizer's step."""
    waits: dict[str, int]
    """How often the host waits in the update, by `file:function: how`."""
    products: dict[str, int]
    """Products of matrices on the GPU, by dtypes."""
    parameters: list[str]
    """Kinds of parameters there are: `dtype on device`."""


class FakeGpu:
    """A process that sees a fake H100 and traces what it is asked for, one case at a time. A context manager.

    `python`: an interpreter that loads libraries as it starts. Raises NoFakeGpu where there can be none.
    """

    def __init__(self, python: str = sys.executable):
        self._python = python

    def __enter__(self) -> FakeGpu:
        self._folder = Path(tempfile.mkdtemp(prefix="papo_fake_gpu_"))
        try:
            build(self._folder)
            self._log = (self._folder / "log").open("w+")
            command = [self._python, "-m", "tools.fake_gpu.trace"]
            streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
            environ = environment(self._folder)
            self._process = subprocess.Popen(command, cwd=ROOT, env=environ, text=True, **streams)
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        return self

    def trace(self, case: Case) -> Traced:
        """Raises RuntimeError with the reason where the case fails."""
        return Traced(**self._ask({"case": asdict(case)}))

    def after_fork(self) -> str:
        """What a process finds that was forked after everything was imported and asks for the GPU: its device, or the
        error. Before the first case: a process that has used the GPU cannot hand it on."""
        return self._ask({"fork": True})["found"]

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # its end is seen below
            print(json.dumps(what), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                answer = json.loads(line.removeprefix(_ANSWER))
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        self._log.seek(0)
        raise RuntimeError(f"the process with the fake GPU ended: {self._log.read().strip()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder)


def main() -> None:
    """The main function of the process with the fake GPU: answers each line of standard input until there are no
    more."""
    import torch

    import megatron_papo.train  # noqa: F401  all that a rank imports

    if not torch.cuda.is_available():
        raise SystemExit("the libraries of the fake GPU were not loaded as this interpreter started")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "fork" in asked:
                answer: dict[str, Any] = {"found": _device_after_fork()}
            else:
                tree = asked["case"]
                answer = asdict(trace(Case(**(tree | {"work": Work(**tree["work"])}))))
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(f"{_ANSWER}{json.dumps(answer)}", flush=True)
    os._exit(0)  # an interpreter with all of this takes seconds to end


def _device_after_fork() -> str:
    import torch

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.cuda.init()
            answer = f"cuda:{torch.cuda.current_device()}"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        answer = said.read()
    os.waitpid(child, 0)
    return answer


def trace(case: Case) -> Traced:
    """Traces one case, in a process that sees the fake GPU."""
    from megatron_papo.config import load_config
    from megatron_papo.distributed.layout import shutdown
    from megatron_papo.model.shape import ModelShape
    from tools.fake_gpu.exchanges import world
    from tools.fake_gpu.rows import make_rows
    from tools.fake_gpu.tracing import traced

    config = load_config(None, [f"{name}={value}" for name, value in case.settings.items()])
    shape = ModelShape.from_dict(case.tree)
    rows = make_rows(case.work, shape)
    with world(case.rank, case.num_ranks), traced() as watched:
        try:
            return _traced(case, config, shape, rows, watched)
        finally:
            shutdown()


def _traced(case: Case, config: Any, shape: Any, rows: Any, watched: Any) -> Traced:
    from megatron_papo.checkpoint.optimizer_state import allocate
    from megatron_papo.distributed.accelerator import adapt_megatron, seed_all
    from megatron_papo.distributed.layout import initialize
    from megatron_papo.model.policy import build_policy
    from megatron_papo.optimization.optimizer import build_optimizer, wrap_policy

    adapt_megatron()
    initialize(config.parallel)
    seed_all(0)
    policy = build_policy(config, shape)
    optimizer = build_optimizer(wrap_policy(policy, config), config, num_updates=100)
    update = _Update(case, config, optimizer, watched)
    built = watched.now
    allocate(optimizer.megatron, step=1)  # as on resuming: an update from then on is as all that follow
    states = watched.now
    watched.waits.clear()
    peaks = update(rows)
    kinds = {f"{parameter.dtype} on {parameter.device}" for parameter in policy.parameters()}
    seen = {"waits": dict(watched.waits), "products": dict(watched.products), "parameters": sorted(kinds)}
    return Traced(weights_and_gradients=built, states=states, **peaks, **seen)


class _Update:
    """Runs one update and measures the peaks of its parts."""

    def __init__(self, case: Case, config: Any, optimizer: Any, watched: Any):
        self.case, self.config, self.optimizer, self.watched = case, config, optimizer, watched
        self.peaks: dict[str, Any] = {}

    def __call__(self, rows: Any) -> dict[str, Any]:
        from megatron_papo.optimization.optimizer import Optimizer

        self.watched.mark()
        self.peaks = {"scoring_peak": 0}
        take_step = Optimizer.step

        def step(optimizer: Any, fault: str = "") -> Any:
            self.peaks["passes_peak_in"] = self.watched.peak_in
            self.peaks["passes_peak"] = self.watched.mark()
            return take_step(optimizer, fault)

        with _no_kernels(), patch.object(Optimizer, "step", step):
            if self.config.parallel.pipeline > 1:
                self._stage(rows[0])
            else:
                self._whole(rows)
        self.peaks["step_peak"] = self.watched.mark()
        return self.peaks

    def _whole(self, rows: Any) -> None:
        from megatron_papo.algorithm.loss_settings import LossSettings
        from megatron_papo.algorithm.losses import papo_loss
        from megatron_papo.model.policy import HeadRequest
        from megatron_papo.optimization.pipeline import score_logprobs, update_policy

        head = HeadRequest()
        (rows,) = score_logprobs(self.optimizer.policy.module, [rows], self.config, head, None)
        self.peaks["scoring_peak"] = self.watched.mark()
        loss = partial(papo_loss, settings=LossSettings.at_step(self.config, step=0))
        update_policy(self.optimizer, rows, head, loss)

    def _stage(self, row: Any) -> None:
        """The rows of a stage that are in flight, all forward and then all backward."""
        import torch

        from megatron_papo.distributed.accelerator import device
        from megatron_papo.model.policy import HeadRequest

        self.optimizer.zero_grad()
        policy, row = self.optimizer.policy, row.to(device())
        outputs = []
        for _ in range(self.case.in_flight):
            policy.module.set_input_tensor(None if policy.module.pre_process else self._received(row))
            output = policy(row, HeadRequest())
            outputs.append(output if isinstance(output, torch.Tensor) else output.policy_logprobs_R)
        while outputs:
            output = outputs.pop(0)
            output.backward(torch.ones_like(output))
        del row, output
        self.optimizer.step()

    def _received(self, row: Any) -> Any:
        """Hidden states, and the levels of DeepStack that are still to be added, as the stage before would send
        them."""
        import torch

        from megatron_papo.distributed.accelerator import device, parameter_dtype

        parallel, policy = self.config.parallel, self.optimizer.policy.module
        share = parallel.tensor if parallel.sequence else 1
        num_image_tokens = sum(map(math.prod, row.grid_thw_I3.tolist())) // policy.shape.vision.merge_unit
        num_places = row.num_tokens // share + policy.language.num_levels * -(-num_image_tokens // share)
        dtype = parameter_dtype(self.config.model.dtype)
        size = (num_places, 1, policy.shape.language.hidden_size)
        return torch.empty(size, dtype=dtype, device=device(), requires_grad=True)


class _NoKernel:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@contextmanager
def _no_kernels() -> Iterator[None]:
    """Kernels that are compiled at run time only allocate their outputs: the head's by Triton, which need addresses of
    memory, and those that torch.compile makes of Megatron-Core's SwiGLU."""
    from megatron.core.fusions import fused_bias_swiglu

    from megatron_papo.logprobs import triton_tile

    def half(values: Any, *_: Any) -> Any:
        return values.new_empty(*values.shape[:-1], values.shape[-1] // 2)

    def alike(_: Any, values: Any, *__: Any) -> Any:
        return values.new_empty(values.shape)

    swiglu = {"swiglu": half, "bias_swiglu": half, "swiglu_back": alike, "bias_swiglu_back": alike}
    with (
        patch.multiple(triton_tile, sums_kernel=_NoKernel(), gradients_kernel=_NoKernel()),
        patch.multiple(fused_bias_swiglu, **swiglu),
    ):
        yield


if __name__ == "__main__":
    main()
