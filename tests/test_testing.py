"""The tools other tests stand on: on both loops, in memory and on sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import Exchange, RequestError, hookimpl
from penstock.codings import decode
from penstock.testing import (
    LAST_CHUNK,
    STREAM_HEAD,
    Close,
    Expect,
    FakeUpstream,
    Harness,
    Pause,
    ReplyReader,
    Reset,
    Stall,
    Step,
    chunk,
    http_reply,
    stream_reply,
)
from penstock.testing.memory import connect
from penstock.testing.strategies import (
    WireResponse,
    chat_bodies,
    http_responses,
    json_bodies,
    segmented,
    sse_streams,
)

CHAT = "/v1/chat/completions"
BODY = b'{"model": "gpt-4o-mini", "messages": []}'
STREAM_BODY = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'


@pytest.fixture(params=[False, True], ids=["memory", "socket"])
def socket(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.anyio
async def test_request_returns_the_upstreams_answer(socket: bool) -> None:
    upstream = FakeUpstream([[http_reply(b'{"ok":1}')]])
    async with Harness(upstream=upstream, socket=socket) as gateway:
        reply = await gateway.request("POST", CHAT, body=BODY)
        assert (reply.status, reply.body) == (200, b'{"ok":1}')
        assert upstream.requests[0].body == BODY
        assert upstream.requests[0].headers.get(b"authorization") == b"Bearer sk-upstream"
        assert gateway.settled == len(gateway.exchanges) == len(gateway.records) == 1
        assert gateway.faults == []


@pytest.mark.anyio
async def test_stream_gives_pieces_as_they_arrive(socket: bool) -> None:
    pause = Pause()
    script: list[Step] = [STREAM_HEAD, chunk(b"data: 1\n\n"), pause, chunk(b"data: 2\n\n"), LAST_CHUNK]
    async with (
        Harness(upstream=FakeUpstream([script]), socket=socket) as gateway,
        gateway.stream("POST", CHAT, body=STREAM_BODY) as stream,
    ):
        pieces = aiter(stream)
        assert await anext(pieces) == b"data: 1\n\n"
        pause.release()
        assert [piece async for piece in pieces] == [b"data: 2\n\n"]
        assert stream.is_complete


@pytest.mark.anyio
async def test_leaving_a_stream_closes_the_upstream_connection(socket: bool) -> None:
    stall = Stall()
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), stall]])
    async with Harness(upstream=upstream, socket=socket) as gateway:
        async with gateway.stream("POST", CHAT, body=STREAM_BODY) as stream:
            assert await anext(aiter(stream)) == b"data: 1\n\n"
        await stall.gone.wait()
        await gateway.wait_settled(1)
        assert gateway.exchanges[0].stream_end == "client_gone"


@pytest.mark.anyio
async def test_raw_client_sends_segments_and_receives_bytes(socket: bool) -> None:
    upstream = FakeUpstream([[http_reply(b"1")], [http_reply(b"2")]])
    async with Harness(upstream=upstream, socket=socket) as gateway:
        client = await gateway.raw()
        request = gateway.request_bytes("POST", CHAT, body=BODY)
        await client.send(*[request[i : i + 1] for i in range(len(request))])
        assert (await client.receive_reply()).body == b"1"
        await client.send(request)
        assert (await client.receive_reply()).body == b"2"
        assert [seen.body for seen in upstream.requests] == [BODY, BODY]
        assert upstream.connection_count == 1


@pytest.mark.anyio
async def test_half_closing_cancels_the_exchange(socket: bool) -> None:
    stall = Stall()
    async with Harness(upstream=FakeUpstream([[stall]]), socket=socket) as gateway:
        client = await gateway.raw()
        await client.send(gateway.request_bytes("POST", CHAT, body=BODY))
        await stall.reached.wait()
        client.half_close()
        await stall.gone.wait()
        await gateway.wait_settled(1)
        assert await client.receive_all() == b""


@pytest.mark.anyio
async def test_resetting_cancels_the_exchange(socket: bool) -> None:
    stall = Stall()
    async with Harness(upstream=FakeUpstream([[stall]]), socket=socket) as gateway:
        client = await gateway.raw()
        await client.send(gateway.request_bytes("POST", CHAT, body=BODY))
        await stall.reached.wait()
        client.reset()
        await stall.gone.wait()
        await gateway.wait_settled(1)


@pytest.mark.parametrize("end", [Close(), Reset()], ids=["close", "reset"])
@pytest.mark.anyio
async def test_upstream_that_ends_before_answering_is_a_provider_error(socket: bool, end: Close | Reset) -> None:
    async with Harness(upstream=FakeUpstream([[end]]), socket=socket) as gateway:
        reply = await gateway.request("POST", CHAT, body=BODY)
        assert reply.status == 502
        assert gateway.exchanges[0].attempts[0].reason == "reset"


@pytest.mark.anyio
async def test_second_upstream_answers_when_the_first_fails(socket: bool) -> None:
    first, second = FakeUpstream([[http_reply(b"down", 503)]]), FakeUpstream([[http_reply(b"up")]])
    async with Harness(upstream=[first, second], socket=socket) as gateway:
        assert (await gateway.request("POST", CHAT, body=BODY)).body == b"up"
        assert [attempt.binding_id for attempt in gateway.exchanges[0].attempts] == ["gpc_up", "gpc_up2"]


@pytest.mark.anyio
async def test_anthropic_messages_reach_the_same_upstream() -> None:
    upstream = FakeUpstream([[http_reply(b"{}")]])
    async with Harness(upstream=upstream) as gateway:
        reply = await gateway.request("POST", "/v1/messages", body=b'{"model":"claude-x"}')
        assert reply.status == 200
        assert upstream.requests[0].headers.get(b"x-api-key") == b"sk-upstream"


class RefuseAll:
    """Refuse every request."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        raise RequestError("permission_denied", "No.")


