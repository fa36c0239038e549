"""The commit rule, filters, and chunk hooks that keep, edit, hold back, block, fail and take their time."""

from __future__ import annotations

from typing import Any

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint

from fault_upstream import ANTHROPIC, DIALECTS, OPENAI, Dialect, events_of, payload_of, until, watched, whole_stream
from penstock import (
    Candidate,
    Chunk,
    Exchange,
    OpenAIProvider,
    PluginError,
    Provider,
    RequestError,
    UpstreamRequest,
    hookimpl,
)
from penstock.relay import PROBE_BYTES, QUEUED_BYTES
from penstock.testing import LAST_CHUNK, STREAM_HEAD, Close, FakeUpstream, Pause, Stall, chunk, http_reply, stream_reply
from penstock.testing.strategies import encode
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio
SECRET = "do not tell the client"
WHOLE = b"".join(OPENAI.events)


# --- the commit rule ------------------------------------------------------------------------------------------------


async def test_nothing_reaches_the_client_before_the_first_whole_event() -> None:
    first = OPENAI.events[0]
    pauses = [Pause() for _ in first[:-1]]
    script: list[Step] = [STREAM_HEAD]
    for at, pause in enumerate(pauses):
        script += [chunk(first[at : at + 1]), pause]
    script += [chunk(first[-1:]), LAST_CHUNK]
    async with watched(FakeUpstream([script])) as run:
        run.idle = 1
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        for pause in pauses:
            await pause.reached.wait()
            assert not client.received
            pause.release()
        assert (await client.receive_reply()).body == first


async def test_stream_without_an_event_in_the_bound_is_committed_as_it_is() -> None:
    event = b"data: " + b"x" * (PROBE_BYTES + 10)
    pause = Pause()
    script: list[Step] = [STREAM_HEAD, chunk(event), pause, chunk(b"\n\n"), LAST_CHUNK]
    async with watched(FakeUpstream([script])) as run:
        run.idle = 1
        async with run.harness.stream("POST", OPENAI.path, body=OPENAI.body) as stream:
            assert stream.status == 200
            pause.release()
            assert (await stream.read()).body == event + b"\n\n"


@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("coding", ["", "gzip"])
async def test_error_event_is_found_in_any_segmentation_and_coding(size: int, coding: str) -> None:
    body = b": open\n\n" + OPENAI.error_event
    body = encode(body, coding) if coding else body
    head = STREAM_HEAD[:-2] + (b"Content-Encoding: gzip\r\n" if coding else b"") + b"\r\n"
    pieces = [chunk(body[at : at + size]) for at in range(0, len(body), size)]
    failing = FakeUpstream([[head, *pieces, LAST_CHUNK]])
    working = FakeUpstream([stream_reply(*OPENAI.events)])
    async with watched(failing, working) as run:
        reply = await run.harness.request("POST", OPENAI.path, {"Accept-Encoding": "gzip"}, OPENAI.body)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert reply.body == WHOLE
        assert [attempt.reason for attempt in run.harness.exchanges[0].attempts] == ["error_event", None]


async def test_coded_stream_that_breaks_gets_no_event_it_could_not_hold() -> None:
    pause, body = Pause(), encode(WHOLE, "gzip")
    head = STREAM_HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    async with watched(FakeUpstream([[head, chunk(body), pause, Close()]])) as run:
        headers = {"Accept-Encoding": "gzip"}
        async with run.harness.stream("POST", OPENAI.path, headers, OPENAI.body) as stream:
            assert await anext(aiter(stream)) == body
            pause.release()
            reply = await stream.read()
        assert (reply.body, reply.is_complete) == (body, False)


# --- filters that fail ----------------------------------------------------------------------------------------------


