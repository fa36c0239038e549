"""A gateway's life: reload without loss, ends that wait for settlement, limits over all connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from signal import SIGHUP, SIGTERM
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import uvloop

from abused_gateway import BODY, CHAT, abused, refused
from penstock import Exchange, OpenAIProvider, hookimpl
from penstock.config import read_document
from penstock.errors import ConfigurationError
from penstock.gateway import Gateway
from penstock.pipeline import SETTLE_SECONDS
from penstock.server import SWEEP_ALL, SWEEP_ROUND
from penstock.testing import LAST_CHUNK, STREAM_HEAD, FakeUpstream, Harness, Pause, RawClient, chunk, http_reply
from penstock.testing.client import request_bytes
from test_health import STREAM_BODY, greet, greeting, serving

pytestmark = pytest.mark.anyio


class Lives:
    """Count lifespans; each holds a task group open, as a plugin with tasks of its own does."""

    def __init__(self) -> None:
        self.entered = self.left = 0

    @hookimpl
    def lifespan(self) -> AbstractAsyncContextManager[None]:
        return self._live()

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            self.entered += 1
            yield
            tasks.cancel_scope.cancel()
        self.left += 1


async def until(is_so: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not is_so():
            await anyio.lowlevel.checkpoint()


# --- reload -----------------------------------------------------------------------------------------------------

BREAKING = """
import sys
from penstock import hookimpl


class Greet:
    {code}
"""
FAULTS = [
    "def __init__(self): raise RuntimeError('broken')\n    @hookimpl\n    def lifespan(self): pass",
    "@hookimpl\n    def register_providers(self): raise RuntimeError('broken')",
    "@hookimpl\n    def register_providers(self): return 7",
    "@hookimpl\n    def register_providers(self): return (1 // 0 for _ in 'a')",
    "@hookimpl\n    def register_routes(self): raise RuntimeError('broken')",
    "@hookimpl\n    def register_routes(self): return [None]",
    "@hookimpl\n    def lifespan(self): raise RuntimeError('broken')",
    "@hookimpl\n    def lifespan(self): return 7",
    "@hookimpl\n    def register_providers(self): sys.exit(1)",
]


async def test_sighup_survives_whatever_a_plugin_raises(tmp_path: Path, anyio_backend: Any) -> None:
    async with serving(greeting(tmp_path, anyio_backend)) as process:
        port = (await process.log("listening"))["port"]
        for code in FAULTS:
            (tmp_path / "greet.py").write_text(BREAKING.format(code=code))
            process.signal(SIGHUP)
            (fault,) = (await process.log("reload refused"))["faults"]
            assert "greet" in fault or "SystemExit" in fault
            assert (await process.ask(port, request_bytes("POST", CHAT, body=BODY), b"POST")).body == b"one"
        greet(tmp_path, "two")
        process.signal(SIGHUP)
        await process.log("reloaded")
        assert (await process.ask(port, request_bytes("POST", CHAT, body=BODY), b"POST")).body == b"two"
        process.signal(SIGTERM)
        assert await process.ended() == 0


class Quits:
    """Be told to start, and end the program instead."""

    @hookimpl
    def lifespan(self) -> AbstractAsyncContextManager[None]:
        return self._live()

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        raise SystemExit(3)
        yield


async def test_lifespan_that_fails_leaves_those_entered_before_and_the_generation_that_runs() -> None:
    lives = Lives()
    async with Harness([lives], upstream=FakeUpstream([[http_reply(b"1")]])) as harness:
        broken = Harness([lives, Quits()], upstream=FakeUpstream())
        with pytest.raises(ConfigurationError, match=r"\[plugins.quits\] did not start: SystemExit"):
            await harness.gateway.reload(broken.configuration)
        assert (lives.entered, lives.left) == (2, 1)
        assert (await harness.request("POST", CHAT, body=BODY)).body == b"1"
    assert (lives.entered, lives.left) == (2, 2)


def streaming() -> tuple[FakeUpstream, Pause]:
    pause = Pause()
    script: list[Any] = [STREAM_HEAD, chunk(b"data: 1\n\n"), pause, chunk(b"data: 2\n\n"), LAST_CHUNK]
    return FakeUpstream([script, [http_reply(b"1")]]), pause


async def stream(harness: Harness) -> RawClient:
    client = await harness.raw()
    await client.send(harness.request_bytes("POST", CHAT, body=STREAM_BODY))
    await client.receive_until(b"data: 1\n\n\r\n")
    return client


async def test_reload_waits_for_no_exchange_and_the_old_plugins_live_until_theirs_has_ended() -> None:
    lives = Lives()
    upstream, pause = streaming()
    async with Harness([lives], upstream=upstream, gateway={"limits": {"drain_timeout": 0.05}}) as harness:
        client = await stream(harness)
        with anyio.fail_after(5):
            await harness.gateway.reload(harness.configuration)
            await harness.gateway.reload(harness.configuration)
        await until(lambda: lives.left == 1)  # the second generation had nothing to do
        assert harness.gateway._retired[0].in_flight == 1
        assert (await harness.request("POST", CHAT, body=BODY)).body == b"1"
        pause.release()
        assert await client.receive_until(LAST_CHUNK) == chunk(b"data: 2\n\n") + LAST_CHUNK
        await until(lambda: lives.left == 2)
        await until(lambda: not harness.gateway._retired)
    assert (lives.entered, lives.left) == (3, 3)


async def test_shutdown_ends_generations_that_still_retire() -> None:
    lives = Lives()
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), Pause()]])
    async with Harness([lives], upstream=upstream, gateway={"limits": {"drain_timeout": 0.05}}) as harness:
        await stream(harness)
        await harness.gateway.reload(harness.configuration)
        assert lives.left == 0
    assert (lives.entered, lives.left) == (2, 2)
    assert [exchange.stream_end for exchange in harness.exchanges] == ["client_gone"]


async def test_sighup_is_answered_while_a_stream_runs_on(tmp_path: Path, anyio_backend: Any) -> None:
    (tmp_path / "hold.py").write_text(HOLDING)
    file = greeting(tmp_path, anyio_backend)
    text = file.read_text().replace('["./greet.py"]', '["./hold.py"]')
    file.write_text(text.replace("drain_timeout = 10.0", "drain_timeout = 60.0"))
    async with serving(file) as process:
        port = (await process.log("listening"))["port"]
        client = await process.connect(port)
        await client.send(request_bytes("POST", CHAT, body=BODY))
        await process.log("held")
        for _ in range(2):
            process.signal(SIGHUP)
            await process.log("reloaded")
        (tmp_path / "free").touch()
        assert (await client.receive_reply()).body == b"free"
        process.signal(SIGTERM)
        assert await process.ended() == 0


HOLDING = """
import sys
from pathlib import Path

