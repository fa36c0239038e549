"""What only the transport on httpcore does: HTTP/2, forward proxies, SOCKS."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest

from penstock.errors import UpstreamError
from penstock.models import Timeouts
from penstock.providers import Origin
from penstock.upstream import UpstreamTransports
from penstock.upstream.store import Limits
from penstock.upstream.via_httpcore import HttpcoreTransport
from upstream_client import Bench, Collector, bench, server_tls, swept, take, trust
from upstream_servers import H2Stream, Peer, Respond, connect_proxy, h2_script, serve, settle, socks_proxy

pytestmark = pytest.mark.anyio

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
MIB = 1024 * 1024


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@asynccontextmanager
async def http2(
    respond: Respond, *, max_streams: int | None = 100, tls: bool = True, limits: Limits | None = None
) -> AsyncIterator[Bench]:
    transport = HttpcoreTransport(limits or Limits())
    trust(transport)
    script = h2_script(respond, max_streams=max_streams)
    async with serve(script, server_tls("h2") if tls else None) as server, swept(transport):
        yield Bench(transport, Origin("https" if tls else "http", "localhost", server.port, http2=True), server)


async def answer(stream: H2Stream) -> None:
    await stream.head(200, (b"content-type", b"text/plain"))
    await stream.data(b"body of %d" % stream.id, end=True)


# --- HTTP/2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [True, False])
async def test_http2_request_and_answer_arrive_whole(tls: bool) -> None:
    seen: list[H2Stream] = []

    async def respond(stream: H2Stream) -> None:
        seen.append(stream)
        await stream.head(201, (b"x-a", b"1"), (b"x-a", b"2"), (b"content-length", b"5"))
        await stream.data(b"hello", end=True)

    async with http2(respond, tls=tls) as upstream:
        got = await upstream.fetch(body=b"q" * 200_000)
    head = got.response.head
    assert (head.status, head.content_length, head.chunked, got.response.is_raw) == (201, 5, False, False)
    assert list(head.headers) == [(b"x-a", b"1"), (b"x-a", b"2"), (b"content-length", b"5")]
    assert (got.payload, got.error) == (b"hello", None)
    headers = dict(seen[0].headers)
    assert headers[b":method"] == b"POST"
    assert headers[b":path"] == b"/v1/x?y=1"
    assert headers[b":authority"] == b"localhost"
    assert headers[b"x-spelled-so"] == b"yes"
    assert seen[0].body == b"q" * 200_000


@pytest.mark.parametrize("status", [204, 304, 200])
async def test_http2_answer_may_have_no_body(status: int) -> None:
    async def respond(stream: H2Stream) -> None:
        await stream.head(status, end=True)

    async with http2(respond) as upstream:
        got = await upstream.fetch(b"GET")
    assert (got.response.head.status, got.payload, got.error) == (status, b"", None)


async def test_http2_requests_share_a_connection() -> None:
    release = anyio.Event()

    async def respond(stream: H2Stream) -> None:
        await stream.head(200)
        await release.wait()
        await stream.data(b"%d" % stream.id, end=True)

    async with http2(respond) as upstream:
        responses = [await upstream.send() for _ in range(5)]
        assert len(upstream.server.peers) == 1
        release.set()
        bodies = [(await take(response)).payload for response in responses]
        again = await upstream.fetch()
        assert len(upstream.server.peers) == 1
    assert bodies == [b"1", b"3", b"5", b"7", b"9"]
    assert again.error is None


@pytest.mark.parametrize(("max_streams", "connections"), [(1, 4), (2, 2), (None, 4)])
async def test_http2_streams_stay_within_what_the_provider_allows(max_streams: int | None, connections: int) -> None:
    release = anyio.Event()

    async def respond(stream: H2Stream) -> None:
        await stream.head(200)
        await release.wait()
        await stream.data(b"x", end=True)

    async with http2(respond, max_streams=max_streams) as upstream:
        responses = [await upstream.send() for _ in range(4)]
        assert len(upstream.server.peers) == connections
        release.set()
        for response in responses:
            assert (await take(response)).payload == b"x"


async def test_http2_stream_that_is_left_is_reset_and_others_go_on() -> None:
    release = anyio.Event()
    streams: list[H2Stream] = []

    async def respond(stream: H2Stream) -> None:
        streams.append(stream)
        await stream.head(200)
        await stream.data(b"begun ")
        await release.wait()
        await stream.data(b"done", end=True)

    async with http2(respond) as upstream:
        left, kept = await upstream.send(), await upstream.send()
        collector = Collector(kept)
        kept.start(collector)
        await collector.began.wait()
        left.close()
        with anyio.fail_after(5):
            await streams[0].was_reset.wait()
        del streams[0].peer.streams[streams[0].id]
        streams[0].peer.h2.send_data(streams[1].id, b"more ")
        await streams[0].peer.flush()
        assert len(upstream.server.peers) == 1
        fresh = await upstream.send()
        assert len(upstream.server.peers) == 2
        fresh.close()
        streams[1].peer.h2.send_data(streams[1].id, b"done", end_stream=True)
        await streams[1].peer.flush()
        with anyio.fail_after(5):
            await collector.ended.wait()
            await upstream.server.peers[0].closed.wait()
    assert (collector.payload, collector.error) == (b"begun more done", None)


async def test_http2_cancelled_wait_for_the_head_resets_the_stream() -> None:
    arrived: list[H2Stream] = []
    waits = anyio.Event()

    async def respond(stream: H2Stream) -> None:
        arrived.append(stream)
        if len(arrived) == 1:
            await stream.head(200)
        else:
            waits.set()

    async with http2(respond) as upstream:
        held = await upstream.send()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upstream.send)
            await waits.wait()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(5):
            await arrived[1].was_reset.wait()
        assert not upstream.server.peers[0].closed.is_set()
        held.close()
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()


async def test_http2_reset_before_the_head_is_a_reset() -> None:
    async def respond(stream: H2Stream) -> None:
        stream.peer.h2.reset_stream(stream.id)
        await stream.peer.flush()

    async with http2(respond) as upstream:
        assert await upstream.fault() == "reset"


async def test_http2_reset_in_the_body_truncates_it() -> None:
    async def respond(stream: H2Stream) -> None:
        await stream.head(200)
        await stream.data(b"abc")
        stream.peer.h2.reset_stream(stream.id)
        await stream.peer.flush()

    async with http2(respond) as upstream:
        got = await upstream.fetch()
    assert got.payload == b"abc"
    assert got.error is not None
    assert got.error.fault == "truncated"


async def test_http2_connection_that_ends_in_a_body_truncates_it() -> None:
    async def respond(stream: H2Stream) -> None:
        await stream.head(200)
        await stream.data(b"abc")
        stream.peer.peer.writer.transport.abort()

    async with http2(respond) as upstream:
        got = await upstream.fetch()
    assert got.error is not None
    assert got.error.fault == "truncated"


async def test_http2_request_refused_by_goaway_is_sent_again_even_a_post() -> None:
    async def respond(stream: H2Stream) -> None:
        if stream.id == 3 and stream.peer.peer.number == 0:
            stream.peer.h2.close_connection(last_stream_id=1)
            await stream.peer.flush()
        else:
            await answer(stream)

    async with http2(respond) as upstream:
        first, second = await upstream.fetch(), await upstream.fetch()
        assert len(upstream.server.peers) == 2
    assert (first.payload, second.payload) == (b"body of 1", b"body of 1")


@pytest.mark.parametrize("cut", [1, 9, 17, 1000])
async def test_http2_streams_accepted_before_a_graceful_goaway_are_finished(cut: int) -> None:
    async def respond(stream: H2Stream) -> None:
        await stream.head(200)
        await stream.data(b"abc")
        for last in (0x7FFFFFFF, stream.id):
            goaway = b"\x00\x00\x0a\x07\x00" + bytes(4) + last.to_bytes(4, "big") + bytes(4) + b"by"
            pieces = [goaway[at : at + cut] for at in range(0, len(goaway), cut)]
            await stream.peer.peer.send(*pieces)
        await stream.data(b"def", end=True)

    async with http2(respond) as upstream:
        answers = [await upstream.fetch() for _ in range(2)]
        assert len(upstream.server.peers) == 2
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
    assert [(got.payload, got.error) for got in answers] == [(b"abcdef", None)] * 2


async def test_http2_field_with_a_line_end_is_refused() -> None:
    async def respond(stream: H2Stream) -> None:
        await stream.head(200, (b"x", b"a\r\nSet-Cookie: stolen"), end=True)

    async with http2(respond) as upstream:
        assert await upstream.fault() == "protocol"


async def test_http2_body_longer_than_announced_is_a_protocol_fault() -> None:
    async def respond(stream: H2Stream) -> None:
        await stream.head(200, (b"content-length", b"2"))
        await stream.data(b"too much", end=True)

    async with http2(respond) as upstream:
        got = await upstream.fetch()
    assert got.error is not None
    assert got.error.fault == "protocol"


async def test_http2_stall_before_the_head_times_out() -> None:
    async def respond(stream: H2Stream) -> None:
        await stream.was_reset.wait()

    async with http2(respond) as upstream:
        assert await upstream.fault(timeouts=Timeouts(first_byte=0.1)) == "timeout"


async def test_http2_stall_of_one_stream_leaves_the_others_alone() -> None:
    release = anyio.Event()

    async def respond(stream: H2Stream) -> None:
        await stream.head(200)
        if stream.id == 3:
            await stream.was_reset.wait()
            return
        await release.wait()
        await stream.data(b"x", end=True)

    async with http2(respond) as upstream:
        patient = Collector(await upstream.send())
        patient.response.start(patient)
        got = await upstream.fetch(timeouts=Timeouts(idle=0.1))
        assert got.error is not None
        assert got.error.fault == "timeout"
        assert not patient.ended.is_set()
        release.set()
        with anyio.fail_after(5):
            await patient.ended.wait()
    assert (patient.payload, patient.error) == (b"x", None)


async def test_http2_paused_body_is_read_ahead_only_within_a_bound() -> None:
    sent = 0

    async def respond(stream: H2Stream) -> None:
        nonlocal sent
        await stream.head(200)
        for _ in range(512):
            await stream.data(bytes(65536))
            sent += 65536
        await stream.data(b"", end=True)

    async with http2(respond) as upstream:
        response = await upstream.send()
        collector = Collector(response, pauses=True)
        response.start(collector)
        await collector.began.wait()
        assert await settle(lambda: sent) < 18 * MIB
        assert collector.size <= 65536
        response.resume()
        with anyio.fail_after(30):
            await collector.ended.wait()
    assert (collector.size, collector.error) == (32 * MIB, None)


async def test_http2_idle_connection_the_provider_closed_is_not_used() -> None:
    async with http2(answer) as upstream:
        await upstream.fetch()
        upstream.server.peers[0].writer.close()
        await settle(lambda: len(upstream.server.peers))
        assert (await upstream.fetch()).payload == b"body of 1"
        assert len(upstream.server.peers) == 2


async def test_http1_is_spoken_where_the_provider_chooses_it() -> None:
    async def script(peer: Peer) -> None:
        while True:
            await peer.read_request()
            await peer.send(OK)

    async with bench("httpcore_tls", script) as upstream:
        upstream.origin = Origin("https", "localhost", upstream.server.port, http2=True)
        assert [(await upstream.fetch()).payload for _ in range(2)] == [b"ok", b"ok"]
        held = await upstream.send()
        assert (await upstream.fetch()).payload == b"ok"
        assert len(upstream.server.peers) == 2
        assert (await take(held)).payload == b"ok"


# --- proxies ----------------------------------------------------------------------------------------------


async def ok(peer: Peer) -> None:
    await peer.read_request()
    await peer.send(OK)


async def test_forward_proxy_is_asked_in_absolute_form_with_its_credential() -> None:
    seen = []

    async def script(peer: Peer) -> None:
        seen.append(await peer.read_request())
        await peer.send(OK)

    async with bench("httpcore", script) as upstream:
        proxy = f"http://us%40er:p%3Aw@127.0.0.1:{upstream.server.port}"
        upstream.origin = Origin("http", "provider.test", 8000, proxy=proxy)
        assert (await upstream.fetch()).payload == b"ok"
    assert seen[0].line == b"POST http://provider.test:8000/v1/x?y=1 HTTP/1.1"
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"us@er:p:w") in seen[0].fields


@pytest.mark.parametrize("uses_http2", [False, True])
async def test_tunnel_carries_tls_to_the_provider(uses_http2: bool) -> None:
    heads: list[bytes] = []
    transport = HttpcoreTransport(Limits())
    trust(transport)
    async with AsyncExitStack() as stack:
        script = h2_script(answer) if uses_http2 else ok
        tls = server_tls("h2" if uses_http2 else "http/1.1")
        server = await stack.enter_async_context(serve(script, tls))
        proxy = await stack.enter_async_context(serve(connect_proxy(heads)))
        await stack.enter_async_context(swept(transport))
        url = f"http://user:word@127.0.0.1:{proxy.port}"
        upstream = Bench(transport, Origin("https", "localhost", server.port, proxy=url, http2=uses_http2), server)
        got = await upstream.fetch()
    assert got.payload == (b"body of 1" if uses_http2 else b"ok")
    assert heads[0].startswith(b"CONNECT localhost:%d HTTP/1.1\r\n" % server.port)
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"user:word") in heads[0]
    assert b"X-Spelled-So" not in heads[0]


async def test_refusal_of_a_proxy_is_a_connect_fault() -> None:
    async def script(peer: Peer) -> None:
        await peer.read_head()
        await peer.send(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        await peer.wait_closed()

    async with bench("httpcore", script) as upstream:
        upstream.origin = Origin("https", "localhost", 1, proxy=f"http://127.0.0.1:{upstream.server.port}")
        with pytest.raises(UpstreamError, match="407") as caught:
            await upstream.send()
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
    assert caught.value.fault == "connect"


@pytest.mark.parametrize("tls", [False, True])
async def test_socks_proxy_carries_the_exchange(tls: bool) -> None:
    logins: list[tuple[bytes, bytes]] = []
    async with (
        bench("httpcore_tls" if tls else "httpcore", ok) as upstream,
        serve(socks_proxy(logins)) as proxy,
    ):
        url = f"socks5://user:word@127.0.0.1:{proxy.port}"
        upstream.origin = Origin("https" if tls else "http", upstream.origin.host, upstream.server.port, proxy=url)
        assert (await upstream.fetch()).payload == b"ok"
        await upstream.transport.aclose()  # type: ignore[union-attr]
    assert logins == [(b"user", b"word")]


async def test_socks_proxy_that_hangs_up_is_a_connect_fault() -> None:
    async def script(peer: Peer) -> None:
        await peer.reader.readexactly(3)

    async with bench("httpcore", script) as upstream:
        upstream.origin = Origin("http", "provider.test", 80, proxy=f"socks5://127.0.0.1:{upstream.server.port}")
        assert await upstream.fault() == "connect"
        assert not upstream.transport.opened


async def test_socks_proxy_that_stalls_is_a_timeout_and_leaves_no_socket() -> None:
    async def script(peer: Peer) -> None:
        await peer.wait_closed()

    async with bench("httpcore", script) as upstream:
        upstream.origin = Origin("http", "provider.test", 80, proxy=f"socks5://127.0.0.1:{upstream.server.port}")
        assert await upstream.fault(timeouts=Timeouts(connect=0.1)) == "timeout"
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()


# --- the choice of transport --------------------------------------------------------------------------------


async def test_transport_follows_the_origin() -> None:
    transports = UpstreamTransports(Limits())
    async with bench("direct", ok) as upstream:
        plain = await transports.send(upstream.request())
        proxied = await transports.send(
            upstream.request(origin=Origin("http", "a.test", 80, f"http://127.0.0.1:{upstream.server.port}"))
        )
        assert (plain.is_raw, proxied.is_raw) == (True, False)
        assert [(await take(response)).payload for response in (plain, proxied)] == [b"ok", b"ok"]
        transports.sweep(1e12)
        await transports.aclose()
    assert not transports.via_httpcore.opened


def test_httpcore_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, penstock.upstream; print('httpcore' in sys.modules, 'h2' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"