class Filter:
    """Fail where a test says."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.fed = 0

    def feed(self, payload: bytes) -> bytes:
        self.fed += 1
        if self.where == f"feed {self.fed}":
            raise KeyError("filter")
        return payload

    def finish(self) -> bytes:
        if self.where == "finish":
            raise KeyError("filter")
        return b""


@attrs.define(eq=False, kw_only=True)
class Filtering(OpenAIProvider):
    where: str

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        return attrs.evolve(super().build(exchange, candidate), response_filter=Filter(self.where))


class FilteringProviders:
    """Bring a provider type per place where a filter may fail."""

    @hookimpl
    def register_providers(self) -> list[Provider]:
        return [Filtering(type=name.replace(" ", "_"), where=name) for name in ("feed 1", "feed 2", "finish")]


@pytest.mark.parametrize("where", ["feed_1", "feed_2", "finish"])
async def test_filter_that_fails_ends_the_stream_and_is_logged(where: str) -> None:
    pause = Pause()
    script: list[Step] = [STREAM_HEAD, chunk(OPENAI.events[0]), pause, chunk(OPENAI.events[1]), LAST_CHUNK]
    upstream = FakeUpstream([script])
    config = {"routing": {"bindings": [{"name": "b", "type": where, "base_url": upstream.base_url}]}}
    async with watched(upstream, plugins=[FilteringProviders], config=config) as run:
        run.faults = 1
        async with run.harness.stream("POST", OPENAI.path, body=OPENAI.body) as stream:
            await pause.reached.wait()
            pause.release()
            reply = await stream.read()
        await run.harness.wait_settled(1)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert (reply.status, reply.is_complete) == (200, False)
        assert payload_of(events_of(reply.body)[-1])["error"]["code"] == "plugin_error"
        assert run.harness.exchanges[0].stream_end == "blocked"


# --- chunk hooks ----------------------------------------------------------------------------------------------------


class Chunks:
    """Do to each chunk what a test says, without or with awaiting, and keep what was seen."""

    sees_chunks = True

    def __init__(self, act: Any) -> None:
        self.act = act
        self.seen: list[bytes] = []
        self.ends = 0

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        return self.note(chunk)

    def note(self, chunk: Chunk) -> bytes | None:
        self.seen += [event.raw for event in chunk.events]
        self.ends += chunk.is_end
        result: bytes | None = self.act(chunk)
        return result


class AsyncChunks(Chunks):
    """The same, awaiting."""

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:  # type: ignore[override]
        await checkpoint()
        return self.note(chunk)


BOTH = pytest.mark.parametrize("kind", [Chunks, AsyncChunks], ids=["def", "async"])
EACH = pytest.mark.parametrize("dialect", DIALECTS, ids=[each.name for each in DIALECTS])


def cut_stream(dialect: Dialect) -> FakeUpstream:
    """Cut the stream's chunks where no event ends."""
    body = b"".join(dialect.events)
    pieces = [body[at : at + 37] for at in range(0, len(body), 37)]
    return FakeUpstream([[STREAM_HEAD, *map(chunk, pieces), LAST_CHUNK]], repeat=True)


