"""Processes of the tests, forked from servers that have imported what is slow to import.

A rank of `tests/support/ranks.py`, a command of `tests/support/commands.py` or what these start
(`tests/support/interpreter.py`) needs seconds of processor time for its imports and, most often, less for its work. A
server imports once and forks a process for each request; what such a process does, it does in a copy of the server's
memory, so no case sees what another has left. There are two: `plain`, and `vllm`, which is forked from `plain` when a
case first asks for it and imports vLLM as well.

    python -m tests.support.process_server FOLDER PID
        serves at FOLDER/plain and FOLDER/vllm until FOLDER or PID is gone
    python -m tests.support.process_server --one FILE
        does the request in FILE in this very process, with nothing imported
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import random
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support.interpreter import PASSED_ON, SERVER, end_as
from tests.support.process_wire import FOLDER, Request, receive, send

PLAIN = (
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.transformer_block",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "mistral_common.tokens.tokenizers.mistral",  # transformers imports it with the first tokenizer
    "transformers.tokenization_mistral_common",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization.config",
    "megatron.core.models.mimo.optimizer",
    "datasets",
    "sklearn.datasets",
    "math_verify",
    "megatron_papo.train",
    "megatron_papo.sft",
    "megatron_papo.evaluate",
    "megatron_papo.score",
    "megatron_papo.preflight.check",
    "megatron_papo.weights.transfer",
    "megatron_papo.generation.remote.remote_generator",
    "megatron_papo.generation.transformers.transformers_engine",
    "megatron_papo.runtime.launch",
    "megatron_papo.optimization.optimizer",
    "tests.support.tiny_run",
)
VLLM = (
    "vllm",
    "vllm.entrypoints.anthropic.protocol",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.llm",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
    "vllm.model_executor.layers.quantization.online",
    "vllm.plugins.io_processors",
    "vllm.plugins.lora_resolvers.filesystem_resolver",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.renderers.hf",
    "vllm.utils.cpu_triton_utils",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.attention.backends.zentorch_sdpa",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.pool.flash_maxsim",
    "vllm.v1.worker.cpu_worker",
    "vllm.triton_utils.dispatcher",
    "blake3",
    "vllm.v1.engine.llm_engine",
    "vllm.model_executor.models.qwen2_5_vl",
    "megatron_papo.generation.vllm.weight_transfer",
    "megatron_papo.generation.remote.engine_process",
)
"""Modules that are imported where they are installed."""
_PR_SET_PDEATHSIG = 1


def main(folder: Path, session: int) -> None:
    """Serves, and in a forked process does what was asked for."""
    _import_all(PLAIN, _load_a_processor)
    work = _Server(folder, "plain", session).serve()
    while work == "vllm":  # in a process of its own
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        _import_all(VLLM, _prepare_vllm)
        work = _Server(folder, "vllm", session).serve()
    if isinstance(work, Request):
        do(work)


def _import_all(names: tuple[str, ...], more: Callable[[], None] = lambda: None) -> None:
    """The collector rests, and leaves the modules alone from then on: their pages stay shared by forked processes."""
    gc.disable()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in names:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        more()
    gc.freeze()
    gc.enable()


def _load_a_processor() -> None:
    """transformers imports the video processors of sixty families to find the one of a folder, and Pillow its formats
    with the first picture."""
    from PIL import Image

    from megatron_papo.config import DataConfig
    from megatron_papo.data.processor import load_processor
    from tests.support.tiny import make_tiny_folder

    with tempfile.TemporaryDirectory() as folder:
        Image.preinit()
        load_processor(make_tiny_folder(Path(folder) / "model"), DataConfig())


def _prepare_vllm() -> None:
    """What vLLM would do at the start of every process: torch.compile compiles and runs a little program for every set
    of vector instructions that it knows, and compiles the one function that an engine without CUDA graphs compiles; and
    every module there is is searched for Triton kernels, to put those for CPUs in their place."""
    import torch
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.sample.sampler import Sampler

    from megatron_papo.distributed.accelerator import CudaMeansCpu

    if not current_platform.is_cpu():
        return

    pick_vec_isa()
    if hasattr(CpuPlatform, "register_triton_kernel_overrides"):  # vLLM 0.26 has none
        CpuPlatform.register_triton_kernel_overrides()
        CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)  # forked processes have it
    config.compile_threads = 1  # in this process, which must not have threads when it forks
    torch.set_num_threads(1)
    # torch's pool of threads is made anew in a forked process by whoever asks for it first. Threads of autograd ask at
    # the same time, which 4 of 54 runs did not survive; here the only thread there is does
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
    for mode in (contextlib.nullcontext(), CudaMeansCpu()):  # an engine on ranks of its own, and one in the trainer's
        with mode, torch.inference_mode():
            for num_words in (64, 96):  # with the second it compiles for any number of words
                Sampler.gather_logprobs(torch.zeros(2, num_words), 1, torch.zeros(2, dtype=torch.int64))


class _Server:
    def __init__(self, folder: Path, name: str, session: int):
        self.folder, self.name = folder, name
        self.session = Path(f"/proc/{session}")
        self.selector = selectors.DefaultSelector()
        self.waiting: dict[int, socket.socket] = {}
        """The connection that is told of the end of a process, by the id of the process."""
        self.tied: dict[socket.socket, int] = {}
        """The processes that are ended when a connection closes."""
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(folder / f"{name}.new"))
        self.listening.listen(64)
        self.woken, self.wakes = socket.socketpair()
        self.wakes.setblocking(False)
        self.woken.setblocking(False)

    def serve(self) -> Request | str | None:
        """Answers requests. Returns in the server, with None when the session is over, and in every process that it
        forked, with what that process has to do."""
        before = signal.signal(signal.SIGCHLD, lambda *_: None), signal.set_wakeup_fd(self.wakes.fileno())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is pytest's, which ends the processes it started
        self.selector.register(self.listening, selectors.EVENT_READ)
        self.selector.register(self.woken, selectors.EVENT_READ)
        (self.folder / f"{self.name}.new").rename(self.folder / self.name)  # from now on it answers
        while self.folder.exists() and self.session.exists():
            for key, _ in self.selector.select(timeout=1.0):
                work = self._answer(key.fileobj)
                if work is not None:
                    signal.set_wakeup_fd(before[1])
                    return work
            self._reap()
        for pid in self.waiting:
            _signal(pid, signal.SIGKILL)
        return None

    def _answer(self, source: Any) -> Request | str | None:
        if source is self.listening:
            self.selector.register(self.listening.accept()[0], selectors.EVENT_READ)
        elif source is self.woken:
            with contextlib.suppress(BlockingIOError):
                self.woken.recv(4096)
        elif source in self.tied:
            self._pass_on(source)
        else:
            return self._start(source)
        return None

    def _pass_on(self, connection: socket.socket) -> None:
        """A signal; or the end, which the process shares with what it has started in its session."""
        try:
            _signal(self.tied[connection], receive(connection)[0])
        except (EOFError, OSError):
            _signal(self.tied[connection], signal.SIGKILL, whole_group=True)
            self._untie(connection)

    def _untie(self, connection: socket.socket) -> None:
        if self.tied.pop(connection, None):
            self.selector.unregister(connection)

    def _start(self, connection: socket.socket) -> Request | str | None:
        """Once a connection: the request, and in answer the process's id; at its end its status."""
        self.selector.unregister(connection)
        try:
            request, descriptors = receive(connection)
        except (EOFError, OSError) as error:
            print(f"a request did not arrive: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            connection.close()
            return None
        if request == "vllm":
            pid = self._fork()
            if not pid:
                connection.close()
                return "vllm"
            self.waiting[pid] = connection
            return None
        if request.module:
            _import_all((request.module,))
        pid = self._fork()
        if not pid:
            connection.close()
            _enter(descriptors[len(request.descriptors) :])
            _open(dict(zip(request.descriptors, descriptors)))
            return request._replace(environ=request.environ | {SERVER: self.name})
        for descriptor in descriptors:
            os.close(descriptor)
        self.waiting[pid] = connection
        if request.tied:
            self.tied[connection] = pid
            self.selector.register(connection, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # gone already; a tied one is seen to be
            send(connection, pid)
        return None

    def _fork(self) -> int:
        """Forks like os.fork. The forked process keeps nothing of the server, and ends when the server ends."""
        server = os.getpid()
        pid = os.fork()
        if not pid:
            _end_with(server)
            self.selector.close()
            for held in (self.listening, self.woken, self.wakes, *self.waiting.values()):
                held.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return pid

    def _reap(self) -> None:
        while self.waiting:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            connection = self.waiting.pop(pid, None)
            if connection is not None:
                self._untie(connection)
                with contextlib.suppress(OSError):
                    send(connection, os.waitstatus_to_exitcode(status))
                connection.close()


def _end_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _signal(pid: int, number: int, whole_group: bool = False) -> None:
    """To a process that may just have ended; `whole_group`: if it leads one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number) if whole_group and os.getpgid(pid) == pid else os.kill(pid, number)


def _enter(namespaces: list[int]) -> None:
    """Goes on as a process within these, where they are not this one's: a node of tools/slurm_lab.sh has its own host
    name, `/etc/hosts` and process IDs. Those hold for a child only, so this process stays before it and passes signals
    and status on."""
    ours = {os.stat(place).st_ino for place in Path("/proc/self/ns").iterdir()}
    if all(os.fstat(each).st_ino in ours for each in namespaces):
        for each in namespaces:
            os.close(each)
        return
    for each in namespaces:
        os.setns(each)
        os.close(each)
    inside = os.fork()
    if not inside:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: _signal(inside, number))
    end_as(os.waitstatus_to_exitcode(os.waitpid(inside, 0)[1]))


def _open(files: dict[int, int]) -> None:
    """This process's open files become those of the keys."""
    beyond = max(files) + 1
    moved = {number: fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, beyond) for number, each in files.items()}
    for each in files.values():
        os.close(each)
    for number, each in moved.items():
        os.dup2(each, number)
        os.close(each)


def do(request: Request) -> None:
    """What was asked for, in this process, which ends with it as a Python process does."""
    if request.new_session:
        os.setsid()
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environ)
    _start_others_by(os.environ)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1 if number == 2 else -1, closefd=False)  # noqa: SIM115 - for as long as it lives
        for number, mode in enumerate("rww")
    )
    _forget_randomness()
    if request.argv:
        _own_temporary_folders()
    code = _exit_code(_call(request) if request.call else _command(request))
    with contextlib.suppress(Exception):
        threading._shutdown()
    if request.argv:  # a call ends as multiprocessing ends a process: what libraries do at an exit may wait for peers
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _start_others_by(environ: Mapping[str, str]) -> None:
    """What this process starts with `sys.executable` is forked from the same server."""
    python = Path(environ.get(FOLDER, ""), "bin", "python")
    if SERVER in environ and python.exists():
        sys.executable = str(python)
        multiprocessing.set_executable(sys.executable)


