"""One lean record per exchange on the request path; what is slow about it is done elsewhere.

``record`` appends a tuple to a bounded queue per sink. A thread drains the queues in short slices and hands them to the
sinks: the log, whose line of JSON is made at once, and, where configured, OpenTelemetry spans. A slow or broken sink
costs traffic nothing; what does not fit into a queue is counted in ``dropped``.
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

    def write(self, records: Sequence[Any]) -> None: ...
    def close(self) -> None: ...


class PreparingSink(Sink, Protocol):
    """A sink that turns a record into what it will write at once, on the event loop, where that is the cheaper way.

    Two threads that want the interpreter at the same time cost each other far more than a line of JSON costs either;
    ``write`` then gets what ``prepare`` returned, many at a time, and does nothing but the write.
    """

    slice_records: int

    def prepare(self, record: Record) -> Any: ...


class _Lane:
    """One sink with its bounded queue."""

    __slots__ = ("prepare", "queue", "sink", "slice_records")

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.queue: deque[Any] = deque()
        self.prepare = getattr(sink, "prepare", None)
        self.slice_records: int = getattr(sink, "slice_records", _SLICE)


class Telemetry:
    """Queue records and drain them on a thread of its own."""

    def __init__(self, sinks: Sequence[Sink] = (), log: Log | None = None) -> None:
        self._lanes: tuple[_Lane, ...] = ()
        self.feed(*sinks)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.log = log or Log()
        self.dropped = 0
        self.recorded = 0

    def feed(self, *sinks: Sink) -> None:
        """Hand records to these sinks too, from now on."""
        self._lanes += tuple(_Lane(sink) for sink in sinks)

    @property
    def queued(self) -> int:
        """Records that wait, over all sinks."""
        return sum(len(lane.queue) for lane in self._lanes)

    def record(self, exchange: Exchange) -> None:
        """Append what is remembered of a settled exchange; never blocks, never raises."""
        self.recorded += 1
        if not self._lanes:
            return
        record = _record_of(exchange)
        for lane in self._lanes:
            if len(lane.queue) >= QUEUE_RECORDS:
                self.dropped += 1
            else:
                lane.queue.append(record if lane.prepare is None else lane.prepare(record))

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
        if self._lanes and self._thread is None:
            self._thread = threading.Thread(target=self._run, name="penstock-telemetry", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Write what is queued and close the sinks. One that hangs loses the queue, it does not hold up the end."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=STOP_SECONDS)
            if self._thread.is_alive():
                for lane in self._lanes:
                    self.dropped += len(lane.queue)
                    lane.queue.clear()
                return
            self._thread = None
        self.drain()
        for lane in self._lanes:
            lane.sink.close()

    def _run(self) -> None:
        while not self._stopping.wait(_INTERVAL_SECONDS):
            self.drain()

    def drain(self) -> None:
        """Hand every queued record to the sinks, giving way to other threads between slices."""
        for lane in self._lanes:
            queue, sink = lane.queue, lane.sink
            while queue:
                records = [queue.popleft() for _ in range(min(lane.slice_records, len(queue)))]
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
