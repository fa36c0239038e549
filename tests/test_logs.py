"""The line per exchange: the same fields by template and by table, readable, and never a secret or a prompt."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Candidate, Chunk, Exchange, OpenAIProvider, TraceContext, UpstreamRequest, Usage, hookimpl, new_key
from penstock.log import Log, Mode
from penstock.logs import LogSink, fields_of, json_line, overhead_ns
from penstock.models import Attempt
from penstock.telemetry import Record
from penstock.testing import FakeUpstream, Harness, Reset, http_reply, stream_reply
from penstock.testing.harness import PEPPER
from penstock.testing.upstream import Step
from recording import logging_to

CHAT = "/v1/chat/completions"
NANOSECONDS = st.integers(0, 10**15)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
HEX = st.text("0123456789abcdef", min_size=16, max_size=16).map(str.encode)
COUNTS = st.integers(0, 10**12)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Draw what an exchange may leave behind."""
    trace = TraceContext(draw(HEX) * 2, draw(HEX), draw(st.none() | HEX))
    attempt = Attempt(0, "gpc_a", "openai", draw(st.none() | TEXT), b"0" * 16, 0)
    usages = st.builds(
        Usage, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, st.sampled_from(["provider", "estimated"])
    )
    return Record(
        request_id=b"req_" + draw(HEX),
        trace=trace,
        started_at_ns=draw(st.integers(0, 4 * 10**18)),
        started_ns=draw(NANOSECONDS),
        duration_ns=draw(NANOSECONDS),
        upstream_ns=draw(NANOSECONDS),
        committed_ns=draw(st.none() | NANOSECONDS),
        method=draw(st.sampled_from([b"GET", b"POST", b"M-SEARCH", b"!#$%&'*+-.^_`|~"])),
        route=draw(st.sampled_from(["", CHAT, "/v1/models/{id}"])),
        operation="chat",
        key_prefix=draw(st.none() | TEXT),
        key_id=draw(st.none() | TEXT),
        provider=draw(st.none() | TEXT),
        binding_id=draw(st.none() | TEXT),
        model=draw(st.none() | TEXT),
        model_source=draw(st.none() | TEXT),
        status=draw(st.none() | st.integers(100, 599)),
        error=draw(st.none() | TEXT),
        attempts=[attempt] * draw(st.integers(0, 3)),
        is_stream=draw(st.booleans()),
        stream_end=draw(st.sampled_from([None, "complete", "client_gone", "upstream_failed", "blocked"])),
        chunks=draw(COUNTS),
        bytes_out=draw(COUNTS),
        usage=draw(st.none() | usages),
    )


@given(records())
def test_template_says_what_the_table_says(record: Record) -> None:
    line = json_line(record)
    assert json.loads(line) == fields_of(record)
    assert list(json.loads(line)) == list(fields_of(record))
    assert b"\n" not in line
    assert b"\r" not in line


@given(records())
def test_overhead_is_never_negative_and_never_more_than_the_time_until_the_commit(record: Record) -> None:
    until = record.duration_ns if record.committed_ns is None else record.committed_ns
    assert 0 <= overhead_ns(record) <= until


@given(st.lists(records(), max_size=5))
def test_sink_writes_one_line_per_record(found: list[Record]) -> None:
    stream = io.StringIO()
    sink = LogSink(Log("json", stream))
    sink.write(found)
    sink.close()
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [fields_of(record) for record in found]


# --- modes ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


MODES: list[tuple[Mode, type[io.StringIO], bool]] = [
    ("json", Terminal, False),
    ("console", io.StringIO, True),
    ("auto", Terminal, True),
    ("auto", io.StringIO, False),
    ("off", io.StringIO, False),
]


@pytest.mark.parametrize(("mode", "stream", "is_console"), MODES)
def test_auto_is_console_on_a_terminal_only(mode: Mode, stream: type[io.StringIO], is_console: bool) -> None:
    assert Log(mode, stream()).is_console is is_console


def test_off_keeps_warnings_and_errors() -> None:
    stream = io.StringIO()
    log = Log("off", stream)
    log.info("quiet")
    log.warning("loud")
    log.error("louder")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud", "louder"]


