"""A harness that also logs and exports, as a running gateway does, into memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from penstock.log import Log, Mode
from penstock.logs import LogSink
from penstock.models import Exchange
from penstock.telemetry import Record, Sink, Telemetry
from penstock.testing.harness import Harness, _Recorder


class _Writing(_Recorder):
    """Keep what a harness needs, and hand everything on to a log and to sinks."""

    def __init__(self, log: Log, sinks: Sequence[Sink]) -> None:
        super().__init__()
        self.log = log
        self._lanes = ()
        self.feed(self, LogSink(log), *sinks)

    def report_fault(self, exchange: Exchange | None, error: BaseException) -> None:
        super().report_fault(exchange, error)
        Telemetry.report_fault(self, exchange, error)

    def write(self, records: Sequence[Record]) -> None:
        self.kept += records


def logging_to(harness: Harness, stream: io.StringIO, *sinks: Sink, mode: Mode = "json") -> Any:
    """Let a harness that has not been entered log to ``stream``; returns its telemetry."""
    telemetry = _Writing(Log(mode, stream), sinks)
    harness._recorder = telemetry
    return telemetry
