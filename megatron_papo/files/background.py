"""One task at a time in a thread, which does not keep the process alive."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    def __init__(self, name: str):
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, task: Callable[[], None]) -> None:
        """Waits for the previous task, starts this one, and returns at once."""
        self.wait()
        self._thread = threading.Thread(target=self._call, args=(task,), name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the task is over; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _call(self, task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            self._error = error
