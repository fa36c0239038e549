"""A plugin's own requests: one whole decoded answer within its bounds, or an UpstreamError and no connection left."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import attrs
import pytest

from fault_upstream import until
from penstock import Fetch, FetchedResponse, Origin, Timeouts, UpstreamError, UpstreamRequest
from penstock.testing import LAST_CHUNK, FakeUpstream, Harness, Reset, Stall, chunk, http_reply
from penstock.testing.upstream import Close, Step

pytestmark = pytest.mark.anyio

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n%b\r\n"
MAX_BYTES = 1000
ZIPPED = gzip.compress(b"one")


@attrs.define
class Fetching:
    """Fetch from one upstream, in memory."""

    harness: Harness
    upstream: FakeUpstream

    async def fetch(self, path: bytes = b"/v1/things", timeout: float = 10.0) -> FetchedResponse:
        origin = Origin("http", self.upstream.host, 80)
        request = UpstreamRequest(origin, b"GET", path, b"host: h\r\nx-a: 1\r\n", b"", Timeouts())
        fetch = self.harness.gateway.generation.services.get(Fetch)  # type: ignore[type-abstract]
        return await fetch(request, timeout=timeout, max_bytes=MAX_BYTES)

    async def fault(self, timeout: float = 10.0) -> str:
        with pytest.raises(UpstreamError) as caught:
            await self.fetch(timeout=timeout)
        await until(lambda: not self.upstream.connections, "the connection is closed")
        return caught.value.fault


@asynccontextmanager
async def fetching(*script: Step, repeat: bool = False) -> AsyncIterator[Fetching]:
    upstream = FakeUpstream([script], repeat=repeat)
    async with Harness(upstream=upstream) as harness:
        yield Fetching(harness, upstream)


async def test_whole_answer_is_returned_and_the_connection_used_again() -> None:
    async with fetching(http_reply(b'{"a":1}'), repeat=True) as run:
        for _ in range(3):
            assert await run.fetch() == FetchedResponse(200, b'{"a":1}')
        assert run.upstream.connection_count == 1
        assert run.upstream.requests[0].head == b"GET /v1/things HTTP/1.1\r\nhost: h\r\nx-a: 1\r\n\r\n"


@pytest.mark.parametrize("status", [204, 404, 500])
async def test_any_status_is_an_answer(status: int) -> None:
    body = b"" if status == 204 else b"no"
    reply = b"HTTP/1.1 204 None\r\n\r\n" if status == 204 else http_reply(body, status)
    async with fetching(reply) as run:
        assert await run.fetch() == FetchedResponse(status, body)


ANSWERS: dict[str, list[Step]] = {
    "chunked": [CHUNKED % b"", chunk(b"on"), chunk(b"e"), LAST_CHUNK],
    "until closed": [b"HTTP/1.1 200 OK\r\n\r\none", Close()],
    "gzip": [http_reply(ZIPPED, fields=[(b"Content-Encoding", b"gzip")])],
    "gzip in chunks": [CHUNKED % b"Content-Encoding: GZIP\r\n", chunk(ZIPPED[:7]), chunk(ZIPPED[7:]), LAST_CHUNK],
    "identity": [http_reply(b"one", fields=[(b"Content-Encoding", b"identity")])],
}


@pytest.mark.parametrize("kind", ANSWERS)
async def test_framing_and_coding_are_undone(kind: str) -> None:
    async with fetching(*ANSWERS[kind]) as run:
        assert (await run.fetch()).body == b"one"


FAULTS: dict[str, tuple[list[Step], str]] = {
    "larger than allowed": ([http_reply(bytes(MAX_BYTES + 1))], "protocol"),
    "endless": ([CHUNKED % b"", *[chunk(bytes(100))] * 11, Stall()], "protocol"),
    "broken off": ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", Close()], "truncated"),
    "chunks broken off": ([CHUNKED % b"", chunk(b"abc"), Close()], "truncated"),
    "bad chunk": ([CHUNKED % b"", b"zz\r\nabc\r\n", Close()], "protocol"),
    "no HTTP": ([b"SSH-2.0-x\r\n\r\n", Close()], "protocol"),
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_answer_that_is_no_whole_answer_is_an_error_and_closes_the_connection(kind: str) -> None:
    script, fault = FAULTS[kind]
    async with fetching(*script) as run:
        assert await run.fault() == fault


CODED: dict[str, tuple[bytes, bytes]] = {
    "bomb": (b"gzip", gzip.compress(bytes(MAX_BYTES + 1))),
    "corrupt": (b"gzip", b"not gzip"),
    "cut off": (b"gzip", ZIPPED[:-3]),
    "unknown": (b"exi", b"one"),
}


@pytest.mark.parametrize("kind", CODED)
async def test_content_that_cannot_be_decoded_within_the_bound_is_an_error(kind: str) -> None:
    coding, body = CODED[kind]
    async with fetching(http_reply(body, fields=[(b"Content-Encoding", coding)])) as run:
        with pytest.raises(UpstreamError, match="cannot be decoded") as caught:
            await run.fetch()
        assert caught.value.fault == "protocol"


async def test_body_of_just_the_bound_is_returned() -> None:
    async with fetching(http_reply(bytes(MAX_BYTES))) as run:
        assert (await run.fetch()).body == bytes(MAX_BYTES)


async def test_reset_before_the_head_is_an_error() -> None:
    async with fetching(Reset()) as run:
        assert await run.fault() == "reset"


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"])
async def test_answer_that_is_not_whole_in_time_is_a_timeout(sent: bytes) -> None:
    stall = Stall()
    async with fetching(sent, stall) as run:
        with pytest.raises(UpstreamError, match=r"no whole answer within 0\.05 s") as caught:
            await run.fetch(timeout=0.05)
        assert caught.value.fault == "timeout"
        with anyio.fail_after(10):
            await stall.gone.wait()


async def test_cancelled_fetch_closes_its_connection() -> None:
    stall = Stall()
    async with fetching(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", stall) as run:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.fetch)
            with anyio.fail_after(10):
                await stall.reached.wait()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(10):
            await stall.gone.wait()


async def test_nobody_listening_is_a_connect_error() -> None:
    async with FakeUpstream() as gone:
        port = gone.port or 0
    async with Harness(upstream=FakeUpstream()) as harness:
        request = UpstreamRequest(Origin("http", "127.0.0.1", port), b"GET", b"/", b"host: h\r\n", b"")
        fetch = harness.gateway.generation.services.get(Fetch)  # type: ignore[type-abstract]
        with pytest.raises(UpstreamError) as caught:
            await fetch(request, timeout=10, max_bytes=10)
        assert caught.value.fault == "connect"
