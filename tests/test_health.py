"""Probes, draining and the process around them: start, reload, stop, several workers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from abused_gateway import BODY, CHAT, abused
from penstock.keys import new_key
from penstock.testing import LAST_CHUNK, STREAM_HEAD, FakeUpstream, Harness, Pause, RawClient, Reply, chunk, http_reply
from penstock.testing.client import request_bytes
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio

STREAM_BODY = b'{"model":"m","stream":true}'


def get(path: bytes, method: bytes = b"GET") -> bytes:
    return b"%b %b HTTP/1.1\r\nHost: a\r\n\r\n" % (method, path)


# --- probes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "body"), [(b"/", b"penstock\n"), (b"/healthz", b"ok\n"), (b"/readyz", b"ok\n")])
async def test_probe_is_answered_without_a_key(path: bytes, body: bytes) -> None:
    async with abused() as gateway:
        client = await gateway.raw()
        for method, expected in ((b"GET", body), (b"HEAD", b"")):
            await client.send(get(path, method))
            reply = await client.receive_reply(method)
            assert (reply.status, reply.body) == (200, expected)
            assert reply.header("content-length") == str(len(body))
            assert reply.header("cache-control") == "no-store"
        assert gateway.settled == 0


async def test_probe_with_a_query_is_answered() -> None:
    async with abused() as gateway:
        assert (await gateway.request("GET", "/healthz?verbose=1")).status == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/"])
async def test_probe_takes_no_other_method(path: str) -> None:
    async with abused() as gateway:
        assert (await gateway.request("POST", path, body=BODY)).status == 404


async def test_probe_is_answered_while_exchanges_are_at_their_limit() -> None:
    pause = Pause()
    async with abused(FakeUpstream([[pause, http_reply()]]), max_in_flight=1) as gateway:
        busy, probe = await gateway.raw(), await gateway.raw()
        await busy.send(gateway.request_bytes("POST", CHAT, body=BODY))
        await pause.reached.wait()
        await probe.send(get(b"/readyz"))
        assert (await probe.receive_reply(b"GET")).status == 200
        pause.release()
        assert (await busy.receive_reply()).status == 200


async def test_not_ready_before_it_listens() -> None:
    async with abused(socket=False) as gateway:
        gateway.gateway.server.is_started = False
        reply = await gateway.request("GET", "/readyz")
        assert (reply.status, reply.body) == (503, b"starting\n")
        assert (await gateway.request("GET", "/healthz")).status == 200


# --- draining, in process -------------------------------------------------------------------------------------


@asynccontextmanager
async def draining(gateway: Harness) -> AsyncIterator[None]:
    """Begin to drain; leaving waits until the gateway is empty."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(begin_drain, gateway)
        yield


async def begin_drain(gateway: Harness, *, task_status: anyio.abc.TaskStatus[None]) -> None:
    server = gateway.gateway.server
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.drain)
        while not server.is_draining:
            await anyio.lowlevel.checkpoint()
        task_status.started()
    assert not server.connections


@pytest.mark.parametrize("socket", [False, True], ids=["memory", "socket"])
async def test_drain_closes_idle_connections_and_serves_what_is_under_way(socket: bool) -> None:
    pause = Pause()
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), pause, chunk(b"data: 2\n\n"), LAST_CHUNK]])
    async with abused(upstream, socket=socket) as gateway:
        idle, busy, late = await gateway.raw(), await gateway.raw(), await gateway.raw()
        await idle.send(get(b"/readyz"))
        assert (await idle.receive_reply(b"GET")).status == 200
        await busy.send(gateway.request_bytes("POST", CHAT, body=STREAM_BODY))
        await busy.receive_until(b"data: 1\n\n\r\n")
        await late.send(b"GET /rea")
        while not any(connection._buffer for connection in gateway.gateway.server.connections):
            await anyio.lowlevel.checkpoint()
        async with draining(gateway):
            assert await idle.receive_all() == b""
            await late.send(b"dyz HTTP/1.1\r\nHost: a\r\n\r\n")
            reply = await late.receive_reply(b"GET")
            assert (reply.status, reply.body, reply.header("connection")) == (503, b"draining\n", "close")
            assert await late.receive_all() == b""
            assert gateway.settled == 0
            pause.release()
            assert await busy.receive_all() == chunk(b"data: 2\n\n") + LAST_CHUNK
        assert [exchange.stream_end for exchange in gateway.exchanges] == ["complete"]


async def test_drain_lets_a_slow_client_take_its_answer() -> None:
    size = 16 * 1024 * 1024
    async with abused(FakeUpstream([[http_reply(b"x" * size)]])) as gateway:
        client = await gateway.raw()
        client.pause()
        while not gateway.gateway.server.connections:
            await anyio.lowlevel.checkpoint()
        (connection,) = gateway.gateway.server.connections
        connection._transport_now.set_write_buffer_limits(1 << 30)
        await client.send(gateway.request_bytes("POST", CHAT, body=BODY))
        await gateway.wait_settled(1)
        async with draining(gateway):
            client.resume()
            assert len((await client.receive_reply()).body) == size


