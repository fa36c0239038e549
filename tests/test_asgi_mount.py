"""ASGI applications beside the data plane: what they send arrives, what they break stays theirs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from abused_gateway import abused, empty
from penstock import hookimpl
from penstock.asgi import Mount
from penstock.errors import ConfigurationError
from penstock.gateway import Gateway
from penstock.testing import Harness

pytestmark = pytest.mark.anyio

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Console:
    """Mount one application."""

    def __init__(self, app: Any, *prefixes: str) -> None:
        self._mounts = [Mount(prefix, app) for prefix in prefixes or ("/console",)]

    @hookimpl
    def register_routes(self) -> list[Mount]:
        return self._mounts


def start(status: int = 200, *fields: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(fields)}


def body(content: bytes = b"", *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


def answering(*messages: Any) -> Any:
    """Return an application that sends these messages."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with what was asked, as a framework's smallest application would."""
    request = await receive()
    assert request["more_body"] is False
    seen = (scope["method"], scope["path"], scope["query_string"].decode(), request["body"].decode())
    await send(start(200, (b"content-type", b"text/plain")))
    await send(body(" ".join(seen).encode()))


async def ask(gateway: Harness, data: bytes, method: bytes = b"GET") -> Any:
    client = await gateway.raw()
    await client.send(data)
    return await client.receive_reply(method)


def get(path: bytes = b"/console", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%b %b HTTP/%b\r\nHost: a\r\n\r\n" % (method, path, version)


async def test_get_and_post_reach_the_application_on_one_connection() -> None:
    async with abused(plugins=[Console(echo)]) as gateway:
        client = await gateway.raw()
        await client.send(get(b"/console/a%20b?c=%20d"))
        assert (await client.receive_reply(b"GET")).body == b"GET /console/a b c=%20d "
        await client.send(b"POST /console HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
        assert (await client.receive_reply()).body == b"POST /console  hello"
        assert gateway.settled == 0


async def test_scope_is_that_of_asgi_3() -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await answering(start(), body())(scope, receive, send)

    async with abused(plugins=[Console(app)]) as gateway:
        await ask(gateway, b"GET /console/%C3%A9 HTTP/1.1\r\nHost: a\r\nX-Name: V\r\n\r\n")
        (scope,) = scopes
        assert scope["type"] == "http"
        assert scope["asgi"]["version"] == "3.0"
        assert (scope["http_version"], scope["scheme"], scope["method"]) == ("1.1", "http", "GET")
        assert (scope["path"], scope["raw_path"], scope["root_path"]) == ("/console/é", b"/console/%C3%A9", "/console")
        assert scope["headers"] == [(b"host", b"a"), (b"x-name", b"V")]
        assert scope["client"][0] == "127.0.0.1"


async def test_streamed_answer_arrives_as_it_is_sent() -> None:
    released = anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"first", more=True))
        await released.wait()
        await send(body(b"", more=True))
        await send(body(b"second", more=True))
        await send(body())

    async with abused(plugins=[Console(app)]) as gateway:
        client = await gateway.raw()
        await client.send(get())
        assert await client.receive_until(b"5\r\nfirst\r\n")
        released.set()
        assert await client.receive_until(b"0\r\n\r\n") == b"6\r\nsecond\r\n0\r\n\r\n"
        await client.send(get(b"/healthz"))
        assert (await client.receive_reply(b"GET")).body == b"ok\n"


