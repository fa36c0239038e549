"""Spans made of records: who is whose parent, what they say, and what happens when nobody takes them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, format_trace_id

from fault_upstream import OPENAI
from penstock import ConfigurationError, new_key
from penstock.spans import SpanSink, new_span_sink
from penstock.testing import FakeUpstream, Harness, Pause, Reply, Reset, http_reply, stream_reply
from penstock.testing.harness import PEPPER
from penstock.testing.upstream import LAST_CHUNK, STREAM_HEAD, chunk
from recording import logging_to

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
ANSWER = b'{"usage":{"prompt_tokens":10,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}'


class Exporting:
    """A gateway with one binding per upstream and an exporter in memory."""

    def __init__(self, *upstreams: FakeUpstream, namespace: str = "penstock", **key: Any) -> None:
        self.exporter = InMemorySpanExporter()
        secret = new_key(namespace)
        bindings = [
            {"name": f"b{number}", "type": "openai_compatible", "base_url": upstream.base_url, "credential": "sk"}
            for number, upstream in enumerate(upstreams)
        ]
        config: dict[str, Any] = {
            "routing": {"bindings": bindings},
            "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "k", "secret": secret, **key}]},
        }
        self.harness = Harness(config=config, upstream=upstreams, gateway={"namespace": namespace})
        self.harness.key = secret
        logging_to(self.harness, io.StringIO(), SpanSink(self.exporter, namespace))

    async def spans(
        self, body: Any = None, fields: dict[str, str] | None = None, path: str = CHAT
    ) -> list[ReadableSpan]:
        """Send one request; returns its spans, the server's first."""
        self.reply: Reply = await self.harness.request(
            "POST", path, fields or {}, body or {"model": "m", "messages": []}
        )
        assert self.harness.records
        found = list(self.exporter.get_finished_spans())
        self.exporter.clear()
        return found


def said(span: ReadableSpan, *names: str) -> list[Any]:
    attributes = span.attributes or {}
    return [attributes.get(name) for name in names]


def span_id(span: ReadableSpan) -> str:
    assert span.context is not None
    return format_span_id(span.context.span_id)


# --- who is whose parent --------------------------------------------------------------------------------------------


