"""Fixtures that several rooms of tests share, each made once a session; the servers that processes are forked from."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from tests.support import processes, workers
from tests.support.inputs import inputs as inputs
from tests.support.inputs import inputs_of as inputs_of
from tests.support.slurm_lab import slurm as slurm

CORE = tuple(
    f"tests/parallel/test_{name}.py"
    for name in ("model_parity", "optim", "generation_transformers", "generation_vllm", "generation_trainer")
)
"""What depends most on versions of torch, transformers and vLLM; the fast tests have a case of training."""


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "every rank and command is a process that imports everything itself, nothing is forked from a server"
    parser.addoption("--isolated", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # while test modules are imported
    if not hasattr(config, "workerinput"):  # in a worker of pytest-xdist the servers are the session's
        config.add_cleanup(processes.open_session(config.getoption("--isolated")))
        if getattr(config.option, "numprocesses", None):  # forked as well: each would import torch for itself
            config.option.tx = [f"popen//python={processes.interpreter()}"] * len(config.option.tx)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/unit/"):
            item.add_marker("fast")
        if item.nodeid.startswith(CORE):
            item.add_marker("core")
    if not config.pluginmanager.has_plugin("randomly"):
        items.sort(key=lambda item: workers.place_of(item.nodeid))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return workers.scheduler(config, log)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    workers.print_slowest(terminalreporter)
    if config.pluginmanager.has_plugin("randomly"):
        terminalreporter.write_line(f"in an order of chance: make test-random SEED={config.option.randomly_seed}")
