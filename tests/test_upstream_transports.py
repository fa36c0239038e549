"""Both transports give the same answers to the same bytes."""

from __future__ import annotations

import gzip
from functools import partial

import anyio
import pytest

from penstock.errors import UpstreamError
from penstock.upstream.store import Limits
from upstream_client import KINDS, OK, Collector, Connect, answering, answering_once, bench, take
from upstream_servers import Peer, Script, settle, turns

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Connect:
    return partial(bench, request.param)


# --- what arrives -------------------------------------------------------------------------------------------


async def test_request_arrives_as_built(connect: Connect) -> None:
    lines: list[tuple[bytes, bytes, bytes]] = []

    async def script(peer: Peer) -> None:
        request = await peer.read_request()
        lines.append((request.line.replace(b"http://provider.test:80", b""), request.fields, request.body))
        await peer.send(OK)

    async with connect(script) as upstream:
        await upstream.fetch(body=b"x" * 100_000)
    [(line, fields, body)] = lines
    assert line == b"POST /v1/x?y=1 HTTP/1.1"
    assert fields.lower().count(b"content-length: 100000\r\n") == 1
    assert b"Host: localhost\r\n" in fields
    assert b"X-Spelled-So: yes\r\n" in fields
    assert body == b"x" * 100_000


async def test_post_without_a_body_announces_length_zero(connect: Connect) -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append((await peer.read_request()).fields.lower())
        await peer.send(OK)

    async with connect(script) as upstream:
        await upstream.fetch(body=b"")
    assert b"content-length: 0\r\n" in seen[0]


async def test_head_keeps_status_reason_spelling_and_repeated_fields(connect: Connect) -> None:
    head = b"HTTP/1.1 429 Slow  Down\r\nRetry-AFTER: 7\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 0\r\n\r\n"
    async with connect(answering(head)) as upstream:
        answer = await upstream.fetch()
    head_read = answer.response.head
    assert (head_read.status, head_read.reason, head_read.content_length) == (429, b"Slow  Down", 0)
    assert list(head_read.headers) == [
        (b"Retry-AFTER", b"7"),
        (b"X-A", b"1"),
        (b"x-a", b"2"),
        (b"Content-Length", b"0"),
    ]
    assert head_read.fields == b"Retry-AFTER: 7\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 0\r\n"
    assert (answer.payload, answer.error) == (b"", None)


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_body_of_known_length_arrives_however_it_is_cut(connect: Connect, size: int) -> None:
    wire = b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n" + b"0123456789" * 2
    pieces = [wire[at : at + size] for at in range(0, len(wire), size)]
    async with connect(answering(*pieces)) as upstream:
        answer = await upstream.fetch()
        assert answer.response.head.content_length == 20
    assert (answer.payload, answer.error) == (b"0123456789" * 2, None)


@pytest.mark.parametrize("size", [1, 5, 10_000])
async def test_chunked_body_with_trailers_arrives_however_it_is_cut(connect: Connect, size: int) -> None:
    wire = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3;note=x\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-Trailer: yes\r\n\r\n"
    )
    pieces = [wire[at : at + size] for at in range(0, len(wire), size)]
    async with connect(answering(*pieces)) as upstream:
        first = await upstream.fetch()
        second = await upstream.fetch()
        assert len(upstream.server.peers) == 1
    for answer in (first, second):
        assert answer.response.head.content_length is None
        assert (answer.payload, answer.error) == (b"abc0123456789", None)


async def test_body_delimited_by_close_ends_with_the_connection(connect: Connect) -> None:
    async with connect(answering_once(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nabc", b"def")) as upstream:
        answer = await upstream.fetch()
    assert (answer.payload, answer.error) == (b"abcdef", None)


async def test_body_delimited_by_close_that_is_held_back_ends_too(connect: Connect) -> None:
    async with connect(answering_once(b"HTTP/1.1 200 OK\r\nX: y\r\n\r\nabc")) as upstream:
        response = await upstream.send()
        await upstream.server.peers[0].ending.wait()
        await turns(50)
        answer = await take(response)
    assert (answer.payload, answer.error) == (b"abc", None)


@pytest.mark.parametrize("status", [204, 304])
async def test_bodiless_statuses_end_at_once_and_keep_the_connection(connect: Connect, status: int) -> None:
    head = b"HTTP/1.1 %d Fine\r\nX: y\r\n\r\n" % status
    async with connect(answering(head)) as upstream:
        answers = [await upstream.fetch() for _ in range(2)]
        reused = len(upstream.server.peers) == 1
    assert [(a.response.head.status, a.payload, a.error) for a in answers] == [(status, b"", None)] * 2
    assert reused


async def test_interim_responses_are_passed_over(connect: Connect) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with connect(answering(interim[:30], interim[30:] + OK)) as upstream:
        answer = await upstream.fetch()
    assert (answer.response.head.status, answer.payload) == (200, b"ok")


async def test_coded_body_is_not_decoded(connect: Connect) -> None:
    body = gzip.compress(b"secret of the body " * 50)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with connect(answering(head + body)) as upstream:
        answer = await upstream.fetch()
    assert answer.response.head.headers.get(b"content-encoding") == b"gzip"
    assert answer.payload == body


async def test_early_answer_arrives_before_the_request_is_read(connect: Connect) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig")
        await peer.wait_closed()

    async with connect(script) as upstream:
        answer = await upstream.fetch(body=b"x" * (4 * MIB))
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
    assert (answer.response.head.status, answer.payload, answer.error) == (413, b"big", None)


# --- back-pressure ------------------------------------------------------------------------------------------


async def test_paused_body_is_read_ahead_only_within_a_bound(connect: Connect) -> None:
    piece = bytes(range(256)) * 256
    count = 256

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * count))
        for _ in range(count):
            await peer.send(piece)
        await peer.wait_closed()

    async with connect(script) as upstream:
        response = await upstream.send()
        collector = Collector(response, pauses=True)
        response.start(collector)
        await collector.began.wait()
        taken = collector.size
        sent = await settle(lambda: upstream.server.peers[0].sent_bytes)
        assert collector.size == taken
        assert taken <= 256 * 1024
        assert sent < 12 * MIB < len(piece) * count
        response.resume()
        with anyio.fail_after(30):
            await collector.ended.wait()
    assert collector.error is None
    assert collector.payload == piece * count