@pytest.mark.parametrize("plugin", [RefuseAll, RefuseAll(), ("no", RefuseAll)], ids=["class", "object", "pair"])
@pytest.mark.anyio
async def test_plugins_run_without_being_installed(plugin: Any) -> None:
    async with Harness(plugins=[plugin]) as gateway:
        reply = await gateway.request("POST", CHAT, body=BODY)
        assert reply.status == 403
        assert reply.header("X-Penstock-Error") == "permission_denied"


@pytest.mark.anyio
async def test_request_without_script_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="has no script"):
        async with Harness(upstream=FakeUpstream()) as gateway:
            await gateway.request("POST", CHAT, body=BODY)


@pytest.mark.anyio
async def test_missed_expectation_fails_the_test() -> None:
    upstream = FakeUpstream([[Expect(b"needle"), http_reply()]])
    with pytest.raises(AssertionError, match="does not hold b'needle'"):
        async with Harness(upstream=upstream) as gateway:
            await gateway.request("POST", CHAT, body=BODY)


@pytest.mark.anyio
async def test_exception_of_the_test_leaves_the_harness_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Harness(upstream=FakeUpstream()):
            raise KeyError("mine")


@pytest.mark.anyio
async def test_fixtures_give_the_tools(harness: type[Harness], fake_upstream: type[FakeUpstream]) -> None:
    upstream = fake_upstream([stream_reply(b"data: 1\n\n", b"data: [DONE]\n\n")])
    async with harness(upstream=upstream) as gateway:
        reply = await gateway.request("POST", CHAT, body=STREAM_BODY)
        assert reply.body == b"data: 1\n\ndata: [DONE]\n\n"


@pytest.mark.anyio
async def test_upstream_entered_alone_listens_on_a_socket() -> None:
    async with FakeUpstream([[http_reply(b"alone")]]) as upstream, Harness(upstream=upstream) as gateway:
        assert upstream.base_url.startswith("http://127.0.0.1:")
        assert (await gateway.request("POST", CHAT, body=BODY)).body == b"alone"


# --- strategies ---------------------------------------------------------------------------------------------


@given(st.binary(max_size=600).flatmap(lambda data: st.tuples(st.just(data), segmented(st.just(data)))))
def test_segments_join_to_the_data(drawn: tuple[bytes, list[bytes]]) -> None:
    data, pieces = drawn
    assert b"".join(pieces) == data
    assert all(pieces)


@given(json_bodies() | chat_bodies() | chat_bodies(stream=True))
def test_json_bodies_are_json(body: bytes) -> None:
    json.loads(body)


@given(chat_bodies(model="m", stream=True))
def test_streaming_chat_bodies_ask_for_usage(body: bytes) -> None:
    call = json.loads(body)
    assert (call["model"], call["stream"], call["stream_options"]) == ("m", True, {"include_usage": True})


@given(sse_streams(dialect="openai.chat"))
def test_chat_streams_end_with_done(stream: bytes) -> None:
    lines = [line for line in stream.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all("choices" in json.loads(line[6:]) for line in lines[:-1] if line.startswith("data: "))


@given(http_responses(), st.data())
def test_responses_read_back_as_drawn(response: WireResponse, data: st.DataObject) -> None:
    reader = ReplyReader()
    for piece in data.draw(segmented(st.just(response.raw))):
        reader.feed(piece)
    if response.is_close_delimited:
        reader.feed(b"")
    reply = reader.reply()
    assert (reply.status, reply.body, reply.is_complete) == (response.status, response.body, True)
    coding = reply.headers.get(b"content-encoding")
    assert response.content == (response.body if coding is None else decode(reply.body, coding, 10**6))


# --- memory transports --------------------------------------------------------------------------------------


class Log(asyncio.Protocol):
    """Write down what a transport calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def data_received(self, data: bytes) -> None:
        self.calls.append(data)

    def eof_received(self) -> bool:
        self.calls.append("eof")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(("lost", type(exc)))

    def pause_writing(self) -> None:
        self.calls.append("pause")

    def resume_writing(self) -> None:
        self.calls.append("resume")


async def turn(times: int = 10) -> None:
    for _ in range(times):
        await anyio.lowlevel.checkpoint()


@pytest.mark.anyio
async def test_memory_transport_delivers_all_writes_before_the_end() -> None:
    near, far = Log(), Log()
    transport = connect(near, far)
    transport.write(b"a")
    transport.writelines([b"b", b"c"])
    transport.close()
    await turn()
    assert far.calls == [b"a", b"bc", "eof", ("lost", type(None))]
    assert near.calls == [("lost", type(None))]


@pytest.mark.anyio
async def test_memory_transport_holds_back_a_writer_whose_reader_is_slow() -> None:
    near, far = Log(), Log()
    transport = connect(near, far)
    transport.pause_reading()
    other = transport._peer
    other.write(b"x" * 70_000)
    await turn()
    assert (near.calls, far.calls) == ([], ["pause"])
    transport.resume_reading()
    await turn()
    assert (len(near.calls), far.calls) == (1, ["pause", "resume"])


@pytest.mark.anyio
async def test_memory_transport_reset_drops_what_was_not_read() -> None:
    near, far = Log(), Log()
    transport = connect(near, far)
    transport.write(b"never read")
    transport.reset()
    await turn()
    assert far.calls == [("lost", ConnectionResetError)]
