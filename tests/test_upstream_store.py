"""The store of idle connections, and TLS sessions that are resumed."""

from __future__ import annotations

import asyncio
import ssl

import anyio
import attrs
import pytest

from penstock.providers import Origin
from penstock.upstream.store import ConnectionStore, Limits
from upstream_client import bench
from upstream_servers import Peer

HERE = Origin("http", "here.test", 80)
THERE = Origin("http", "there.test", 80)


@attrs.define(eq=False)
class Plug:
    """A connection that only remembers what was done to it."""

    origin: Origin = HERE
    idle_since: float = 0.0
    usable: bool = True
    aborted: bool = False

    def is_usable(self) -> bool:
        return self.usable

    def abort(self) -> None:
        self.aborted = True


def test_last_in_is_first_out() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits())
    first, second = Plug(), Plug()
    store.put(first)
    store.put(second)
    assert [store.take(HERE), store.take(HERE), store.take(HERE)] == [second, first, None]


def test_origins_are_kept_apart() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits())
    store.put(Plug(HERE))
    assert store.take(THERE) is None
    assert store.take(attrs.evolve(HERE, http2=True)) is None
    assert store.take(attrs.evolve(HERE, proxy="http://proxy.test:80")) is None
    assert len(store) == 1


def test_unusable_connections_are_passed_over_and_closed() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits())
    good, bad = Plug(), Plug(usable=False)
    store.put(good)
    store.put(bad)
    assert store.take(HERE) is good
    assert (good.aborted, bad.aborted, len(store)) == (False, True, 0)


def test_limit_per_origin_closes_the_oldest() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits(max_idle_per_origin=2))
    plugs = [Plug() for _ in range(3)]
    for plug in plugs:
        store.put(plug)
    assert [plug.aborted for plug in plugs] == [True, False, False]
    assert len(store) == 2


def test_discarded_connection_is_not_taken() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits())
    plug = Plug()
    store.put(plug)
    store.discard(plug)
    store.discard(plug)
    assert store.take(HERE) is None


def test_expiry_closes_only_what_is_overdue() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits(idle_timeout=30.0))
    old, young, other = Plug(idle_since=10.0), Plug(idle_since=20.0), Plug(THERE, idle_since=5.0)
    for plug in (old, young, other):
        store.put(plug)
    store.expire(45.0)
    assert (old.aborted, young.aborted, other.aborted) == (True, False, True)
    assert store.take(HERE) is young


def test_eviction_closes_the_one_idle_longest() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits())
    young, old = Plug(HERE, idle_since=9.0), Plug(THERE, idle_since=3.0)
    store.put(young)
    store.put(old)
    assert store.evict()
    assert (young.aborted, old.aborted) == (False, True)
    assert store.evict()
    assert not store.evict()


def test_closing_closes_everything() -> None:
    store: ConnectionStore[Plug] = ConnectionStore(Limits())
    plugs = [Plug(HERE), Plug(THERE)]
    for plug in plugs:
        store.put(plug)
    store.close()
    assert all(plug.aborted for plug in plugs)
    assert len(store) == 0


@pytest.fixture(params=[False, True], ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": request.param}


async def closing(peer: Peer) -> None:
    await peer.read_request()
    reused = peer.writer.get_extra_info("ssl_object").session_reused
    answer = b"resumed" if reused else b"in full"
    await peer.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 7\r\n\r\n" + answer)


@pytest.mark.anyio
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_second_handshake_with_a_host_resumes_its_session(version: ssl.TLSVersion) -> None:
    async with bench("direct_tls", closing) as upstream:
        context = upstream.transport.tls.context_for(upstream.origin)
        context.maximum_version = version
        bodies = [(await upstream.fetch()).payload for _ in range(3)]
        assert len(upstream.server.peers) == 3
    assert bodies == [b"in full", b"resumed", b"resumed"]


@pytest.mark.anyio
async def test_handshakes_at_the_same_time_do_not_disturb_each_other() -> None:
    bodies: list[bytes] = []
    async with bench("direct_tls", closing) as upstream:

        async def one() -> None:
            bodies.append((await upstream.fetch()).payload)

        for _ in range(2):
            async with anyio.create_task_group() as tasks:
                for _ in range(6):
                    tasks.start_soon(one)
    assert len(bodies) == 12


@pytest.mark.anyio
async def test_unsent_rest_of_a_request_keeps_the_connection_from_reuse() -> None:
    goes_on = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.read_head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await goes_on.wait()

    async with bench("direct", script) as upstream:
        answer = await upstream.fetch(body=bytes(16 * 1024 * 1024))
        assert answer.response.head.status == 413
        assert not len(upstream.transport.idle)
        goes_on.set()