import anyio
from penstock import Response, hookimpl


class Hold:
    @hookimpl
    async def pre_request(self, exchange):
        print("held", file=sys.stderr, flush=True)
        while not (Path(__file__).parent / "free").exists():
            await anyio.sleep(0.01)
        return Response(200, b"free")
"""

# --- the end ----------------------------------------------------------------------------------------------------


class Settles:
    """Take most of a plugin's time to settle, and note whether the lifespan still runs then."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.is_open = False
        self.found: list[bool] = []

    @hookimpl
    def lifespan(self) -> AbstractAsyncContextManager[None]:
        return self._live()

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        self.is_open = True
        yield
        self.is_open = False

    @hookimpl
    async def post_response(self, exchange: Exchange) -> None:
        await anyio.sleep(self.seconds)
        self.found.append(self.is_open)


async def test_lifespans_are_left_after_every_plugin_has_had_its_time_to_settle() -> None:
    plugins = [(f"settles{number}", Settles(SETTLE_SECONDS / 2 + 0.1)) for number in range(2)]
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), Pause()]])
    async with Harness(plugins, upstream=upstream, gateway={"limits": {"drain_timeout": 0.05}}) as harness:
        await stream(harness)
    assert [plugin.found for _, plugin in plugins] == [[True], [True]]


# --- any event loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_embedded_gateway_serves_under_a_loop_that_anyio_did_not_start(run: Callable[..., bytes]) -> None:
    table = {"listen": "127.0.0.1:0", "anonymous": True}
    gateway = Gateway(read_document({"gateway": table}, source="test", environment={}))

    async def ask() -> bytes:
        async with asyncio.timeout(10), gateway.running():
            reader, writer = await asyncio.open_connection("127.0.0.1", await gateway.listen())
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            reply = await reader.read()
            writer.close()
            await writer.wait_closed()
            return reply

    coroutine: Coroutine[Any, Any, bytes] = ask()
    assert run(coroutine).startswith(b"HTTP/1.1 200 OK\r\n")


# --- what a plugin does wrong at start ---------------------------------------------------------------------------


class Opens:
    """Open a file that is not there."""

    @hookimpl
    def lifespan(self) -> AbstractAsyncContextManager[None]:
        return self._live()

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        with open("/no"):  # noqa: ASYNC230 - what a beginner writes
            yield