async def test_drain_cuts_what_does_not_end_in_time() -> None:
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), Pause()]])
    async with abused(upstream, drain_timeout=0.1) as gateway:
        busy, partial = await gateway.raw(), await gateway.raw()
        await busy.send(gateway.request_bytes("POST", CHAT, body=STREAM_BODY))
        await busy.receive_until(b"data: 1\n\n\r\n")
        await partial.send(b"GET /rea")
        await gateway.gateway.server.drain()
        await gateway.wait_settled(1)
        assert gateway.exchanges[0].stream_end == "client_gone"


# --- the process ----------------------------------------------------------------------------------------------

KEY = new_key()
GREETING = """
from penstock import Exchange, Response, hookimpl


class Greet:
    @hookimpl
    def pre_request(self, exchange: Exchange) -> Response:
        return Response(200, b"{word}")
"""


class Process:
    """A running ``penstock serve``: its log lines, its port, its end."""

    def __init__(self, process: anyio.abc.Process) -> None:
        self._process = process
        self._pending = b""
        self._clients: list[RawClient] = []
        self.lines: list[dict[str, Any]] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: Signals) -> None:
        self._process.send_signal(number)

    async def log(self, event: str) -> dict[str, Any]:
        """Return the next log line of this event. Raises TimeoutError, AssertionError at the end."""
        with anyio.fail_after(20):
            while True:
                line = await self._line()
                assert line is not None, f"the process ended before {event!r}: {self.lines}"
                if line.get("event", "").startswith(event):
                    return line

    async def _line(self) -> dict[str, Any] | None:
        assert self._process.stderr is not None
        while b"\n" not in self._pending:
            try:
                self._pending += await self._process.stderr.receive()
            except anyio.EndOfStream:
                return None
        text, _, self._pending = self._pending.partition(b"\n")
        line: dict[str, Any] = json.loads(text) if text.startswith(b"{") else {"event": text.decode()}
        self.lines.append(line)
        return line

    async def ended(self) -> int:
        """Return the exit status, once every process that held the log has gone."""
        with anyio.fail_after(20):
            while await self._line() is not None:
                pass
            return await self._process.wait()

    async def connect(self, port: int) -> RawClient:
        client = RawClient()
        await asyncio.get_running_loop().create_connection(lambda: client, "127.0.0.1", port)
        self._clients.append(client)
        return client

    async def ask(self, port: int, data: bytes, method: bytes = b"GET") -> Reply:
        client = await self.connect(port)
        await client.send(data)
        reply = await client.receive_reply(method)
        client.close()
        return reply

    async def close_clients(self) -> None:
        for client in self._clients:
            client.close()
            await client.closed.wait()