def test_what_json_cannot_say_is_said_as_text() -> None:
    stream = io.StringIO()
    Log("json", stream).info("odd", value={1, 2}.__class__, path=b"x")
    assert json.loads(stream.getvalue())["value"] == "<class 'set'>"


@given(records())
def test_console_renders_every_field_on_one_line(record: Record) -> None:
    stream = io.StringIO()
    LogSink(Log("console", stream)).write([record])
    text = stream.getvalue()
    assert text.endswith("\n")
    for name in ("exchange", "request_id", "route", "status", "duration_ms"):
        assert name in text
    assert record.request_id.decode() in text


# --- nothing secret -------------------------------------------------------------------------------------------------

CANARY = "canary-7f3a"
HOOKS = ("authenticate", "pre_request", "select_provider", "post_response")


def leak(exchange: Exchange) -> None:
    """Raise what a careless plugin raises: its text quotes everything there is."""
    request = exchange.request
    everything = request.body.decode("utf-8", "replace") + repr(list(request.headers)) + repr(request.query)
    secret_local = everything
    try:
        try:
            raise KeyError(secret_local)
        except KeyError as error:
            error.add_note(everything)
            raise ValueError(everything) from error
    except ValueError:
        raise RuntimeError(everything)  # noqa: B904 - the context is what is tested


def leaky(hook: str) -> tuple[str, type[Any]]:
    def fail(self: Any, exchange: Exchange) -> None:
        leak(exchange)

    async def fail_later(self: Any, exchange: Exchange) -> None:
        leak(exchange)

    def fail_chunk(self: Any, exchange: Exchange, chunk: Chunk) -> None:
        raise ValueError(chunk.data)

    function: Callable[..., Awaitable[None] | None] = fail_later if hook == "pre_request" else fail
    if hook == "on_stream_chunk":
        function = fail_chunk
    return "leaky", type("Leaky", (), {hook: hookimpl(function), "sees_chunks": True})


class LeakyProvider(OpenAIProvider):
    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        leak(exchange)
        raise AssertionError


class LeakyUsage(OpenAIProvider):
    def read_usage(self, exchange: Exchange, window: Any) -> Usage | None:
        raise ValueError(window.text)


class LeakyProviders:
    """Bring providers that quote what they are given."""

    @hookimpl
    def register_providers(self) -> list[OpenAIProvider]:
        return [LeakyProvider(type="leaky_build"), LeakyUsage(type="leaky_usage")]


def answer() -> list[Step]:
    fields = [(b"Content-Type", b"application/json"), (b"Set-Cookie", CANARY.encode()), (b"X-Own", CANARY.encode())]
    return [http_reply(b'{"id":"x","choices":[{"message":{"content":"%b"}}]}' % CANARY.encode(), fields=fields)]


