"""What is bounded, cut or told around an attempt: held answers, hooks that await for ever, breaks without framing."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import anyio
import attrs
import pytest
from anyio.lowlevel import checkpoint

from fault_upstream import OPENAI, events_of, payload_of, until, watched
from penstock import (
    Candidate,
    Chunk,
    ConfigurationError,
    Exchange,
    OpenAIProvider,
    PluginError,
    Provider,
    RequestError,
    UpstreamError,
    UpstreamRequest,
    hookimpl,
)
from penstock.config import read_document
from penstock.providers import UpstreamResponse
from penstock.relay import QUEUED_BYTES
from penstock.testing import STREAM_HEAD, Close, FakeUpstream, Pause, Stall, chunk, http_reply, stream_reply
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio
SECRET_HOST = "billing-7.corp.internal"


class Watching:
    """See every chunk, by ``def``."""

    sees_chunks = True

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> None:
        assert exchange.committed_ns is None or chunk.data is not None


class WatchingLater:
    """See every chunk, by ``async def``."""

    sees_chunks = True

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> None:
        await checkpoint()


WATCHERS = pytest.mark.parametrize("watchers", [[], [Watching], [WatchingLater]], ids=["raw", "def", "async"])


# --- an answer that is held -----------------------------------------------------------------------------------------


class Hesitant:
    """Think for as long as the test says before a second attempt."""

    def __init__(self) -> None:
        self.reached, self.decided = anyio.Event(), anyio.Event()

    @hookimpl
    async def select_provider(self, exchange: Exchange) -> None:
        if exchange.attempts:
            self.reached.set()
            await self.decided.wait()


@WATCHERS
@pytest.mark.parametrize("is_stream", [True, False])
async def test_failing_answer_that_is_held_makes_its_upstream_wait(watchers: list[Any], is_stream: bool) -> None:
    hesitant = Hesitant()
    body = OPENAI.error_event + b"data: " + b"x" * 4_000_000 + b"\n\n"
    script = stream_reply(*[body[at : at + 8000] for at in range(0, len(body), 8000)])
    upstream = FakeUpstream([script if is_stream else [http_reply(body, 500)]])
    async with watched(upstream, plugins=[hesitant, *watchers]) as run:
        run.idle = 1
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        await hesitant.reached.wait()
        (connection,) = run.harness.gateway.transports.direct.opened
        await until(lambda: connection._paused, "the upstream is made to wait")
        relay: Any = connection._receiver
        assert QUEUED_BYTES < len(relay._buffer) <= 8 * QUEUED_BYTES
        hesitant.decided.set()
        reply = await client.receive_reply()
        assert (reply.status, reply.body) == (200 if is_stream else 500, body)


# --- close-delimited answers ----------------------------------------------------------------------------------------


async def broken_off(run: Any, pause: Pause, seen: bytes) -> bytes:
    """Ask as an HTTP/1.0 client, break the answer off behind ``seen``, and return what came after it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", run.harness.port)
    request = run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body)
    writer.write(request.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1))
    try:
        await reader.readuntil(seen)
        pause.release()
        return await reader.read()
    finally:
        writer.close()


def breaking(content_type: bytes, seen: bytes, pause: Pause) -> FakeUpstream:
    head = STREAM_HEAD.replace(b"text/event-stream", content_type)
    script: list[Step] = [head, chunk(seen), pause, Close()]
    return FakeUpstream([script])


@WATCHERS
async def test_close_delimited_json_that_breaks_off_ends_in_a_reset(watchers: list[Any]) -> None:
    pause, seen = Pause(), b'{"a":1}'
    async with watched(breaking(b"application/json", seen, pause), plugins=watchers) as run:
        with pytest.raises(ConnectionResetError):
            await broken_off(run, pause, seen)
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "upstream_failed"


@WATCHERS
async def test_close_delimited_stream_that_breaks_off_ends_in_a_terminal_event(watchers: list[Any]) -> None:
    pause, seen = Pause(), OPENAI.events[0]
    async with watched(breaking(b"text/event-stream", seen, pause), plugins=watchers) as run:
        (last,) = events_of(await broken_off(run, pause, seen))
        assert OPENAI.is_terminal(payload_of(last), "upstream_mid_stream_failure", "provider_error")
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "upstream_failed"


async def test_close_delimited_json_that_is_blocked_ends_in_a_reset_and_keeps_its_error() -> None:
    def block(self: Any, exchange: Exchange, chunk: Chunk) -> None:
        if chunk.is_end:
            raise KeyError("blocked")

    plugin = "blocking", type("Blocking", (), {"on_stream_chunk": hookimpl(block), "sees_chunks": True})
    head = STREAM_HEAD.replace(b"text/event-stream", b"application/json")
    pause = Pause()
    async with watched(FakeUpstream([[head, chunk(b"{}"), pause, b"0\r\n\r\n"]]), plugins=[plugin]) as run:
        run.idle = run.faults = 1
        with pytest.raises(ConnectionResetError):
            await broken_off(run, pause, b"{}")
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "blocked"


# --- what clients are told ------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Unreachable:
    """Fail as a test says, in words that are not for clients."""

    error: UpstreamError

    async def send(self, request: UpstreamRequest) -> UpstreamResponse:
        raise self.error


@attrs.define(eq=False, kw_only=True)
class Faulty(OpenAIProvider):
    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        if self.type == "refusing":
            raise RequestError("unsupported_parameter", "Not with this provider.")
        error = UpstreamError(self.type, f"{SECRET_HOST} says no")  # type: ignore[arg-type]
        return attrs.evolve(super().build(exchange, candidate), transport=Unreachable(error))


