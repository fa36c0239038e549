"""Every byte arrives as it was sent, for any content, framing, coding and segmentation, on both loops.

Drawn cases run in memory, where a segment is a read, and over sockets; each event loop has a thread of its own.
The short form draws some sixty cases per property; ``PENSTOCK_TESTS=full`` draws over a thousand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fault_upstream import bindings
from penstock import Exchange, Usage, new_key
from penstock.testing import Close, FakeUpstream, Harness, RecordedRequest, Reply, request_bytes
from penstock.testing.harness import PEPPER
from penstock.testing.strategies import (
    WireResponse,
    chat_bodies,
    chunked_bodies,
    codings,
    encode,
    http_responses,
    json_strings,
    segmentations,
)
from penstock.testing.upstream import Step
from test_dialects_openai import classes_on_wire

# A third of the profile's cases: every property runs four times, on two loops in two ways.
settings_here = settings(
    max_examples=settings().max_examples // 3, suppress_health_check=list(HealthCheck), deadline=None
)
Fields = list[tuple[bytes, bytes]]


@attrs.define(eq=False)
class Carrier:
    """Carry one drawn exchange after the other through one gateway."""

    portal: BlockingPortal
    harness: Harness
    upstream: FakeUpstream
    script: list[Step]

    def carry(self, request: Sequence[bytes], response: Sequence[Step]) -> tuple[RecordedRequest, Reply, Exchange]:
        """Return the request as the upstream got it, the answer as the client got it, and the exchange."""
        return self.portal.call(self._carry, request, response)

    async def _carry(
        self, request: Sequence[bytes], response: Sequence[Step]
    ) -> tuple[RecordedRequest, Reply, Exchange]:
        self.script[:] = response
        harness, upstream = self.harness, self.upstream
        asked, settled = len(upstream.requests), harness.settled
        client = await harness.raw()
        try:
            await client.send(*request)
            reply = await client.receive_reply()
            await harness.wait_settled(settled + 1)
        finally:
            client.close()
            harness._clients.remove(client)
        assert not harness.faults
        assert len(upstream.requests) == asked + 1, reply
        return upstream.requests[-1], reply, harness.exchanges[-1]


@pytest.fixture(scope="module", params=["asyncio-memory", "uvloop-memory", "asyncio-socket", "uvloop-socket"])
def carrier(request: pytest.FixtureRequest) -> Iterator[Carrier]:
    loop, way = request.param.split("-")
    script: list[Step] = []
    upstream = FakeUpstream([lambda _: list(script)], repeat=True)
    key = new_key()
    keys = [
        {
            "name": "test",
            "secret": key,
            "model_aliases": {"fast": "gpt-4o-mini", "smart": "claude-x"},
        },
        {"name": "forwards", "secret": (forwarding := new_key()), "usage_frame": "forward"},
    ]
    config: dict[str, Any] = {
        "virtual_keys": {"pepper": PEPPER, "keys": keys},
        **bindings(upstream, model_map={"mapped": "gpt-x"}, models=["gpt-4o-mini", "claude-x", "m"]),
    }
    config["routing"]["bindings"][0]["handle"] = "h"
    harness = Harness((), config, upstream, socket=way == "socket")
    harness.key = key
    options = {"use_uvloop": loop == "uvloop"}
    with (
        start_blocking_portal("asyncio", backend_options=options) as portal,
        portal.wrap_async_context_manager(harness),
    ):
        found = Carrier(portal, harness, upstream, script)
        found.harness.forwarding_key = forwarding  # type: ignore[attr-defined]
        yield found


def steps_of(response: WireResponse, segments: Sequence[bytes]) -> list[Step]:
    return [*segments, Close()] if response.is_close_delimited else [*segments]


def lines_of(fields: Fields) -> bytes:
    return b"".join([b"%b: %b\r\n" % field for field in fields])


# --- what a client sends --------------------------------------------------------------------------------------------

PATHS = {
    "/v1/chat/completions": "gpt-4o-mini",
    "/v1/responses": "gpt-4o-mini",
    "/v1/completions": "gpt-4o-mini",
    "/v1/embeddings": "gpt-4o-mini",
    "/v1/messages": "claude-x",
    "/v1/messages/count_tokens": "claude-x",
}


@st.composite
def multipart_bodies(draw: st.DrawFn, model: str) -> bytes:
    """Draw a form with a model among binary files."""
    file = draw(st.binary(max_size=100))
    parts = [
        b'Content-Disposition: form-data; name="model"\r\n\r\n' + model.encode(),
        b'Content-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n\r\n' + file,
    ]
    assume(b"--bound" not in file)
    return b"".join(b"--bound\r\n" + part + b"\r\n" for part in draw(st.permutations(parts))) + b"--bound--\r\n"


@attrs.frozen
class Sent:
    """A request in its wire form, with what must come out of it."""

    path: str
    content: bytes
    """Before content coding."""
    body: bytes
    segments: list[bytes] = attrs.field(repr=False)
    is_http10: bool
    coding: str


@st.composite
def requests(draw: st.DrawFn, key: str, *, fields: Fields | None = None) -> Sent:
    path = draw(st.sampled_from([*PATHS, "/v1/audio/transcriptions"]))
    extra: Fields = list(fields or ()) or [(b"Accept-Encoding", b"gzip, br, zstd")]
    if path in PATHS:
        content = draw(chat_bodies(model=PATHS[path], stream=draw(st.booleans())))
    else:
        content = draw(multipart_bodies("gpt-4o-mini"))
        extra.append((b"Content-Type", b"multipart/form-data; boundary=bound"))
    coding = draw(st.sampled_from(["", "", *codings()]))
    body = encode(content, coding) if coding else content
    if coding:
        extra.append((b"Content-Encoding", coding.encode()))
    query = draw(st.sampled_from(["", "?beta=true", "?a=%20&b=/?&a=2"]))
    is_http10 = draw(st.integers(0, 4)) == 0
    if not is_http10 and draw(st.booleans()):
        head = request_bytes("POST", path + query, [*extra, (b"Transfer-Encoding", b"chunked")], key=key)
        wire = head + draw(chunked_bodies(body, extensions=False))
    else:
        wire = request_bytes("POST", path + query, extra, body, key=key)
    if is_http10:
        wire = wire.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)
    return Sent(path + query, content, body, draw(segmentations(wire)), is_http10, coding)


@settings_here
@given(data=st.data())
def test_both_bodies_arrive_as_they_were_sent(carrier: Carrier, data: st.DataObject) -> None:
    sent = data.draw(requests(carrier.harness.key))
    response = data.draw(http_responses())
    segments = data.draw(segmentations(response.raw))
    got, reply, exchange = carrier.carry(sent.segments, steps_of(response, segments))
    assert got.body == sent.body
    assert got.headers.get_all(b"content-length") == [b"%d" % len(sent.body)]
    assert b"transfer-encoding" not in got.headers
    assert got.headers.get(b"content-encoding") == (sent.coding.encode() or None)
    assert got.target == sent.path.encode()
    assert (reply.status, reply.body, reply.is_complete) == (response.status, response.body, True)
    assert (exchange.status, exchange.stream_end) == (response.status, "complete")
    head, _, raw = reply.raw.partition(b"\r\n\r\n")
    kept = [field for field in response.fields if field[0] not in {b"Content-Length", b"Transfer-Encoding"}]
    assert head.startswith(b"HTTP/1.1 %d Drawn\r\n" % response.status + lines_of(kept))
    chunked = (b"Transfer-Encoding", b"chunked") in response.fields
    if sent.is_http10:
        assert raw == response.body
        assert reply.header("transfer-encoding") is None
        assert reply.header("connection") == "close"
    elif chunked:
        assert raw == response.raw.partition(b"\r\n\r\n")[2]
    if not chunked and not response.is_close_delimited:
        assert reply.header("content-length") == str(len(response.body))


# --- header fields --------------------------------------------------------------------------------------------------

TRAVELS: Fields = [
    (b"X-Custom", b"a  b,c"),
    (b"x-CUSTOM", b"\xc3\xa9"),
    (b"anthropic-beta", b"one"),
    (b"Anthropic-Beta", b"two,three"),
    (b"OpenAI-Beta", b"responses=v9"),
    (b"anthropic-version", b"2023-06-01"),
    (b"User-Agent", b"test/1"),
    (b"ACCEPT", b"*/*"),
    (b"x-stainless-os", b"Linux"),
    (b"X-Penstocky", b"no prefix of ours"),
    (b"X-Forwarded", b"no prefix either"),
    (b"Date", b"Sat, 21 Nov 2026 00:00:00 GMT"),
]
STAYS_REQUEST: Fields = [
    (b"Cookie", b"a=1"),
    (b"Forwarded", b"for=1.2.3.4"),
    (b"X-Forwarded-For", b"1.2.3.4"),
    (b"x-forwarded-proto", b"https"),
    (b"X-Penstock-Cache", b"respect"),
    (b"x-penstock-anything", b"1"),
    (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    (b"tracestate", b"a=1"),
    (b"baggage", b"a=1"),
    (b"TE", b"trailers"),
    (b"Keep-Alive", b"timeout=5"),
    (b"Proxy-Connection", b"keep-alive"),
    (b"Proxy-Authorization", b"Basic x"),
    (b"X-API-Key", b"second credential"),
    (b"x-goog-api-key", b"third credential"),
]
STAYS_RESPONSE: Fields = [
    (b"Connection", b"keep-alive"),
    (b"Keep-Alive", b"timeout=5"),
    (b"Set-Cookie", b"a=1"),
    (b"Traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    (b"X-Penstock-Model", b"spoofed"),
    (b"Proxy-Authenticate", b"Basic"),
]
HOPS = [(b"Connection", b"X-Hop, keep-alive"), (b"X-Hop", b"1")]


@st.composite
def mixed_fields(draw: st.DrawFn, stays: Fields) -> tuple[Fields, Fields]:
    """Draw fields in any order; returns all and those that travel."""
    fields = draw(st.lists(st.sampled_from([*TRAVELS, *stays]), max_size=8, unique=True))
    if draw(st.booleans()) and not any(name == b"Connection" for name, _ in fields):
        fields = draw(st.permutations([*fields, *HOPS]))
    return list(fields), [field for field in fields if field in TRAVELS]


@settings_here
@given(data=st.data())
def test_header_lines_travel_in_order_as_they_are_spelled(carrier: Carrier, data: st.DataObject) -> None:
    request_fields, there = data.draw(mixed_fields(STAYS_REQUEST))
    response_fields, back = data.draw(mixed_fields(STAYS_RESPONSE))
    authorization = (b"Authorization", b"Bearer " + carrier.harness.key.encode())
    wire = request_bytes("POST", "/v1/chat/completions", [authorization, *request_fields], b'{"model":"m"}')
    answer = b"HTTP/1.1 203 Odd Reason!\r\n" + lines_of(response_fields) + b"Content-Length: 2\r\n\r\n{}"
    got, reply, _ = carrier.carry(data.draw(segmentations(wire)), data.draw(segmentations(answer)))
    own = {b"host", b"content-length", b"accept-encoding", b"authorization"}
    travelled = [line for line in got.head.split(b"\r\n")[1:-2] if line.partition(b":")[0].lower() not in own]
    assert travelled == [b"Content-Type: application/json", *lines_of(there).split(b"\r\n")[:-1]]
    assert got.headers.get_all(b"authorization") == [b"Bearer sk-upstream"]
    assert len(got.headers.get_all(b"host")) == 1
    expected = b"HTTP/1.1 203 Odd Reason!\r\n" + lines_of(back) + b"X-Penstock-Request-Id: "
    assert reply.raw.startswith(expected)
    assert reply.headers.get_all(b"x-penstock-model") == [b"m"]


# --- edits ----------------------------------------------------------------------------------------------------------


RENAMED = [
    ("fast", "/v1/chat/completions", "gpt-4o-mini"),
    ("mapped", "/v1/chat/completions", "gpt-x"),
    ("openai_compatible/m/n", "/v1/chat/completions", "m/n"),
    ("h/m", "/v1/responses", "m"),
    ("smart", "/v1/messages", "claude-x"),
    ("anthropic/claude-y", "/v1/messages", "claude-y"),
]
"""What a client asks for, where, and what the provider is asked for."""


@settings_here
@given(data=st.data())
def test_only_the_model_differs(carrier: Carrier, data: st.DataObject) -> None:
    asked, path, upstream_model = data.draw(st.sampled_from(RENAMED))
    body = data.draw(chat_bodies(model=asked, stream=data.draw(st.booleans())))
    plain = json.dumps(asked).encode()
    assume(body.count(plain) == 1)
    spelled = data.draw(json_strings(st.just(asked)))
    before, after = body.split(plain)
    coding = data.draw(st.sampled_from(["", "", *codings()]))
    wire_body = before + spelled + after
    fields: Fields = [(b"Content-Encoding", coding.encode())] if coding else []
    wire_body = encode(wire_body, coding) if coding else wire_body
    wire = request_bytes("POST", path, fields, wire_body, key=carrier.harness.key)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    got, reply, _ = carrier.carry(data.draw(segmentations(wire)), [answer])
    assert got.body == before + json.dumps(upstream_model).encode() + after
    assert b"content-encoding" not in got.headers
    assert reply.header("x-penstock-model") == upstream_model


USAGE = b'{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}'
ASKING = b'"stream_options":{"include_usage":true}'


@st.composite
def usage_streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draw a chat stream as it is without and with ``include_usage``."""
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    without, added = [], []
    for text in draw(st.lists(json_strings(), min_size=1, max_size=4)):
        front = b'data: {"id":"c1","choices":[{"index":0,"delta":{"content":' + text + b"}}]"
        without.append(front + b"}" + end + end)
        added.append(front + b',"usage":null}' + end + end)
    frame = b'data: {"id":"c1","choices":[],"usage":' + USAGE + b"}" + end + end
    done = b"data: [DONE]" + end + end
    return b"".join([*without, done]), b"".join([*added, frame, done])


