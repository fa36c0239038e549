"""Every outcome of an attempt, at every place of a chain, streamed or not, whatever the breaker: over sockets."""

from __future__ import annotations

import socket

import attrs
import pytest

from fallback_chain import GOOD, STREAM, WHOLE, Chain, chain, failing, good
from fault_upstream import HALF_EVENT, OPENAI
from penstock import server
from penstock.testing import STREAM_HEAD, Close, FakeUpstream, Pause, Reset, Stall, chunk, http_reply, stream_reply
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio

TIMEOUTS = {"connect": 5.0, "first_byte": 5.0, "idle": 5.0}
SOON = TIMEOUTS | {"first_byte": 0.1}


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


@attrs.frozen
class Row:
    """One outcome of an attempt and what the table says of it."""

    steps: tuple[Step, ...]
    goes_on: bool
    is_failure: bool
    status: int
    """What the client gets where nobody else is asked."""
    has_answer: bool = True
    """Whether there is an answer to relay."""
    streams: tuple[bool, ...] = (False, True)


def refusal(status: int) -> Row:
    return Row((http_reply(b"verbatim", status, ((b"X-Odd", b"1"),)),), False, False, status)


def failure(*steps: Step, status: int = 502, streams: tuple[bool, ...] = (False, True)) -> Row:
    return Row(steps, True, True, status, has_answer=False, streams=streams)


ROWS = {
    **{str(status): attrs.evolve(refusal(status), goes_on=True, is_failure=True) for status in (500, 502, 503, 529)},
    **{str(status): attrs.evolve(refusal(status), goes_on=True) for status in (404, 429)},
    **{str(status): refusal(status) for status in (400, 401, 402, 403, 409, 413, 418, 422)},
    "reset": failure(Reset()),
    "closed": failure(Close()),
    "not_http": failure(b"SSH-2.0-OpenSSH\r\n\r\n", Close()),
    "bad_chunk": failure(STREAM_HEAD + b"zz\r\n", Close(), streams=(True,)),
    "truncated": failure(STREAM_HEAD, chunk(HALF_EVENT), Close(), streams=(True,)),
    "no_head_in_time": failure(Stall(), status=504),
    "no_event_in_time": failure(STREAM_HEAD, chunk(HALF_EVENT), Stall(), status=504, streams=(True,)),
    "error_event": Row(tuple(stream_reply(OPENAI.error_event)), True, True, 200, streams=(True,)),
}
CASES = [pytest.param(row, is_stream, id=f"{name}-{'stream' if is_stream else 'whole'}")
         for name, row in ROWS.items() for is_stream in row.streams]  # fmt: skip
PLACES = {"first": 0, "middle": 1, "last": 2}


def timeouts_of(row: Row) -> dict[str, float]:
    return SOON if any(isinstance(step, Stall) for step in row.steps) else TIMEOUTS


def upstreams_around(row: Row, place: int, *, is_stream: bool, warm: bool) -> list[FakeUpstream]:
    """Return three upstreams: failing ones before the row's place, working ones after it."""
    found = []
    for number in range(3):
        steps = failing(number) if number < place else good(is_stream=is_stream)
        own = [failing(9), list(row.steps)] if warm else [list(row.steps)]
        found.append(FakeUpstream(own) if number == place else FakeUpstream([steps], repeat=True))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("row", "is_stream"), CASES)
@pytest.mark.parametrize("breaker", ["closed", "half_open"])
async def test_outcome_at_a_place_of_the_chain(row: Row, is_stream: bool, place: str, breaker: str) -> None:
    at = PLACES[place]
    is_warm = breaker == "half_open"
    upstreams = upstreams_around(row, at, is_stream=is_stream, warm=is_warm)
    opens_at = 1 if is_warm else 2
    async with chain(*upstreams, breaker={"failures": opens_at}, timeouts=timeouts_of(row)) as run:
        name = "abc"[at]
        if is_warm:
            await run.ask_one(name)
            run.clock.now += 60
            assert run.state(name) == "half_open"
        reply = await run.ask(STREAM if is_stream else WHOLE)
        goes_on = row.goes_on and at < 2
        answerer = at + 1 if goes_on else at
        made = [int(number <= answerer) for number in range(3)]
        made[at] += is_warm
        assert run.dials == made
        assert_answered(run, reply.status, reply.body, row, answerer if goes_on else None, is_stream=is_stream)
        assert reply.header("X-Penstock-Fallback-Count") == str(answerer)
        assert reply.header("X-Penstock-Provider") == "openai_compatible"
        assert reply.header("X-Penstock-Model") == "m"
        assert run.last.candidate is not None
        assert run.last.candidate.binding.name == "abc"[answerer]
        if is_warm:
            assert run.state(name) == ("open" if row.is_failure else "closed")
        else:
            assert {found: state.failures for found, state in run.states().items()} == {
                failed: 1 for number, failed in enumerate("abc") if number < at or (number == at and row.is_failure)
            }


def assert_answered(run: Chain, status: int, body: bytes, row: Row, answerer: int | None, *, is_stream: bool) -> None:
    """The client has the next candidate's answer, or the row's verbatim, or the gateway's where there is none."""
    if answerer is not None:
        assert (status, body) == (200, b"".join(OPENAI.events) if is_stream else GOOD)
        assert run.last.error is None
    elif row.has_answer:
        assert (status, run.last.error) == (row.status, None)
        assert body == (OPENAI.error_event if row.status == 200 else b"verbatim")
    else:
        assert status == row.status
        assert run.last.error is not None
        assert run.last.error.code == ("upstream_timeout" if status == 504 else "provider_error")
        attempts = run.last.error.meta["attempts"]
        assert [attempt["binding"] for attempt in attempts] == ["gpc_a", "gpc_b", "gpc_c"][: len(attempts)]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("place", PLACES)
