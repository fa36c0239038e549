"""What chunk hooks and filters see of bodies that are coded, huge, held back or wrongly edited."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from fault_upstream import OPENAI, events_of, payload_of, watched
from penstock import Chunk, Exchange, PluginError, hookimpl
from penstock import editing as editing_module
from penstock.heads import ResponseHead, read_response_head
from penstock.testing import LAST_CHUNK, STREAM_HEAD, Close, FakeUpstream, Pause, chunk, http_reply, stream_reply
from penstock.testing.strategies import encode
from penstock.testing.upstream import Step

pytestmark = pytest.mark.anyio
WHOLE = b"".join(OPENAI.events)
JSON = b'{"id":"c1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
JSON_REQUEST = b'{"model":"m","messages":[]}'
CODINGS = ("gzip", "br", "zstd")


class Watcher:
    """Keep what was seen of each chunk, and put END for end."""

    sees_chunks = True

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, bool]] = []
        self.events: list[bytes] = []

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        return self.note(chunk)

    def note(self, chunk: Chunk) -> bytes | None:
        self.seen.append((chunk.data, chunk.is_end))
        self.events += [event.raw for event in chunk.events]
        return chunk.data.replace(b" end", b" END")


class AsyncWatcher(Watcher):
    """The same, awaiting."""

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:  # type: ignore[override]
        await checkpoint()
        return self.note(chunk)


BOTH = pytest.mark.parametrize("kind", [Watcher, AsyncWatcher], ids=["def", "async"])


def coded_head(coding: str) -> bytes:
    return STREAM_HEAD[:-2] + b"Content-Encoding: %b\r\n\r\n" % coding.encode()


def coded_stream(body: bytes, coding: str, size: int = 11) -> list[Step]:
    coded = encode(body, coding) if coding in CODINGS else body
    pieces = [chunk(coded[at : at + size]) for at in range(0, len(coded), size)]
    return [coded_head(coding), *pieces, LAST_CHUNK]


def coded_reply(body: bytes, coding: str, status: int = 200) -> bytes:
    fields = ((b"Content-Type", b"application/json"), (b"Content-Encoding", coding.encode()))
    return http_reply(body, status, fields)


# --- content codings ------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("coding", CODINGS)
async def test_hook_sees_and_edits_a_stream_that_came_coded(kind: Any, coding: str) -> None:
    watcher = kind()
    async with watched(FakeUpstream([coded_stream(WHOLE, coding)]), plugins=[watcher]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, {"Accept-Encoding": coding}, OPENAI.body)
        assert (reply.body, reply.is_complete) == (WHOLE.replace(b" end", b" END"), True)
        assert reply.header("content-encoding") is None
        assert watcher.events == list(OPENAI.events)
        usage = run.harness.exchanges[0].usage
        assert usage is not None
        assert (usage.source, usage.input, usage.output) == ("provider", 7, 3)


@BOTH
@pytest.mark.parametrize("coding", CODINGS)
async def test_hook_sees_json_that_came_coded(kind: Any, coding: str) -> None:
    watcher = kind()
    upstream = FakeUpstream([[coded_reply(encode(JSON, coding), coding)]])
    async with watched(upstream, plugins=[watcher]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, body=JSON_REQUEST)
        assert (reply.status, reply.body, reply.header("content-encoding")) == (200, JSON, None)
        assert b"".join(data for data, _ in watcher.seen) == JSON
        usage = run.harness.exchanges[0].usage
        assert usage is not None
        assert (usage.source, usage.input, usage.output) == ("provider", 7, 3)


@BOTH
async def test_identity_is_no_coding(kind: Any) -> None:
    watcher = kind()
    async with watched(FakeUpstream([coded_stream(WHOLE, "identity")]), plugins=[watcher]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert reply.body == WHOLE.replace(b" end", b" END")
        assert watcher.events == list(OPENAI.events)


async def test_stream_called_identity_gets_its_terminal_event() -> None:
    pause = Pause()
    script: list[Step] = [coded_head("identity"), chunk(OPENAI.events[0]), pause, Close()]
    async with watched(FakeUpstream([script])) as run:
        async with run.harness.stream("POST", OPENAI.path, body=OPENAI.body) as stream:
            assert await anext(aiter(stream)) == OPENAI.events[0]
            pause.release()
            reply = await stream.read()
        last = payload_of(events_of(reply.body)[-1])
        assert OPENAI.is_terminal(last, "upstream_mid_stream_failure", "provider_error")


async def test_filter_strips_the_usage_frame_of_a_coded_stream() -> None:
    upstream = FakeUpstream([coded_stream(WHOLE, "gzip")])
    async with watched(upstream) as run:
        run.idle = 1
        body = b'{"model":"m","stream":true,"messages":[]}'
        reply = await run.harness.request("POST", OPENAI.path, {"Accept-Encoding": "gzip"}, body)
        assert reply.body == b"".join(event for event in OPENAI.events if b"usage" not in event)
        assert reply.header("content-encoding") is None


async def test_unwatched_coded_stream_keeps_its_coding() -> None:
    async with watched(FakeUpstream([coded_stream(WHOLE, "gzip")])) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, {"Accept-Encoding": "gzip"}, OPENAI.body)
        assert (reply.body, reply.header("content-encoding")) == (encode(WHOLE, "gzip"), "gzip")


def unreadable(why: str) -> list[Step]:
    coded = encode(JSON, "gzip")
    scripts: dict[str, list[Step]] = {
        "unknown": [coded_reply(b"what is this", "x-secret")],
        "corrupt": [coded_reply(b"this is no gzip at all", "gzip")],
        "cut off": [coded_reply(coded[:-6], "gzip")],
        "one of two": [coded_reply(coded, "gzip, x-secret")],
        "corrupt stream": [coded_head("gzip"), chunk(b"this is no gzip at all"), LAST_CHUNK],
    }
    return scripts[why]


WHYS = pytest.mark.parametrize("why", ["unknown", "corrupt", "cut off", "one of two", "corrupt stream"])


@BOTH
@WHYS
async def test_answer_a_hook_cannot_read_is_a_failed_attempt(kind: Any, why: str) -> None:
    watcher = kind()
    async with watched(FakeUpstream([unreadable(why)]), plugins=[watcher]) as run:
        reply = await run.harness.request("POST", OPENAI.path, body=JSON_REQUEST)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert (reply.status, reply.header("X-Penstock-Error")) == (502, "provider_error")
        (attempt,) = run.harness.exchanges[0].attempts
        assert attempt.reason == "protocol"
        assert watcher.seen == []


@WHYS
async def test_next_provider_is_tried_for_an_answer_a_hook_cannot_read(why: str) -> None:
    watcher = Watcher()
    second = FakeUpstream([[http_reply(JSON)]])
    async with watched(FakeUpstream([unreadable(why)]), second, plugins=[watcher]) as run:
        reply = await run.harness.request("POST", OPENAI.path, body=JSON_REQUEST)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert (reply.status, reply.body) == (200, JSON)
        assert [attempt.reason for attempt in run.harness.exchanges[0].attempts] == ["protocol", None]


@BOTH
@pytest.mark.parametrize("ending", ["corrupt", "cut off"])
async def test_coding_that_breaks_in_the_middle_ends_the_stream_as_the_providers_failure(
    kind: Any, ending: str
) -> None:
    """Two gzip members: the second is unreadable, the first was passed on before."""
    pause = Pause()
    rest = {"corrupt": b"no member of gzip", "cut off": encode(OPENAI.events[1], "gzip")[:-6]}[ending]
    script: list[Step] = [coded_head("gzip"), chunk(encode(OPENAI.events[0], "gzip")), pause, chunk(rest), LAST_CHUNK]
    async with watched(FakeUpstream([script]), plugins=[kind()]) as run:
        async with run.harness.stream("POST", OPENAI.path, body=OPENAI.body) as stream:
            assert await anext(aiter(stream)) == OPENAI.events[0]
            pause.release()
            reply = await stream.read()
        await run.harness.wait_settled(1)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert not reply.is_complete
        last = payload_of(events_of(reply.body)[-1])
        assert OPENAI.is_terminal(last, "upstream_mid_stream_failure", "provider_error")
        assert run.harness.exchanges[0].stream_end == "upstream_failed"


def head_of(*lines: bytes) -> ResponseHead:
    block = b"".join(line + b"\r\n" for line in (*lines, b"Content-Length: 1"))
    return read_response_head(b"HTTP/1.1 200 OK\r\n" + block + b"\r\n")


def test_codings_of_all_lines_count() -> None:
    assert editing_module.coding_of(head_of()) is None
    assert editing_module.coding_of(head_of(b"Content-Encoding: identity")) is None
    assert editing_module.coding_of(head_of(b"Content-Encoding: identity", b"content-encoding: br")) == b"identity,br"
    assert editing_module.coding_of(head_of(b"Content-Encoding: GZIP , br")) == b"GZIP , br"


# --- large events ---------------------------------------------------------------------------------------------------


@BOTH
async def test_event_of_two_megabytes_reaches_hook_and_client(kind: Any) -> None:
    large = b'data: {"x":"' + b"x" * 2_000_000 + b'"}\n\n'
    watcher = kind()
    async with watched(FakeUpstream([stream_reply(OPENAI.events[0], large)]), plugins=[watcher]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert (reply.body, reply.is_complete) == (OPENAI.events[0] + large, True)
        assert watcher.events == [OPENAI.events[0], large]


@BOTH
@pytest.mark.parametrize("is_whole", [True, False])
async def test_event_beyond_the_bound_ends_the_stream_after_those_before_it(
    kind: Any, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editing_module, "MAX_EVENT_BYTES", 1000)
    watcher, pause = kind(), Pause()
    large = b"data: " + b"x" * 2000 + (b"\n\n" if is_whole else b"")
    first, second = OPENAI.events[:2]
    script: list[Step] = [STREAM_HEAD, chunk(first), pause, chunk(second + large), LAST_CHUNK]
    async with watched(FakeUpstream([script]), plugins=[watcher]) as run:
        async with run.harness.stream("POST", OPENAI.path, body=OPENAI.body) as stream:
            assert await anext(aiter(stream)) == first
            pause.release()
            reply = await stream.read()
        await run.harness.wait_settled(1)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert reply.body.startswith(first + second.replace(b" end", b" END"))
        assert b"xxx" not in reply.body
        assert watcher.events == [first, second]
        last = payload_of(events_of(reply.body)[-1])
        assert OPENAI.is_terminal(last, "upstream_mid_stream_failure", "provider_error")
        assert run.harness.exchanges[0].stream_end == "upstream_failed"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_chunk_has_all_its_events_whatever_ends_their_lines(newline: bytes) -> None:
    events = [b"data: " + text + newline * 2 for text in (b"a", b"b" * 2_000_000)]
    assert [event.raw for event in Chunk(b"".join(events), is_event_stream=True).events] == events


# --- what hooks give back -------------------------------------------------------------------------------------------


class HoldingBack:
    """Hold everything back until the end."""

    sees_chunks = True

    def __init__(self) -> None:
        self.held = b""

    @hookimpl
    def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes:
        self.held += chunk.data
        return self.held if chunk.is_end else b""


@BOTH
async def test_what_one_hook_holds_back_the_next_does_not_see(kind: Any) -> None:
    watcher = kind()
    upstream = FakeUpstream([stream_reply(*OPENAI.events)])
    async with watched(upstream, plugins=[HoldingBack(), watcher]) as run:
        run.idle = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        assert reply.body == WHOLE.replace(b" end", b" END")
        assert watcher.seen == [(WHOLE, True)]


async def later() -> bytes:
    return b"too late"


def awaitable() -> Coroutine[Any, Any, bytes]:
    return later()


@pytest.mark.parametrize("value", [awaitable, lambda: "text", lambda: bytearray(b"x"), lambda: 7])
@pytest.mark.parametrize("beside", [[], [AsyncWatcher]], ids=["alone", "beside async"])
@pytest.mark.parametrize("is_stream", [True, False])
async def test_chunk_hook_that_gives_back_no_bytes_is_named(value: Any, beside: list[Any], is_stream: bool) -> None:
    def give(self: Any, exchange: Exchange, chunk: Chunk) -> Any:
        return value()

    plugins = [("wrong", type("Wrong", (), {"on_stream_chunk": hookimpl(give), "sees_chunks": True}))]
    script = stream_reply(*OPENAI.events) if is_stream else [http_reply(JSON)]
    async with watched(FakeUpstream([script]), plugins=[*plugins, *beside]) as run:
        run.faults = 1
        reply = await run.harness.request("POST", OPENAI.path, body=OPENAI.body)
        run.idle = len(run.harness.gateway.transports.direct.idle)
        assert not reply.is_complete
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, fault.hook) == ("wrong", "on_stream_chunk")
        assert isinstance(fault.__cause__, TypeError)
