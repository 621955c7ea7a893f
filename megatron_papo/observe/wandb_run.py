"""The run in wandb, online or in files under run.dir, with numbers and tables of samples. It never ends the run.

Whatever wandb raises, and whatever it leaves unanswered for a time, costs one warning: an online run goes on offline,
in files that `wandb sync` takes, under the same id; where that fails too, it goes on without wandb, and
RUN/metrics.jsonl has every number. A full disk is no such failure: wandb's own process writes its files, and stops for
good when a disk is full. So meanwhile nothing is handed to wandb; afterwards the same run is opened anew, and what
waited follows. Lost is what that process had not yet written when the disk filled.
"""

from __future__ import annotations

import errno
import re
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from megatron_papo.config import ObserveConfig, RunConfig
from megatron_papo.files.small_files import write_atomically
from megatron_papo.observe.bounded_call import call_within
from megatron_papo.observe.dashboard import with_overview
from megatron_papo.observe.samples import SampleRow
from megatron_papo.observe.wandb_service import INIT_S, end_wandb, kill_wandb, open_wandb, sample_table
from megatron_papo.text.secret_values import text_without_secrets
from megatron_papo.text.untrusted import as_text

_MAX_WAITING = 10_000
_OPEN_S = 2 * INIT_S + 20.0
"""Seconds for opening a run: importing wandb, starting its process, reaching its server."""
_CALL_S = 30.0
"""Seconds for handing one record over, which takes milliseconds."""
_FINISH_S = 60.0
"""Seconds for what has not been uploaded yet when a run ends; 10 after a failure, for which other ranks wait."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class WandbRun:
    """A context: opened as it is made, closed at its end. All calls are bounded in time, and none raises."""

    def __init__(self, observe: ObserveConfig, run: RunConfig, config_text: str, warn: Callable[[str], None]):
        """`config_text`: the resolved settings as YAML. `warn` takes one line."""
        self._observe, self._settings, self._config_text, self._warn = observe, run, config_text, warn
        self._mode = str(observe.wandb)
        self._run: Any = None
        self._waiting: deque[Callable[[], dict[str, Any]]] = deque(maxlen=_MAX_WAITING)
        self.disk_is_full = False
        """Set by whoever notices: nothing is handed to wandb meanwhile."""
        self._hand_over()

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step; those of the dashboard stand once more in a section that comes first."""
        self._waiting.append(lambda: {"step": step, **with_overview(values)})
        self._hand_over()

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        self._waiting.append(lambda: {"step": step, "samples": sample_table(rows)})
        self._hand_over()

    def __enter__(self) -> WandbRun:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Hands over what waits and ends the run, in wandb as failed where it has."""
        if self._mode == "off":
            return
        self._hand_over()
        self._finish(10.0 if failed else _FINISH_S, exit_code=int(failed))
        self._end_service()
        if self._waiting and self._mode != "off":
            self._warn(f"wandb: the last {len(self._waiting)} records could not be written")
        self._mode = "off"

    def _hand_over(self) -> None:
        """Opens the run where it is not open, and gives it what waits."""
        while self._mode != "off":
            if self.disk_is_full:
                self._finish(_CALL_S)
                return
            try:
                self._run = self._run or call_within(_OPEN_S, self._open)
                while self._waiting:
                    call_within(_CALL_S, partial(self._log, self._run, self._waiting[0]))
                    self._waiting.popleft()
                return
            except Exception as error:
                if getattr(error, "errno", None) in _FULL:  # pictures and tables are written by this process
                    self._warn(f"wandb: {error}")
                    self._finish(_CALL_S)
                    return
                self._give_way(error)

    @staticmethod
    def _log(run: Any, record: Callable[[], dict[str, Any]]) -> None:
        run.log(record())

    def _give_way(self, error: Exception) -> None:
        """From online to offline, from there (and at once where the package is broken) to nothing, with a warning."""
        reason = text_without_secrets(" ".join(str(error).split())).rstrip(".")[:300] or type(error).__name__
        folder = self._settings.dir / "wandb"
        if self._mode == "online" and not isinstance(error, ImportError):
            self._mode = "offline"
            self._warn(
                f"wandb: {reason}: the run goes on offline, `wandb sync {folder}/offline-run-*` uploads it later"
            )
        else:
            self._mode = "off"
            self._waiting.clear()
            self._warn(
                f"wandb: {reason}: the run goes on without wandb; {self._settings.dir}/metrics.jsonl has all numbers"
            )
        self._run = None
        self._end_service()

    def _finish(self, limit_s: float, exit_code: int = 0) -> None:
        if self._run is None:
            return
        try:
            call_within(limit_s, partial(self._run.finish, exit_code=exit_code))
        except TimeoutError:
            folder = self._settings.dir / "wandb"
            later = f"`wandb sync --include-online {folder}/*run-*` does it later"
            self._warn(f"wandb: not all was uploaded within {limit_s:g} s; {later}")
        except Exception as error:
            self._warn(f"wandb: {text_without_secrets(str(error))[:300]}")
        self._run = None

    def _end_service(self) -> None:
        """Ends wandb's process, by force where it does not answer: a run of the same id can then be opened, and the end
        of this process does not wait for it."""
        for _ in range(2):
            try:
                call_within(_CALL_S / 3, end_wandb)
                return
            except TimeoutError:
                kill_wandb()
            except Exception:
                return

    def _open(self) -> Any:
        online = self._mode == "online"
        run = open_wandb(self._observe, self._settings, self._config_text, self._id(), online=online)
        if online:
            print(f"papo: wandb: {as_text(run.url)}", flush=True)
        return run

    def _id(self) -> str:
        """The run's id in wandb, the same after a resume; a new one, with a warning, if its file holds none any
        more."""
        name_file = self._settings.dir / "wandb_id.txt"
        if name_file.exists():
            kept = name_file.read_bytes().decode(errors="replace").strip()
            if re.fullmatch(r"[\w-]{1,64}", kept, re.ASCII):
                return kept
            self._warn(f"{name_file}: holds no id: wandb shows what follows as another run")
        fresh = uuid.uuid4().hex[:12]
        name_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(name_file, fresh)
        return fresh
