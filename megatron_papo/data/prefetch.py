"""The next draw, prepared in a thread while the ranks generate, score and update.

What `take` gives is what drawing in its place would have given: prompts, masks, cursor, bad rows in the order in which
they are met, and errors, which are raised at the step they belong to. Masks depend on the step, so a draw is for a
cursor and a step. A dynamically sampled step may go on with another round or end, which nobody knows beforehand; where
the guess was wrong the prompts stand and their masks are made again. Views of prompts that dynamic sampling then drops
are made for nothing: time of the thread's, while masking the kept ones later would decode their pictures again.

The thread touches nothing that anyone else uses: the dataset and its processor are its own, bad rows a copy. It joins
no collective.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from megatron_papo.data.dataset import BadRow, BadRows, PromptDataset
from megatron_papo.data.draw import Draw
from megatron_papo.data.masking import Masks
from megatron_papo.data.order import DataCursor

_CLOSE_S = 5.0
"""How long the end of a run waits for the prompt at hand; a thread that hangs is left behind."""


class DrawFunction(Protocol):
    """`draw_prompts`, with what stays the same over a run filled in."""

    def __call__(
        self, cursor: DataCursor, *, bad_rows: BadRows, masks: Masks | None, cancelled: threading.Event | None = None
    ) -> Draw: ...


class Prefetch:
    """Draws of a run, each prepared while the one before is in use; with `ahead=False` each when it is taken.

    `masks` says which masked views the prompts get, but for the step; None: none. No draw is prepared for `num_steps`.
    """

    def __init__(
        self, dataset: PromptDataset, draw: DrawFunction, masks: Masks | None, *, num_steps: int, ahead: bool
    ) -> None:
        self._dataset, self._draw, self._masks = dataset, draw, masks
        self._num_steps, self._ahead = num_steps, ahead
        self._work: _Work | None = None
        self._step, self._rounds, self._usual_rounds = -1, 0, 1

    def take(self, cursor: DataCursor, step: int, bad_rows: BadRows) -> Draw:
        """The draw at `cursor` with the masks of `step`; notes bad rows in `bad_rows`. Raises as `draw_prompts`."""
        draw = self._prepared(cursor, step, bad_rows)
        if draw is None:
            draw = self._draw(cursor, bad_rows=bad_rows, masks=self._masks_of(step))
        next_step = self._likely_step(step)
        if self._ahead and next_step < self._num_steps:
            self._work = _Work(self._draw, draw.cursor, next_step, bad_rows, self._masks_of(next_step))
        return draw

    def close(self) -> None:
        """Drops what is under way."""
        if self._work is not None:
            self._work.cancel(_CLOSE_S)
            self._work = None

    def _prepared(self, cursor: DataCursor, step: int, bad_rows: BadRows) -> Draw | None:
        """What the thread has made of it, waited for; None when that was another draw."""
        work, self._work = self._work, None
        if work is None:
            return None
        if work.cursor != cursor:
            work.cancel()
            return None
        failed = work.outcome.exception() is not None
        if work.step != step and failed:  # may be a fault of that step's masks alone
            return None
        bad_rows.merge(work.bad_rows)
        draw = work.outcome.result()
        return draw if work.step == step else self._with_masks(draw, step)

    def _with_masks(self, draw: Draw, step: int) -> Draw | None:
        """None where masking fails: drawn anew, another row takes its place."""
        masks = self._masks_of(step)
        if masks is None:
            return draw
        try:
            updates = tuple(tuple(self._dataset.mask(prompt, masks) for prompt in chunk) for chunk in draw.updates)
        except BadRow:
            return None
        return replace(draw, updates=updates)

    def _masks_of(self, step: int) -> Masks | None:
        return None if self._masks is None else replace(self._masks, step=step)

    def _likely_step(self, step: int) -> int:
        """The step of the draw after this one: a step takes as many rounds as the step before, more often than not."""
        if step != self._step:
            self._step, self._rounds, self._usual_rounds = step, 0, self._rounds or 1
        self._rounds += 1
        return step if self._rounds < self._usual_rounds else step + 1


class _Work:
    """A draw on its way, in a thread that does not outlive the process."""

    def __init__(
        self, draw: DrawFunction, cursor: DataCursor, step: int, bad_rows: BadRows, masks: Masks | None
    ) -> None:
        self.cursor, self.step = cursor, step
        self.bad_rows = bad_rows.copy()
        self.outcome: Future[Draw] = Future()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(draw, masks), name="prefetch", daemon=True)
        self._thread.start()

    def cancel(self, timeout_s: float | None = None) -> None:
        """Ends the thread after the prompt at hand."""
        self._cancelled.set()
        self._thread.join(timeout_s)

    def _run(self, draw: DrawFunction, masks: Masks | None) -> None:
        try:
            made = draw(self.cursor, bad_rows=self.bad_rows, masks=masks, cancelled=self._cancelled)
        except BaseException as error:  # raised where the draw is taken
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(made)
