"""Answers gathered whole before any of them is committed: reviewed, changed, refused or given up, over sockets."""

from __future__ import annotations

import gzip
from typing import Any

import anyio
import pytest

from fallback_chain import GOOD, STREAM, WHOLE, chain, good
from fault_upstream import OPENAI
from penstock import Exchange, PluginError, RequestError, server, whole
from penstock.testing import LAST_CHUNK, STREAM_HEAD, Close, FakeUpstream, Pause, Reset, Stall, chunk, http_reply
from penstock.testing.upstream import Step
from scripted_translator import ASK, MESSAGES, Reviewer, Translating, translated, wrapped

pytestmark = pytest.mark.anyio

LONG = {"connect": 5.0, "first_byte": 5.0, "idle": 5.0}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n"
CODED = b"Content-Encoding: gzip\r\n"
ZIPPED = gzip.compress(GOOD)
FRAMINGS: dict[str, list[Step]] = {
    "length": [http_reply(GOOD)],
    "length_in_pieces": [HEAD + b"Content-Length: %d\r\n\r\n" % len(GOOD), GOOD[:9], GOOD[9:]],
    "chunked": [CHUNKED + b"\r\n", chunk(GOOD[:5]), chunk(GOOD[5:]), LAST_CHUNK],
    "chunked_with_trailers": [CHUNKED + b"\r\n" + chunk(GOOD) + b"0\r\nX-Sum: 1\r\n\r\n"],
    "close": [HEAD + b"\r\n", GOOD, Close()],
    "gzip_length": [HEAD + CODED + b"Content-Length: %d\r\n\r\n" % len(ZIPPED) + ZIPPED],
    "gzip_chunked": [CHUNKED + CODED + b"\r\n", chunk(ZIPPED[:9]), chunk(ZIPPED[9:]), LAST_CHUNK],
    "gzip_close": [HEAD + CODED + b"\r\n" + ZIPPED, Close()],
}
BROKEN: dict[str, tuple[list[Step], str]] = {
    "length_cut": ([HEAD + b"Content-Length: 99\r\n\r\n" + GOOD[:9], Close()], "truncated"),
    "length_reset": ([HEAD + b"Content-Length: 99\r\n\r\n" + GOOD[:9], Reset()], "truncated"),
    "chunks_cut": ([CHUNKED + b"\r\n" + chunk(GOOD), Close()], "truncated"),
    "bad_chunk": ([CHUNKED + b"\r\nzz\r\n", Stall()], "protocol"),
    "no_gzip": ([HEAD + CODED + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD], "protocol"),
    "half_a_gzip": ([CHUNKED + CODED + b"\r\n" + chunk(ZIPPED[:20]) + LAST_CHUNK], "protocol"),
    "coding_unknown": ([HEAD + b"Content-Encoding: rot13\r\nContent-Length: 2\r\n\r\n{}"], "protocol"),
    "stalls": ([HEAD + b"Content-Length: 99\r\n\r\n" + GOOD[:9], Stall()], "timeout"),
}


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


def setup(kind: str, reviewer: Reviewer) -> tuple[list[Any], str, bytes]:
    """Return plugins, path and body of an exchange that is reviewed, translated or both."""
    plugins: list[Any] = [] if kind == "translated" else [("reviewer", reviewer)]
    if kind == "reviewed":
        return plugins, OPENAI.path, WHOLE
    return [*plugins, ("translating", Translating())], MESSAGES, ASK


KINDS = ("reviewed", "translated", "both")


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("framing", FRAMINGS)
async def test_whole_answer_of_any_framing_reaches_the_client_with_its_length(
    framing: str, kind: str, version: bytes
) -> None:
    reviewer = Reviewer()
    plugins, path, body = setup(kind, reviewer)
    async with chain(FakeUpstream([FRAMINGS[framing]]), plugins=plugins, bindings=translated()) as run:
        client = await run.harness.raw()
        request = run.harness.request_bytes("POST", path, {}, body)
        await client.send(request.replace(b"HTTP/1.1", b"HTTP/" + version, 1))
        reply = await client.receive_reply()
        expected = GOOD if kind == "reviewed" else wrapped(GOOD)
        assert (reply.status, reply.body, reply.is_complete) == (200, expected, True)
        assert reply.header("content-length") == str(len(expected))
        assert (reply.header("content-encoding"), reply.header("transfer-encoding")) == (None, None)
        assert reply.header("content-type") == "application/json"
        assert reviewer.seen == ([] if kind == "translated" else [expected])
        await run.harness.wait_settled(1)
        assert (run.last.stream_end, run.harness.settled) == ("complete", 1)
        assert run.last.usage is not None
        assert (run.last.usage.input, run.last.usage.output, run.last.usage.source) == (7, 3, "provider")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("breaks", BROKEN)
