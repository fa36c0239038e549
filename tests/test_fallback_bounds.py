"""How far a chain goes: what a key's ``fallback`` says, and what ends it, over sockets."""

from __future__ import annotations

from typing import Any

import pytest

from fallback_chain import GOOD, STREAM, WHOLE, chain, failing, good
from fault_upstream import HALF_EVENT, OPENAI
from penstock import server
from penstock.testing import STREAM_HEAD, FakeUpstream, Reset, Stall, chunk, http_reply, stream_reply
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio

LONG = {"connect": 5.0, "first_byte": 5.0, "idle": 5.0}
CLASSES = ("5xx", "timeout", "rate_limit", "network_error", "not_found")
OF_CLASS: dict[str, list[Step]] = {
    "5xx": failing(),
    "timeout": [Stall()],
    "rate_limit": failing(status=429),
    "network_error": [Reset()],
    "not_found": failing(status=404),
}


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


def served() -> FakeUpstream:
    return FakeUpstream([good(is_stream=False)], repeat=True)


@pytest.mark.parametrize("happens", CLASSES)
@pytest.mark.parametrize("named", CLASSES)
async def test_only_failures_the_key_names_lead_to_the_next(happens: str, named: str) -> None:
    first = FakeUpstream([OF_CLASS[happens]])
    timeouts = LONG | {"first_byte": 0.1}
    async with chain(first, served(), fallback={"on": [named]}, timeouts=timeouts) as run:
        reply = await run.ask()
        assert run.dials == [1, int(happens == named)]
        assert (reply.status == 200) == (happens == named)


@pytest.mark.parametrize("happens", CLASSES)
async def test_empty_list_turns_fallback_off(happens: str) -> None:
    first = FakeUpstream([OF_CLASS[happens]])
    async with chain(first, served(), fallback={"on": []}, timeouts=LONG | {"first_byte": 0.1}) as run:
        reply = await run.ask()
        expected = {"5xx": 503, "timeout": 504, "rate_limit": 429, "network_error": 502, "not_found": 404}
        assert (reply.status, run.dials) == (expected[happens], [1, 0])


async def test_error_event_is_relayed_where_fallback_is_off() -> None:
    first = FakeUpstream([stream_reply(OPENAI.error_event)])
    async with chain(first, served(), fallback={"on": []}) as run:
        reply = await run.ask(STREAM)
        assert (reply.status, reply.body, run.dials) == (200, OPENAI.error_event, [1, 0])


@pytest.mark.parametrize("most", [1, 2, 3])
async def test_no_more_are_dialled_than_allowed_and_the_last_answer_is_relayed_verbatim(most: int) -> None:
    body = b'{ "error" : {"n": 10000000000000000000000} }\n'
    fields = ((b"Content-Type", b"application/json"), (b"X-Odd", b"1"), (b"Retry-After", b"7"))
    upstreams = [FakeUpstream([[http_reply(b"%d" % number + body, 503, fields)]]) for number in range(4)]
    async with chain(*upstreams, fallback={"max_attempts": most}) as run:
        reply = await run.ask()
        assert run.dials == [int(number < most) for number in range(4)]
        assert (reply.status, reply.body) == (503, b"%d" % (most - 1) + body)
        assert reply.raw.startswith(b"HTTP/1.1 503 Reply\r\nContent-Type: application/json\r\nX-Odd: 1\r\nRetry-After")
        assert reply.header("X-Penstock-Fallback-Count") == str(most - 1)
        assert reply.header("X-Penstock-Error") is None


async def test_chain_of_three_is_the_default() -> None:
    upstreams = [FakeUpstream([failing(number)]) for number in range(4)]
    async with chain(*upstreams) as run:
        await run.ask()
        assert run.dials == [1, 1, 1, 0]


STALLS: dict[str, tuple[bytes, list[Step]]] = {
    "no_head": (WHOLE, [Stall()]),
    "no_event": (STREAM, [STREAM_HEAD, chunk(HALF_EVENT), Stall()]),
}


@pytest.mark.parametrize("stall", STALLS)
async def test_deadline_ends_an_attempt_that_hangs(stall: str) -> None:
    body, steps = STALLS[stall]
    async with chain(FakeUpstream([steps]), served(), fallback={"timeout_ms": 150}, timeouts=LONG) as run:
        reply = await run.ask(body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (504, "upstream_timeout")
        assert run.dials == [1, 0]
        (attempt,) = run.last.attempts
        assert attempt.reason == "timeout"
        assert 0.1e9 < run.last.ended_ns - run.last.started_ns < 3e9


async def test_deadline_is_one_for_all_attempts() -> None:
    upstreams = FakeUpstream([failing()]), FakeUpstream([[Stall()]]), served()
    async with chain(*upstreams, fallback={"timeout_ms": 200}, timeouts=LONG) as run:
        reply = await run.ask()
        assert (reply.status, run.dials) == (504, [1, 1, 0])
        assert [found["reason"] for found in reply.json()["error"]["meta"]["attempts"]] == ["status", "timeout"]


async def test_deadline_bounds_no_answer_that_has_begun() -> None:
    stall = Stall()
    first = FakeUpstream([[STREAM_HEAD, chunk(OPENAI.events[0]), stall]])
    timeouts = LONG | {"idle": 0.6}
    async with chain(first, fallback={"timeout_ms": 100}, timeouts=timeouts) as run:
        async with run.harness.stream("POST", OPENAI.path, body=STREAM) as stream:
            await stream.read()
        await run.harness.wait_settled(1)
        assert run.last.ended_ns - run.last.started_ns > 0.5e9
        assert (run.last.status, run.last.attempts[0].reason) == (200, None)


async def test_bindings_own_timeout_lets_the_next_answer_within_the_deadline() -> None:
    upstreams = FakeUpstream([[Stall()]]), served()
    own: list[dict[str, Any]] = [{"timeouts": LONG | {"first_byte": 0.05}}]
    async with chain(*upstreams, fallback={"timeout_ms": 4000}, bindings=own, timeouts=LONG) as run:
        reply = await run.ask()
        assert (reply.status, reply.body) == (200, GOOD)


async def test_skip_takes_no_attempt() -> None:
    upstreams = FakeUpstream([failing()]), served()
    async with chain(*upstreams, fallback={"max_attempts": 1}, breaker={"failures": 1}) as run:
        await run.ask_one("a")
        reply = await run.ask()
        assert (reply.status, reply.header("X-Penstock-Fallback-Count"), run.dials) == (200, "1", [1, 1])