STREAM = stream_reply(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % CANARY.encode(), b"data: [DONE]\n\n")
ERROR = stream_reply(b'data: {"error":{"message":"%b"}}\n\n' % CANARY.encode())
SCRIPTS: dict[str, list[Step]] = {
    "answer": answer(),
    "stream": STREAM,
    "provider's error": [http_reply(CANARY.encode(), 400)],
    "error event": ERROR,
    "reset": [Reset()],
    "no HTTP": [f"{CANARY}\r\n\r\n".encode()],
    "bad field": [f"HTTP/1.1 200 OK\r\n{CANARY}\r\n\r\n".encode()],
    "bad chunk": [f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{CANARY}\r\n".encode()],
}


async def shout(harness: Harness, secret: str) -> None:
    """Send requests with canaries wherever a client can put something that is not to be kept."""
    fields = {
        "Authorization": f"Bearer {secret}",
        "Cookie": f"session={CANARY}",
        "X-Penstock-Metadata": CANARY,
        "User-Agent": CANARY,
        "X-Own": CANARY,
        "tracestate": f"v={CANARY}",
        "baggage": CANARY,
    }
    body = {"model": "m", "stream": True, "messages": [{"content": CANARY}], "user": CANARY}
    await harness.request("POST", f"{CHAT}?q={CANARY}&key={secret}", fields, body)
    for path, payload in (
        (CHAT, f'{{"model":"m", {CANARY}'.encode()),
        (CHAT, f'{{"messages":"{CANARY}"}}'.encode()),
        (f"/v1/{CANARY}?key={secret}", b"{}"),
        (f"/v1beta/models/gemini-x:generateContent?key={secret}", f'{{"contents":"{CANARY}"}}'.encode()),
        (f"/v1/responses/{CANARY}?x={secret}", b""),
        (f"/v1/models/{CANARY}", b""),
    ):
        await harness.request("POST" if payload else "GET", path, fields, payload)
    await harness.request("POST", CHAT, {"x-api-key": f"{CANARY}-bad-key"}, body)
    client = await harness.raw()
    await client.send(f"POST {CHAT} HTTP/1.1\r\nHost: h\r\n{CANARY}: \x01{secret}\r\n\r\n".encode())
    await client.receive_all()


def quiet(text: str, secret: str) -> None:
    assert CANARY not in text
    assert secret not in text
    assert secret[20:] not in text
    assert "sk-canary-upstream" not in text
    assert PEPPER not in text


async def run_quietly(
    script: list[Step], plugins: list[Any], mode: Mode = "json", kind: str = "openai_compatible"
) -> list[str]:
    """Run everything a client may send, and return the lines that were logged."""
    secret, stream = new_key(), io.StringIO()
    upstream = FakeUpstream([script], repeat=True)
    binding = {"name": "up", "type": kind, "base_url": upstream.base_url, "credential": "sk-canary-upstream",
               "extra_headers": {"X-Tenant": CANARY}}  # fmt: skip
    config: dict[str, Any] = {
        "routing": {"bindings": [binding]},
        "virtual_keys": {"pepper": PEPPER, "keys": [{"name": "k", "secret": secret}]},
    }
    harness = Harness(plugins, config, upstream)
    logging_to(harness, stream, mode=mode)
    async with harness:
        await shout(harness, secret)
        found = harness.records
        assert len(found) == 8
        quiet(repr(found), secret)
    quiet(stream.getvalue(), secret)
    return stream.getvalue().splitlines()


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["json", "console"])
@pytest.mark.parametrize("script", SCRIPTS)
async def test_log_never_holds_what_client_or_provider_said(script: str, mode: Mode) -> None:
    lines = await run_quietly(SCRIPTS[script], [], mode)
    assert len([line for line in lines if "exchange" in line]) == 8


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["json", "console"])
@pytest.mark.parametrize("hook", [*HOOKS, "on_stream_chunk"])
async def test_log_never_holds_what_a_failing_plugin_quotes(hook: str, mode: Mode) -> None:
    lines = await run_quietly(STREAM, [leaky(hook), "virtual_keys"], mode)
    faults = "\n".join(lines)
    assert "leaky" in faults
    assert hook in faults
    assert "test_logs.py" in faults


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["leaky_build", "leaky_usage"])
async def test_log_never_holds_what_a_failing_provider_quotes(kind: str) -> None:
    lines = await run_quietly(answer(), [LeakyProviders], kind=kind)
    assert "test_logs.py" in "\n".join(lines)


@pytest.mark.anyio
async def test_line_of_an_exchange_says_what_operators_ask() -> None:
    stream = io.StringIO()
    harness = Harness(upstream=FakeUpstream([answer()]))
    logging_to(harness, stream)
    async with harness:
        reply = await harness.request("POST", CHAT, body={"model": "m", "messages": []})
        assert harness.records
        line = json.loads(stream.getvalue())
        assert line["request_id"] == reply.header("X-Penstock-Request-Id")
        assert line["trace_id"] == reply.header("X-Penstock-Trace-Id")
        assert line["key"] == harness.key[:17]
        found = {name: line[name] for name in ("route", "method", "model", "provider", "status", "error", "attempts")}
        assert found == {
            "route": CHAT, "method": "POST", "model": "m", "provider": "openai_compatible", "status": 200,
            "error": None, "attempts": 1,
        }  # fmt: skip
        assert 0 <= line["overhead_ms"] <= line["first_byte_ms"] <= line["duration_ms"]