async def test_whole_answer_that_breaks_off_is_the_next_candidates(breaks: str, kind: str) -> None:
    steps, reason = BROKEN[breaks]
    plugins, path, body = setup(kind, Reviewer())
    timeouts = LONG | ({"idle": 0.05} if breaks == "stalls" else {})
    upstreams = FakeUpstream([steps]), FakeUpstream([good(is_stream=False)])
    async with chain(
        *upstreams, plugins=plugins, bindings=translated(2), breaker={"failures": 1}, timeouts=timeouts
    ) as run:
        reply = await run.harness.request("POST", path, body=body)
        assert (reply.status, reply.body) == (200, GOOD if kind == "reviewed" else wrapped(GOOD))
        assert [attempt.reason for attempt in run.last.attempts] == [reason, None]
        assert (reply.header("X-Penstock-Fallback-Count"), run.state("a")) == ("1", "open")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("breaks", BROKEN)
async def test_only_answer_that_breaks_off_is_answered_for(breaks: str, kind: str) -> None:
    steps, reason = BROKEN[breaks]
    plugins, path, body = setup(kind, Reviewer())
    timeouts = LONG | ({"idle": 0.05} if breaks == "stalls" else {})
    async with chain(FakeUpstream([steps]), plugins=plugins, bindings=translated(), timeouts=timeouts) as run:
        reply = await run.harness.request("POST", path, body=body)
        assert reply.status == (504 if reason == "timeout" else 502)
        assert GOOD[:9] not in reply.body
        assert run.harness.settled == 1
        assert run.last.usage is None


@pytest.mark.parametrize("steps", [
    [CHUNKED + b"\r\n" + chunk(b"x" * 600), chunk(b"x" * 600), Stall()],
    [CHUNKED + CODED + b"\r\n" + chunk(gzip.compress(b"x" * 1200)), Stall()],
])  # fmt: skip
async def test_answer_too_large_to_gather_is_given_up_for_the_next(
    monkeypatch: pytest.MonkeyPatch, steps: list[Step]
) -> None:
    monkeypatch.setattr(whole, "MOST_BYTES", 1000)
    upstreams = FakeUpstream([steps]), FakeUpstream([good(is_stream=False)])
    async with chain(*upstreams, plugins=[("reviewer", Reviewer())], timeouts=LONG) as run:
        reply = await run.ask()
        assert (reply.status, reply.body, run.last.attempts[0].reason) == (200, GOOD, "protocol")
        stall = steps[-1]
        assert isinstance(stall, Stall)
        await stall.gone.wait()


async def test_answer_without_a_first_byte_in_time_is_a_timeout() -> None:
    silent: list[Step] = [HEAD + b"Content-Length: 99\r\n\r\n", Stall()]
    timeouts = LONG | {"first_byte": 0.1}
    async with chain(FakeUpstream([silent]), plugins=[("reviewer", Reviewer())], timeouts=timeouts) as run:
        assert (await run.ask()).status == 504
        assert run.last.attempts[0].message == "the provider's answer had no first byte in time"


# --- what the reviewer says -------------------------------------------------------------------------------------------


def blocking(_exchange: Exchange, _body: bytes) -> bytes | None:
    raise RequestError("guardrail_blocked", "Blocked.")


