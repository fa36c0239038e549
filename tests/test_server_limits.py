"""What clients may take: time, bytes, connections, exchanges; and what happens at and beyond each limit."""

from __future__ import annotations

import contextlib
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from abused_gateway import BODY, CHAT, abused, assert_envelope, empty, refused
from penstock import Exchange, hookimpl
from penstock.testing import (
    LAST_CHUNK,
    STREAM_HEAD,
    FakeUpstream,
    Harness,
    Pause,
    RawClient,
    Stall,
    chunk,
    http_reply,
)
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio

PROBE = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
SHORT = 0.2
"""A time limit that a test waits for; limits are checked every 0.1 s."""


@pytest.fixture(params=[False, True], ids=["memory", "socket"])
def socket(request: pytest.FixtureRequest) -> Any:
    return request.param


def post(gateway: Harness, *lines: bytes, path: bytes = CHAT.encode(), version: bytes = b"1.1") -> bytes:
    """Return the head of a POST with a good key."""
    start = b"POST %b HTTP/%b" % (path, version)
    own = (start, b"Host: gateway.test", b"Authorization: Bearer " + gateway.key.encode())
    return b"\r\n".join((*own, *lines, b"", b""))


async def send(gateway: Harness, *segments: bytes) -> RawClient:
    client = await gateway.raw()
    await client.send(*segments)
    return client


# --- time -----------------------------------------------------------------------------------------------------


async def test_connection_that_sends_nothing_is_closed_silently(socket: bool) -> None:
    async with abused(socket=socket, head_timeout=SHORT) as gateway:
        client = await gateway.raw()
        assert await client.receive_all() == b""


async def test_head_that_does_not_end_in_time_is_refused(socket: bool) -> None:
    async with abused(socket=socket, head_timeout=SHORT) as gateway:
        await refused(await send(gateway, b"GET / HTTP/1.1\r\nHost:"), 408, "request_timeout", b"GET")


async def test_dribbling_does_not_win_time_for_a_head() -> None:
    async with abused(socket=False, head_timeout=SHORT) as gateway:
        client = await send(gateway, b"GET / HTTP/1.1\r\n")
        with anyio.fail_after(5):
            while not client.received:
                await client.send(b"a")
                await anyio.sleep(0.01)
        await refused(client, 408, "request_timeout", b"GET")


async def test_body_that_does_not_end_in_time_is_refused_in_its_dialect(socket: bool) -> None:
    async with abused(socket=socket, body_timeout=SHORT) as gateway:
        client = await send(gateway, post(gateway, b"Content-Length: 9", path=b"/v1/messages") + b"{")
        reply = await client.receive_reply()
        assert reply.status == 408
        assert (reply.json()["type"], reply.json()["error"]["code"]) == ("error", "request_timeout")
        assert await client.receive_all() == b""
        assert gateway.settled == 0


async def test_chunked_body_that_does_not_end_in_time_is_refused() -> None:
    async with abused(body_timeout=SHORT) as gateway:
        client = await send(gateway, post(gateway, b"Transfer-Encoding: chunked") + b"1\r\n{\r\n")
        await refused(client, 408, "request_timeout")


async def test_idle_connection_is_closed_silently(socket: bool) -> None:
    async with abused(socket=socket, keep_alive_timeout=SHORT) as gateway:
        client = await send(gateway, PROBE)
        assert (await client.receive_reply(b"GET")).status == 200
        assert await client.receive_all() == b""


async def test_idle_connection_is_closed_after_a_slow_reader_has_caught_up(socket: bool) -> None:
    size = 16 * 1024 * 1024
    async with abused(FakeUpstream([[http_reply(b"x" * size)]]), socket=socket, keep_alive_timeout=SHORT) as gateway:
        client = await gateway.raw()
        client.pause()
        await client.send(gateway.request_bytes("POST", CHAT, body=BODY))
        (connection,) = gateway.gateway.server.connections
        await until(lambda: connection._write_paused)
        client.resume()
        assert len((await client.receive_reply()).body) == size
        assert await client.receive_all() == b""


async def test_silent_exchange_has_no_deadline_of_the_connection() -> None:
    pause = Pause()
    limits = {"keep_alive_timeout": 0.01, "head_timeout": 0.01, "body_timeout": 0.01, "write_timeout": 0.01}
    async with abused(FakeUpstream([[pause, http_reply(b"1")]]), socket=False, **limits) as gateway:
        client = await send(gateway, gateway.request_bytes("POST", CHAT, body=BODY))
        await pause.reached.wait()
        gateway.gateway.server.connections.copy().pop().sweep(gateway.gateway.server.now() + 3600)
        pause.release()
        assert (await client.receive_reply()).body == b"1"


