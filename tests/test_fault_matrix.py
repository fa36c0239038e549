"""Every state of an exchange, with disconnect, reset, stall and cut, from the provider's side, over sockets.

Whatever happens, ``watched`` asserts at the end that post_response ran exactly once per exchange, that no task, client
connection or half-read upstream connection is left, and that nothing unexpected was logged. The short form takes
seconds; ``PENSTOCK_TESTS=full`` only lengthens the property tests beside this file.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from fault_upstream import DIALECTS, HALF_EVENT, JSON_HEAD, Dialect, events_of, payload_of, watched
from penstock import server
from penstock.testing import (
    LAST_CHUNK,
    STREAM_HEAD,
    Close,
    FakeUpstream,
    Pause,
    Reset,
    Stall,
    chunk,
    http_reply,
    stream_reply,
)
from penstock.testing.upstream import Step

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("dialect", DIALECTS, ids=[each.name for each in DIALECTS])]

PATIENT: dict[str, float] = {"connect": 5.0, "first_byte": 5.0, "idle": 5.0}
EVENT_HEAD = STREAM_HEAD.replace(b"Transfer-Encoding: chunked\r\n", b"")


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let deadlines be looked at often: most tests of this file that wait, wait for one."""
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


def idle_of(end: str) -> dict[str, float]:
    """Return timeouts that soon end a stream which stalls, and no other."""
    return PATIENT | ({"idle": 0.05} if end == "stall" else {})


def is_gone(end: Step) -> bool:
    return not isinstance(end, Stall)


# --- before the commit: the gateway answers -----------------------------------------------------------------------

