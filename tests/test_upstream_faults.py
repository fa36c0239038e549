"""Both transports name the same faults, before the head and in the body."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from penstock.errors import UpstreamError
from penstock.models import Timeouts
from penstock.providers import Origin
from upstream_client import KINDS, OK, SHORT, Collector, Connect, answering, bench, take
from upstream_servers import Peer, turns

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return partial(bench, request.param)


# --- faults before the head ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(b"nonsense\r\n\r\n", id="no status line"),
        pytest.param(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok\r\n\r\n", id="bare LF"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", id="two lengths"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            id="both framings",
        ),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\nok", id="folded line"),
        pytest.param(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n", id="switch of protocols"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n", id="large"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000, id="endless"),
    ],
)
async def test_bad_head_is_a_protocol_fault(connect: Connect, wire: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(wire)
        await peer.wait_closed()

    async with connect(script) as upstream:
        assert await upstream.fault() == "protocol"
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nX"])
async def test_close_before_the_whole_head_is_a_reset(connect: Connect, begun: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(begun)

    async with connect(script) as upstream:
        assert await upstream.fault() == "reset"


async def test_tcp_reset_before_the_head_is_a_reset(connect: Connect) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        peer.reset()

    async with connect(script) as upstream:
        assert await upstream.fault() == "reset"


async def test_stall_before_the_head_times_out(connect: Connect) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.wait_closed()

    async with connect(script) as upstream:
        assert await upstream.fault(timeouts=SHORT) == "timeout"
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()


async def test_cancelled_wait_for_the_head_closes_the_connection(connect: Connect) -> None:
    was_read = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.read_request()
        was_read.set()
        await peer.wait_closed()

    async with connect(script) as upstream:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(upstream.send)
            await was_read.wait()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
        await turns(5)
        assert not upstream.transport.opened


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_nobody_listening_is_a_connect_fault(connect: Connect, scheme: str) -> None:
    async with bench("direct", answering(OK)) as gone:
        closed_port = gone.server.port
    async with connect(answering(OK)) as upstream:
        request = upstream.request(origin=Origin(scheme, "127.0.0.1", closed_port))
        with pytest.raises(UpstreamError, match="cannot connect") as caught:
            await upstream.transport.send(request)
    assert caught.value.fault == "connect"


async def test_host_name_that_cannot_resolve_is_a_dns_fault(connect: Connect) -> None:
    async with connect(answering(OK)) as upstream:
        request = upstream.request(origin=Origin("http", "no..such-name.invalid", 80))
        with pytest.raises(UpstreamError, match="does not resolve") as caught:
            await upstream.transport.send(request)
    assert caught.value.fault == "dns"


@pytest.mark.parametrize("kind", ["direct_tls", "httpcore_tls", "httpcore_tunnel"])
async def test_untrusted_certificate_is_a_tls_fault(kind: str) -> None:
    async with bench(kind, answering(OK)) as upstream:
        upstream.transport.tls.forget()
        assert await upstream.fault() == "tls"
        assert not upstream.transport.opened


@pytest.mark.parametrize("kind", ["direct_tls", "httpcore_tls"])
async def test_stalled_handshake_is_a_timeout(kind: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.wait_closed()

    async with bench("direct", script) as silent, bench(kind, answering(OK)) as upstream:
        origin = Origin("https", "localhost", silent.server.port)
        request = upstream.request(origin=origin, timeouts=Timeouts(connect=0.1))
        with pytest.raises(UpstreamError, match="no connection") as caught:
            await upstream.transport.send(request)
        with anyio.fail_after(5):
            await silent.server.peers[0].closed.wait()
    assert caught.value.fault == "timeout"


# --- faults in the body -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize(
    "begun",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ],
    ids=["length", "chunked"],
)
async def test_body_that_breaks_off_is_truncated(connect: Connect, begun: bytes, resets: bool) -> None:
    has_begun = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(begun)
        await has_begun.wait()
        if resets:
            peer.reset()

    async with connect(script) as upstream:
        response = await upstream.send()
        collector = Collector(response)
        response.start(collector)
        await collector.began.wait()
        has_begun.set()
        with anyio.fail_after(5):
            await collector.ended.wait()
    assert collector.payload == b"abc"
    assert collector.error is not None
    assert collector.error.fault == "truncated"


@pytest.mark.parametrize("kind", ["direct", "httpcore", "httpcore_forward"])
async def test_tcp_reset_is_no_end_of_a_body_delimited_by_close(kind: str) -> None:
    goes_on = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nabc")
        await goes_on.wait()
        peer.reset()

    async with bench(kind, script) as upstream:
        response = await upstream.send()
        goes_on.set()
        await upstream.server.peers[0].closed.wait()
        await turns(20)
        answer = await take(response)
    assert answer.error is not None
    assert answer.error.fault == "truncated"


async def test_bad_chunk_size_is_a_protocol_fault(connect: Connect) -> None:
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    async with connect(answering(wire, b"-1\r\n")) as upstream:
        answer = await upstream.fetch()
    assert answer.error is not None
    assert answer.error.fault == "protocol"


async def test_stall_in_the_body_is_an_idle_timeout(connect: Connect) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        await peer.wait_closed()

    async with connect(script) as upstream:
        answer = await upstream.fetch(timeouts=Timeouts(first_byte=20.0, idle=0.1))
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
    assert answer.payload == b"abc"
    assert answer.error is not None
    assert answer.error.fault == "timeout"


@pytest.mark.parametrize("started", [False, True])
async def test_response_closed_in_its_body_closes_the_connection(connect: Connect, started: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        await peer.wait_closed()

    async with connect(script) as upstream:
        response = await upstream.send()
        collector = Collector(response)
        if started:
            response.start(collector)
            await collector.began.wait()
        response.close()
        response.close()
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
        await turns(20)
        assert not len(upstream.transport.idle)
        assert not upstream.transport.opened
        assert not collector.ended.is_set()


async def test_response_closed_by_its_receiver_is_not_delivered_further(connect: Connect) -> None:
    class Closing(Collector):
        def receive(self, data: bytes) -> None:
            super().receive(data)
            self.response.close()

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nabc", b"def")
        await peer.wait_closed()

    async with connect(script) as upstream:
        response = await upstream.send()
        collector = Closing(response)
        response.start(collector)
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
        await turns(20)
    assert len(collector.reads) == 1
    assert not collector.ended.is_set()


async def test_transport_closed_under_a_body_truncates_it(connect: Connect) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        await peer.wait_closed()

    async with connect(script) as upstream:
        response = await upstream.send()
        collector = Collector(response)
        response.start(collector)
        await collector.began.wait()
    assert collector.error is not None
    assert collector.error.fault == "truncated"