async def test_exchange_is_a_child_of_the_callers_span_and_parent_of_its_attempts() -> None:
    run = Exporting(
        FakeUpstream([[http_reply(b"", 503)]]), FakeUpstream([[Reset()]]), FakeUpstream([[http_reply(ANSWER)]])
    )
    async with run.harness as harness:
        server, *attempts = await run.spans(fields={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"})
        assert server.kind is SpanKind.SERVER
        assert server.parent is not None
        assert server.parent.is_remote
        assert format_span_id(server.parent.span_id) == PARENT_ID
        assert span_id(server) == run.reply.header("X-Penstock-Span-Id")
        assert len(attempts) == 3
        recorded = [attempt.span_id.decode() for attempt in harness.exchanges[0].attempts]
        assert [span_id(span) for span in attempts] == recorded
        for span in (server, *attempts):
            assert span.context is not None
            assert format_trace_id(span.context.trace_id) == TRACE_ID == run.reply.header("X-Penstock-Trace-Id")
        for span in attempts:
            assert span.kind is SpanKind.CLIENT
            assert span.parent == server.context


async def test_exchange_without_a_caller_begins_a_trace() -> None:
    run = Exporting(FakeUpstream([[http_reply()]]))
    async with run.harness:
        server, attempt = await run.spans(fields={"traceparent": f"00-{'0' * 32}-{PARENT_ID}-01"})
        assert server.parent is None
        assert attempt.parent == server.context
        assert run.reply.header("traceparent") == f"00-{run.reply.header('X-Penstock-Trace-Id')}-{span_id(server)}-01"


async def test_attempts_lie_within_their_exchange_one_after_the_other() -> None:
    run = Exporting(FakeUpstream([[http_reply(b"", 503)]]), FakeUpstream([[http_reply(ANSWER)]]))
    async with run.harness:
        server, first, second = await run.spans()
        times = [
            server.start_time,
            first.start_time,
            first.end_time,
            second.start_time,
            second.end_time,
            server.end_time,
        ]
        assert times == sorted(times, key=lambda at: at or 0)
        assert None not in times


# --- what they say --------------------------------------------------------------------------------------------------


async def test_span_of_an_exchange_says_who_what_and_how_much() -> None:
    run = Exporting(FakeUpstream([[http_reply(ANSWER)]]), project="proj_a", principal="user_a",
                    model_aliases={"nick": "m"})  # fmt: skip
    async with run.harness:
        server, _ = await run.spans({"model": "nick", "messages": []})
        assert server.name == "chat m"
        attributes = dict(server.attributes or {})
        assert attributes.pop("penstock.overhead_us") >= 0  # type: ignore[operator]
        assert attributes == {
            "penstock.request_id": run.reply.header("X-Penstock-Request-Id"),
            "penstock.vk_id": "vk_k",
            "penstock.project_id": "proj_a",
            "penstock.team_id": "team_default",
            "penstock.org_id": "org_default",
            "penstock.principal_id": "user_a",
            "penstock.provider": "openai_compatible",
            "penstock.binding_id": "gpc_b0",
            "penstock.model_source": "alias",
            "penstock.fallback.attempt": 0,
            "penstock.usage_source": "provider",
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "openai_compatible",
            "gen_ai.request.model": "m",
            "gen_ai.usage.input_tokens": 10,
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.usage.cache_read.input_tokens": 4,
            "gen_ai.usage.cache_creation.input_tokens": 0,
            "http.request.method": "POST",
            "http.response.status_code": 200,
            "http.route": CHAT,
        }
        assert server.status.status_code is StatusCode.UNSET
        assert server.resource.attributes["service.name"] == "penstock"


async def test_attempts_say_their_number_and_why_they_failed() -> None:
    run = Exporting(
        FakeUpstream([[http_reply(b"", 503)]]), FakeUpstream([[Reset()]]), FakeUpstream([[http_reply(ANSWER)]])
    )
    async with run.harness:
        server, *attempts = await run.spans()
        names = ("penstock.attempt.number", "penstock.attempt.outcome", "http.response.status_code", "error.type")
        assert [said(span, *names) for span in attempts] == [
            [0, "status", 503, "status"],
            [1, "reset", None, "reset"],
            [2, "answered", 200, None],
        ]
        error, unset = StatusCode.ERROR, StatusCode.UNSET
        assert [span.status.status_code for span in attempts] == [error, error, unset]
        assert said(server, "penstock.fallback.attempt", "penstock.binding_id") == [2, "gpc_b2"]


async def test_stream_says_how_it_went() -> None:
    run = Exporting(FakeUpstream([stream_reply(*OPENAI.events)]))
    async with run.harness:
        server, _ = await run.spans(OPENAI.body)
        names = ("penstock.stream.end", "penstock.stream.bytes", "gen_ai.usage.output_tokens")
        assert said(server, *names) == ["complete", len(run.reply.raw.partition(b"\r\n\r\n")[2]), 3]
        chunks, first = said(server, "penstock.stream.chunks", "penstock.stream.first_byte_ms")
        assert chunks >= 1
        assert first > 0


async def test_stream_whose_client_has_gone_says_so() -> None:
    pause = Pause()
    run = Exporting(FakeUpstream([[STREAM_HEAD, chunk(OPENAI.events[0]), pause, LAST_CHUNK]]))
    async with run.harness as harness:
        async with harness.stream("POST", CHAT, body=OPENAI.body):
            await pause.reached.wait()
        await harness.wait_settled(1)
        assert harness.records
        server, _ = run.exporter.get_finished_spans()
        assert said(server, "penstock.stream.end") == ["client_gone"]


REFUSALS = [
    ({"x-api-key": "bad"}, {"model": "m"}, 401, "invalid_api_key", None),
    ({}, {}, 400, "missing_model", "vk_k"),
]


@pytest.mark.parametrize(("fields", "body", "status", "code", "key"), REFUSALS)
async def test_refusal_has_a_span_without_attempts_and_usage(
    fields: dict[str, str], body: Any, status: int, code: str, key: str | None
) -> None:
    run = Exporting(FakeUpstream())
    async with run.harness:
        (server,) = await run.spans(body or b"{}", fields)
        assert said(server, "http.response.status_code", "error.type", "penstock.vk_id") == [status, code, key]
        assert said(server, "gen_ai.usage.input_tokens", "gen_ai.request.model") == [None, None]
        assert server.status.status_code is StatusCode.UNSET


async def test_failed_exchange_is_an_error() -> None:
    run = Exporting(FakeUpstream([[Reset()]]))
    async with run.harness:
        server, _ = await run.spans()
        assert server.status.status_code is StatusCode.ERROR
        assert said(server, "http.response.status_code", "error.type") == [502, "provider_error"]


async def test_namespace_names_attributes_and_service() -> None:
    run = Exporting(FakeUpstream([[http_reply()]]), namespace="langwatch")
    async with run.harness:
        server, attempt = await run.spans()
        names = [name for span in (server, attempt) for name in span.attributes or {}]
        assert "langwatch.vk_id" in names
        assert not [name for name in names if "penstock" in name]
        assert server.resource.attributes["service.name"] == "langwatch"


async def test_spans_hold_neither_key_nor_prompt_nor_credential() -> None:
    run = Exporting(FakeUpstream([[http_reply(b'{"text":"canary"}')]]))
    async with run.harness:
        body = {"model": "m", "messages": [{"content": "canary"}], "user": "canary"}
        spans = await run.spans(body, {"tracestate": "v=canary", "X-Own": "canary"}, f"{CHAT}?q=canary")
        text = "".join(span.to_json() for span in spans)
        assert "canary" not in text
        assert run.harness.key not in text


# --- exporters ------------------------------------------------------------------------------------------------------


class Refusing(SpanExporter):
    """Report failure, as an exporter whose collector is down does."""

    def __init__(self) -> None:
        self.asked = self.closed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked += 1
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self.closed += 1


async def test_spans_nobody_takes_are_counted_and_cost_traffic_nothing() -> None:
    exporter, log = Refusing(), io.StringIO()
    harness = Harness(upstream=FakeUpstream([[http_reply()]], repeat=True))
    telemetry = logging_to(harness, log, SpanSink(exporter))
    async with harness:
        for _ in range(2):
            assert (await harness.request("POST", CHAT, body={"model": "m"})).status == 200
        assert harness.records
    assert (exporter.asked, telemetry.dropped, exporter.closed) == (1, 2, 1)
    assert "telemetry sink failed" in log.getvalue()


async def test_console_destination_prints_spans(capsys: pytest.CaptureFixture[str]) -> None:
    harness = Harness(upstream=FakeUpstream([[http_reply()]]))
    logging_to(harness, io.StringIO(), new_span_sink("console", "penstock"))
    async with harness:
        await harness.request("POST", CHAT, body={"model": "m"})
        assert harness.records
    assert '"penstock.vk_id": "vk_test"' in capsys.readouterr().out


def test_destination_that_is_not_installed_says_what_to_install() -> None:
    if importlib.util.find_spec("opentelemetry.exporter") is not None:
        new_span_sink("otlp", "penstock").close()
        return
    with pytest.raises(ConfigurationError, match="opentelemetry-exporter-otlp-proto-http"):
        new_span_sink("otlp", "penstock")