class Single:
    """Return a provider where a list of them belongs."""

    @hookimpl
    def register_providers(self) -> Any:
        return OpenAIProvider(type="single")


class Routes:
    """Return a prefix where a list of mounts belongs."""

    @hookimpl
    def register_routes(self) -> Any:
        return 7


class Raises:
    """Fail while the gateway is built."""

    @hookimpl
    def register_providers(self) -> Any:
        raise KeyError("region")


class Complains:
    """Say what is wrong with the configuration."""

    @hookimpl
    def register_providers(self) -> Any:
        raise ConfigurationError("region: is missing")


@pytest.mark.parametrize(
    ("plugin", "fault"),
    [
        (
            Opens,
            "harness: [plugins.opens] did not start: FileNotFoundError: [Errno 2] No such file or directory: '/no'",
        ),
        (
            Single,
            "harness: [plugins.single] register_providers must return a list of providers, returned OpenAIProvider",
        ),
        (Routes, "harness: [plugins.routes] register_routes must return a list of mounts, returned int"),
        (Raises, "harness: [plugins.raises] failed in register_providers: KeyError: 'region'"),
        (Complains, "harness: [plugins.complains] region: is missing"),
    ],
)
async def test_plugin_that_fails_at_start_is_a_line_with_file_and_plugin(plugin: type[Any], fault: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        async with Harness([plugin]):
            pass
    assert caught.value.faults == (fault,)


# --- limits over all connections --------------------------------------------------------------------------------


def begun(harness: Harness, *lines: bytes) -> bytes:
    own = (b"POST %b HTTP/1.1" % CHAT.encode(), b"Host: a", b"Authorization: Bearer " + harness.key.encode())
    return b"\r\n".join((*own, *lines, b"", b""))


@pytest.mark.parametrize("socket", [False, True], ids=["memory", "socket"])
async def test_bodies_still_arriving_are_bounded_over_all_connections(socket: bool) -> None:
    upstream = FakeUpstream([[http_reply(b"1")], [http_reply(b"2")]])
    async with abused(upstream, socket=socket, max_buffered_bytes=30) as gateway:
        server = gateway.gateway.server
        slow, other = await gateway.raw(), await gateway.raw()
        await slow.send(begun(gateway, b"Content-Length: %d" % len(BODY)) + BODY[:10])
        await until(lambda: server.buffered_bytes == 10)
        await slow.send(BODY[10:20])
        await until(lambda: server.buffered_bytes == 20)
        await other.send(begun(gateway, b"Transfer-Encoding: chunked") + b"b\r\n" + b"x" * 11 + b"\r\n")
        reply = await refused(other, 503, "overloaded")
        assert reply.header("retry-after") == "1"
        assert server.buffered_bytes == 20
        # One that comes whole is not counted, however large.
        assert (await gateway.request("POST", CHAT, body=BODY)).body == b"1"
        await slow.send(BODY[20:])
        assert (await slow.receive_reply()).body == b"2"
        assert server.buffered_bytes == 0


async def test_body_whose_client_goes_or_runs_out_of_time_is_counted_no_longer() -> None:
    async with abused(body_timeout=0.2, max_buffered_bytes=30) as gateway:
        server = gateway.gateway.server
        gone, late = await gateway.raw(), await gateway.raw()
        for client in (gone, late):
            await client.send(begun(gateway, b"Content-Length: 100") + b"x" * 10)
        await until(lambda: server.buffered_bytes == 20)
        gone.close()
        await until(lambda: server.buffered_bytes == 10)
        await refused(late, 408, "request_timeout")
        assert server.buffered_bytes == 0


async def test_sweep_of_many_connections_is_spread_and_misses_none() -> None:
    async with abused(socket=False) as gateway:
        server = gateway.gateway.server
        for _ in range(SWEEP_ALL + 100):
            await gateway.raw()
        server._unswept.clear()
        rounds = [server._due_for_sweep() for _ in range(SWEEP_ROUND)]
        assert {len(due) for due in rounds} == {(SWEEP_ALL + 100) // SWEEP_ROUND}
        assert {connection for due in rounds for connection in due} == server.connections


async def test_deadlines_of_many_connections_are_kept() -> None:
    async with abused(socket=False, head_timeout=0.2) as gateway:
        clients = [await gateway.raw() for _ in range(SWEEP_ALL + 100)]
        for client in clients:
            assert await client.receive_all() == b""
