"""The user's own metrics (`observe.metrics`): functions of the responses that a step has trained on.

Each rank calls them with its own responses; what they return is averaged over the responses of all ranks. They are
called in the main thread, without a time limit. A function that fails costs its metrics of that step, never the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_papo.config.user_function import load_user_function, name_of_function
from megatron_papo.distributed.exchange import gather_objects
from megatron_papo.rewards.returned import failed_with
from megatron_papo.rewards.reward_row import MetricRow, metric_rows_of
from megatron_papo.text.untrusted import as_text, shortened
from megatron_papo.training.console import warn
from megatron_papo.training.session import Run
from megatron_papo.types import Group, Metrics

_KEY = "observe.metrics"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_FAILED = "failed"
"""The metric `own/failed` is the share of calls that failed."""

MetricFunction = Callable[[list[MetricRow]], Mapping[str, Any]]


class OwnMetrics:
    """The functions of a run. All ranks call `of_step` together."""

    def __init__(self, run: Run) -> None:
        """Raises ValueError naming observe.metrics for a function that cannot be imported or does not take rows."""
        self._run = run
        self._functions = [load_user_function(_KEY, name, ("rows",))[0] for name in run.config.observe.metrics]
        self._warned: set[str] = set()

    def of_step(self, groups: Sequence[Group], step: int) -> Metrics:
        """Sums and counts of this rank's groups as `own/<name>`, the same on all ranks of a model-parallel group. Warns
        once of each function that fails."""
        if not self._functions:
            return {}
        layout = self._run.layout
        with self._run.clock.stage("metrics"):
            prefix = self._run.processor.response_prefix
            rows = [row for group in groups for row in metric_rows_of(group, prefix, step)]
            found = own_metrics(self._functions, rows) if layout.model_group.rank() == 0 else ({}, {})
            metrics, faults = gather_objects(found, layout.model_group)[0]
            all_faults: dict[str, str] = {}
            for share in gather_objects(faults, layout.data_group):
                all_faults = share | all_faults
        for name in sorted(all_faults.keys() - self._warned):
            warn(self._run, f"{_KEY}: {name} {all_faults[name]}: its metrics of step {step} are missing on a rank")
        self._warned |= all_faults.keys()
        return metrics


def own_metrics(functions: Sequence[MetricFunction], rows: list[MetricRow]) -> tuple[Metrics, dict[str, str]]:
    """What the functions return of these rows, as sums and counts under `own/<name>`, and why a function has failed, by
    its name. Without rows no function is called."""
    metrics: Metrics = {}
    faults: dict[str, str] = {}
    for function in functions if rows else ():
        name = name_of_function(function)
        try:
            found = {f"own/{key}": _sum_and_count(key, value, len(rows)) for key, value in function(rows).items()}
            if taken := sorted(found.keys() & metrics.keys()):
                raise ValueError(f"another function has already returned {taken[0].removeprefix('own/')}")
        except Exception as error:  # the user's function may raise and return anything
            faults[name] = failed_with(error).reason
        else:
            metrics |= found
    if functions and rows:
        metrics[f"own/{_FAILED}"] = (float(len(faults)), float(len(functions)))
    return metrics, faults


def _sum_and_count(key: Any, value: Any, num_rows: int) -> tuple[float, float]:
    """A metric of this rank's rows: a mean over them, or a sum with its own count. Raises ValueError."""
    if not isinstance(key, str) or not _NAME.fullmatch(key) or key == _FAILED:
        raise ValueError(f"{as_text(shortened(repr(key)))} is no name for a metric")
    pair = (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value) * num_rows, num_rows)
    if not all(map(math.isfinite, pair)):
        raise ValueError(f"the metric {key} is {as_text(shortened(repr(value)))}")
    return float(pair[0]), float(pair[1])
