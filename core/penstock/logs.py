"""The line per exchange and the gateway's own messages, through structlog: JSON in production, coloured on a terminal.

Standard output belongs to command results, so everything logged goes to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO, Literal, TextIO

import msgspec
import structlog

from penstock.telemetry import Record


def configure_logging(mode: Literal["auto", "json", "console", "off"], stream: TextIO | None = None) -> bool:
    """Set structlog up for the process; returns whether lines are for a terminal."""
    stream = sys.stderr if stream is None else stream
    is_console = mode == "console" or (mode == "auto" and stream.isatty())
    shared: list[Any] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    if is_console:
        last: list[Any] = [structlog.dev.ConsoleRenderer()]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_to_json)]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    return is_console


def _to_json(event: Any, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


class LogSink:
    """Write one line per exchange to a binary stream, unbuffered; a stream that cannot take it loses the line."""

    def __init__(self, stream: BinaryIO | None = None, *, is_console: bool = False) -> None:
        self._stream = sys.stderr.buffer if stream is None else stream
        self._render = structlog.dev.ConsoleRenderer() if is_console else None

    def write(self, records: Sequence[Record]) -> None:
        lines = []
        for record in records:
            fields = fields_of(record)
            if self._render is None:
                lines.append(msgspec.json.encode(fields))
            else:
                lines.append(str(self._render(None, "info", fields)).encode())
        self._stream.write(b"\n".join(lines) + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the stream open: it belongs to the process."""


def fields_of(record: Record) -> dict[str, Any]:
    """Return the fields of an exchange's line; never a secret, never a prompt; absent facts are left out."""
    at = datetime.fromtimestamp(record.started_at_ns / 1e9, UTC).isoformat(timespec="milliseconds")
    fields: dict[str, Any] = {
        "timestamp": at.replace("+00:00", "Z"),
        "level": "info",
        "event": "exchange",
        "request_id": record.request_id.decode(),
        "trace_id": record.trace.trace_id.decode(),
        "key": record.key_prefix,
        "route": record.route or "unknown",
        "method": record.method.decode(),
        "model": record.model,
        "provider": record.provider,
        "status": record.status,
        "error": record.error,
        "attempts": len(record.attempts),
        "duration_ms": round(record.duration_ns / 1e6, 3),
        "overhead_ms": round(overhead_ns(record) / 1e6, 3),
    }
    if record.committed_ns is not None:
        fields["first_byte_ms"] = round(record.committed_ns / 1e6, 3)
    if record.is_stream or record.stream_end not in (None, "complete"):
        fields |= {"stream_end": record.stream_end, "chunks": record.chunks, "bytes": record.bytes_out}
    usage = record.usage
    if usage is not None:
        fields |= {"input_tokens": usage.all_input, "output_tokens": usage.output, "usage_source": usage.source}
        if usage.cache_read:
            fields["cache_read_tokens"] = usage.cache_read
    return {name: value for name, value in fields.items() if value is not None}


def overhead_ns(record: Record) -> int:
    """Return the time the gateway itself took before the commit: all of it not spent waiting for an upstream head."""
    until = record.duration_ns if record.committed_ns is None else record.committed_ns
    return max(0, until - record.upstream_ns)
