"""The line per exchange, and the figures spans share with it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from penstock.log import Log
from penstock.telemetry import Record


class LogSink:
    """Write one line per exchange; a stream that cannot take it loses the line."""

    slice_records = 4096

    def __init__(self, log: Log) -> None:
        self._log = log

    def prepare(self, record: Record) -> Record | bytes:
        """Return a line of JSON; for a terminal the record, whose colours are the thread's work."""
        return record if self._log.is_console else json_line(record)

    def write(self, records: Sequence[Any]) -> None:
        """Write what ``prepare`` returned, or records."""
        stream = self._log.stream
        if self._log.is_console:
            stream.write("".join([self._log.render(fields_of(record)) + "\n" for record in records]))
        else:
            lines = [record if isinstance(record, bytes) else json_line(record) for record in records]
            stream.write(b"\n".join([*lines, b""]).decode())
        stream.flush()

    def close(self) -> None:
        """Leave the stream open: it belongs to the process."""


_encode = msgspec.json.encode
_LINE = (
    b'{"timestamp":"%b.%03dZ","level":"info","event":"exchange","request_id":"%b","trace_id":"%b","key":%b,'
    b'"route":"%b","method":"%b","model":%b,"provider":%b,"status":%b,"error":%b,"attempts":%d,'
    b'"duration_ms":%.3f,"overhead_ms":%.3f'
)


@functools.lru_cache(maxsize=4)
def _second(at: int) -> bytes:
    """Return a second since the epoch as RFC 3339 without zone; consecutive lines share it."""
    return datetime.fromtimestamp(at, UTC).isoformat()[:19].encode()


def json_line(record: Record) -> bytes:
    """Return an exchange's line: what ``fields_of`` gives, as JSON, written without building it first.

    It is on the same core as traffic, so it is a template; a property test holds it equal to ``fields_of``.
    """
    second, rest = divmod(record.started_at_ns, 1_000_000_000)
    line = _LINE % (
        _second(second),
        rest // 1_000_000,
        record.request_id,
        record.trace.trace_id,
        _encode(record.key_prefix),
        (record.route or "unknown").encode(),
        record.method,
        _encode(record.model),
        _encode(record.provider),
        _encode(record.status),
        _encode(record.error),
        len(record.attempts),
        record.duration_ns / 1e6,
        overhead_ns(record) / 1e6,
    )
    if record.committed_ns is not None:
        line += b',"first_byte_ms":%.3f' % (record.committed_ns / 1e6)
    if record.is_stream or record.stream_end not in (None, "complete"):
        line += b',"stream_end":%b,"chunks":%d,"bytes":%d' % (
            _encode(record.stream_end), record.chunks, record.bytes_out,
        )  # fmt: skip
    usage = record.usage
    if usage is not None:
        line += b',"input_tokens":%d,"output_tokens":%d,"cache_read_tokens":%d,"usage_source":"%b"' % (
            usage.all_input, usage.output, usage.cache_read, usage.source.encode(),
        )  # fmt: skip
    return line + b"}"


def fields_of(record: Record) -> dict[str, Any]:
    """Return the fields of an exchange's line; never a secret, never a prompt."""
    second, rest = divmod(record.started_at_ns, 1_000_000_000)
    fields: dict[str, Any] = {
        "timestamp": f"{_second(second).decode()}.{rest // 1_000_000:03d}Z",
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
        fields |= {"input_tokens": usage.all_input, "output_tokens": usage.output,
                   "cache_read_tokens": usage.cache_read, "usage_source": usage.source}  # fmt: skip
    return fields


def overhead_ns(record: Record) -> int:
    """Return the time the gateway itself took before the commit: all of it not spent waiting for an upstream head."""
    until = record.duration_ns if record.committed_ns is None else record.committed_ns
    return max(0, until - record.upstream_ns)