async def test_watching_for_a_disconnect_does_not_end_a_stream() -> None:
    """Starlette runs this beside every stream, and cancels the stream when the client has gone."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as tasks:

            async def listen() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(listen)
            await send(start())
            for number in range(20):
                await send(body(b"%d," % number, more=True))
                await anyio.lowlevel.checkpoint()
            await send(body())

    async with abused(plugins=[Console(app)]) as gateway:
        reply = await ask(gateway, get())
        assert reply.body == b"".join(b"%d," % number for number in range(20))
        assert reply.is_complete
        assert gateway.faults == []


async def test_client_that_leaves_cancels_the_application() -> None:
    begun, cancelled = anyio.Event(), anyio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"x", more=True))
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async with abused(plugins=[Console(app)]) as gateway:
        client = await gateway.raw()
        await client.send(get())
        await begun.wait()
        client.close()
        with anyio.fail_after(5):
            await cancelled.wait()
        assert gateway.faults == []


@pytest.mark.parametrize("socket", [False, True], ids=["memory", "socket"])
async def test_application_is_held_back_by_a_slow_client(socket: bool) -> None:
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send(start())
        for _ in range(1000):
            await send(body(b"x" * 64_000, more=True))
            sent += 64_000

    async with abused(plugins=[Console(app)], socket=socket, write_timeout=0.2) as gateway:
        client = await gateway.raw()
        client.pause()
        await client.send(get())
        with anyio.fail_after(5):
            while not gateway.gateway.server.connections:
                await anyio.lowlevel.checkpoint()
        await empty(gateway.gateway.server)
        assert 0 < sent < 20_000_000


async def test_head_is_answered_without_a_body() -> None:
    async with abused(plugins=[Console(answering(start(200, (b"content-length", b"5")), body(b"hello")))]) as gateway:
        client = await gateway.raw()
        await client.send(get(method=b"HEAD"))
        reply = await client.receive_reply(b"HEAD")
        assert (reply.status, reply.header("content-length"), reply.body) == (200, "5", b"")
        await client.send(get())
        assert (await client.receive_reply(b"GET")).body == b"hello"


async def test_status_without_body_has_none() -> None:
    async with abused(plugins=[Console(answering(start(204), body(b"stray")))]) as gateway:
        client = await gateway.raw()
        await client.send(get() + get())
        for _ in range(2):
            reply = await client.receive_reply(b"GET")
            assert (reply.status, reply.body, reply.header("content-length")) == (204, b"", None)


async def test_http10_client_gets_a_stream_until_the_end_of_the_connection() -> None:
    app = answering(start(), body(b"a", more=True), body(b"b"))
    async with abused(plugins=[Console(app)]) as gateway:
        client = await gateway.raw()
        await client.send(get(version=b"1.0"))
        head, _, content = (await client.receive_all()).partition(b"\r\n\r\n")
        assert content == b"ab"
        assert b"\r\nconnection: close" in head
        assert b"transfer-encoding" not in head


async def test_framing_an_application_sends_is_not_doubled() -> None:
    fields = ((b"Transfer-Encoding", b"chunked"), (b"Connection", b"keep-alive"))
    async with abused(plugins=[Console(answering(start(200, *fields), body(b"a", more=True), body(b"b")))]) as gateway:
        reply = await ask(gateway, get())
        assert reply.body == b"ab"
        assert reply.headers.get_all(b"transfer-encoding") == [b"chunked"]


# --- applications that break ----------------------------------------------------------------------------------


async def fail(scope: Scope, receive: Receive, send: Send) -> None:
    raise ZeroDivisionError("a secret of the application")


BROKEN = {
    "raises": fail,
    "returns_without_answer": answering(),
    "starts_only": answering(start()),
    "body_before_start": answering(body(b"x")),
    "starts_twice": answering(start(), start()),
    "splits_the_head": answering(start(200, (b"x-a", b"b\r\nx-c: d")), body()),
    "odd_field_name": answering(start(200, (b"x a", b"b")), body()),
    "interim_status": answering(start(100), body()),
    "odd_length": answering(start(200, (b"content-length", b"-5")), body(b"hello")),
    "two_lengths": answering(start(200, (b"content-length", b"5"), (b"content-length", b"6")), body(b"hello")),
    "text_body": answering(start(), {"type": "http.response.body", "body": "text"}),
}


@pytest.mark.parametrize("app", BROKEN.values(), ids=BROKEN)
async def test_broken_application_is_a_500_that_tells_nothing(app: Any) -> None:
    async with abused(plugins=[Console(app)]) as gateway:
        reply = await ask(gateway, get())
        assert (reply.status, reply.header("connection")) == (500, "close")
        assert reply.json()["error"]["code"] == "internal_error"
        assert b"Traceback" not in reply.raw
        assert b"secret" not in reply.raw
        assert len(gateway.faults) == 1
        assert (await ask(gateway, get(b"/healthz"))).status == 200


BREAKING_OFF = {
    "stream": answering(start(), body(b"part", more=True), start()),
    "length": answering(start(200, (b"content-length", b"9")), body(b"part", more=True), start()),
    "stream_without_end": answering(start(), body(b"part", more=True)),
    "less_than_announced": answering(start(200, (b"content-length", b"9")), body(b"part")),
}


@pytest.mark.parametrize("app", BREAKING_OFF.values(), ids=BREAKING_OFF)
async def test_answer_that_breaks_off_ends_the_connection_visibly(app: Any) -> None:
    async with abused(plugins=[Console(app)]) as gateway:
        reply = await ask(gateway, get() + get(b"/healthz"))
        assert (reply.status, reply.body, reply.is_complete) == (200, b"part", False)


async def test_more_than_announced_is_not_the_next_answer() -> None:
    app = answering(start(200, (b"content-length", b"4")), body(b"fourHTTP/1.1 200 stray\r\n\r\n"))
    async with abused(plugins=[Console(app)]) as gateway:
        client = await gateway.raw()
        await client.send(get() + get(b"/healthz"))
        assert (await client.receive_reply(b"GET")).body == b"four"
        assert (await client.receive_reply(b"GET")).body == b"ok\n"


async def test_body_after_the_end_is_a_fault_and_is_not_sent() -> None:
    async with abused(plugins=[Console(answering(start(), body(b"one"), body(b"two")))]) as gateway:
        client = await gateway.raw()
        await client.send(get())
        assert (await client.receive_all()).endswith(b"\r\n\r\none")
        assert len(gateway.faults) == 1


async def test_body_over_the_limit_is_refused_before_the_application() -> None:
    called: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        called.append(scope)

    async with abused(plugins=[Console(app)], max_body_bytes=10) as gateway:
        reply = await ask(gateway, b"POST /console HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n", b"POST")
        assert (reply.status, reply.json()["error"]["code"]) == (413, "payload_too_large")
        assert called == []


async def test_cancelling_inside_an_application_stays_inside() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(asyncio.sleep(3600))
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            await send(start())
            await send(body(b"fine"))

    async with abused(plugins=[Console(app)]) as gateway:
        assert (await ask(gateway, get())).body == b"fine"


# --- prefixes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"/console", b"/console/", b"/console/a/b", b"/console?x=1"])
async def test_prefix_covers_itself_and_what_is_below(path: bytes) -> None:
    async with abused(plugins=[Console(echo)]) as gateway:
        assert (await ask(gateway, get(path))).status == 200


@pytest.mark.parametrize("path", [b"/consoles", b"/Console", b"/consol", b"/x/console", b"//console"])
async def test_prefix_does_not_cover_its_likes(path: bytes) -> None:
    async with abused(plugins=[Console(echo)]) as gateway:
        assert (await ask(gateway, get(path))).status == 404


async def test_endpoints_and_probes_stay_with_the_gateway() -> None:
    async with abused(plugins=[Console(echo, "/v", "/health")]) as gateway:
        assert (await ask(gateway, get(b"/healthz"))).body == b"ok\n"
        assert (await ask(gateway, get(b"/v1/models"))).status == 401


@pytest.mark.parametrize(
    "prefix", ["/v1", "/v1/admin", "/v1beta", "/v1beta/x", "/healthz", "/readyz", "/", "", "console", "/console/"]
)
async def test_prefix_that_cannot_be_had_is_refused_at_start(prefix: str) -> None:
    harness = Harness([("console", Console(echo, prefix))], gateway={"anonymous": True}, bare=True)
    with pytest.raises(ConfigurationError, match=r"\[plugins\.console\] mount prefix"):
        Gateway(harness.configuration())
