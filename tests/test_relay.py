"""The commit rule, the bound on what is probed and queued, and filters that fail."""

from __future__ import annotations

from typing import Any

import anyio
import attrs
import pytest

from fault_upstream import ANTHROPIC, OPENAI, events_of, payload_of, until, watched
from penstock import Candidate, Chunk, Exchange, OpenAIProvider, Provider, UpstreamRequest, hookimpl
from penstock.relay import PROBE_BYTES, QUEUED_BYTES
from penstock.testing import LAST_CHUNK, STREAM_HEAD, Close, FakeUpstream, Pause, Stall, chunk, stream_reply
from penstock.testing.strategies import encode
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio
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
