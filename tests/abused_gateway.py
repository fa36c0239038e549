"""A gateway on a socket for tests that misbehave: what they break must be answered, and must leave nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from penstock.server import Server
from penstock.testing import FakeUpstream, Harness, RawClient, Reply
from penstock_plugins.providers.openai_compatible import OpenAICompatible
from penstock_plugins.routing import Routing
from penstock_plugins.virtual_keys import VirtualKeys

CHAT = "/v1/chat/completions"
BODY = b'{"model":"gpt-4o-mini","messages":[]}'
VIRTUAL_KEYS = ("virtual_keys", VirtualKeys)
PROVIDING = (("routing", Routing), ("openai_compatible", OpenAICompatible))
"""Classes, not names: looking plugins up among the installed ones would take most of a test's time."""
SMUGGLED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: smuggled\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
NO_DRAIN = 8.0
"""A leak shows as a drain that takes this long."""


@asynccontextmanager
async def abused(
    upstream: FakeUpstream | None = None, *, plugins: Any = (), socket: bool = True, **limits: float
) -> AsyncIterator[Harness]:
    """Run a gateway; when the test is through, no exchange may be in flight and no connection open."""
    gateway = {"limits": {"drain_timeout": NO_DRAIN, **limits}}
    names = (VIRTUAL_KEYS, *plugins, *PROVIDING)
    chosen = upstream or FakeUpstream()
    async with Harness(names, upstream=chosen, gateway=gateway, socket=socket, bare=True) as harness:
        server = harness.gateway.server
        yield harness
        for client in harness._clients:
            client.close()
        await empty(server)
        assert server.in_flight == harness.gateway.generation.in_flight == 0


async def empty(server: Server) -> None:
    """Return once no connection is left. Raises TimeoutError."""
    with anyio.fail_after(NO_DRAIN / 2):
        while server.connections or server.in_flight:
            await anyio.lowlevel.checkpoint()


def head(gateway: Harness, *lines: bytes, start: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    """Return a head with a good key, so that only what the test adds can be what is refused."""
    own = (start, b"Host: gateway.test", b"Authorization: Bearer " + gateway.key.encode())
    return b"\r\n".join((*own, *lines, b"", b""))


async def send(gateway: Harness, *segments: bytes) -> RawClient:
    client = await gateway.raw()
    await client.send(*segments)
    return client


async def refused(client: RawClient, status: int, code: str, method: bytes = b"POST") -> Reply:
    """Read one refusal and the end of the connection behind it."""
    reply = await client.receive_reply(method)
    assert reply.status == status, reply
    assert reply.is_complete
    assert reply.header("X-Penstock-Error") == code
    assert reply.header("connection") == "close"
    if method != b"HEAD":
        assert_envelope(reply, code)
    assert await client.receive_all() == b""
    return reply


def assert_envelope(reply: Reply, code: str) -> None:
    """Check the shape OpenAI's clients read, in which refusals outside of any dialect are written."""
    assert reply.header("content-type") == "application/json"
    error = reply.json()["error"]
    assert (error["type"], error["code"]) == (code, code)
    assert error["message"]
