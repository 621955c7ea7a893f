"""TensorBoard's event file, by way of the outbox: torch's own writer loses what a full disk did not take, then raises.

Leaves out everything but numbers, texts, pictures and the layout of the dashboard.
"""

from __future__ import annotations

import io
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from megatron_papo.observe.dashboard import Chart
from megatron_papo.observe.outbox import Outbox


class Board:
    """A new event file in `folder`; what older ones say of `first_step` and later no longer counts."""

    def __init__(self, folder: Path, outbox: Outbox, first_step: int):
        self._outbox = outbox
        self._path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def number(self, name: str, value: float, step: int) -> None:
        self._add_summary(summary.scalar(name, value), step)

    def text(self, name: str, markdown: str, step: int) -> None:
        self._add_summary(summary.text(name, markdown), step)

    def picture(self, name: str, pixels_HW3: Any, step: int) -> None:
        """`pixels_HW3`: bytes, as numpy holds them."""
        self._add_summary(summary.image(name, pixels_HW3, dataformats="HWC"), step)

    def layout(self, charts: Sequence[Chart], step: int) -> None:
        """What TensorBoard shows under CUSTOM SCALARS: the charts in their order."""
        wanted = {
            f"{number}. {chart.title}": ["Multiline", [f"^{re.escape(name)}$" for name in chart.metrics]]
            for number, chart in enumerate(charts, 1)
        }
        self._add_summary(summary.custom_scalars({"Look at these first": wanted}), step)

    def _add_summary(self, values: Summary, step: int) -> None:
        self._add(Event(wall_time=time.time(), step=step, summary=values))

    def _add(self, event: Event) -> None:
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._outbox.append(self._path, framed.getvalue())
