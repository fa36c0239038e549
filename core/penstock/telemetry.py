"""One lean record per exchange on the request path; the log line and the span are made of it elsewhere.

``record`` appends a tuple to a bounded queue. A thread drains the queue in short slices and hands records to the sinks:
the log and, where configured, OpenTelemetry spans. A slow or broken sink costs traffic nothing; what does
not fit into the queue is counted in ``dropped``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from penstock.errors import PluginError
from penstock.log import Log, message_of, traceback_of
from penstock.models import Attempt, Exchange, Principal, TraceContext, Usage

QUEUE_RECORDS = 50_000
_SLICE = 64
_INTERVAL_SECONDS = 0.05
STOP_SECONDS = 5.0


class Record(NamedTuple):
    """What is remembered of a settled exchange: no body, no secret."""

    request_id: bytes
    trace: TraceContext
    started_at_ns: int
    started_ns: int
    """Monotonic, to relate attempts to ``started_at_ns``."""
    duration_ns: int
    upstream_ns: int
    committed_ns: int | None
    """Nanoseconds from the start to the commit."""
    method: bytes
    route: str
    operation: str
    key_prefix: str | None
    key_id: str | None
    provider: str | None
    binding_id: str | None
    model: str | None
    model_source: str | None
    status: int | None
    error: str | None
    attempts: Sequence[Attempt]
    is_stream: bool
    stream_end: str | None
    chunks: int
    bytes_out: int
    usage: Usage | None
    principal: Principal | None = None


class Sink(Protocol):
    """Take records off the request path, on the telemetry thread."""

    def write(self, records: Sequence[Record]) -> None: ...
    def close(self) -> None: ...


class Telemetry:
    """Queue records and drain them on a thread of its own."""

    def __init__(self, sinks: Sequence[Sink] = (), log: Log | None = None) -> None:
        self._sinks = tuple(sinks)
        self._queue: deque[Record] = deque()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.log = log or Log()
        self.dropped = 0
        self.recorded = 0

    def record(self, exchange: Exchange) -> None:
        """Append what is remembered of a settled exchange; never blocks, never raises."""
        self.recorded += 1
        if not self._sinks:
            return
        if len(self._queue) >= QUEUE_RECORDS:
            self.dropped += 1
            return
        self._queue.append(_record_of(exchange))

    def report_fault(self, exchange: Exchange | None, error: BaseException) -> None:
        """Log an unexpected exception with plugin and hook where they are known."""
        details: dict[str, Any] = {"error": type(error).__name__, "message": message_of(error)}
        if exchange is not None:
            details["request_id"] = exchange.request_id.decode()
        if isinstance(error, PluginError):
            details |= {"plugin": error.plugin, "hook": error.hook}
        # Without local variables and the texts of strangers' exceptions: those hold keys and prompts.
        details["traceback"] = traceback_of(error.__cause__ or error)
        self.log.error("fault", **details)

    def report_exhausted(self, exchange: Exchange) -> None:
        """Log why no provider answered; clients are not told, for these texts may name hosts."""
        attempts = [
            {"binding": attempt.binding_id, "reason": attempt.outcome, "message": attempt.message}
            for attempt in exchange.attempts
        ]
        self.log.warning("no provider answered", request_id=exchange.request_id.decode(), attempts=attempts)

    def start(self) -> None:
        if self._sinks and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="penstock-telemetry", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Write what is queued and close the sinks. One that hangs loses the queue, it does not hold up the end."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=STOP_SECONDS)
            if self._thread.is_alive():
                self.dropped += len(self._queue)
                self._queue.clear()
                return
            self._thread = None
        self.drain()
        for sink in self._sinks:
            sink.close()

    def _run(self) -> None:
        while not self._stopping.wait(_INTERVAL_SECONDS):
            self.drain()

    def drain(self) -> None:
        """Hand every queued record to the sinks, giving way to other threads between slices."""
        queue = self._queue
        while queue:
            records = [queue.popleft() for _ in range(min(_SLICE, len(queue)))]
            for sink in self._sinks:
                try:
                    sink.write(records)
                except Exception as error:  # noqa: BLE001 - fail open: telemetry never stops traffic
                    self.dropped += len(records)
                    self.log.warning("telemetry sink failed", sink=type(sink).__name__, error=str(error))
            time.sleep(0)


def _record_of(exchange: Exchange) -> Record:
    request, principal, candidate = exchange.request, exchange.principal, exchange.candidate
    started, committed, error = exchange.started_ns, exchange.committed_ns, exchange.error
    known = principal is not None
    chosen = candidate is not None
    return Record(
        exchange.request_id,
        exchange.trace,
        exchange.started_at_ns,
        started,
        exchange.ended_ns - started,
        exchange.upstream_ns,
        None if committed is None else committed - started,
        request.head.method,
        request.endpoint.path,
        request.endpoint.operation,
        principal.display_prefix if known else None,  # type: ignore[union-attr]
        principal.virtual_key_id if known else None,  # type: ignore[union-attr]
        candidate.binding.type if chosen else None,  # type: ignore[union-attr]
        candidate.binding.id if chosen else None,  # type: ignore[union-attr]
        candidate.model if chosen else None,  # type: ignore[union-attr]
        candidate.model_source if chosen else None,  # type: ignore[union-attr]
        exchange.status,
        None if error is None else error.code,
        exchange.attempts,
        exchange.is_stream,
        exchange.stream_end,
        exchange.chunks_out,
        exchange.bytes_out,
        exchange.usage,
        principal,
    )