class CountEnds:
    """Count settlements."""

    def __init__(self) -> None:
        self.ends: list[str | None] = []

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        self.ends.append(exchange.stream_end)


async def test_client_that_never_reads_is_cut_and_settled_once(socket: bool) -> None:
    script: list[Step] = [STREAM_HEAD, *[chunk(b"data: %b\n\n" % (b"x" * 1_000_000))] * 16, Stall()]
    ends = CountEnds()
    async with abused(FakeUpstream([script]), plugins=[ends], socket=socket, write_timeout=SHORT) as gateway:
        client = await gateway.raw()
        client.pause()
        await client.send(gateway.request_bytes("POST", CHAT, body=b'{"model":"m","stream":true}'))
        await gateway.wait_settled(1)
        await empty(gateway.gateway.server)
    assert ends.ends == ["client_gone"]


async def test_client_that_takes_its_last_answer_never_is_cut(socket: bool) -> None:
    """The exchange has ended and the connection is closing, yet bytes wait that nobody reads."""
    body = b"x" * (16 * 1024 * 1024 if socket else 100_000)
    async with abused(FakeUpstream([[http_reply(body)]]), socket=socket, write_timeout=SHORT) as gateway:
        client = await gateway.raw()
        client.pause()
        fields = {"Connection": "close"}
        await client.send(gateway.request_bytes("POST", CHAT, fields, BODY))
        await gateway.wait_settled(1)
        await empty(gateway.gateway.server)


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
async def test_client_that_leaves_an_answer_unread_without_pausing_the_gateway_is_cut(connection: str) -> None:
    """Less is unread than makes the transport ask for a pause, so only the end of the connection can notice."""
    upstream = FakeUpstream([[http_reply(b"x" * (16 * 1024 * 1024))]])
    async with abused(upstream, keep_alive_timeout=SHORT, write_timeout=SHORT) as gateway:
        client = await gateway.raw()
        client.pause()
        await until(lambda: gateway.gateway.server.connections)
        (accepted,) = gateway.gateway.server.connections
        accepted._transport_now.set_write_buffer_limits(1 << 30)
        await client.send(gateway.request_bytes("POST", CHAT, {"Connection": connection}, BODY))
        await gateway.wait_settled(1)
        await empty(gateway.gateway.server)
        client.resume()
        with contextlib.suppress(ConnectionResetError):
            await client.receive_all()
        assert len(client.received) < 16 * 1024 * 1024


async def test_client_that_sends_and_never_reads_is_answered_within_bounds_then_cut() -> None:
    async with abused(socket=False, write_timeout=SHORT) as gateway:
        client = await gateway.raw()
        client.pause()
        request = gateway.request_bytes("GET", "/v1/nothing")
        for _ in range(2000):
            await client.send(request)
        assert gateway.settled < 400
        await empty(gateway.gateway.server)


# --- bodies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_body_of_exactly_the_limit_passes(framing: str) -> None:
    upstream = FakeUpstream([[http_reply()]])
    async with abused(upstream, max_body_bytes=len(BODY)) as gateway:
        if framing == "length":
            data = post(gateway, b"Content-Length: %d" % len(BODY)) + BODY
        else:
            data = post(gateway, b"Transfer-Encoding: chunked") + chunk(BODY[:5]) + chunk(BODY[5:]) + LAST_CHUNK
        assert (await (await send(gateway, data)).receive_reply()).status == 200
        assert upstream.requests[0].body == BODY


async def test_longer_body_is_refused_from_its_length_alone(socket: bool) -> None:
    upstream = FakeUpstream()
    async with abused(upstream, socket=socket, max_body_bytes=100) as gateway:
        client = await send(gateway, post(gateway, b"Content-Length: 101"))
        await refused(client, 413, "payload_too_large")
        assert upstream.connection_count == 0