async def test_open_breaker_is_skipped_without_a_dial(place: str, is_stream: bool) -> None:
    at = PLACES[place]
    upstreams = upstreams_around(ROWS["503"], at, is_stream=is_stream, warm=True)
    async with chain(*upstreams, breaker={"failures": 1}, fallback={"max_attempts": 3 if at == 2 else 2}) as run:
        await run.ask_one("abc"[at])
        reply = await run.ask(STREAM if is_stream else WHOLE)
        assert run.dials[at] == 1
        assert [attempt.is_skipped for attempt in run.last.attempts].index(True) == at
        if at == 2:  # the last that answered is the second of the chain
            assert (reply.status, reply.header("X-Whose"), reply.header("X-Penstock-Fallback-Count")) == (503, "1", "1")
        else:
            assert reply.status == 200
            assert reply.header("X-Penstock-Fallback-Count") == str(at + 1)
        assert run.last.attempts[at].reason == "circuit_open"


async def test_all_breakers_open_is_circuit_open_with_the_shortest_wait() -> None:
    upstreams = [FakeUpstream([failing(number)]) for number in range(2)]
    async with chain(*upstreams, breaker={"failures": 1, "open_seconds": 40}) as run:
        await run.ask_one("b")
        run.clock.now += 10
        await run.ask_one("a")
        run.clock.now += 5
        reply = await run.ask()
        assert (reply.status, reply.header("X-Penstock-Error")) == (503, "circuit_open")
        assert reply.header("retry-after") == "25"
        assert reply.header("x-should-retry") is None
        assert reply.json()["error"]["meta"]["attempts"] == [
            {"binding": f"gpc_{name}", "model": "m", "reason": "circuit_open", "status": None} for name in "ab"
        ]
        assert run.dials == [1, 1]


@pytest.mark.parametrize(("steps", "status", "code"), [
    (Reset(), 502, "provider_error"), (Stall(), 504, "upstream_timeout"),
])  # fmt: skip
async def test_skips_behind_a_provider_without_an_answer_are_listed(steps: Step, status: int, code: str) -> None:
    first, second = FakeUpstream([[steps]]), FakeUpstream([failing(1)])
    async with chain(first, second, breaker={"failures": 1}, timeouts=SOON) as run:
        await run.ask_one("b")
        reply = await run.ask()
        assert (reply.status, reply.header("X-Penstock-Error")) == (status, code)
        reasons = [attempt["reason"] for attempt in reply.json()["error"]["meta"]["attempts"]]
        assert reasons == ["reset" if status == 502 else "timeout", "circuit_open"]


async def test_refused_connection_goes_on_and_is_a_failure() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dead = {"base_url": f"http://127.0.0.1:{unused.getsockname()[1]}"}
        upstreams = FakeUpstream(), FakeUpstream([good(is_stream=False)])
        async with chain(*upstreams, bindings=[dead], breaker={"failures": 1}) as run:
            reply = await run.ask()
            assert (reply.status, reply.body) == (200, GOOD)
            assert [attempt.reason for attempt in run.last.attempts] == ["connect", None]
            assert run.state("a") == "open"


async def test_host_that_does_not_resolve_goes_on_and_is_a_failure() -> None:
    upstreams = FakeUpstream(), FakeUpstream([good(is_stream=False)])
    missing = {"base_url": "http://no-such-host.invalid"}
    async with chain(*upstreams, bindings=[missing], breaker={"failures": 1}) as run:
        assert (await run.ask()).status == 200
        assert run.last.attempts[0].reason == "dns"
        assert run.state("a") == "open"


# --- after the commit -------------------------------------------------------------------------------------------------

ENDS: dict[str, list[Step]] = {
    "close": [Close()],
    "reset": [Reset()],
    "stall": [Stall()],
    "bad_chunk": [b"zz\r\n", Stall()],
    "half_an_event": [chunk(HALF_EVENT), Close()],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_nobody_else_is_dialled_after_the_first_byte(end: str, is_stream: bool) -> None:
    pause = Pause()
    head = STREAM_HEAD if is_stream else STREAM_HEAD.replace(b"text/event-stream", b"application/json")
    first = FakeUpstream([[head, chunk(OPENAI.events[0]), pause, *ENDS[end]]])
    second = FakeUpstream([good(is_stream=is_stream)], repeat=True)
    timeouts = TIMEOUTS | ({"idle": 0.05} if end == "stall" else {})
    async with chain(first, second, timeouts=timeouts, breaker={"failures": 1}) as run:
        async with run.harness.stream("POST", OPENAI.path, body=STREAM if is_stream else WHOLE) as stream:
            assert await anext(aiter(stream)) == OPENAI.events[0]
            pause.release()
            reply = await stream.read()
        await run.harness.wait_settled(1)
        assert not reply.is_complete
        assert run.dials == [1, 0]
        assert second.connection_count == 0
        assert reply.header("X-Penstock-Fallback-Count") == "0"
        assert (run.last.stream_end, len(run.last.attempts)) == ("upstream_failed", 1)
        assert run.state("a") == "closed"
