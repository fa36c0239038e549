"""The story of an exchange under plugins that wait, fail, answer, edit and block, and under clients that vanish."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from fault_upstream import ANTHROPIC, DIALECTS, OPENAI, Dialect, until, watched, whole_stream
from penstock import (
    BodyWindow,
    Candidate,
    Chunk,
    Exchange,
    OpenAIProvider,
    PluginError,
    Principal,
    Provider,
    RequestError,
    Response,
    UpstreamRequest,
    Usage,
    hookimpl,
)
from penstock import pipeline as pipeline_module
from penstock.testing import (
    STREAM_HEAD,
    FakeUpstream,
    Harness,
    Stall,
    chunk,
    http_reply,
    stream_reply,
)

pytestmark = pytest.mark.anyio

SECRET = "do not tell the client"
BEFORE = ("authenticate", "pre_request", "select_provider")


def plugin(hook: str, function: Any, **attributes: Any) -> Any:
    """Return a plugin, named ``faulty``, that implements one hook."""
    return "faulty", type("Faulty", (), {hook: hookimpl(function), **attributes})


def fail(self: Any, exchange: Exchange) -> None:
    raise KeyError(SECRET)


async def fail_later(self: Any, exchange: Exchange) -> None:
    await checkpoint()
    raise KeyError(SECRET)


def fail_awaitable(self: Any, exchange: Exchange) -> Awaitable[None]:
    return fail_later(self, exchange)


FAILURES = {"def": fail, "async": fail_later, "awaitable": fail_awaitable}


# --- failing closed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("hook", BEFORE)
@pytest.mark.parametrize("dialect", DIALECTS, ids=[each.name for each in DIALECTS])
async def test_exception_before_the_commit_is_a_500_named_in_the_log_only(
    dialect: Dialect, hook: str, kind: str
) -> None:
    async with watched(whole_stream(dialect), plugins=[plugin(hook, FAILURES[kind]), "virtual_keys"]) as run:
        run.faults = 1
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        assert b"faulty" not in reply.raw
        assert hook.encode() not in reply.raw
        assert SECRET.encode() not in reply.raw
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, fault.hook) == ("faulty", hook)
        assert isinstance(fault.__cause__, KeyError)
        assert run.upstreams[0].requests == []
        assert run.harness.exchanges[0].status == 500


@pytest.mark.parametrize("kind", FAILURES)
async def test_exception_in_settlement_is_logged_and_the_others_still_run(kind: str) -> None:
    async with watched(whole_stream(OPENAI), plugins=[plugin("post_response", FAILURES[kind])]) as run:
        run.idle = run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.body) == (200, b"".join(OPENAI.events))
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, fault.hook) == ("faulty", "post_response")


class Broken(OpenAIProvider):
    """Fail in one of the provider's two methods."""

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        if self.type == "broken_build":
            raise KeyError(SECRET)
        return super().build(exchange, candidate)

    def read_usage(self, exchange: Exchange, window: BodyWindow) -> Usage | None:
        raise KeyError(SECRET)


class BrokenProviders:
    """Bring a provider that cannot build and one that cannot read usage."""

    @hookimpl
    def register_providers(self) -> list[Provider]:
        return [Broken(type="broken_build"), Broken(type="broken_usage")]


def broken_binding(upstream: FakeUpstream, kind: str) -> dict[str, Any]:
    return {"routing": {"bindings": [{"name": "b", "type": kind, "base_url": upstream.base_url}]}}


async def test_provider_that_cannot_build_is_named_in_the_log_only() -> None:
    upstream = whole_stream(OPENAI)
    config = broken_binding(upstream, "broken_build")
    async with watched(upstream, plugins=[BrokenProviders], config=config) as run:
        run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        assert SECRET.encode() not in reply.raw
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, fault.hook) == ("broken_build", "build")


