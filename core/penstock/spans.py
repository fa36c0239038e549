"""OpenTelemetry spans made of settled records, on the telemetry thread: one SERVER span per exchange, one CLIENT span
per attempt as its child. Attribute names follow the GenAI semantic conventions where those have one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from penstock import __version__
from penstock.errors import ConfigurationError
from penstock.logs import overhead_ns
from penstock.models import Attempt, Principal, Usage, fallbacks
from penstock.telemetry import Record

_SCOPE = InstrumentationScope("penstock", __version__)
_OPERATIONS = {"chat": "chat", "messages": "chat", "responses": "chat", "completions": "text_completion",
               "embeddings": "embeddings"}  # fmt: skip


def new_span_sink(kind: Literal["console", "otlp"], namespace: str) -> SpanSink:
    """Return the sink for a configured destination. Raises ConfigurationError where its exporter is not installed."""
    if kind == "console":
        return SpanSink(ConsoleSpanExporter(out=sys.stdout), namespace)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import-not-found] # noqa: PLC0415
            OTLPSpanExporter,
        )
    except ImportError:
        raise ConfigurationError(
            '[gateway] spans: "otlp" needs the package opentelemetry-exporter-otlp-proto-http'
        ) from None
    return SpanSink(OTLPSpanExporter(), namespace)


class SpanSink:
    """Turn records into finished spans and hand them to an exporter."""

    def __init__(self, exporter: SpanExporter, namespace: str = "penstock") -> None:
        self._exporter = exporter
        self._namespace = namespace
        self._resource = Resource.create({"service.name": namespace, "service.version": __version__})

    def write(self, records: Sequence[Record]) -> None:
        spans: list[ReadableSpan] = []
        for record in records:
            server = self._server_span(record)
            spans.append(server)
            spans += [self._attempt_span(record, attempt, server.context) for attempt in record.attempts]
        if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
            raise ConnectionError("the exporter could not deliver the spans")

    def close(self) -> None:
        self._exporter.shutdown()

    def _server_span(self, record: Record) -> ReadableSpan:
        trace = record.trace
        flags = TraceFlags(int(trace.flags, 16))
        trace_id = int(trace.trace_id, 16)
        context = SpanContext(trace_id, int(trace.span_id, 16), is_remote=False, trace_flags=flags)
        parent = None
        if trace.parent_id is not None:
            parent = SpanContext(trace_id, int(trace.parent_id, 16), is_remote=True, trace_flags=flags)
        failed = record.status is None or record.status >= 500
        return ReadableSpan(
            name=f"{_OPERATIONS.get(record.operation, record.operation)} {record.model or ''}".strip(),
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=self._attributes(record),
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR if failed else StatusCode.UNSET),
            start_time=record.started_at_ns,
            end_time=record.started_at_ns + record.duration_ns,
            instrumentation_scope=_SCOPE,
        )

    def _attributes(self, record: Record) -> dict[str, Any]:
        name = self._namespace
        attributes: dict[str, Any] = {
            f"{name}.request_id": record.request_id.decode(),
            f"{name}.vk_id": record.key_id,
            f"{name}.provider": record.provider,
            f"{name}.binding_id": record.binding_id,
            f"{name}.model_source": record.model_source,
            f"{name}.fallback.attempt": fallbacks(record.attempts),
            f"{name}.overhead_us": overhead_ns(record) // 1000,
            "gen_ai.operation.name": _OPERATIONS.get(record.operation),
            "gen_ai.provider.name": record.provider,
            "gen_ai.request.model": record.model,
            "http.request.method": record.method.decode(),
            "http.response.status_code": record.status,
            "http.route": record.route or None,
            "error.type": record.error,
        }
        if record.is_stream:
            attributes |= {
                f"{name}.stream.chunks": record.chunks,
                f"{name}.stream.bytes": record.bytes_out,
                f"{name}.stream.end": record.stream_end,
            }
            if record.committed_ns is not None:
                attributes[f"{name}.stream.first_byte_ms"] = record.committed_ns / 1e6
        if record.principal is not None:
            attributes |= self._attribution(record.principal)
        if record.usage is not None:
            attributes |= self._counts(record.usage)
        return {key: value for key, value in attributes.items() if value is not None}

    def _attribution(self, principal: Principal) -> dict[str, Any]:
        name = self._namespace
        return {
            f"{name}.project_id": principal.project_id,
            f"{name}.team_id": principal.team_id,
            f"{name}.org_id": principal.organization_id,
            f"{name}.principal_id": principal.principal_id,
        }

    def _counts(self, usage: Usage) -> dict[str, Any]:
        return {
            "gen_ai.usage.input_tokens": usage.all_input,
            "gen_ai.usage.output_tokens": usage.output,
            "gen_ai.usage.cache_read.input_tokens": usage.cache_read,
            "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_5m + usage.cache_write_1h,
            f"{self._namespace}.usage_source": usage.source,
        }

    def _attempt_span(self, record: Record, attempt: Attempt, parent: SpanContext) -> ReadableSpan:
        context = SpanContext(
            parent.trace_id, int(attempt.span_id, 16), is_remote=False, trace_flags=parent.trace_flags
        )
        started = record.started_at_ns + attempt.started_ns - record.started_ns
        ended = started if not attempt.ended_ns else record.started_at_ns + attempt.ended_ns - record.started_ns
        attributes: dict[str, Any] = {
            f"{self._namespace}.attempt.number": attempt.number,
            f"{self._namespace}.attempt.outcome": attempt.outcome,
            f"{self._namespace}.binding_id": attempt.binding_id,
            "gen_ai.provider.name": attempt.provider,
            "gen_ai.request.model": attempt.model,
            "http.response.status_code": attempt.status,
            "error.type": attempt.reason,
        }
        return ReadableSpan(
            name=f"attempt {attempt.provider}",
            context=context,
            parent=parent,
            resource=self._resource,
            attributes={key: value for key, value in attributes.items() if value is not None},
            kind=SpanKind.CLIENT,
            status=Status(StatusCode.ERROR if attempt.reason else StatusCode.UNSET),
            start_time=started,
            end_time=ended,
            instrumentation_scope=_SCOPE,
        )
