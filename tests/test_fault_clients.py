"""The client's side of the fault matrix: leaving at any moment, taking nothing, half-closing; see test_fault_matrix."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from fault_upstream import ANTHROPIC, DIALECTS, HALF_EVENT, JSON_HEAD, Dialect, Watched, until, watched
from penstock import Chunk, Exchange, hookimpl, server
from penstock.testing import (
    LAST_CHUNK,
    STREAM_HEAD,
    FakeUpstream,
    Pause,
    RawClient,
    Stall,
    chunk,
)
from penstock.testing.upstream import Step

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("dialect", DIALECTS, ids=[each.name for each in DIALECTS])]


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let deadlines be looked at often: most tests of this file that wait, wait for one."""
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


class Watcher:
    """See every chunk and change none."""

    sees_chunks = True

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> None:
        assert chunk.is_event_stream


class AsyncWatcher:
    """The same, awaiting."""

    sees_chunks = True

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> None:
        await checkpoint()


def leave(client: Any, how: str) -> None:
    {"close": client.close, "reset": client.reset, "half_close": client.half_close}[how]()


LEAVINGS = ("close", "reset", "half_close")


@pytest.mark.parametrize("how", LEAVINGS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
async def test_client_that_leaves_inside_its_request_leaves_nothing(dialect: Dialect, how: str, share: float) -> None:
    async with watched(FakeUpstream()) as run:
        run.settled = 0
        client = await run.harness.raw()
        request = run.harness.request_bytes("POST", dialect.path, body=dialect.body)
        await client.send(request[: int(len(request) * share)])
        leave(client, how)
        assert run.upstreams[0].requests == []


@pytest.mark.parametrize("how", LEAVINGS)
@pytest.mark.parametrize("state", ["head", "first_event", "first_byte"])
async def test_client_that_leaves_while_waiting_cancels_the_upstream(dialect: Dialect, how: str, state: str) -> None:
    stall = Stall()
    before: dict[str, list[Step]] = {
        "head": [],
        "first_event": [STREAM_HEAD, chunk(HALF_EVENT)],
        "first_byte": [JSON_HEAD],
    }
    async with watched(FakeUpstream([[*before[state], stall]])) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", dialect.path, body=dialect.body))
        await stall.reached.wait()
        leave(client, how)
        await stall.gone.wait()
        await run.harness.wait_settled(1)
        exchange = run.harness.exchanges[0]
        assert (exchange.status, exchange.stream_end, exchange.committed_ns) == (None, "client_gone", None)
        assert not client.received


@pytest.mark.parametrize("how", LEAVINGS)
async def test_client_that_leaves_a_stream_cancels_the_upstream(dialect: Dialect, how: str) -> None:
    stall = Stall()
    first = dialect.events[0]
    async with watched(FakeUpstream([[STREAM_HEAD, chunk(first), chunk(HALF_EVENT), stall]])) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == first
            await stall.reached.wait()
            leave(stream.client, how)
            await stall.gone.wait()
            await run.harness.wait_settled(1)
        exchange = run.harness.exchanges[0]
        assert (exchange.status, exchange.stream_end) == (200, "client_gone")
        assert exchange.window is not None
        assert exchange.usage is not None
        assert exchange.usage.source == ("provider" if dialect is ANTHROPIC else "estimated")


async def test_drained_stream_is_settled_by_its_usage(dialect: Dialect) -> None:
    pause = Pause()
    script: list[Step] = [STREAM_HEAD, chunk(dialect.events[0]), pause, *map(chunk, dialect.events[1:]), LAST_CHUNK]
    drain = {"drain_after_disconnect": {"seconds": 5.0, "bytes": 100_000}}
    async with watched(FakeUpstream([script]), gateway=drain) as run:
        run.idle = 1
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == dialect.events[0]
        listener = run.harness.gateway.server
        while listener.connections:
            await pause.reached.wait()
            await checkpoint()
        pause.release()
        await run.harness.wait_settled(1)
        exchange = run.harness.exchanges[0]
        assert exchange.stream_end == "client_gone"
        assert exchange.usage is not None
        assert (exchange.usage.all_input, exchange.usage.output) == (7, 3)


@pytest.mark.parametrize("bound", ["seconds", "bytes"])
async def test_drain_is_bounded(dialect: Dialect, bound: str) -> None:
    pause = Pause()
    stall = Stall()
    script: list[Step] = [STREAM_HEAD, chunk(dialect.events[0]), pause, chunk(b": pad\n\n" * 200), stall]
    limits = {"seconds": {"seconds": 0.1, "bytes": 100_000}, "bytes": {"seconds": 60.0, "bytes": 500}}
    async with watched(FakeUpstream([script]), gateway={"drain_after_disconnect": limits[bound]}) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == dialect.events[0]
        listener = run.harness.gateway.server
        while listener.connections:
            await checkpoint()
        pause.release()
        await run.harness.wait_settled(1)
        await stall.gone.wait()
        exchange = run.harness.exchanges[0]
        assert exchange.stream_end == "client_gone"
        assert exchange.window is not None
        assert exchange.window.text.startswith(dialect.events[0])


@pytest.mark.parametrize("kind", ["raw", "filter", "hook", "async_hook"])
async def test_slow_client_slows_the_upstream(dialect: Dialect, kind: str) -> None:
    """At most 256 KiB of a stream is held inside; the rest waits at the provider."""
    piece = chunk(b"data: " + b"x" * 8000 + b"\n\n")
    count = 600  # far more than the sockets in between hold
    plugins: dict[str, Sequence[Any]] = {"hook": [Watcher], "async_hook": [AsyncWatcher]}
    body = dialect.body if kind != "filter" else b'{"model":"claude-m","stream":true}'
    script: list[Step] = [STREAM_HEAD, *[piece] * count, LAST_CHUNK]
    async with watched(FakeUpstream([script]), plugins=plugins.get(kind, ())) as run:
        run.idle = 1
        client = await slow_client(run)
        (connection,) = run.harness.gateway.server.connections
        await client.send(run.harness.request_bytes("POST", dialect.path, body=body))
        await run.upstreams[0].wait_requests(1)
        (upstream,) = run.harness.gateway.transports.direct.opened
        held = await most_held(connection, upstream)
        client.resume()
        reply = await client.receive_reply()
        assert reply.body.count(b"x" * 8000) == count
        assert held <= 256 * 1024


async def slow_client(run: Watched) -> RawClient:
    """Return a client that takes nothing yet, behind sockets that hold little."""
    client = await run.harness.raw()
    listener = run.harness.gateway.server
    await until(lambda: listener.connections, "the gateway has the connection")
    (connection,) = listener.connections
    ends: Sequence[tuple[Any, int]] = ((client._transport, socket.SO_RCVBUF), (connection._transport, socket.SO_SNDBUF))
    for transport, option in ends:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 32 * 1024)
    client.pause()
    return client


async def most_held(connection: Any, upstream: Any) -> int:
    """Return the most bytes the gateway held until the flow stood still."""
    most = still = 0
    while still < 200:
        relay = connection._relay
        queued = getattr(relay, "_queued", 0)  # only where hooks await
        held = connection._transport.get_write_buffer_size() + queued
        still = still + 1 if upstream._paused and held <= most else 0
        most = max(most, held)
        await checkpoint()
    return most


async def test_client_that_takes_nothing_is_cut_off(dialect: Dialect) -> None:
    piece = chunk(b"data: " + b"x" * 8000 + b"\n\n")
    script: list[Step] = [STREAM_HEAD, *[piece] * 600, LAST_CHUNK]
    async with watched(FakeUpstream([script]), gateway={"limits": {"write_timeout": 0.2}}) as run:
        client = await slow_client(run)
        await client.send(run.harness.request_bytes("POST", dialect.path, body=dialect.body))
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "client_gone"