@st.composite
def framed(draw: st.DrawFn, body: bytes) -> list[Step]:
    """Draw an event stream's wire form, in any framing and segmentation."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    if framing == "length":
        wire = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    elif framing == "chunked":
        wire = head + b"Transfer-Encoding: chunked\r\n\r\n" + draw(chunked_bodies(body))
    else:
        wire = head + b"\r\n" + body
    return [*draw(segmentations(wire)), *([Close()] if framing == "close" else [])]


@settings_here
@given(data=st.data())
@pytest.mark.parametrize("frame", ["strip", "forward"])
def test_usage_asked_for_by_the_gateway_leaves_no_trace(carrier: Carrier, frame: str, data: st.DataObject) -> None:
    without, with_usage = data.draw(usage_streams())
    body = data.draw(chat_bodies(stream=False)).rstrip()
    body = body[:-1] + data.draw(st.sampled_from([b',"stream":true}', b' , "stream" : true \n}  ']))
    key = carrier.harness.key if frame == "strip" else carrier.harness.forwarding_key  # type: ignore[attr-defined]
    wire = request_bytes("POST", "/v1/chat/completions", (), body, key=key)
    got, reply, exchange = carrier.carry(data.draw(segmentations(wire)), data.draw(framed(with_usage)))
    assert got.body.replace(b"," + ASKING, b"") == body
    assert got.body.count(ASKING) == 1
    assert (reply.body, reply.is_complete) == (without if frame == "strip" else with_usage, True)
    assert exchange.usage == Usage(input=7, output=3)


@settings_here
@given(data=st.data())
@pytest.mark.parametrize("asked", [True, False])
def test_usage_the_client_decided_about_is_its_own_affair(carrier: Carrier, asked: bool, data: st.DataObject) -> None:
    _, with_usage = data.draw(usage_streams())
    body = data.draw(chat_bodies(stream=True))
    if not asked:
        body = body.replace(b'{"include_usage" : true}', b'{"include_usage": false}')
    wire = request_bytes("POST", "/v1/chat/completions", (), body, key=carrier.harness.key)
    got, reply, _ = carrier.carry([wire], data.draw(framed(with_usage)))
    assert got.body == body
    assert reply.body == with_usage


# --- recorded replies -----------------------------------------------------------------------------------------------

ENDPOINTS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "messages": "/v1/messages",
}


@pytest.mark.parametrize(
    "provider", ["openai", "azure-openai", "anthropic", "groq", "deepseek", "mistral", "openrouter"]
)
def test_recorded_streams_arrive_whole_and_are_metered(carrier: Carrier, recordings: Path, provider: str) -> None:
    carried = 0
    for meta_file in sorted((recordings / "streaming" / provider).glob("*.meta.json")):
        meta = json.loads(meta_file.read_bytes())
        path = ENDPOINTS.get(meta["api"])
        if path is None:
            continue
        body = meta_file.with_name(meta["file"]).read_bytes()
        model = "claude-x" if meta["api"] == "messages" else "gpt-4o-mini"
        asked: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
        request = request_bytes("POST", path, (), asked, key=carrier.harness.key)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % meta["content_type"].encode()
        for size in (113, 100_000):
            pieces = [body[at : at + size] for at in range(0, len(body), size)]
            chunks = b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]) + b"0\r\n\r\n"
            wire = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
            segments = [wire[at : at + 1000] for at in range(0, len(wire), 1000)]
            _, reply, exchange = carrier.carry([request], segments)
            assert (reply.body, reply.is_complete) == (body, True), meta_file
            assert reply.raw.endswith(chunks)
            check_usage(exchange.usage, meta)
        carried += 1
    assert carried


def check_usage(usage: Usage | None, meta: dict[str, Any]) -> None:
    """Compare with the usage objects as they appeared on the wire."""
    found = [next(iter(entry.values())) for entry in meta["usage_on_wire"]]
    if not found:
        assert usage is None or usage.source == "estimated", meta["file"]
        return
    assert usage is not None, meta["file"]
    written = usage.cache_write_5m + usage.cache_write_1h
    if meta["api"] != "messages":
        assert (usage.all_input, usage.cache_read, written, usage.output) == classes_on_wire(found[-1])
        return
    counted: dict[str, Any] = {}
    for entry in found:
        counted.update({name: value for name, value in entry.items() if value is not None})
    rows = [counted, *[row for row in counted.get("iterations", ()) if row["type"] == "compaction"]]
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
    expected = tuple(sum(row.get(name, 0) for row in rows) for name in names)
    assert (usage.input, usage.cache_read, written, usage.output) == expected, meta["file"]