TOLD = {
    "connect": (502, "The provider could not be reached."),
    "dns": (502, "The provider could not be reached."),
    "tls": (502, "The provider could not be reached."),
    "reset": (502, "The provider closed the connection before answering."),
    "truncated": (502, "The provider's answer broke off before any of it could be passed on."),
    "protocol": (502, "The provider sent an invalid answer."),
    "timeout": (504, "The provider did not answer in time."),
}


class FaultyProviders:
    """Bring a provider per fault, and one that refuses."""

    @hookimpl
    def register_providers(self) -> list[Provider]:
        return [Faulty(type=name) for name in (*TOLD, "refusing")]


def bound_to(kind: str) -> dict[str, Any]:
    return {"routing": {"bindings": [{"name": "b", "type": kind, "base_url": f"http://{SECRET_HOST}/v1"}]}}


@pytest.mark.parametrize("fault", TOLD)
async def test_client_is_told_what_happened_and_the_log_where(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with watched(FakeUpstream(), plugins=[FaultyProviders], config=bound_to(fault)) as run:
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        error = reply.json()["error"]
        assert (reply.status, error["message"]) == TOLD[fault]
        assert SECRET_HOST.encode() not in reply.raw
        (attempt,) = run.harness.exchanges[0].attempts
        told = {"binding": attempt.binding_id, "model": attempt.model, "reason": fault, "status": None}
        assert error["meta"]["attempts"] == [told]
        assert (attempt.reason, attempt.message) == (fault, f"{SECRET_HOST} says no")
        logged = capsys.readouterr().err
        assert f"{SECRET_HOST} says no" in logged
        assert run.harness.exchanges[0].request_id.decode() in logged


# --- how attempts end -----------------------------------------------------------------------------------------------


async def test_attempt_refused_before_it_was_sent_says_so() -> None:
    async with watched(FakeUpstream(), plugins=[FaultyProviders], config=bound_to("refusing")) as run:
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (400, "unsupported_parameter")
        (attempt,) = run.harness.exchanges[0].attempts
        assert (attempt.outcome, attempt.status) == ("not_sent", None)
        assert attempt.ended_ns >= attempt.started_ns


@pytest.mark.parametrize("start", [b"", STREAM_HEAD + chunk(b"data: {")], ids=["head", "first event"])
async def test_attempt_whose_client_left_says_so(start: bytes) -> None:
    stall = Stall()
    script: list[Step] = [start, stall] if start else [stall]
    async with watched(FakeUpstream([script])) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=OPENAI.body))
        await stall.reached.wait()
        client.reset()
        await run.harness.wait_settled(1)
        (attempt,) = run.harness.exchanges[0].attempts
        assert attempt.outcome == "client_gone"
        assert attempt.ended_ns >= attempt.started_ns


# --- hooks that await for ever --------------------------------------------------------------------------------------


async def await_for_ever(self: Any, exchange: Exchange) -> None:
    await asyncio.get_running_loop().create_future()


def return_for_ever(self: Any, exchange: Exchange) -> Any:
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("hook", ["authenticate", "pre_request", "select_provider"])
@pytest.mark.parametrize("function", [await_for_ever, return_for_ever])
async def test_hook_that_awaits_for_ever_fails_closed(hook: str, function: Any) -> None:
    plugin = "endless", type("Endless", (), {hook: hookimpl(function)})
    bounds = {"hook_timeout": 0.05}
    async with watched(FakeUpstream(), plugins=[plugin, "virtual_keys"], gateway=bounds) as run:
        run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, fault.hook) == ("endless", hook)
        assert isinstance(fault.__cause__, TimeoutError)


async def test_chunk_hook_that_awaits_for_ever_ends_the_stream() -> None:
    async def wait(self: Any, exchange: Exchange, chunk: Chunk) -> None:
        if chunk.data == OPENAI.events[1]:
            await asyncio.get_running_loop().create_future()

    plugin = "endless", type("Endless", (), {"on_stream_chunk": hookimpl(wait), "sees_chunks": True})
    stall = Stall()
    script: list[Step] = [STREAM_HEAD, chunk(OPENAI.events[0]), chunk(OPENAI.events[1]), stall]
    async with watched(FakeUpstream([script]), plugins=[plugin], gateway={"hook_timeout": 0.05}) as run:
        run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert not reply.is_complete
        assert payload_of(events_of(reply.body)[-1])["error"]["code"] == "plugin_error"
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, fault.hook) == ("endless", "on_stream_chunk")
        await stall.gone.wait()


async def test_settlement_has_a_bound_of_its_own() -> None:
    async def settle(self: Any, exchange: Exchange) -> None:
        await checkpoint()

    plugin = "settling", type("Settling", (), {"post_response": hookimpl(settle)})
    async with watched(FakeUpstream(), plugins=[plugin], gateway={"hook_timeout": 7.0}) as run:
        run.settled = 0
        hooks = run.harness.gateway.generation.pipeline.hooks
        assert {call.timeout for call in hooks.post_response} == {math.inf}
        assert {call.timeout for call in hooks.authenticate} == {7.0}


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_bound_on_hooks_must_be_more_than_nothing(seconds: float) -> None:
    with pytest.raises(ConfigurationError, match=r"hook_timeout: must be more than 0"):
        read_document({"gateway": {"hook_timeout": seconds}}, source="test", environment={})