def _forget_randomness() -> None:
    """What a new process draws for itself; torch's generator starts alike in every process."""
    random.seed()
    if "numpy" in sys.modules:
        import numpy

        numpy.random.seed()


def _own_temporary_folders() -> None:
    """Folders that modules made as they were imported, as wandb does: a process that ends would remove them for all."""
    for each in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        owner = (each.peek() or (None,))[0]
        if isinstance(owner, tempfile.TemporaryDirectory):
            each.detach()
            owner.__init__()  # type: ignore[misc]


def _call(request: Request) -> Callable[[], object]:
    def call() -> object:
        function, args = pickle.loads(request.call)
        return function(*args)

    return call


def _command(request: Request) -> Callable[[], object]:
    first, *words = request.argv
    paths = [path for path in request.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0:0] = [{"-m": os.getcwd(), "-c": ""}.get(first, str(Path(first).resolve().parent)), *paths]
    if first == "-m":
        sys.argv = words
        return lambda: runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    if first == "-c":
        sys.argv = ["-c", *words[1:]]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        return lambda: exec(words[0], main.__dict__)
    sys.argv = [first, *words]
    return lambda: runpy.run_path(first, run_name="__main__")


def _exit_code(work: Callable[[], object]) -> int:
    try:
        work()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        file = Path(sys.argv[2])
        request = pickle.loads(file.read_bytes())
        file.unlink()
        do(request)
    else:
        # the very module that requests are unpickled with
        importlib.import_module("tests.support.process_server").main(Path(sys.argv[1]), int(sys.argv[2]))