ENDS: dict[str, Callable[[], Step]] = {"close": Close, "reset": Reset, "stall": Stall}
UNANSWERED: dict[str, bytes] = {
    "nothing": b"",
    "half_a_head": STREAM_HEAD[:30],
    "interim_head": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n",
    "head_of_a_stream": STREAM_HEAD,
    "head_of_json": JSON_HEAD,
    "half_a_size_line": STREAM_HEAD + b"1",
    "half_an_event": STREAM_HEAD + chunk(HALF_EVENT),
    "half_a_chunk": STREAM_HEAD + b"40\r\n" + HALF_EVENT,
    "only_a_comment": STREAM_HEAD + chunk(b": keep-alive\n\n"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("state", UNANSWERED)
async def test_upstream_that_fails_before_the_commit_is_answered_for(dialect: Dialect, state: str, end: str) -> None:
    step = ENDS[end]()
    upstream = FakeUpstream([[UNANSWERED[state], step] if UNANSWERED[state] else [step]])
    async with watched(upstream, timeouts=PATIENT | ({} if is_gone(step) else {"first_byte": 0.05})) as run:
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        exchange = run.harness.exchanges[0]
        assert reply.is_complete
        assert b"data:" not in reply.body
        if is_gone(step):
            assert (reply.status, reply.header("X-Penstock-Error")) == (502, "provider_error")
            assert exchange.attempts[0].reason in {"reset", "truncated"}
        else:
            assert (reply.status, reply.header("X-Penstock-Error")) == (504, "upstream_timeout")
            assert exchange.attempts[0].reason == "timeout"
        attempt = {
            "binding": f"gpc_{dialect.binding}",
            "model": exchange.attempts[0].model,
            "reason": exchange.attempts[0].reason,
            "status": exchange.attempts[0].status,
        }
        assert reply.json()["error"]["meta"]["attempts"] == [attempt]
        assert (exchange.status, exchange.committed_ns, len(exchange.attempts)) == (reply.status, None, 1)


async def test_refused_connection_is_answered_for(dialect: Dialect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with watched(FakeUpstream(), base_url=url) as run:
            reply = await run.harness.request("POST", dialect.path, body=dialect.body)
            assert reply.status == 502
            assert run.harness.exchanges[0].attempts[0].reason == "connect"


NOT_HTTP = {
    "garbage": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "bad_status": b"HTTP/1.1 2xx OK\r\n\r\n",
    "two_lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
    "length_and_chunks": STREAM_HEAD[:-2] + b"Content-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "bare_line_feed": b"HTTP/1.1 200 OK\r\nX-A: 1\nX-B: 2\r\nContent-Length: 2\r\n\r\nok",
    "folded_field": b"HTTP/1.1 200 OK\r\nX-A: 1\r\n  2\r\nContent-Length: 2\r\n\r\nok",
    "negative_length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
    "switched_protocols": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    "endless_head": b"HTTP/1.1 200 OK\r\n" + b"X-Pad: 0123456789\r\n" * 8000,
    "bad_chunk_size": STREAM_HEAD + b"zz\r\nno\r\n",
    "huge_chunk_size": STREAM_HEAD + b"ffffffffffffffffff\r\nno\r\n",
    "bad_chunk_end": STREAM_HEAD + b"2\r\nno!!",
}


@pytest.mark.parametrize("reply", NOT_HTTP)
async def test_malformed_answer_is_a_provider_error(dialect: Dialect, reply: str) -> None:
    async with watched(FakeUpstream([[NOT_HTTP[reply], Stall()]]), timeouts=PATIENT) as run:
        answer = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert (answer.status, answer.header("X-Penstock-Error")) == (502, "provider_error")
        assert run.harness.exchanges[0].attempts[0].reason == "protocol"


# --- before the commit: there is something to relay ---------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503, 529])
async def test_only_providers_error_is_relayed_verbatim(dialect: Dialect, status: int) -> None:
    body = b'{ "error" : {"message": "na\\u00efve", "n": 10000000000000000000000} }\n'
    upstream = FakeUpstream([[http_reply(body, status, ((b"X-Odd", b"1"), (b"Retry-After", b"7")))]])
    async with watched(upstream) as run:
        run.idle = 1
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert (reply.status, reply.body, reply.header("retry-after")) == (status, body, "7")
        assert reply.raw.startswith(b"HTTP/1.1 %d Reply\r\nX-Odd: 1\r\nRetry-After: 7\r\n" % status)
        assert reply.header("X-Penstock-Error") is None
        exchange = run.harness.exchanges[0]
        assert (exchange.status, exchange.stream_end, exchange.error) == (status, "complete", None)


async def test_only_providers_error_event_is_relayed_verbatim(dialect: Dialect) -> None:
    async with watched(FakeUpstream([stream_reply(dialect.error_event, b": more\n\n")])) as run:
        run.idle = 1
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert (reply.status, reply.body, reply.is_complete) == (200, dialect.error_event + b": more\n\n", True)
        exchange = run.harness.exchanges[0]
        assert (exchange.attempts[0].reason, exchange.stream_end) == ("error_event", "complete")


@pytest.mark.parametrize("first", ["error_event", "status", "reset", "half_an_event", "timeout"])
async def test_no_byte_of_a_failed_attempt_reaches_the_client(dialect: Dialect, first: str) -> None:
    scripts: dict[str, list[Step]] = {
        "error_event": [*stream_reply(dialect.error_event)[:-1], Stall()],
        "status": [http_reply(b"first", 503)],
        "reset": [Reset()],
        "half_an_event": [STREAM_HEAD, chunk(HALF_EVENT), Close()],
        "timeout": [STREAM_HEAD, chunk(HALF_EVENT), Stall()],
    }
    failing, working = FakeUpstream([scripts[first]]), FakeUpstream([stream_reply(*dialect.events)])
    timeouts = PATIENT | ({"first_byte": 0.2} if first == "timeout" else {})
    async with watched(failing, working, timeouts=timeouts) as run:
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        run.idle = 2 if first == "status" and failing.connections else 1
        assert (reply.status, reply.body, reply.is_complete) == (200, b"".join(dialect.events), True)
        assert reply.header("X-Penstock-Fallback-Count") == "1"
        assert working.requests[0].body == dialect.body
        attempts = run.harness.exchanges[0].attempts
        assert attempts[0].reason is not None
        assert attempts[1].reason is None


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n"])
async def test_answer_without_a_body_ends_with_its_head(dialect: Dialect, status: int, length: bytes) -> None:
    script = [b"HTTP/1.1 %d None\r\n%bX-A: 1\r\n\r\n" % (status, length)]
    async with watched(FakeUpstream([script, [http_reply(b"next")]])) as run:
        run.idle, run.settled = 1, 2
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", dialect.path, body=dialect.body))
        reply = await client.receive_reply()
        assert (reply.status, reply.body, reply.is_complete) == (status, b"", True)
        if status == 204:  # RFC 9110 section 8.6
            assert reply.header("content-length") is None
        await client.send(run.harness.request_bytes("POST", dialect.path, body=dialect.body))
        assert (await client.receive_reply()).body == b"next"


async def test_interim_answers_are_dropped(dialect: Dialect) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    async with watched(FakeUpstream([[interim, *stream_reply(*dialect.events)]])) as run:
        run.idle = 1
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert (reply.status, reply.body) == (200, b"".join(dialect.events))


@pytest.mark.parametrize("behind", ["length", "chunks"])
async def test_surplus_bytes_are_never_delivered(dialect: Dialect, behind: str) -> None:
    surplus = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen"
    answer = http_reply(b"mine") if behind == "length" else STREAM_HEAD + chunk(dialect.events[0]) + LAST_CHUNK
    async with watched(FakeUpstream([[answer + surplus], [http_reply(b"second")]])) as run:
        run.settled, run.idle = 2, 1
        client = await run.harness.raw()
        for expected in (b"mine" if behind == "length" else dialect.events[0], b"second"):
            await client.send(run.harness.request_bytes("POST", dialect.path, body=dialect.body))
            assert (await client.receive_reply()).body == expected
        assert run.upstreams[0].connection_count == 2


# --- after the commit -----------------------------------------------------------------------------------------------

CUTS: dict[str, bytes] = {
    "event_boundary": b"",
    "in_a_size_line": b"3",
    "in_a_size_lines_end": b"30\r",
    "behind_a_size_line": b"30\r\n",
    "in_a_chunk": b"30\r\n" + HALF_EVENT,
    "behind_a_payload": b"b\r\n" + HALF_EVENT,
    "behind_a_payloads_cr": b"b\r\n" + HALF_EVENT + b"\r",
    "in_an_event": chunk(HALF_EVENT),
    "in_an_events_end": chunk(b"data: 1\n"),
    "in_a_character": chunk(b'data: {"x":"\xf0\x9f'),
    "in_a_name": chunk(b"event: err"),
    "in_an_extension": b"30;x=1",
}


def assert_ends_in_error(dialect: Dialect, body: bytes, code: str, kind: str) -> None:
    """The stream is parsable to its end, which is one whole terminal event."""
    assert body.endswith(b"\n\n")
    *_, last = events_of(body)
    assert last.startswith(b"event: error\ndata: ")
    assert dialect.is_terminal(payload_of(last), code, kind)
    assert body.count(b"event: error\n") == 1


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("cut", CUTS)
async def test_broken_stream_ends_in_one_terminal_event(dialect: Dialect, cut: str, end: str) -> None:
    pause, first = Pause(), dialect.events[0]
    tail: list[Step] = [CUTS[cut]] if CUTS[cut] else []
    upstream = FakeUpstream([[STREAM_HEAD, chunk(first), pause, *tail, ENDS[end]()]])
    async with watched(upstream, timeouts=idle_of(end)) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == first
            pause.release()
            reply = await stream.read()
            assert stream.client.closed.is_set() or not await stream.client.receive()
        assert not reply.is_complete
        assert reply.body.startswith(first)
        assert_ends_in_error(dialect, reply.body, "upstream_mid_stream_failure", "provider_error")
        await run.harness.wait_settled(1)
        exchange = run.harness.exchanges[0]
        assert (exchange.status, exchange.stream_end) == (200, "upstream_failed")
        assert [attempt.reason for attempt in exchange.attempts] == [None]
        assert exchange.window is not None
        assert exchange.window.text.startswith(first)


@pytest.mark.parametrize("bad", [b"zz\r\n", b"3\r\nabcd\r\n", b"0\r\nContent-Length: 1\r\n\r\n", b"0\r\n: x\r\n\r\n"])
async def test_malformed_chunk_breaks_the_stream_off(dialect: Dialect, bad: bytes) -> None:
    pause, first = Pause(), dialect.events[0]
    async with watched(FakeUpstream([[STREAM_HEAD, chunk(first), pause, bad, Stall()]])) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == first
            pause.release()
            reply = await stream.read()
        assert not reply.is_complete
        assert reply.body.startswith(first)
        assert_ends_in_error(dialect, reply.body, "upstream_mid_stream_failure", "provider_error")
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "upstream_failed"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
async def test_terminal_event_is_parsable_behind_any_line_end(dialect: Dialect, newline: bytes) -> None:
    pause = Pause()
    first = dialect.events[0].replace(b"\n", newline)
    script: list[Step] = [STREAM_HEAD, chunk(first + b": c" + newline), pause, chunk(HALF_EVENT), Close()]
    async with watched(FakeUpstream([script])) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == first + b": c" + newline
            pause.release()
            reply = await stream.read()
        body = reply.body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        assert_ends_in_error(dialect, body, "upstream_mid_stream_failure", "provider_error")
        await run.harness.wait_settled(1)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_json_cut_short_is_seen_as_cut_short(dialect: Dialect, framing: str, end: str) -> None:
    pause = Pause()
    head = JSON_HEAD if framing == "length" else STREAM_HEAD.replace(b"text/event-stream", b"application/json")
    part = b'{"a":1,' if framing == "length" else chunk(b'{"a":1,')
    upstream = FakeUpstream([[head + part, pause, ENDS[end]()]])
    async with watched(upstream, timeouts=idle_of(end)) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            pause.release()
            reply = await stream.read()
        assert (reply.status, reply.body, reply.is_complete) == (200, b'{"a":1,', False)
        await run.harness.wait_settled(1)
        assert run.harness.exchanges[0].stream_end == "upstream_failed"


@pytest.mark.parametrize("end", ["reset", "stall"])
async def test_close_delimited_stream_that_breaks_ends_in_a_terminal_event(dialect: Dialect, end: str) -> None:
    pause, first = Pause(), dialect.events[0]
    async with watched(FakeUpstream([[EVENT_HEAD, first, pause, ENDS[end]()]]), timeouts=idle_of(end)) as run:
        async with run.harness.stream("POST", dialect.path, body=dialect.body) as stream:
            assert await anext(aiter(stream)) == first
            pause.release()
            reply = await stream.read()
        assert not reply.is_complete
        assert_ends_in_error(dialect, reply.body, "upstream_mid_stream_failure", "provider_error")


async def test_close_delimited_stream_ends_cleanly(dialect: Dialect) -> None:
    async with watched(FakeUpstream([[EVENT_HEAD, *dialect.events, Close()]])) as run:
        reply = await run.harness.request("POST", dialect.path, body=dialect.body)
        assert (reply.body, reply.is_complete) == (b"".join(dialect.events), True)
        assert run.harness.exchanges[0].usage is not None


async def test_stream_broken_under_the_usage_filter_ends_in_a_terminal_event(dialect: Dialect) -> None:
    pause, first = Pause(), dialect.events[0]
    script: list[Step] = [STREAM_HEAD, chunk(first), pause, chunk(HALF_EVENT), Close()]
    async with watched(FakeUpstream([script])) as run:
        body = b'{"model":"claude-m","stream":true}'
        async with run.harness.stream("POST", dialect.path, body=body) as stream:
            assert await anext(aiter(stream)) == first
            pause.release()
            reply = await stream.read()
        assert not reply.is_complete
        assert_ends_in_error(dialect, reply.body, "upstream_mid_stream_failure", "provider_error")