async def test_longer_chunked_body_is_refused_at_the_limit(socket: bool) -> None:
    upstream = FakeUpstream()
    async with abused(upstream, socket=socket, max_body_bytes=100) as gateway:
        data = post(gateway, b"Transfer-Encoding: chunked") + chunk(b"x" * 101)
        await refused(await send(gateway, data), 413, "payload_too_large")
        assert upstream.connection_count == 0
        assert gateway.settled == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_refusal_of_a_long_body_is_readable_while_the_body_is_still_sent(framing: str) -> None:
    size = 24 * 1024 * 1024
    upstream = FakeUpstream()
    async with abused(upstream, max_body_bytes=1000) as gateway:
        field = b"Content-Length: %d" % size if framing == "length" else b"Transfer-Encoding: chunked"
        client = await send(gateway, post(gateway, field))
        first = b"" if framing == "length" else b"%x\r\n" % size
        await client.send(first, *[b"x" * 65536] * (size // 65536))
        await refused(client, 413, "payload_too_large")
        assert upstream.connection_count == 0


class Ponder:
    """Let a test decide when a request goes on."""

    def __init__(self) -> None:
        self.reached, self.released = anyio.Event(), anyio.Event()

    @hookimpl
    async def authenticate(self, exchange: Exchange) -> None:
        self.reached.set()
        await self.released.wait()


async def test_refusal_is_readable_though_reading_had_paused() -> None:
    ponder = Ponder()
    async with abused(plugins=[ponder], socket=False, max_body_bytes=1000) as gateway:
        bare = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n"
        client = await send(gateway, bare)
        await ponder.reached.wait()
        await client.send(*[b"x" * 65536] * 30)
        (connection,) = gateway.gateway.server.connections
        assert connection._read_paused
        ponder.released.set()
        await refused(client, 401, "invalid_api_key")
        await client.send(b"x" * 65536)
        await until(lambda: not client._transport._peer._inbox)
        assert gateway.gateway.server.connections == {connection}


async def test_key_is_checked_before_size() -> None:
    async with abused(max_body_bytes=10) as gateway:
        bare = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n"
        await refused(await send(gateway, bare), 401, "invalid_api_key")


# --- 100-continue ---------------------------------------------------------------------------------------------

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EXPECT = b"Expect: 100-continue"


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_client_is_told_to_continue_and_then_answered(framing: str) -> None:
    upstream = FakeUpstream([[http_reply(b"1")]])
    async with abused(upstream) as gateway:
        field = b"Content-Length: %d" % len(BODY) if framing == "length" else b"Transfer-Encoding: chunked"
        client = await send(gateway, post(gateway, EXPECT, field))
        assert await client.receive_until(b"\r\n\r\n") == CONTINUE
        await client.send(BODY if framing == "length" else chunk(BODY) + LAST_CHUNK)
        assert (await client.receive_reply()).body == b"1"
        assert upstream.requests[0].headers.get(b"expect") is None


async def test_body_too_long_is_refused_instead_of_continued() -> None:
    async with abused(max_body_bytes=10) as gateway:
        client = await send(gateway, post(gateway, EXPECT, b"Content-Length: 11"))
        assert b"100 Continue" not in (await refused(client, 413, "payload_too_large")).raw


async def test_request_without_body_is_not_continued() -> None:
    async with abused() as gateway:
        client = await send(gateway, b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + EXPECT + b"\r\n\r\n")
        assert (await client.receive_reply(b"GET")).raw.startswith(b"HTTP/1.1 200 ")


async def test_http10_request_is_not_continued() -> None:
    async with abused(FakeUpstream([[http_reply(b"1")]])) as gateway:
        length = b"Content-Length: %d" % len(BODY)
        client = await send(gateway, post(gateway, EXPECT, length, version=b"1.0") + BODY)
        assert (await client.receive_all()).startswith(b"HTTP/1.1 200 ")


# --- how many -------------------------------------------------------------------------------------------------


async def test_connection_beyond_the_limit_is_turned_away_readably() -> None:
    async with abused(max_connections=2) as gateway:
        first, second = await send(gateway, PROBE), await send(gateway, PROBE)
        assert (await first.receive_reply(b"GET")).status == (await second.receive_reply(b"GET")).status == 200
        third = await send(gateway, gateway.request_bytes("POST", CHAT, body=b"x" * 1_000_000))
        reply = await refused(third, 503, "overloaded")
        assert reply.header("retry-after") == "1"
        third.close()
        await first.send(PROBE)
        assert (await first.receive_reply(b"GET")).status == 200


async def test_connection_is_admitted_once_another_has_gone() -> None:
    async with abused(max_connections=1) as gateway:
        first = await send(gateway, PROBE)
        assert (await first.receive_reply(b"GET")).status == 200
        first.close()
        await empty(gateway.gateway.server)
        assert (await (await send(gateway, PROBE)).receive_reply(b"GET")).status == 200


async def test_exchange_beyond_the_limit_is_refused_and_the_connection_stays() -> None:
    pause = Pause()
    upstream = FakeUpstream([[pause, http_reply(b"1")], [http_reply(b"2")]])
    async with abused(upstream, max_in_flight=1) as gateway:
        request = gateway.request_bytes("POST", CHAT, body=BODY)
        first = await send(gateway, request)
        await pause.reached.wait()
        second = await send(gateway, request)
        reply = await second.receive_reply()
        assert (reply.status, reply.header("retry-after"), reply.header("connection")) == (503, "1", None)
        assert_envelope(reply, "overloaded")
        pause.release()
        assert (await first.receive_reply()).body == b"1"
        await second.send(request)
        assert (await second.receive_reply()).body == b"2"


# --- how connections end --------------------------------------------------------------------------------------


async def test_half_closed_connection_settles_once(socket: bool) -> None:
    stall = Stall()
    async with abused(FakeUpstream([[stall]]), socket=socket) as gateway:
        client = await send(gateway, gateway.request_bytes("POST", CHAT, body=BODY))
        await stall.reached.wait()
        client.half_close()
        await stall.gone.wait()
        await empty(gateway.gateway.server)
        assert [exchange.stream_end for exchange in gateway.exchanges] == ["client_gone"]


@pytest.mark.parametrize("part", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"])
async def test_half_closed_unfinished_request_is_dropped(socket: bool, part: bytes) -> None:
    async with abused(socket=socket) as gateway:
        client = await send(gateway, part)
        client.half_close()
        assert await client.receive_all() == b""
        assert gateway.settled == 0


async def test_half_close_behind_a_refusal_leaves_nothing(socket: bool) -> None:
    async with abused(socket=socket) as gateway:
        client = await send(gateway, b"nonsense\r\n\r\n")
        client.half_close()
        assert b" 400 " in await client.receive_all()


async def test_refused_client_that_stays_is_cut() -> None:
    async with abused() as gateway:
        client = await send(gateway, b"nonsense\r\n\r\n")
        await refused(client, 400, "bad_request")
        (connection,) = gateway.gateway.server.connections
        connection.sweep(gateway.gateway.server.now() + 3600)
        await empty(gateway.gateway.server)


@pytest.mark.parametrize("connection", [b"X-Nothing: 1", b"Connection: keep-alive", b"Connection: close"])
async def test_http10_client_gets_one_answer_and_the_end(connection: bytes) -> None:
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), chunk(b"data: 2\n\n"), LAST_CHUNK]])
    async with abused(upstream) as gateway:
        length = b"Content-Length: %d" % len(BODY)
        client = await send(gateway, post(gateway, connection, length, version=b"1.0") + BODY)
        head, _, body = (await client.receive_all()).partition(b"\r\n\r\n")
        assert body == b"data: 1\n\ndata: 2\n\n"
        assert b"transfer-encoding" not in head.lower()
        assert b"\r\nconnection: close" in head


