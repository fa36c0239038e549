"""What the exchange tests share: dialects, events, gateways over sockets, and what must be left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import attrs

from penstock.testing import FakeUpstream, Harness, RawClient, stream_reply

PATIENCE_SECONDS = 5.0
CREDENTIAL = "sk-upstream"
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 20\r\n\r\n"
HALF_EVENT = b'data: {"par'


@attrs.frozen
class Dialect:
    """A streaming endpoint as its clients and providers use it."""

    name: str
    path: str
    binding_type: str
    binding: str
    body: bytes = attrs.field(repr=False)
    """A request that streams, and to which the gateway has nothing to add."""
    events: tuple[bytes, ...] = attrs.field(repr=False)
    """The events of a whole stream."""
    error_event: bytes = attrs.field(repr=False)

    def is_terminal(self, payload: Any, code: str, kind: str) -> bool:
        """Tell whether a decoded payload is this dialect's terminal error event."""
        error = payload["error"]
        if self.binding_type == "anthropic":
            kind = "api_error" if kind == "provider_error" else kind
            return payload["type"] == "error" and (error["type"], error["code"]) == (kind, code)
        return (error["type"], error["code"], error["param"]) == (kind, code, None)


OPENAI = Dialect(
    "openai",
    "/v1/chat/completions",
    "openai_compatible",
    "up",
    b'{"model":"m","stream":true,"stream_options":{"include_usage":true},"messages":[]}',
    (
        'data: {"id":"c1","choices":[{"index":0,"delta":{"content":"naïve 👩\u200d🚀"}}]}\n\n'.encode(),
        b'data: {"id":"c1","choices":[{"index":0,"delta":{"content":" end"}}]}\n\n',
        b'data: {"id":"c1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n',
        b"data: [DONE]\n\n",
    ),
    b'data: {"error":{"message":"over capacity","type":"server_error"}}\n\n',
)
ANTHROPIC = Dialect(
    "anthropic",
    "/v1/messages",
    "anthropic",
    "anthropic",
    b'{"model":"claude-m","stream":true,"messages":[]}',
    (
        b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7}}}\n\n',
        'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"é"}}\n\n'.encode(),
        b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":3}}\n\n',
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
    b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n',
)
DIALECTS = (OPENAI, ANTHROPIC)


def bindings(*upstreams: FakeUpstream, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return the routing table a harness makes by itself, each binding with further settings."""
    table = []
    for dialect in DIALECTS:
        for number, upstream in enumerate(upstreams, 1):
            name = dialect.binding if number == 1 else f"{dialect.binding}{number}"
            table.append(
                {
                    "name": name,
                    "type": dialect.binding_type,
                    "base_url": upstream.base_url,
                    "credential": CREDENTIAL,
                    **settings,
                }
            )
    return {"routing": {"bindings": table}}


def whole_stream(dialect: Dialect) -> FakeUpstream:
    """Return an upstream that answers every request with the dialect's stream."""
    return FakeUpstream([stream_reply(*dialect.events)], repeat=True)


async def until(condition: Callable[[], object], what: str) -> None:
    """Give way to the loop until the condition holds. Raises AssertionError naming ``what`` did not come."""
    with anyio.move_on_after(PATIENCE_SECONDS):
        while not condition():
            await anyio.lowlevel.checkpoint()
        return
    raise AssertionError(f"never came about: {what}")


@attrs.define(eq=False)
class Watched:
    """A gateway whose leavings are checked when the test is done with it."""

    harness: Harness
    upstreams: tuple[FakeUpstream, ...]
    idle: int = 0
    """Upstream connections that may be left, whole and reusable."""
    settled: int = 1
    """Exchanges that must have settled, each once."""
    faults: int = 0
    _tasks: int = attrs.field(factory=lambda: len(asyncio.all_tasks()))

    async def check(self, clients: Sequence[RawClient]) -> None:
        """Raise AssertionError for what did not settle once or was left behind."""
        harness, server = self.harness, self.harness.gateway.server
        await harness.wait_settled(self.settled)
        for client in clients:
            client.close()
        direct = harness.gateway.transports.direct
        await until(lambda: not server.connections, "client connections are closed")
        await until(
            lambda: len(direct.opened) == self.idle == sum(len(each.connections) for each in self.upstreams),
            f"{self.idle} upstream connections stay open",
        )
        await until(lambda: len(asyncio.all_tasks()) == self._tasks + self.idle, "no task is left")
        assert len(direct.idle) == self.idle
        assert server.in_flight == harness.gateway.generation.in_flight == 0
        assert harness.settled == len(harness.exchanges) == self.settled
        assert len({exchange.request_id for exchange in harness.exchanges}) == self.settled
        assert len(harness.faults) == self.faults, harness.faults


@asynccontextmanager
async def watched(
    *upstreams: FakeUpstream,
    plugins: Sequence[Any] = (),
    gateway: Mapping[str, Any] | None = None,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    socket: bool = True,
    **settings: Any,
) -> AsyncIterator[Watched]:
    """Run a gateway over sockets; on leaving, check that everything settled once and nothing leaks.

    ``settings`` go into every binding.
    """
    tables = {**bindings(*upstreams, **settings), **(config or {})}
    async with Harness(plugins, tables, upstreams, gateway=gateway, socket=socket) as harness:
        found = Watched(harness, upstreams)
        yield found
        await found.check(harness._clients)


def payload_of(event: bytes) -> Any:
    """Return the decoded payload of an event."""
    return json.loads(b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:")))


def events_of(body: bytes) -> list[bytes]:
    """Split a stream of LF lines into events; what is not closed by a blank line is the last, and left open."""
    return [event for event in body.split(b"\n\n") if event]
