"""Requests sent before the answer to the one in front: in order, one at a time, within bounds."""

from __future__ import annotations

import anyio.lowlevel
import pytest

from abused_gateway import BODY, CHAT, CHUNKED, SMUGGLED, abused, head, refused, send
from penstock import Exchange, hookimpl
from penstock.connection import AHEAD_BYTES
from penstock.testing import FakeUpstream, Pause, Stall, http_reply

pytestmark = pytest.mark.anyio


async def test_pipelined_requests_are_answered_in_order_one_after_the_other() -> None:
    pauses = [Pause(), Pause(), Pause()]
    upstream = FakeUpstream([[pause, http_reply(b"%d" % number)] for number, pause in enumerate(pauses)])
    async with abused(upstream) as gateway:
        requests = [gateway.request_bytes("POST", CHAT, body=b'{"model":"m%d"}' % n) for n in range(3)]
        client = await send(gateway, b"".join(requests))
        for number, pause in enumerate(pauses):
            await pause.reached.wait()
            assert len(upstream.requests) == number + 1
            assert gateway.gateway.server.in_flight == 1
            pause.release()
            assert (await client.receive_reply()).body == b"%d" % number
        assert [seen.body for seen in upstream.requests] == [b'{"model":"m%d"}' % n for n in range(3)]


async def test_reading_pauses_while_an_exchange_runs() -> None:
    stall = Stall()
    async with abused(FakeUpstream([[stall]]), socket=False) as gateway:
        client = await send(gateway, gateway.request_bytes("POST", CHAT, body=BODY))
        await stall.reached.wait()
        (connection,) = gateway.gateway.server.connections
        await client.send(*[b"x" * 10_000] * 1000)
        assert AHEAD_BYTES < len(connection._buffer) <= AHEAD_BYTES + 10_000
        client.reset()


class Yield:
    """Let the loop read on in the middle of each exchange."""

    @hookimpl
    async def authenticate(self, exchange: Exchange) -> None:
        await anyio.lowlevel.checkpoint()


async def test_read_ahead_stays_bounded_while_pipelined_requests_are_served() -> None:
    request = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 8000 + b"\r\n\r\n"
    segment = request * 8
    async with abused(plugins=[Yield()], socket=False) as gateway:
        client = await send(gateway, *[segment] * 40)
        (connection,) = gateway.gateway.server.connections
        for _ in range(8 * 40):
            assert len(connection._buffer) <= AHEAD_BYTES + len(segment)
            assert (await client.receive_reply(b"GET")).status == 401


async def test_read_ahead_of_a_long_head_is_read_on() -> None:
    pause = Pause()
    upstream = FakeUpstream([[pause, http_reply()]])
    async with abused(upstream, max_head_bytes=200_000) as gateway:
        long = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 150_000 + b"\r\n\r\n"
        client = await send(gateway, gateway.request_bytes("POST", CHAT, body=BODY) + long)
        await pause.reached.wait()
        pause.release()
        assert (await client.receive_reply()).status == 200
        assert (await client.receive_reply(b"GET")).body == b"ok\n"


async def test_pipelining_gives_other_connections_their_turn() -> None:
    async with abused(socket=False) as gateway:
        probe = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
        greedy, other = await gateway.raw(), await gateway.raw()
        (connection,) = (one for one in gateway.gateway.server.connections if one._transport is greedy._transport._peer)
        greedy._transport.write(probe * 2000)
        await other.send(probe)
        assert (await other.receive_reply(b"GET")).status == 200
        assert len(connection._buffer) > 1900 * len(probe)


async def test_pipelined_request_behind_a_refused_one_is_never_served() -> None:
    upstream = FakeUpstream()
    async with abused(upstream) as gateway:
        good = gateway.request_bytes("POST", CHAT, body=BODY)
        bad = head(gateway, b"Content-Length: 4", CHUNKED)
        await refused(await send(gateway, bad + good), 400, "bad_request")
        assert upstream.connection_count == 0


async def test_bad_request_behind_a_good_one_is_refused_in_its_turn() -> None:
    upstream = FakeUpstream([[http_reply(b"1")]])
    async with abused(upstream) as gateway:
        good = gateway.request_bytes("POST", CHAT, body=BODY)
        client = await send(gateway, good + head(gateway, b"Content-Length: 4", CHUNKED) + good)
        assert (await client.receive_reply()).body == b"1"
        await refused(client, 400, "bad_request")
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_request_inside_a_body_stays_body(framing: str) -> None:
    upstream = FakeUpstream([[http_reply(b"1")]])
    async with abused(upstream) as gateway:
        body = b'{"model":"m","prompt":"' + SMUGGLED + b'"}'
        if framing == "length":
            data = head(gateway, b"Content-Length: %d" % len(body)) + body
        else:
            data = head(gateway, CHUNKED) + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        client = await send(gateway, data)
        assert (await client.receive_reply()).status == 200
        client.half_close()
        assert await client.receive_all() == b""
        assert [seen.body for seen in upstream.requests] == [body]
        assert upstream.requests[0].headers.get_all(b"content-length") == [b"%d" % len(body)]
        assert upstream.requests[0].headers.get(b"transfer-encoding") is None