async def test_answer_given_up_for_another_candidate_is_not_what_is_settled() -> None:
    body = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'
    upstream = FakeUpstream([[http_reply(body, 503)]])
    both = [("b", "openai"), ("c", "broken_build")]
    tables = [{"name": n, "type": kind, "base_url": upstream.base_url, "models": ["m"]} for n, kind in both]
    config = {"routing": {"bindings": tables}}
    async with watched(upstream, plugins=["openai", BrokenProviders], config=config) as run:
        run.idle = run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        (exchange,) = run.harness.exchanges
        assert [attempt.reason for attempt in exchange.attempts] == ["status", "not_sent"]
        assert (exchange.window, exchange.usage, exchange.bytes_out) == (None, None, 0)


@pytest.mark.parametrize("answer", ["stream", "json"])
async def test_provider_that_cannot_read_usage_changes_no_answer(answer: str) -> None:
    script = stream_reply(*OPENAI.events) if answer == "stream" else [http_reply(b"{}")]
    upstream = FakeUpstream([script])
    config = broken_binding(upstream, "broken_usage")
    async with watched(upstream, plugins=[BrokenProviders], config=config) as run:
        run.idle = run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.is_complete) == (200, True)
        assert reply.body == (b"".join(OPENAI.events) if answer == "stream" else b"{}")


@pytest.mark.parametrize("hook", BEFORE)
async def test_refusal_of_any_hook_reaches_the_client(hook: str) -> None:
    def refuse(self: Any, exchange: Exchange) -> None:
        raise RequestError("permission_denied", "Not today.", meta={"rule": 7})

    async with watched(whole_stream(OPENAI), plugins=[plugin(hook, refuse), "virtual_keys"]) as run:
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.header("x-should-retry")) == (403, "false")
        assert reply.json()["error"]["meta"] == {"rule": 7}
        exchange = run.harness.exchanges[0]
        assert (exchange.status, exchange.error is not None, exchange.attempts) == (403, True, [])


async def test_plugins_answer_needs_no_upstream() -> None:
    def answer(self: Any, exchange: Exchange) -> Response:
        return Response(203, b"mine")

    async with watched(whole_stream(OPENAI), plugins=[plugin("pre_request", answer)]) as run:
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.body) == (203, b"mine")
        assert run.upstreams[0].requests == []
        assert run.harness.exchanges[0].status == 203


# --- settlement -----------------------------------------------------------------------------------------------------


class SlowSettlement:
    """Settle only once the test says so."""

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self.release = anyio.Event()
        self.done = 0

    @hookimpl
    async def post_response(self, exchange: Exchange) -> None:
        self.reached.set()
        await self.release.wait()
        self.done += 1


@pytest.mark.parametrize("leaving", ["close", "reset", "half_close"])
async def test_client_that_leaves_during_settlement_does_not_stop_it(leaving: str) -> None:
    slow = SlowSettlement()
    async with watched(whole_stream(OPENAI), plugins=[slow]) as run:
        run.idle = 1
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        assert (await client.receive_reply()).body == b"".join(OPENAI.events)
        await slow.reached.wait()
        {"close": client.close, "reset": client.reset, "half_close": client.half_close}[leaving]()
        server = run.harness.gateway.server
        await until(lambda: not server.connections or next(iter(server.connections))._is_closing, "the client has gone")
        assert server.in_flight == 1
        slow.release.set()
        await run.harness.wait_settled(1)
        assert slow.done == 1
        assert run.harness.exchanges[0].stream_end == "complete"


async def test_next_request_waits_for_a_settlement_that_awaits() -> None:
    slow = SlowSettlement()
    async with watched(whole_stream(OPENAI), plugins=[slow]) as run:
        run.idle, run.settled = 1, 2
        client = await run.harness.raw()
        request = run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body)
        await client.send(request, request)
        assert (await client.receive_reply()).status == 200
        await slow.reached.wait()
        assert len(run.upstreams[0].requests) == 1
        slow.release.set()
        assert (await client.receive_reply()).status == 200
        assert slow.done == 2