@BOTH
@EACH
async def test_chunk_hook_that_returns_none_sees_whole_events_and_keeps_every_byte(kind: Any, dialect: Dialect) -> None:
    watcher = kind(lambda chunk: None)
    async with watched(cut_stream(dialect), plugins=[watcher]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert (reply.body, reply.is_complete) == (b"".join(dialect.events), True)
        assert (watcher.seen, watcher.ends) == (list(dialect.events), 1)
        assert run.harness.exchanges[0].usage is not None


@BOTH
async def test_chunk_hook_edits_and_holds_back(kind: Any) -> None:
    held: list[bytes] = []

    def act(chunk: Chunk) -> bytes:
        if chunk.is_end:
            return b"".join(held) + chunk.data
        held.append(chunk.data.replace(b" end", b" END"))
        return b""

    async with watched(cut_stream(OPENAI), plugins=[kind(act)]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.body, reply.is_complete) == (b"".join(OPENAI.events).replace(b" end", b" END"), True)


@BOTH
async def test_chunk_hook_edits_json_of_any_length(kind: Any) -> None:
    upstream = FakeUpstream([[http_reply(b'{"a":1}')]])

    def act(chunk: Chunk) -> bytes:
        return chunk.data.replace(b"1", b"12345") + (b" " if chunk.is_end else b"")

    async with watched(upstream, plugins=[kind(act)]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, body=b'{"model":"m"}')
        assert (reply.body, reply.header("content-length")) == (b'{"a":12345} ', None)


@BOTH
@EACH
@pytest.mark.parametrize("position", [0, 1, -1])
async def test_blocked_chunk_ends_the_stream_with_one_terminal_event(
    kind: Any, dialect: Dialect, position: int
) -> None:
    """No byte of the event that was refused reaches the client, and the upstream is let go."""
    refused = dialect.events[position]

    def act(chunk: Chunk) -> None:
        if refused in chunk.data:
            raise RequestError("guardrail_blocked", "No.")

    stall = Stall()
    async with watched(FakeUpstream([[STREAM_HEAD, *map(chunk, dialect.events), stall]]), plugins=[kind(act)]) as run:
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert not reply.is_complete
        *passed, last = events_of(reply.body)
        assert refused not in reply.body
        assert b"".join(event + b"\n\n" for event in passed) == b"".join(dialect.events[:position])
        assert dialect.is_terminal(payload_of(last), "stream_chunk_blocked", "guardrail_blocked")
        exchange = run.harness.exchanges[0]
        assert (exchange.stream_end, exchange.error and exchange.error.code) == ("blocked", "guardrail_blocked")
        await stall.gone.wait()


def fail_first(chunk: Chunk) -> None:
    raise KeyError(SECRET)


def fail_late(chunk: Chunk) -> None:
    if b"DONE" in chunk.data:
        raise KeyError(SECRET)


def fail_at_the_end(chunk: Chunk) -> None:
    if chunk.is_end:
        raise KeyError(SECRET)


def answer_text(chunk: Chunk) -> Any:
    return "text"


@BOTH
@pytest.mark.parametrize("act", [fail_first, fail_late, fail_at_the_end, answer_text])
async def test_chunk_hook_that_fails_ends_the_stream_and_is_logged(kind: Any, act: Any) -> None:
    async with watched(whole_stream(OPENAI), plugins=[("faulty", kind(act))]) as run:
        run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert not reply.is_complete
        last = events_of(reply.body)[-1]
        assert payload_of(last)["error"]["code"] == "plugin_error"
        assert SECRET.encode() not in reply.raw
        (fault,) = run.harness.faults
        assert act is answer_text or (isinstance(fault, PluginError) and fault.plugin == "faulty")
        assert run.harness.exchanges[0].stream_end == "blocked"


@BOTH
async def test_client_that_leaves_a_watched_stream_settles_once(kind: Any) -> None:
    stall = Stall()
    script: list[Step] = [STREAM_HEAD, chunk(OPENAI.events[0]), stall]
    async with watched(FakeUpstream([script]), plugins=[kind(lambda chunk: None)]) as run:
        async with run.harness.stream("POST", OPENAI.path, body=OPENAI.body) as stream:
            assert await anext(aiter(stream)) == OPENAI.events[0]
        await stall.gone.wait()
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "client_gone"


@BOTH
@EACH
async def test_watched_stream_that_breaks_ends_in_a_terminal_event(kind: Any, dialect: Dialect) -> None:
    pause = Pause()
    script: list[Step] = [STREAM_HEAD, chunk(dialect.events[0]), pause, chunk(b"data: {"), Stall()]
    timeouts = {"idle": 0.1, "first_byte": 5.0}
    async with watched(FakeUpstream([script]), plugins=[kind(lambda chunk: None)], timeouts=timeouts) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == dialect.events[0]
            pause.release()
            reply = await stream.read()
        assert not reply.is_complete
        last = events_of(reply.body)[-1]
        assert dialect.is_terminal(payload_of(last), "upstream_mid_stream_failure", "provider_error")


@BOTH
async def test_compressed_answer_is_not_asked_for_where_chunks_are_watched(kind: Any) -> None:
    async with watched(whole_stream(OPENAI), plugins=[kind(lambda chunk: None)]) as run:
        run.idle = 1
        headers = {"Accept-Encoding": "gzip, br"}
        await run.harness.request("POST", OPENAI.path, headers, OPENAI.body)
        assert run.upstreams[0].requests[0].headers.get(b"accept-encoding") == b"identity"


# --- hooks that await -----------------------------------------------------------------------------------------------


class Gate:
    """Let no chunk pass until the test says so."""

    sees_chunks = True

    def __init__(self) -> None:
        self.reached, self.open = anyio.Event(), anyio.Event()

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> None:
        self.reached.set()
        await self.open.wait()


async def test_slow_hook_slows_the_upstream() -> None:
    gate = Gate()
    piece = b"data: " + b"x" * 8000 + b"\n\n"
    async with watched(FakeUpstream([stream_reply(*[piece] * 600)]), plugins=[gate]) as run:
        run.idle = 1
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        await gate.reached.wait()
        (upstream,) = run.harness.gateway.transports.direct.opened
        (connection,) = run.harness.gateway.server.connections
        await until(lambda: upstream._paused, "the upstream is made to wait")
        relay: Any = connection._relay
        assert QUEUED_BYTES < relay._queued <= 5 * QUEUED_BYTES
        gate.open.set()
        assert (await client.receive_reply()).body == piece * 600


@pytest.mark.parametrize("end", ["stall", "close"])
async def test_client_that_leaves_while_a_hook_waits_settles_once(end: str) -> None:
    gate = Gate()
    steps: dict[str, Step] = {"stall": Stall(), "close": Close()}
    script: list[Step] = [STREAM_HEAD, chunk(ANTHROPIC.events[0]), steps[end]]
    async with watched(FakeUpstream([script]), plugins=[gate]) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", ANTHROPIC.path, body=ANTHROPIC.body))
        await gate.reached.wait()
        client.reset()
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "client_gone"
        assert run.harness.exchanges[0].usage is not None