async def test_body_that_is_not_started_is_read_ahead_only_within_a_bound(connect: Connect) -> None:
    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (16 * MIB))
        for _ in range(256):
            await peer.send(bytes(65536))

    async with connect(script) as upstream:
        response = await upstream.send()
        assert await settle(lambda: upstream.server.peers[0].sent_bytes) < 12 * MIB
        answer = await take(response)
    assert (answer.size, answer.error) == (16 * MIB, None)


# --- connections --------------------------------------------------------------------------------------------


async def test_second_request_goes_over_the_same_connection(connect: Connect) -> None:
    async with connect(answering(OK)) as upstream:
        bodies = [(await upstream.fetch()).payload for _ in range(3)]
        assert len(upstream.server.peers) == 1
    assert bodies == [b"ok"] * 3


async def test_connection_close_is_obeyed(connect: Connect) -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    async with connect(answering(head)) as upstream:
        for _ in range(2):
            await upstream.fetch()
        assert len(upstream.server.peers) == 2


def dying_when_reused(seen: list[bytes]) -> Script:
    async def script(peer: Peer) -> None:
        seen.append((await peer.read_request()).line[:4])
        await peer.send(OK)
        seen.append((await peer.read_request()).line[:4])
        if peer.number:
            await peer.send(OK)

    return script


async def test_get_on_a_dead_kept_alive_connection_is_sent_again_once(connect: Connect) -> None:
    seen: list[bytes] = []
    async with connect(dying_when_reused(seen)) as upstream:
        await upstream.fetch(b"GET")
        answer = await upstream.fetch(b"GET")
        assert len(upstream.server.peers) == 2
    assert answer.payload == b"ok"
    assert len(seen) == 3


async def test_post_on_a_dead_kept_alive_connection_is_not_sent_again(connect: Connect) -> None:
    seen: list[bytes] = []
    async with connect(dying_when_reused(seen)) as upstream:
        await upstream.fetch()
        assert await upstream.fault() == "reset"
    assert len(seen) == 2


async def test_get_on_a_new_connection_that_dies_is_not_sent_again(connect: Connect) -> None:
    seen: list[bytes] = []

    async def script(peer: Peer) -> None:
        seen.append((await peer.read_request()).line)

    async with connect(script) as upstream:
        assert await upstream.fault(b"GET") == "reset"
    assert len(seen) == 1


async def test_connection_closed_while_idle_is_not_used(connect: Connect) -> None:
    async with connect(answering_once(OK)) as upstream:
        for number in range(2):
            answer = await upstream.fetch()
            assert answer.payload == b"ok"
            await upstream.server.peers[number].ending.wait()
            await turns(50)


async def test_surplus_bytes_are_not_delivered_and_end_the_connection(connect: Connect) -> None:
    poison = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(OK + poison)
        await peer.wait_closed()

    async with connect(script) as upstream:
        answers = [await upstream.fetch() for _ in range(2)]
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
        assert len(upstream.server.peers) == 2
    assert [answer.payload for answer in answers] == [b"ok", b"ok"]


async def test_unsolicited_bytes_end_an_idle_connection(connect: Connect) -> None:
    is_idle = anyio.Event()

    async def script(peer: Peer) -> None:
        await peer.read_request()
        await peer.send(OK)
        if not peer.number:
            await is_idle.wait()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
        await peer.wait_closed()

    async with connect(script) as upstream:
        await upstream.fetch()
        is_idle.set()
        await turns(30)
        answer = await upstream.fetch()
        assert len(upstream.server.peers) == 2
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
    assert answer.payload == b"ok"


async def test_connections_are_bounded(connect: Connect) -> None:
    async with connect(answering(OK), Limits(max_connections=1)) as upstream:
        held = await upstream.send()
        with pytest.raises(UpstreamError, match="all 1 upstream connections are in use"):
            await upstream.send()
        assert (await take(held)).payload == b"ok"
        assert (await upstream.fetch()).payload == b"ok"


async def test_burst_does_not_pass_the_bound(connect: Connect) -> None:
    faults: list[str] = []
    held = []

    async with connect(answering(OK), Limits(max_connections=2)) as upstream:

        async def one() -> None:
            try:
                held.append(await upstream.send())
            except UpstreamError as error:
                faults.append(error.fault)

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(one)
        assert len(upstream.server.peers) == 2
        for response in held:
            response.close()
    assert (len(held), faults) == (2, ["connect"] * 3)


async def test_idle_connections_expire(connect: Connect) -> None:
    async with connect(answering(OK), Limits(idle_timeout=0.0)) as upstream:
        await upstream.fetch()
        with anyio.fail_after(5):
            await upstream.server.peers[0].closed.wait()
        await turns(5)
        assert not upstream.transport.opened