async def test_slow_settlement_is_bounded_and_keeps_no_other_from_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_module, "SETTLE_SECONDS", 0.05)
    slow = SlowSettlement()
    async with watched(whole_stream(OPENAI), plugins=[slow]) as run:
        run.idle = run.faults = 1
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        assert (await client.receive_reply()).status == 200
        await run.harness.wait_settled(1)
        (fault,) = run.harness.faults
        assert isinstance(fault, TimeoutError)
        assert "slow_settlement" in str(fault)
        assert slow.done == 0


class Awaitables:
    """Settle by a plain function that returns something to await."""

    def __init__(self) -> None:
        self.slow = SlowSettlement()

    @hookimpl
    def post_response(self, exchange: Exchange) -> Awaitable[None]:
        return SlowSettlement.post_response(self.slow, exchange)


async def test_settlement_that_turns_out_to_await_is_shielded_too() -> None:
    plugin, stall = Awaitables(), Stall()
    async with watched(FakeUpstream([[stall]]), plugins=[plugin]) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        await stall.reached.wait()
        client.close()
        await plugin.slow.reached.wait()
        plugin.slow.release.set()
        await run.harness.wait_settled(1)
        assert plugin.slow.done == 1


# --- cancellation at every await ------------------------------------------------------------------------------------


class Steps:
    """Await in every hook, and count exchanges that began and that settled."""

    sees_chunks = True

    def __init__(self) -> None:
        self.begun = self.settled = 0

    @hookimpl
    async def authenticate(self, exchange: Exchange) -> Principal:
        self.begun += 1
        await checkpoint()
        return Principal("vk_test", "test", "test")

    @hookimpl
    async def pre_request(self, exchange: Exchange) -> None:
        await checkpoint()

    @hookimpl
    async def select_provider(self, exchange: Exchange) -> None:
        await checkpoint()

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> None:
        await checkpoint()

    @hookimpl
    async def post_response(self, exchange: Exchange) -> None:
        await checkpoint()
        self.settled += 1


@pytest.mark.parametrize(("leaving", "drain"), [("close", False), ("reset", False), ("close", True)])
async def test_client_that_vanishes_at_any_step_settles_once(leaving: str, drain: bool) -> None:
    """The client goes after n turns of the loop, for every n until the exchange ends before it goes."""
    turns, ends = 0, set()
    while "complete" not in ends or turns < 20:
        ends.add(await vanish(turns, leaving, drain=drain))
        turns += 1
        assert turns < 300
    assert {"client_gone", "complete"} <= ends


async def vanish(turns: int, leaving: str, *, drain: bool) -> str | None:
    """Carry an exchange with a fallback, whose client goes after so many turns; returns how its stream ended."""
    gateway = {"drain_after_disconnect": {"seconds": 0.05, "bytes": 100_000}} if drain else {}
    steps = Steps()
    upstream = FakeUpstream([[http_reply(b"down", 503)], stream_reply(*OPENAI.events)])
    async with Harness([steps, "virtual_keys"], upstream=[upstream, upstream], gateway=gateway) as harness:
        client = await harness.raw()
        await client.send(harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        for _ in range(turns):
            await checkpoint()
        {"close": client.close, "reset": client.reset}[leaving]()
        server, direct = harness.gateway.server, harness.gateway.transports.direct
        await until(lambda: not server.connections and not server.in_flight, "the exchange has ended")
        await until(lambda: len(direct.opened) == len(direct.idle), "no half-read connection is left")
        assert steps.begun == steps.settled == harness.settled <= 1
        assert not harness.faults
        return harness.exchanges[0].stream_end if harness.exchanges else None


async def test_shutdown_settles_what_is_under_way() -> None:
    stall = Stall()
    steps = Steps()
    upstream = FakeUpstream([[STREAM_HEAD, chunk(ANTHROPIC.events[0]), stall]])
    limits = {"limits": {"drain_timeout": 0.05}}
    async with Harness([steps, "virtual_keys"], upstream=upstream, gateway=limits, socket=True) as harness:
        client = await harness.raw()
        await client.send(harness.request_bytes("POST", ANTHROPIC.path, body=ANTHROPIC.body))
        await stall.reached.wait()
    assert steps.begun == steps.settled == harness.settled == 1
    assert harness.exchanges[0].usage is not None