@pytest.mark.parametrize("kind", ["reviewed", "both"])
async def test_refused_answer_is_403_and_settled_once_with_its_usage(kind: str) -> None:
    plugins, path, body = setup(kind, Reviewer(blocking))
    upstreams = FakeUpstream([good(is_stream=False)]), FakeUpstream([good(is_stream=False)])
    async with chain(*upstreams, plugins=plugins, bindings=translated(2), breaker={"failures": 1}) as run:
        reply = await run.harness.request("POST", path, body=body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (403, "guardrail_blocked")
        assert b"choices" not in reply.body
        assert (run.dials, run.harness.settled) == ([1, 0], 1)
        assert run.last.usage is not None
        assert (run.last.usage.input, run.last.usage.output) == (7, 3)
        assert (run.last.stream_end, run.last.committed_ns, run.states()) == (None, None, {})


@pytest.mark.parametrize("new", [b"", b"{}", b"x" * 200_000])
@pytest.mark.parametrize("kind", ["reviewed", "both"])
async def test_changed_answer_reaches_the_client_with_its_own_length(kind: str, new: bytes) -> None:
    plugins, path, body = setup(kind, Reviewer(lambda _exchange, _body: new))
    async with chain(FakeUpstream([FRAMINGS["gzip_chunked"]]), plugins=plugins, bindings=translated()) as run:
        reply = await run.harness.request("POST", path, body=body)
        assert (reply.body, reply.header("content-length"), reply.is_complete) == (new, str(len(new)), True)
        assert run.last.usage is not None
        assert run.last.usage.output == 3


async def test_reviewers_see_one_after_the_other_what_those_before_made_of_it() -> None:
    first = Reviewer(lambda _exchange, body: body + b"1", name="first")
    second = Reviewer(lambda _exchange, body: body + b"2", name="second")
    upstream = FakeUpstream([good(is_stream=False)])
    async with chain(upstream, plugins=[("first", first)], later=[("second", second)]) as run:
        assert (await run.ask()).body == GOOD + b"12"
        assert (first.seen, second.seen) == ([GOOD], [GOOD + b"1"])


async def test_reviewer_that_fails_is_a_plugin_error_and_settled_once() -> None:
    def fail(_exchange: Exchange, _body: bytes) -> bytes:
        raise ZeroDivisionError

    async with chain(FakeUpstream([good(is_stream=False)]), plugins=[("reviewer", Reviewer(fail))]) as run:
        reply = await run.ask()
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, fault.hook, run.harness.settled) == ("reviewer", "on_response", 1)


async def test_client_that_leaves_while_an_answer_is_judged_is_charged_for_it() -> None:
    judging = anyio.Event()

    async def judge(_exchange: Exchange, _body: bytes) -> bytes | None:
        judging.set()
        await anyio.sleep_forever()
        return None

    async with chain(FakeUpstream([good(is_stream=False)]), plugins=[("reviewer", Reviewer(judge))]) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", OPENAI.path, body=WHOLE))
        await judging.wait()
        client.close()
        await run.harness.wait_settled(1)
        assert (run.last.stream_end, run.last.status, run.last.committed_ns) == ("client_gone", None, None)
        assert run.last.usage is not None
        assert run.last.usage.output == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_client_that_leaves_while_an_answer_is_gathered_cancels_it(kind: str) -> None:
    plugins, path, body = setup(kind, Reviewer())
    stall = Stall()
    first = FakeUpstream([[HEAD + b"Content-Length: 99\r\n\r\n" + GOOD[:9], stall]])
    async with chain(first, plugins=plugins, bindings=translated(), timeouts=LONG) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", path, body=body))
        await stall.reached.wait()
        client.close()
        await stall.gone.wait()
        await run.harness.wait_settled(1)
        assert (run.last.stream_end, run.last.attempts[0].reason) == ("client_gone", "client_gone")


# --- what is not shown to reviewers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 429, 503])
async def test_error_of_the_provider_is_relayed_as_it_came_and_not_reviewed(status: int) -> None:
    reviewer = Reviewer(blocking)
    async with chain(FakeUpstream([[http_reply(b"odd", status)]]), plugins=[("reviewer", reviewer)]) as run:
        reply = await run.ask()
        assert (reply.status, reply.body, reviewer.seen) == (status, b"odd", [])


async def test_event_stream_is_not_gathered() -> None:
    pause, reviewer = Pause(), Reviewer(blocking)
    steps: list[Step] = [STREAM_HEAD, chunk(OPENAI.events[0]), pause, chunk(OPENAI.events[1]), LAST_CHUNK]
    async with chain(FakeUpstream([steps]), plugins=[("reviewer", reviewer)]) as run:
        async with run.harness.stream("POST", OPENAI.path, body=STREAM) as stream:
            assert await anext(aiter(stream)) == OPENAI.events[0]
            pause.release()
            assert (await stream.read()).body == b"".join(OPENAI.events[:2])
        assert reviewer.seen == []


async def test_connections_of_client_and_provider_are_used_again() -> None:
    upstream = FakeUpstream([FRAMINGS["chunked"]], repeat=True)
    async with chain(upstream, plugins=[("reviewer", Reviewer())]) as run:
        client = await run.harness.raw()
        for _ in range(3):
            await client.send(run.harness.request_bytes("POST", OPENAI.path, body=WHOLE))
            assert (await client.receive_reply()).body == GOOD
        assert upstream.connection_count == 1
