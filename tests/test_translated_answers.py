"""Exchanges with providers that speak another dialect, by a scripted translator, over sockets."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from fallback_chain import GOOD, Chain, chain, failing
from fault_upstream import ANTHROPIC, HALF_EVENT, OPENAI, events_of, payload_of
from penstock import Exchange, PluginError, hookimpl, server
from penstock.editing import Chunk
from penstock.testing import LAST_CHUNK, STREAM_HEAD, Close, FakeUpstream, Pause, Reset, Stall, chunk, http_reply
from penstock.testing import stream_reply as whole_stream
from penstock.testing.upstream import Step
from scripted_translator import ASK, ASK_STREAM, MESSAGES, STOP, Translating, delta, translated, wrapped

pytestmark = pytest.mark.anyio

LONG = {"connect": 5.0, "first_byte": 5.0, "idle": 5.0}
FIRST = OPENAI.events[0]
SEEN_FIRST = delta(payload := FIRST[6:-2])
NATIVE = b'{"type":"message","usage":{"input_tokens":1,"output_tokens":2}}'


@pytest.fixture(autouse=True)
def frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SWEEP_SECONDS", 0.01)


def seen(*events: bytes) -> bytes:
    """Return what a client sees of chat events, the usage frame taken out."""
    return b"".join(STOP if b"[DONE]" in event else delta(event[6:-2]) for event in events if b"usage" not in event)


async def post(run: Chain, body: bytes, headers: dict[str, str] | None = None) -> Any:
    return await run.harness.request("POST", MESSAGES, headers or {}, body)


def bring() -> tuple[list[Any], Translating]:
    plugin = Translating()
    return [("translating", plugin)], plugin


# --- the request ------------------------------------------------------------------------------------------------------


async def test_request_reaches_the_providers_path_without_what_only_its_own_dialect_knows() -> None:
    plugins, _ = bring()
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x", "X-Own": "1", "Accept-Encoding": "gzip"}
    async with chain(FakeUpstream([[http_reply(GOOD)]]), plugins=plugins, bindings=translated()) as run:
        asked = ASK.replace(b'"max_tokens"', b'"top_k":1,"max_tokens"')
        reply = await run.harness.request("POST", f"{MESSAGES}?beta=true", headers, asked)
        (request,) = run.upstreams[0].requests
        assert request.target == b"/v1/chat/completions"
        assert json.loads(request.body) == {"model": "m", "messages": []}
        assert request.headers.get(b"authorization") == b"Bearer sk-upstream"
        assert (request.headers.get(b"x-own"), request.headers.get(b"accept-encoding")) == (b"1", b"identity")
        assert [name for name, _ in request.headers if name.lower().startswith(b"anthropic-")] == []
        assert request.headers.get(b"content-length") == str(len(request.body)).encode()
        assert (reply.status, reply.body, reply.header("X-Penstock-Params-Dropped")) == (200, wrapped(GOOD), "top_k")
        assert reply.header("X-Penstock-Provider") == "openai_compatible"


async def test_compressed_request_is_translated() -> None:
    plugins, _ = bring()
    async with chain(FakeUpstream([[http_reply(GOOD)]]), plugins=plugins, bindings=translated()) as run:
        reply = await post(run, gzip.compress(ASK), {"Content-Encoding": "gzip"})
        assert reply.status == 200
        request = run.upstreams[0].requests[0]
        assert (json.loads(request.body)["model"], request.headers.get(b"content-encoding")) == ("m", None)


UNTRANSLATABLE = ASK.replace(b'"max_tokens"', b'"unsupported":1,"max_tokens"')


async def test_request_that_cannot_be_translated_is_refused_where_nobody_else_is_left() -> None:
    plugins, _ = bring()
    async with chain(FakeUpstream(), plugins=plugins, bindings=translated(), breaker={"failures": 1}) as run:
        reply = await post(run, UNTRANSLATABLE)
        assert (reply.status, reply.header("X-Penstock-Error")) == (400, "unsupported_parameter")
        assert reply.header("x-should-retry") == "false"
        assert (run.dials, run.states(), run.last.attempts[0].is_skipped) == ([0], {}, True)


async def test_request_that_cannot_be_translated_goes_to_the_next_that_takes_it_as_it_is() -> None:
    plugins, _ = bring()
    upstreams = FakeUpstream(), FakeUpstream([[http_reply(NATIVE)]])
    fallback = {"max_attempts": 1}
    async with chain(*upstreams, plugins=plugins, bindings=translated(1, "anthropic"), fallback=fallback) as run:
        reply = await post(run, UNTRANSLATABLE)
        assert (reply.status, reply.body, reply.header("X-Penstock-Fallback-Count")) == (200, NATIVE, "1")
        assert (run.upstreams[1].requests[0].body, reply.header("X-Penstock-Provider")) == (UNTRANSLATABLE, "anthropic")
        assert [attempt.reason for attempt in run.last.attempts] == ["unsupported_parameter", None]


async def test_answer_of_a_native_provider_is_relayed_where_the_rest_cannot_be_asked() -> None:
    plugins, _ = bring()
    upstreams = FakeUpstream([failing(7)]), FakeUpstream()
    bindings = list(reversed(translated(1, "anthropic")))
    async with chain(*upstreams, plugins=plugins, bindings=bindings) as run:
        reply = await post(run, UNTRANSLATABLE)
        assert (reply.status, reply.header("X-Whose"), reply.header("X-Penstock-Provider")) == (503, "7", "anthropic")
        assert (reply.header("X-Penstock-Fallback-Count"), run.dials) == ("0", [1, 0])


async def test_native_provider_behind_a_translated_one_answers_as_if_nothing_had_been() -> None:
    plugins, _ = bring()
    upstreams = FakeUpstream([failing()]), FakeUpstream([[http_reply(NATIVE)]])
    async with chain(*upstreams, plugins=plugins, bindings=translated(1, "anthropic")) as run:
        asked = ASK.replace(b'"max_tokens"', b'"top_k":1,"max_tokens"')
        reply = await post(run, asked)
        assert (reply.body, reply.header("X-Penstock-Params-Dropped")) == (NATIVE, None)
        assert run.upstreams[1].requests[0].body == asked
        assert run.last.usage is not None
        assert (run.last.usage.input, run.last.upstream_endpoint) == (1, None)


# --- whole answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 429, 503])
async def test_error_is_translated_with_its_status_and_headers(status: int) -> None:
    plugins, _ = bring()
    async with chain(FakeUpstream([failing(3, status)]), plugins=plugins, bindings=translated()) as run:
        reply = await post(run, ASK)
        assert (reply.status, reply.header("X-Whose")) == (status, "3")
        assert reply.json()["status"] == status
        assert reply.header("X-Penstock-Error") is None


async def test_last_error_is_relayed_translated_and_answers_no_json_are_no_answers() -> None:
    plugins, _ = bring()
    upstreams = FakeUpstream([[http_reply(b"<html>")]]), FakeUpstream([failing(2)])
    async with chain(*upstreams, plugins=plugins, bindings=translated(2)) as run:
        reply = await post(run, ASK)
        assert (reply.status, reply.json()["status"], reply.header("X-Whose")) == (503, 503, "2")
        assert [attempt.reason for attempt in run.last.attempts] == ["protocol", "status"]


@pytest.mark.parametrize("where", ["request", "answer", "first_event"])
async def test_translator_that_fails_before_the_commit_is_a_plugin_error_that_names_it(where: str) -> None:
    plugins, _ = bring()
    scripts: dict[str, list[Step]] = {
        "request": [],
        "answer": [http_reply(b'"crash"')],
        "first_event": whole_stream(b"data: crash\n\n"),
    }
    body = {"request": ASK.replace(b'"max_tokens"', b'"crash":1,"max_tokens"'), "answer": ASK}.get(where, ASK_STREAM)
    async with chain(FakeUpstream([scripts[where]]), plugins=plugins, bindings=translated()) as run:
        reply = await post(run, body)
        assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
        (fault,) = run.harness.faults
        assert isinstance(fault, PluginError)
        assert fault.plugin == "ScriptedTranslator"
        assert isinstance(fault.__cause__, ZeroDivisionError)
        assert run.harness.settled == 1


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 50, 10_000])
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_stream_is_translated_however_it_is_cut(size: int, version: bytes) -> None:
    plugins, plugin = bring()
    text = b"".join(OPENAI.events)
    pieces = [chunk(text[at : at + size]) for at in range(0, len(text), size)]
    upstream = FakeUpstream([[STREAM_HEAD, *pieces, LAST_CHUNK]])
    async with chain(upstream, plugins=plugins, bindings=translated()) as run:
        client = await run.harness.raw()
        request = run.harness.request_bytes("POST", MESSAGES, {}, ASK_STREAM)
        await client.send(request.replace(b"HTTP/1.1", b"HTTP/" + version, 1))
        reply = await client.receive_reply()
        assert (reply.status, reply.body, reply.is_complete) == (200, seen(*OPENAI.events), True)
        assert reply.header("content-type") == "text/event-stream; charset=utf-8"
        await run.harness.wait_settled(1)
        # The gateway asked for the usage frame, metered it, and took it out before it was translated.
        assert json.loads(upstream.requests[0].body)["stream_options"] == {"include_usage": True}
        assert not any(b"prompt_tokens" in frame for frame in plugin.translator.replies[0].frames)
        assert run.last.usage is not None
        assert (run.last.usage.input, run.last.usage.output, run.last.usage.source) == (7, 3, "provider")
        assert run.last.is_stream


async def test_compressed_stream_is_translated_though_nobody_asked_for_it() -> None:
    plugins, _ = bring()
    zipped = gzip.compress(b"".join(OPENAI.events))
    head = STREAM_HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")
    upstream = FakeUpstream([[head, chunk(zipped[:40]), chunk(zipped[40:]), LAST_CHUNK]])
    async with chain(upstream, plugins=plugins, bindings=translated()) as run:
        reply = await post(run, ASK_STREAM)
        assert (reply.body, reply.header("content-encoding")) == (seen(*OPENAI.events), None)


BEGINS: dict[str, tuple[list[Step], str]] = {
    "error_event": (whole_stream(OPENAI.error_event), "error_event"),
    "unreadable": ([STREAM_HEAD, chunk(b"data: unreadable\n\n"), Stall()], "protocol"),
    "truncated": ([STREAM_HEAD, chunk(HALF_EVENT), Close()], "truncated"),
    "503": (failing(), "status"),
}


@pytest.mark.parametrize("begins", BEGINS)
async def test_stream_that_begins_badly_is_the_next_candidates(begins: str) -> None:
    plugins, _ = bring()
    steps, reason = BEGINS[begins]
    upstreams = FakeUpstream([steps]), FakeUpstream([whole_stream(*OPENAI.events)])
    async with chain(
        *upstreams, plugins=plugins, bindings=translated(2), breaker={"failures": 1}, timeouts=LONG
    ) as run:
        reply = await post(run, ASK_STREAM)
        assert (reply.body, reply.header("X-Penstock-Fallback-Count")) == (seen(*OPENAI.events), "1")
        assert [attempt.reason for attempt in run.last.attempts] == [reason, None]
        assert run.state("a") == "open"


CUTS: dict[str, list[Step]] = {
    "event_boundary": [Close()],
    "in_an_event": [chunk(HALF_EVENT), Close()],
    "in_a_chunk": [b"30\r\n" + HALF_EVENT, Close()],
    "reset": [chunk(HALF_EVENT), Reset()],
    "bad_chunk": [b"zz\r\n", Stall()],
    "stall": [chunk(HALF_EVENT), Stall()],
    "clean_end_without_the_last_event": [LAST_CHUNK],
    "half_an_event_and_a_clean_end": [chunk(HALF_EVENT), LAST_CHUNK],
    "unreadable": [chunk(b"data: unreadable\n\n"), Stall()],
}


@pytest.mark.parametrize("has_hook", [False, True])
@pytest.mark.parametrize("cut", CUTS)
async def test_broken_stream_ends_in_one_terminal_event_of_the_clients_dialect(cut: str, has_hook: bool) -> None:
    pause = Pause()
    plugins, _ = bring()
    upstreams = FakeUpstream([[STREAM_HEAD, chunk(FIRST), pause, *CUTS[cut]]]), FakeUpstream()
    timeouts = LONG | ({"idle": 0.05} if cut == "stall" else {})
    if has_hook:
        plugins.append(("watching", Watching()))
    async with chain(*upstreams, plugins=plugins, bindings=translated(2), timeouts=timeouts) as run:
        async with run.harness.stream("POST", MESSAGES, body=ASK_STREAM) as stream:
            assert await anext(aiter(stream)) == SEEN_FIRST
            pause.release()
            reply = await stream.read()
        assert not reply.is_complete
        first, last = events_of(reply.body)
        assert first + b"\n\n" == SEEN_FIRST
        assert last.startswith(b"event: error\ndata: ")
        assert ANTHROPIC.is_terminal(payload_of(last), "upstream_mid_stream_failure", "provider_error")
        await run.harness.wait_settled(1)
        assert (run.last.stream_end, run.dials, run.harness.settled) == ("upstream_failed", [1, 0], 1)
        assert run.harness.faults == []


class Watching:
    """Look at each chunk, and wait for nothing."""

    sees_chunks = True

    @hookimpl
    async def on_stream_chunk(self, exchange: Exchange, chunk: Chunk) -> bytes | None:
        assert chunk.is_event_stream == (exchange.status == 200)
        return None


@pytest.mark.parametrize("has_hook", [False, True])
async def test_translator_that_fails_in_a_stream_ends_it_as_a_plugin_error(has_hook: bool) -> None:
    pause = Pause()
    plugins, _ = bring()
    upstream = FakeUpstream([[STREAM_HEAD, chunk(FIRST), pause, chunk(b"data: crash\n\n"), Stall()]])
    if has_hook:
        plugins.append(("watching", Watching()))
    async with chain(upstream, plugins=plugins, bindings=translated()) as run:
        async with run.harness.stream("POST", MESSAGES, body=ASK_STREAM) as stream:
            assert await anext(aiter(stream)) == SEEN_FIRST
            pause.release()
            reply = await stream.read()
        _, last = events_of(reply.body)
        assert ANTHROPIC.is_terminal(payload_of(last), "plugin_error", "plugin_error")
        await run.harness.wait_settled(1)
        assert (run.last.stream_end, len(run.harness.faults)) == ("blocked", 1)


async def test_client_that_leaves_cancels_a_translated_stream() -> None:
    stall = Stall()
    plugins, _ = bring()
    first = FakeUpstream([[STREAM_HEAD, chunk(FIRST), stall]])
    async with chain(first, plugins=plugins, bindings=translated(), timeouts=LONG) as run:
        async with run.harness.stream("POST", MESSAGES, body=ASK_STREAM) as stream:
            assert await anext(aiter(stream)) == SEEN_FIRST
        await stall.gone.wait()
        await run.harness.wait_settled(1)
        assert (run.last.stream_end, run.last.committed_ns is not None) == ("client_gone", True)
        assert run.last.window is not None
        assert run.last.window.text == FIRST