async def test_close_is_answered_with_close() -> None:
    async with abused(FakeUpstream([[http_reply(b"1")]])) as gateway:
        client = await send(gateway, gateway.request_bytes("POST", CHAT, {"Connection": "close"}, BODY))
        reply = await client.receive_reply()
        assert (reply.body, reply.header("connection")) == (b"1", "close")
        assert await client.receive_all() == b""


class Crash:
    """Fail where nobody expects it: the gateway's own step behind the pipeline."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        if exchange.request.headers.get(b"x-crash"):
            exchange.trace = None  # type: ignore[assignment]


async def test_crash_in_one_connection_leaves_the_others(socket: bool) -> None:
    pause = Pause()
    upstream = FakeUpstream([[pause, http_reply(b"1")], [http_reply(b"lost")], [http_reply(b"2")]])
    async with abused(upstream, plugins=[Crash()], socket=socket) as gateway:
        request = gateway.request_bytes("POST", CHAT, body=BODY)
        first = await send(gateway, request)
        await pause.reached.wait()
        broken = await send(gateway, gateway.request_bytes("POST", CHAT, {"X-Crash": "1"}, BODY))
        with contextlib.suppress(ConnectionResetError):
            assert b"lost" not in await broken.receive_all()
        pause.release()
        assert (await first.receive_reply()).body == b"1"
        assert (await (await send(gateway, request)).receive_reply()).body == b"2"
        assert gateway.faults


async def test_write_that_fails_leaves_those_of_others() -> None:
    async with abused(FakeUpstream([[http_reply(b"1")]]), socket=False) as gateway:
        bad, good = await gateway.raw(), await gateway.raw()
        failures: list[Any] = []
        server = gateway.gateway.server
        server._loop.set_exception_handler(lambda _, told: failures.append(told["message"]))  # type: ignore[union-attr]
        server.outbox.write(bad._transport._peer, object())  # type: ignore[arg-type]
        server.outbox.write(good._transport._peer, b"still written")
        assert await good.receive() == b"still written"
        assert await bad.receive_all() == b""
        assert failures == ["a write failed"]
        server._loop.set_exception_handler(None)  # type: ignore[union-attr]


async def until(holds: Any) -> None:
    """Return once something holds. Raises TimeoutError."""
    with anyio.fail_after(10):
        while not holds():
            await anyio.lowlevel.checkpoint()
