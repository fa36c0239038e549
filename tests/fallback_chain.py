"""A gateway whose key has a chain of scripted providers, a breaker for each and a clock that only tests move."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs

from fault_upstream import CREDENTIAL, OPENAI
from penstock import Exchange, new_key
from penstock.governance import CircuitState
from penstock.testing import FakeUpstream, Harness, Reply, http_reply, stream_reply
from penstock.testing.upstream import Step
from penstock_plugins.fallback import FallbackChains

STREAM = OPENAI.body
WHOLE = b'{"model":"m","messages":[]}'
GOOD = b'{"id":"c1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
NAMES = ("a", "b", "c", "d", "e")


def good(*, is_stream: bool) -> list[Step]:
    """Return the steps of a whole answer."""
    return stream_reply(*OPENAI.events) if is_stream else [http_reply(GOOD)]


def failing(number: int = 0, status: int = 503) -> list[Step]:
    """Return the steps of an error answer that says whose it is."""
    return [http_reply(b'{"error":{"message":"number %d"}}' % number, status, ((b"X-Whose", b"%d" % number),))]


@attrs.define(eq=False)
class Clock:
    """Tell seconds that only tests move."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@attrs.define(eq=False)
class Chain:
    """A running gateway, its upstreams in the order of the key."""

    harness: Harness
    upstreams: Sequence[FakeUpstream]
    clock: Clock
    plugin: list[FallbackChains]

    async def ask(self, body: bytes = WHOLE, headers: Mapping[str, str] | None = None) -> Reply:
        return await self.harness.request("POST", OPENAI.path, headers or {}, body)

    async def ask_one(self, name: str) -> Reply:
        """Ask one binding only."""
        return await self.ask(WHOLE.replace(b'"m"', b'"%b/m"' % name.encode()))

    @property
    def dials(self) -> list[int]:
        """Return how many requests each upstream has got."""
        return [len(upstream.requests) for upstream in self.upstreams]

    @property
    def last(self) -> Exchange:
        return self.harness.exchanges[-1]

    def states(self) -> dict[str, CircuitState]:
        """Return breakers by the names of their bindings."""
        return {found.binding_id.removeprefix("gpc_"): found for found in self.plugin[-1].states()}

    def state(self, name: str) -> str:
        found = self.states().get(name)
        return "closed" if found is None else found.state


def timed(ticks: Callable[[], float], made: list[FallbackChains]) -> tuple[str, type[Any]]:
    """Return the plugin with another clock; ``made`` gets each generation's object."""

    @attrs.define(eq=False)
    class Timed(FallbackChains):
        clock: Callable[[], float] = ticks

        def __attrs_post_init__(self) -> None:
            super().__attrs_post_init__()
            made.append(self)

    return "fallback", Timed


@asynccontextmanager
async def chain(
    *upstreams: FakeUpstream,
    fallback: Mapping[str, Any] | None = None,
    breaker: Mapping[str, Any] | None = None,
    plugins: Sequence[Any] = (),
    later: Sequence[Any] = (),
    bindings: Sequence[Mapping[str, Any]] = (),
    socket: bool = True,
    **settings: Any,
) -> AsyncIterator[Chain]:
    """Run a gateway over sockets. ``fallback`` is the key's, ``breaker`` the plugin's table.

    ``plugins`` stand before it, ``later`` behind. ``bindings``: further settings of each binding; ``settings`` go
    into all.
    """
    clock, made = Clock(), list[FallbackChains]()
    table = []
    for number, upstream in enumerate(upstreams):
        own = dict(bindings[number]) if number < len(bindings) else {}
        name = NAMES[number]
        given = {"name": name, "handle": name, "type": "openai_compatible", "base_url": upstream.base_url}
        table.append({**given, "credential": CREDENTIAL, **settings, **own})
    secret = new_key()
    key = {"name": "test", "secret": secret, "fallback": dict(fallback or {})}
    config: dict[str, Any] = {
        "routing": {"bindings": table},
        "fallback": dict(breaker or {}),
        "virtual_keys": {"pepper": "a pepper for tests only", "keys": [key]},
    }
    async with Harness([*plugins, timed(clock, made), *later], config, upstreams, socket=socket) as harness:
        harness.key = secret
        yield Chain(harness, upstreams, clock, made)