@asynccontextmanager
async def serving(file: Path, *options: str) -> AsyncIterator[Process]:
    """Run ``penstock serve`` on a file; it must have ended by itself when left."""
    code = "from penstock.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "-c", str(file), *options]
    async with await anyio.open_process(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as opened:
        process = Process(opened)
        try:
            yield process
            assert opened.returncode is not None, "the process still runs"
        finally:
            await process.close_clients()
            if opened.returncode is None:
                opened.terminate()


def write_file(folder: Path, backend: Any, plugins: str, tables: str = "") -> Path:
    """Write a configuration whose event loop is the one this test runs on."""
    loop = "uvloop" if backend[1]["use_uvloop"] else "asyncio"
    file = folder / "penstock.toml"
    file.write_text(
        f'[gateway]\nlisten = "127.0.0.1:0"\nlog = "json"\nloop = "{loop}"\nanonymous = true\n'
        f"plugins = {plugins}\n[gateway.limits]\ndrain_timeout = 10.0\n{tables}"
    )
    return file


def proxying(folder: Path, backend: Any, upstream: FakeUpstream) -> Path:
    tables = (
        f'[plugins.virtual_keys]\npepper = "{"p" * 32}"\n[[plugins.virtual_keys.keys]]\nname = "k"\nsecret = "{KEY}"\n'
        f'[[plugins.routing.bindings]]\nname = "up"\ntype = "openai_compatible"\n'
        f'base_url = "{upstream.base_url}"\ncredential = "sk-x"\n'
    )
    return write_file(folder, backend, '["virtual_keys", "routing", "openai_compatible"]', tables)


def greeting(folder: Path, backend: Any) -> Path:
    greet(folder, "one")
    return write_file(folder, backend, '["./greet.py"]')


def greet(folder: Path, word: str) -> None:
    (folder / "greet.py").write_text(GREETING.format(word=word))
    # Two versions within a second and of one size look the same to the cache of compiled files.
    os.utime(folder / "greet.py", (0, len(list(folder.iterdir())) + ord(word[0])))


async def test_sigterm_lets_a_stream_finish_and_ends_with_0(tmp_path: Path, anyio_backend: Any) -> None:
    pause = Pause()
    script: list[Step] = [STREAM_HEAD, chunk(b"data: 1\n\n"), pause, chunk(b"data: 2\n\n"), LAST_CHUNK]
    async with FakeUpstream([script]) as upstream, serving(proxying(tmp_path, anyio_backend, upstream)) as process:
        port = (await process.log("listening"))["port"]
        client = await process.connect(port)
        await client.send(request_bytes("POST", CHAT, body=STREAM_BODY, key=KEY))
        await client.receive_until(b"data: 1\n\n\r\n")
        process.signal(SIGTERM)
        assert (await process.log("draining"))["in_flight"] == 1
        await refuses_connections(process, port)
        pause.release()
        assert await client.receive_all() == chunk(b"data: 2\n\n") + LAST_CHUNK
        assert await process.ended() == 0
        (line,) = [line for line in process.lines if line["event"] == "exchange"]
        assert (line["status"], line["stream_end"]) == (200, "complete")


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_idle_process_ends_at_once(tmp_path: Path, anyio_backend: Any, number: Signals) -> None:
    async with serving(greeting(tmp_path, anyio_backend)) as process:
        port = (await process.log("listening"))["port"]
        idle = await process.connect(port)
        await idle.send(get(b"/readyz"))
        assert (await idle.receive_reply(b"GET")).status == 200
        process.signal(number)
        assert await process.ended() == 0
        assert await idle.receive_all() == b""


async def test_sighup_swaps_plugins_and_a_bad_file_changes_nothing(tmp_path: Path, anyio_backend: Any) -> None:
    file = greeting(tmp_path, anyio_backend)
    request = request_bytes("POST", CHAT, body=BODY)
    async with serving(file) as process:
        port = (await process.log("listening"))["port"]
        kept = await process.connect(port)
        await kept.send(request)
        assert (await kept.receive_reply()).body == b"one"
        greet(tmp_path, "two")
        process.signal(SIGHUP)
        await process.log("reloaded")
        await kept.send(request)
        assert (await kept.receive_reply()).body == b"two"
        good = file.read_text()
        for bad in ("nonsense", good.replace("greet", "absent"), good + "unknown = 1\n"):
            file.write_text(bad)
            process.signal(SIGHUP)
            assert (await process.log("reload refused"))["faults"]
            await kept.send(request)
            assert (await kept.receive_reply()).body == b"two"
        greet(tmp_path, 'no word in a plugin that breaks")')
        file.write_text(good)
        process.signal(SIGHUP)
        await process.log("reload refused")
        assert (await process.ask(port, request, b"POST")).body == b"two"
        process.signal(SIGTERM)
        assert await process.ended() == 0


async def test_two_workers_share_a_port_and_die_together(tmp_path: Path, anyio_backend: Any) -> None:
    async with serving(greeting(tmp_path, anyio_backend), "--workers", "2") as process:
        ports = {(await process.log("listening"))["port"] for _ in range(2)}
        (port,) = ports
        for _ in range(8):
            assert (await process.ask(port, request_bytes("POST", CHAT, body=BODY), b"POST")).body == b"one"
        process.signal(SIGTERM)
        assert await process.ended() == 0
        await refuses_connections(process, port)


async def test_worker_that_dies_is_replaced(tmp_path: Path, anyio_backend: Any) -> None:
    async with serving(greeting(tmp_path, anyio_backend), "--workers", "2") as process:
        port, _ = [(await process.log("listening"))["port"] for _ in range(2)]
        victim = children(process.pid)[0]
        os.kill(victim, SIGKILL)
        assert (await process.log("listening"))["port"] == port
        assert victim not in children(process.pid)
        assert (await process.ask(port, get(b"/readyz"))).status == 200
        process.signal(SIGTERM)
        assert await process.ended() == 0


async def test_sighup_reaches_every_worker(tmp_path: Path, anyio_backend: Any) -> None:
    async with serving(greeting(tmp_path, anyio_backend), "--workers", "2") as process:
        port, _ = [(await process.log("listening"))["port"] for _ in range(2)]
        greet(tmp_path, "two")
        process.signal(SIGHUP)
        for _ in range(2):
            await process.log("reloaded")
        for _ in range(8):
            assert (await process.ask(port, request_bytes("POST", CHAT, body=BODY), b"POST")).body == b"two"
        process.signal(SIGINT)
        assert await process.ended() == 0


def children(pid: int) -> list[int]:
    """Return the processes a process has started, as Linux tells."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def refuses_connections(process: Process, port: int) -> None:
    """Return once nothing listens any more. Raises TimeoutError."""
    with anyio.fail_after(5):
        while True:
            try:
                (await process.connect(port)).close()
            except OSError:
                return
            await anyio.lowlevel.checkpoint()
