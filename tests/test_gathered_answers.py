"""Answers that are gathered, seen over time: who leaves in the middle pays for what had come; slow ones are not cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from fallback_chain import GOOD, WHOLE, chain, good
from fault_upstream import OPENAI
from penstock import Exchange, PluginError, Translated, hookimpl, server
from penstock.testing import LAST_CHUNK, FakeUpstream, Pause, Stall, chunk, http_reply
from penstock.testing.upstream import Step
from scripted_translator import ASK, MESSAGES, Reviewer, Translating, translated

pytestmark = pytest.mark.anyio

LONG = {"connect": 5.0, "first_byte": 5.0, "idle": 5.0}
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
LETTERS = 400
PART = b'{"id":"c1","choices":[{"message":{"content":"%b' % (b"word " * (LETTERS // 5))


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


def brought(kind: str) -> tuple[list[Any], str, bytes]:
    """Return plugins, path and body of an exchange whose answer is gathered."""
    if kind == "reviewed":
        return [("reviewer", Reviewer())], OPENAI.path, WHOLE
    return [("translating", Translating())], MESSAGES, ASK


@pytest.mark.parametrize("kind", ["reviewed", "translated"])
async def test_client_that_leaves_while_an_answer_is_gathered_is_charged_for_what_had_come(kind: str) -> None:
    plugins, path, body = brought(kind)
    stall = Stall()
    upstream = FakeUpstream([[CHUNKED, chunk(PART[:100]), chunk(PART[100:]), stall]])
    async with chain(upstream, plugins=plugins, bindings=translated(), timeouts=LONG) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", path, body=body))
        await stall.reached.wait()
        for _ in range(10):  # what was sent is there by then: each turn of the loop looks
            await anyio.lowlevel.checkpoint()
        client.close()
        await stall.gone.wait()
        await run.harness.wait_settled(1)
        last = run.last
        assert (last.stream_end, last.attempts[0].reason, last.bytes_out) == ("client_gone", "client_gone", 0)
        assert last.window is not None
        assert PART.startswith(last.window.text)
        assert last.usage is not None
        assert (last.usage.source, last.usage.output) == ("estimated", -(-LETTERS // 4))


@pytest.mark.parametrize("kind", ["reviewed", "translated"])
async def test_client_that_leaves_before_any_of_an_answer_has_come_leaves_nothing_to_estimate(kind: str) -> None:
    plugins, path, body = brought(kind)
    stall = Stall()
    async with chain(FakeUpstream([[CHUNKED, stall]]), plugins=plugins, bindings=translated(), timeouts=LONG) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", path, body=body))
        await stall.reached.wait()
        client.close()
        await stall.gone.wait()
        await run.harness.wait_settled(1)
        assert (run.last.attempts[0].reason, run.last.usage) == ("client_gone", None)


@pytest.mark.parametrize("kind", ["reviewed", "translated"])
async def test_slow_answer_is_waited_for_once_it_has_begun(kind: str) -> None:
    plugins, path, body = brought(kind)
    pause = Pause()
    first = FakeUpstream([[CHUNKED + chunk(GOOD[:9]), pause, chunk(GOOD[9:]), LAST_CHUNK]])
    second = FakeUpstream([good(is_stream=False)])
    timeouts = LONG | {"first_byte": 0.1}
    async with chain(first, second, plugins=plugins, bindings=translated(2), timeouts=timeouts) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", path, body=body))
        await pause.reached.wait()
        await anyio.sleep(0.3)  # the time that passes is what this is about
        pause.release()
        reply = await client.receive_reply()
        assert (reply.status, reply.is_complete, run.dials) == (200, True, [1, 0])
        assert [attempt.reason for attempt in run.last.attempts] == [None]


@pytest.mark.parametrize("kind", ["reviewed", "translated"])
@pytest.mark.parametrize("late", ["first", "next"])
async def test_answer_whose_next_read_is_overdue_is_a_timeout(kind: str, late: str) -> None:
    plugins, path, body = brought(kind)
    steps: Sequence[Step] = [CHUNKED, Stall()] if late == "first" else [CHUNKED, chunk(GOOD[:9]), Stall()]
    timeouts = LONG | ({"first_byte": 0.1} if late == "first" else {"idle": 0.1})
    upstream = FakeUpstream([list(steps)])
    async with chain(upstream, plugins=plugins, bindings=translated(), timeouts=timeouts) as run:
        assert (await run.harness.request("POST", path, body=body)).status == 504
        assert run.last.attempts[0].reason == "timeout"


# --- translators that fail --------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class BrokenReply:
    """Miss a member, while the body comes or at its end."""

    place: str

    def begin(self, status: int, *, is_event_stream: bool) -> None:
        pass

    def feed(self, payload: bytes) -> bytes:
        return self._read("feed")

    def finish(self) -> bytes:
        return self._read("finish")

    def _read(self, place: str) -> bytes:
        empty: dict[str, bytes] = {}
        return empty["content"] if place == self.place else b""


@attrs.define(eq=False)
class BrokenTranslator:
    """Translate requests, and no answer."""

    place: str
    source = "anthropic.messages"
    target = "openai.chat"

    def translate(self, body: bytes, model: str | None) -> Translated:
        return Translated(json.dumps({"model": model, "messages": []}).encode(), BrokenReply(self.place))


@attrs.define(eq=False)
class Broken:
    """Bring it."""

    place: str

    @hookimpl
    def register_translators(self) -> list[Any]:
        return [BrokenTranslator(self.place)]


@pytest.mark.parametrize("place", ["feed", "finish"])
@pytest.mark.parametrize("reads", [1, 2])
async def test_fault_of_a_translator_ends_the_exchange(place: str, reads: int) -> None:
    """With two reads the end comes in the transport's callback, where nobody would see what is raised."""
    whole, pause = http_reply(GOOD), Pause()
    steps: list[Step] = [whole] if reads == 1 else [whole[:-20], pause, whole[-20:]]
    async with chain(FakeUpstream([steps]), plugins=[("broken", Broken(place))], bindings=translated()) as run:
        client = await run.harness.raw()
        await client.send(run.harness.request_bytes("POST", MESSAGES, body=ASK))
        if reads == 2:
            await pause.reached.wait()
            pause.release()
        with anyio.fail_after(5):
            reply = await client.receive_reply()
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert (fault.plugin, type(fault.__cause__)) == ("BrokenTranslator", KeyError)
        await run.harness.wait_settled(1)
        exchange: Exchange = run.last
        assert (exchange.status, run.harness.settled) == (500, 1)
