"""The tools other tests stand on: on both loops, in memory and on sockets."""

from __future__ import annotations

from typing import Any

import pytest

from penstock import Exchange, RequestError, hookimpl
from penstock.testing import (
    Close,
    Expect,
    FakeUpstream,
    Harness,
    Pause,
    Reset,
    Stall,
    chunk,
    http_reply,
    stream_reply,
)
from penstock.testing.upstream import LAST_CHUNK, STREAM_HEAD, Step

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = b'{"model": "gpt-4o-mini", "messages": []}'
STREAM_BODY = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'


@pytest.fixture(params=[False, True], ids=["memory", "socket"])
def socket(request: pytest.FixtureRequest) -> Any:
    return request.param


async def test_request_returns_the_upstreams_answer(socket: bool) -> None:
    upstream = FakeUpstream([[http_reply(b'{"ok":1}')]])
    async with Harness(upstream=upstream, socket=socket) as gateway:
        reply = await gateway.request("POST", CHAT, body=BODY)
        assert (reply.status, reply.body) == (200, b'{"ok":1}')
        assert upstream.requests[0].body == BODY
        assert upstream.requests[0].headers.get(b"authorization") == b"Bearer sk-upstream"
        assert gateway.settled == len(gateway.exchanges) == len(gateway.records) == 1
        assert gateway.faults == []


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


async def test_leaving_a_stream_closes_the_upstream_connection(socket: bool) -> None:
    stall = Stall()
    upstream = FakeUpstream([[STREAM_HEAD, chunk(b"data: 1\n\n"), stall]])
    async with Harness(upstream=upstream, socket=socket) as gateway:
        async with gateway.stream("POST", CHAT, body=STREAM_BODY) as stream:
            assert await anext(aiter(stream)) == b"data: 1\n\n"
        await stall.gone.wait()
        await gateway.wait_settled(1)
        assert gateway.exchanges[0].stream_end == "client_gone"


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
async def test_upstream_that_ends_before_answering_is_a_provider_error(
    socket: bool, end: Close | Reset
) -> None:
    async with Harness(upstream=FakeUpstream([[end]]), socket=socket) as gateway:
        reply = await gateway.request("POST", CHAT, body=BODY)
        assert reply.status == 502
        assert gateway.exchanges[0].attempts[0].reason == "reset"


async def test_second_upstream_answers_when_the_first_fails(socket: bool) -> None:
    first, second = FakeUpstream([[http_reply(b"down", 503)]]), FakeUpstream([[http_reply(b"up")]])
    async with Harness(upstream=[first, second], socket=socket) as gateway:
        assert (await gateway.request("POST", CHAT, body=BODY)).body == b"up"
        assert [attempt.binding_id for attempt in gateway.exchanges[0].attempts] == ["gpc_up", "gpc_up2"]


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


@pytest.mark.parametrize(
    "plugin", [RefuseAll, RefuseAll(), ("no", RefuseAll)], ids=["class", "object", "pair"]
)
async def test_plugins_run_without_being_installed(plugin: Any) -> None:
    async with Harness(plugins=[plugin]) as gateway:
        reply = await gateway.request("POST", CHAT, body=BODY)
        assert reply.status == 403
        assert reply.header("X-Penstock-Error") == "permission_denied"


async def test_request_without_script_fails_the_test() -> None:
    with pytest.raises(AssertionError, match="has no script"):
        async with Harness(upstream=FakeUpstream()) as gateway:
            await gateway.request("POST", CHAT, body=BODY)


async def test_missed_expectation_fails_the_test() -> None:
    upstream = FakeUpstream([[Expect(b"needle"), http_reply()]])
    with pytest.raises(AssertionError, match="does not hold b'needle'"):
        async with Harness(upstream=upstream) as gateway:
            await gateway.request("POST", CHAT, body=BODY)


async def test_exception_of_the_test_leaves_the_harness_as_it_is() -> None:
    with pytest.raises(KeyError, match="mine"):
        async with Harness(upstream=FakeUpstream()):
            raise KeyError("mine")


async def test_fixtures_give_the_tools(harness: type[Harness], fake_upstream: type[FakeUpstream]) -> None:
    upstream = fake_upstream([stream_reply(b"data: 1\n\n", b"data: [DONE]\n\n")])
    async with harness(upstream=upstream) as gateway:
        reply = await gateway.request("POST", CHAT, body=STREAM_BODY)
        assert reply.body == b"data: 1\n\ndata: [DONE]\n\n"


async def test_upstream_entered_alone_listens_on_a_socket() -> None:
    async with FakeUpstream([[http_reply(b"alone")]]) as upstream, Harness(upstream=upstream) as gateway:
        assert upstream.base_url.startswith("http://127.0.0.1:")
        assert (await gateway.request("POST", CHAT, body=BODY)).body == b"alone"
