"""Every per-exchange hook with every route, way to a provider and outcome: which run, in which order, how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from penstock import Candidate, Chunk, Exchange, Principal, RequestError, Response, hookimpl
from penstock.hooks import PER_EXCHANGE
from penstock.testing import Reply
from policy_gateway import PLUGINS, Run, Way, governed_by_all
from policy_routes import ROUTES, WORD, Route
from test_policy_matrix import CELLS

pytestmark = pytest.mark.anyio
NAMES = ("first", "second")
OUTCOMES = {
    "answered": (),
    "provider_error": ((b"X-Fail", b"1"),),
    "refused": ((b"X-Wish", b"refuse"),),
    "answered_by_plugin": ((b"X-Wish", b"answer"),),
    "stopped": ((b"X-Wish", b"stop"), (b"X-Offend", b"1")),
}
"""Header fields that bring it about."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@attrs.define(eq=False)
class Calls:
    """What the recording plugins were called with, in order."""

    made: list[tuple[str, str]] = attrs.field(factory=list)
    """Hook and plugin; of chunks those of event streams."""
    bodies: dict[str, list[bytes]] = attrs.field(factory=dict)
    """What each plugin was shown of answers."""
    ends: list[str] = attrs.field(factory=list)
    """Who was told of the end of a stream."""

    def clear(self) -> None:
        for each in (self.made, self.bodies, self.ends):
            each.clear()


@attrs.define(eq=False)
class Recorder:
    """Have every per-exchange hook, and note each call."""

    name: str
    calls: Calls

    def note(self, hook: str) -> None:
        self.calls.made.append((hook, self.name))

    @hookimpl
    def authenticate(self, exchange: Exchange) -> Principal | None:
        assert exchange.principal is None
        self.note("authenticate")
        return None

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Response | None:
        assert exchange.principal is not None
        self.note("pre_request")
        exchange.watch_response(self.name)
        exchange.watch_chunks(self.name)
        return None

    @hookimpl
    async def select_provider(self, exchange: Exchange) -> Candidate | None:
        assert exchange.committed_ns is None
        self.note("select_provider")
        return None

    @hookimpl
    async def admit_attempt(self, exchange: Exchange) -> RequestError | None:
        assert exchange.candidate is not None
        self.note("admit_attempt")
        return None

    @hookimpl
    def on_response(self, exchange: Exchange, body: bytes) -> bytes | None:
        assert exchange.committed_ns is None
        self.note("on_response")
        self.calls.bodies.setdefault(self.name, []).append(body)
        return None

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        assert exchange.attempts
        if chunk.is_event_stream:
            self.note("on_stream_chunk")
            self.calls.bodies.setdefault(self.name, []).append(chunk.data)
            if chunk.is_end:
                self.calls.ends.append(self.name)
        return None

    @hookimpl
    def post_response(self, exchange: Exchange) -> None:
        assert exchange.ended_ns
        self.note("post_response")


class Wishes:
    """Refuse, answer or stop what a header says."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Response | None:
        wish = exchange.request.headers.get(b"x-wish")
        if wish == b"refuse":
            raise RequestError("permission_denied", "No.")
        exchange.watch_response("wishes")
        exchange.watch_chunks("wishes")
        return Response(200, b"{}") if wish == b"answer" else None

    @hookimpl
    def on_response(self, exchange: Exchange, body: bytes) -> bytes | None:
        assert body is not None
        if exchange.request.headers.get(b"x-wish") == b"stop":
            raise RequestError("guardrail_blocked", "No.")
        return None

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        if chunk.is_event_stream and exchange.request.headers.get(b"x-wish") == b"stop":
            raise RequestError("guardrail_blocked", "No.")
        return None


def both(hook: str) -> list[tuple[str, str]]:
    return [(hook, name) for name in NAMES]


def is_listing(route: Route) -> bool:
    """Tell whether routing answers it, from what is known."""
    return route.endpoint.dialect == "openai.models"


def expected(route: Route, way: Way, outcome: str) -> list[tuple[str, str]]:
    """Return which hooks run, each run of chunks as one."""
    calls = both("authenticate") + both("pre_request")
    if outcome not in ("refused", "answered_by_plugin") and not is_listing(route):
        calls += (both("select_provider") + both("admit_attempt")) * (2 if way == "second" else 1)
        if outcome != "provider_error":
            calls += both("on_stream_chunk" if route.is_stream else "on_response")
    return calls + [("post_response", name) for name in reversed(NAMES)]


def joined(calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the calls, pairs of chunk calls that follow one another as one pair."""
    found: list[tuple[str, str]] = []
    for call in calls:
        if call[0] != "on_stream_chunk" or found[-2:] != both("on_stream_chunk"):
            found.append(call)
        elif call[1] == NAMES[0]:
            del found[-2:]
            found.append(call)
    return found


def check_reply(route: Route, way: Way, outcome: str, reply: Reply) -> None:
    status = {"provider_error": 400, "refused": 403, "stopped": 200 if route.is_stream else 403}.get(outcome, 200)
    if is_listing(route) and outcome not in ("refused", "answered_by_plugin"):
        status = 200
    assert reply.status == status, (route, way, reply.raw)
    if outcome == "stopped" and not is_listing(route):
        assert WORD.encode() not in reply.body
        assert reply.is_complete != route.is_stream


async def check_cell(run: Run, calls: Calls, route: Route, way: Way, outcome: str) -> None:
    secret = await run.key(route, way)
    calls.clear()
    reply = await run.send(route, secret, None, *OUTCOMES[outcome])
    check_reply(route, way, outcome, reply)
    assert joined(calls.made) == expected(route, way, outcome), (route, way)
    if outcome == "answered" and not is_listing(route):
        shown = {name: b"".join(bodies) for name, bodies in calls.bodies.items()}
        assert shown == dict.fromkeys(NAMES, reply.body), (route, way)  # what the client gets, in its dialect
        assert calls.ends == (list(NAMES) if route.is_stream else []), (route, way)


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_every_hook_runs_on_every_route_in_order_and_once(tmp_path: Path, outcome: str) -> None:
    calls = Calls()
    recorders = [(name, Recorder(name, calls)) for name in NAMES]
    async with governed_by_all(tmp_path, [*recorders, ("wishes", Wishes), *PLUGINS]) as run:
        for route, way in CELLS:
            await check_cell(run, calls, route, way, outcome)
        assert run.harness.faults == []


def test_recorder_has_every_hook_of_an_exchange() -> None:
    assert {name for name in PER_EXCHANGE if name in vars(Recorder)} == set(PER_EXCHANGE)
    seen: set[Any] = {hook for route in ROUTES for hook, _ in expected(route, "native", "answered")}
    assert seen == set(PER_EXCHANGE)
