"""The next draw, prepared in a thread while the ranks generate, score and update.

`take` gives exactly what drawing at that moment would have given: prompts, masks, cursor, bad rows in the order in
which they were met, and errors, which are raised where the draw is taken. A draw depends on the cursor alone, so it
does not matter whether it becomes the next round of a dynamically sampled step or the first round of the next step,
which nobody knows beforehand. Masked views of prompts that dynamic sampling then drops are made in vain; masking only
the kept prompts later would decode their pictures a second time.

The thread touches nothing that anyone else uses: the dataset and its processor are its own, bad rows a copy. It joins
no collective.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Protocol

from megatron_papo.data.bad_rows import BadRows
from megatron_papo.data.draw import Draw
from megatron_papo.data.order import DataCursor

_CLOSE_S = 5.0
"""Seconds that the end of a run waits for the prompt that the thread is at; a thread that hangs is abandoned."""


class DrawFunction(Protocol):
    """`draw_prompts`, with the arguments that stay the same over a run already given."""

    def __call__(self, cursor: DataCursor, *, bad_rows: BadRows, cancelled: threading.Event | None = None) -> Draw: ...


class Prefetch:
    """Draws of a run, each prepared while the one before is in use; with `ahead=False` each when it is taken.

    In the last of `num_steps` nothing is prepared: further rounds of that step are drawn when they are taken.
    """

    def __init__(self, draw: DrawFunction, *, num_steps: int, ahead: bool) -> None:
        self._draw, self._num_steps, self._ahead = draw, num_steps, ahead
        self._work: _Work | None = None

    def take(self, cursor: DataCursor, step: int, bad_rows: BadRows) -> Draw:
        """The draw at `cursor`, for `step`; notes bad rows in `bad_rows`. Raises as `draw_prompts`."""
        draw = self._prepared(cursor, bad_rows) or self._draw(cursor, bad_rows=bad_rows)
        if self._ahead and step + 1 < self._num_steps:
            self._work = _Work(self._draw, draw.cursor, bad_rows)
        return draw

    def close(self) -> None:
        """Ends the thread, whose draw is discarded."""
        if self._work is not None:
            self._work.cancel(_CLOSE_S)
            self._work = None

    def _prepared(self, cursor: DataCursor, bad_rows: BadRows) -> Draw | None:
        """The draw at `cursor` that the thread has prepared, which is waited for; None if it prepared another."""
        work, self._work = self._work, None
        if work is None:
            return None
        if work.cursor != cursor:
            work.cancel()
            return None
        work.outcome.exception()  # waited for, since its bad rows count when it has failed too
        bad_rows.merge(work.bad_rows)
        return work.outcome.result()


class _Work:
    """A draw in preparation, in a thread that does not outlive the process."""

    def __init__(self, draw: DrawFunction, cursor: DataCursor, bad_rows: BadRows) -> None:
        self.cursor = cursor
        self.bad_rows = bad_rows.copy()
        self.outcome: Future[Draw] = Future()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(draw,), name="prefetch", daemon=True)
        self._thread.start()

    def cancel(self, timeout_s: float | None = None) -> None:
        """Ends the thread after the prompt that it is at."""
        self._cancelled.set()
        self._thread.join(timeout_s)

    def _run(self, draw: DrawFunction) -> None:
        try:
            drawn = draw(self.cursor, bad_rows=self.bad_rows, cancelled=self._cancelled)
        except BaseException as error:  # raised where the draw is taken
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(drawn)
