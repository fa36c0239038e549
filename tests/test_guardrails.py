"""Guardrails over sockets: every direction, verdict and dialect, streams and whole answers, the repeat of both."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guarded_gateway import CARD, MAIL, SHAPES, Shape, guarded, guardrail
from penstock import GUARDRAIL_OUTCOMES
from penstock.testing import http_reply, stream_reply
from penstock.testing.upstream import Step

pytestmark = [pytest.mark.anyio]
every_dialect = pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
IBAN = "DE89 3704 0044 0532 0130 00"


def cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


# --- requests -----------------------------------------------------------------------------------------------------


@every_dialect
async def test_request_is_blocked_before_any_upstream_byte(shape: Shape) -> None:
    async with guarded([guardrail("no cards", "pii", settings={"action": "block", "kinds": ["card"]})]) as run:
        reply = await run.ask(shape, f"pay with {CARD}")
        assert (reply.status, reply.header("X-Penstock-Error")) == (403, "guardrail_blocked")
        assert reply.header("x-should-retry") == "false"
        assert "no cards" in reply.json()["error"]["message"]
        assert b"4111" not in reply.body
        assert run.upstream.requests == []
        assert run.counts.of("no cards", "request", "block") == 1


@every_dialect
async def test_request_is_redacted_in_place_and_every_other_byte_kept(shape: Shape) -> None:
    async with guarded([guardrail("pii", "pii")], [[http_reply(shape.whole("ok"))]]) as run:
        text = f'mail {MAIL}, "quoted" é \\ / done'
        body = json.dumps(shape.body(text), indent=2).encode().replace(b"/ done", b"\\/ done")
        reply = await run.harness.request("POST", shape.path, body=body)
        assert reply.status == 200
        sent = run.upstream.requests[0].body
        assert MAIL.encode() not in sent
        assert json.loads(sent) == shape.body(text.replace(MAIL, "[email]"))
        start = body.index(b'"mail ')
        assert sent[:start] == body[:start]
        assert sent.endswith(body[body.index(b"done") + 5 :])


@every_dialect
async def test_harmless_request_and_answer_pass_byte_for_byte(shape: Shape) -> None:
    whole = shape.whole("nothing to see")
    async with guarded([guardrail("pii", "pii", "request", "response", "stream_chunk")], [[http_reply(whole)]]) as run:
        body = json.dumps(shape.body("hello"), indent=3).encode()
        reply = await run.harness.request("POST", shape.path, body=body)
        assert (reply.status, reply.body) == (200, whole)
        assert run.upstream.requests[0].body == body
        assert run.counts.of("pii", "request", "allow") == run.counts.of("pii", "response", "allow") == 1


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "tool", "tool_call_id": "c", "content": f"found {MAIL}"}]},
        {"messages": [{"role": "system", "content": MAIL}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": MAIL}]}]}]},  # noqa: E501
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": f'{{"to":"{MAIL}"}}'}}]}]},  # noqa: E501
        {"system": [{"type": "text", "text": MAIL}], "messages": []},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "x", "input": {"url": MAIL}}]}]},
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": MAIL}]}]},
        {"input": [{"type": "function_call_output", "output": MAIL}], "instructions": "x"},
        {"instructions": MAIL},
        {"contents": [{"parts": [{"functionResponse": {"name": "f", "response": {"id": MAIL}}}]}]},
        {"systemInstruction": {"parts": [{"text": MAIL}]}},
        {"prompt": ["a", MAIL]},
        {"messages": [{"role": "user", "content": [{"type": "a_new_part", "a_new_member": MAIL}]}]},
    ],
)  # fmt: skip
async def test_text_is_found_wherever_a_model_reads_it(body: dict[str, Any]) -> None:
    async with guarded([guardrail("g", "pii", settings={"action": "block"})]) as run:
        reply = await run.harness.request("POST", "/v1/chat/completions", body={"model": "m", **body})
        assert reply.status == 403
        escaped = json.dumps({"model": "m", **body}).replace("@", "\\u0040").encode()
        assert (await run.harness.request("POST", "/v1/chat/completions", body=escaped)).status == 403


async def test_duplicate_members_hide_nothing() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"%b","content":"hi"}],"messages":[]}' % MAIL.encode()
    async with guarded([guardrail("g", "pii", settings={"action": "block"})]) as run:
        assert (await run.harness.request("POST", "/v1/chat/completions", body=body)).status == 403


async def test_body_that_cannot_be_walked_is_refused_and_not_passed_on() -> None:
    deep = b'{"model":"m","messages":' + b"[" * 500 + b'"x"' + b"]" * 500 + b"}"
    async with guarded([guardrail("g", "pii")]) as run:
        for body in (deep, b'{"model":"m","messages":[{"content":"\\ud"}]}'):
            reply = await run.harness.request("POST", "/v1/chat/completions", body=body)
            assert (reply.status, reply.header("X-Penstock-Error")) == (400, "bad_request")
        assert run.upstream.requests == []


async def test_compressed_request_is_judged_and_redacted() -> None:
    import gzip  # noqa: PLC0415

    shape = SHAPES[0]
    async with guarded([guardrail("pii", "pii")], [[http_reply(shape.whole("ok"))]]) as run:
        body = gzip.compress(json.dumps(shape.body(MAIL)).encode())
        fields = [(b"Content-Encoding", b"gzip"), (b"Content-Type", b"application/json")]
        assert (await run.harness.request("POST", shape.path, fields, body)).status == 200
        sent = run.upstream.requests[0]
        assert sent.headers.get(b"content-encoding") is None
        assert json.loads(sent.body) == shape.body("[email]")


async def test_multipart_fields_are_judged_and_files_are_not() -> None:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nask ' + MAIL.encode() + b"\r\n"
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + MAIL.encode() + b"\r\n--b--\r\n"
    )
    fields = [(b"Content-Type", b"multipart/form-data; boundary=b")]
    async with guarded([guardrail("pii", "pii")], [[http_reply(b'{"text":"hi"}')]]) as run:
        assert (await run.harness.request("POST", "/v1/audio/transcriptions", fields, form)).status == 200
        assert run.upstream.requests[0].body == form.replace(MAIL.encode(), b"[email]", 1)


async def test_unattached_key_is_not_judged() -> None:
    async with guarded([guardrail("g", "pii", settings={"action": "block"})], attach=[]) as run:
        assert (await run.ask(SHAPES[0], MAIL)).status == 200
        assert run.counts.items() == []


# --- whole answers ------------------------------------------------------------------------------------------------


@every_dialect
@pytest.mark.parametrize("direction", ["response", "stream_chunk"])
async def test_answer_is_blocked_whole(shape: Shape, direction: str) -> None:
    rail = guardrail("g", "secrets", direction)
    async with guarded([rail], [[http_reply(shape.whole("key: AKIAIOSFODNN7EXAMPLE ok"))]]) as run:
        reply = await run.ask(shape, "hi")
        assert (reply.status, reply.header("X-Penstock-Error")) == (403, "guardrail_blocked")
        assert b"AKIA" not in reply.raw
        exchange = run.harness.exchanges[0]
        assert [each.outcome for each in exchange.state[GUARDRAIL_OUTCOMES]] == ["block"]


@every_dialect
async def test_answer_is_redacted_in_place(shape: Shape) -> None:
    whole = shape.whole(f"write to {MAIL} or {IBAN}.")
    async with guarded([guardrail("g", "pii", "response")], [[http_reply(whole)]]) as run:
        reply = await run.ask(shape, "hi")
        assert reply.body == whole.replace(MAIL.encode(), b"[email]").replace(IBAN.encode(), b"[iban]")


async def test_token_likelihoods_do_not_tell_what_was_redacted() -> None:
    message = {"message": {"content": MAIL}, "logprobs": {"content": [{"token": MAIL}]}}
    async with guarded(
        [guardrail("g", "pii", "response")], [[http_reply(json.dumps({"choices": [message]}).encode())]]
    ) as run:
        reply = await run.ask(SHAPES[0], "hi")
        assert reply.json() == {"choices": [{"message": {"content": "[email]"}, "logprobs": None}]}


async def test_answer_of_a_stream_in_a_json_array_is_judged_as_one_text() -> None:
    shape = SHAPES[4]
    parts = [json.loads(shape.whole(piece)) for piece in cut(f"it is {CARD}.", 4)]
    async with guarded([guardrail("g", "pii", "stream_chunk")], [[http_reply(json.dumps(parts).encode())]]) as run:
        reply = await run.harness.request("POST", "/v1beta/models/m:streamGenerateContent", body=shape.body("hi"))
        said = "".join(part["candidates"][0]["content"]["parts"][0]["text"] for part in reply.json())
        assert said == "it is [card]."


async def test_error_of_a_provider_is_relayed_unjudged() -> None:
    body = b'{"error":{"message":"%b"}}' % MAIL.encode()
    async with guarded(
        [guardrail("g", "pii", "response", settings={"action": "block"})], [[http_reply(body, 400)]]
    ) as run:
        reply = await run.ask(SHAPES[0], "hi")
        assert (reply.status, reply.body) == (400, body)


# --- streams ------------------------------------------------------------------------------------------------------


@every_dialect
@pytest.mark.parametrize("size", [1, 3, 7, 400])
async def test_stream_is_redacted_over_every_boundary(shape: Shape, size: int) -> None:
    text = f"card {CARD}, then {MAIL}; iban {IBAN} end"
    events = shape.events(cut(text, size))
    async with guarded([guardrail("g", "pii", "stream_chunk")], [stream_reply(*events)]) as run:
        reply = await run.ask(shape, "hi", stream=True)
        assert reply.is_complete
        assert shape.said(reply.body) == "card [card], then [email]; iban [iban] end"
        for forbidden in (b"4111", MAIL.encode(), b"DE89"):
            assert forbidden not in reply.body
        assert reply.body.count(b"data:") == b"".join(events).count(b"data:")
        assert run.counts.of("g", "stream_chunk", "modify") == 1


@every_dialect
@pytest.mark.parametrize("size", [1, 5, 400])
async def test_stream_ends_at_a_blocked_text_and_never_shows_its_first_character(shape: Shape, size: int) -> None:
    events = shape.events(cut(f"the number is {CARD}.", size))
    rail = guardrail("g", "pii", "stream_chunk", settings={"action": "block"})
    async with guarded([rail], [stream_reply(*events)]) as run:
        reply = await run.ask(shape, "hi", stream=True)
        assert not reply.is_complete
        assert "the number is ".startswith(shape.said(reply.body))
        assert b"4111" not in reply.body
        last = json.loads(reply.body.replace(b"\r\n", b"\n").strip().rpartition(b"data: ")[2])
        assert "stream_chunk_blocked" in json.dumps(last) or "guardrail" in json.dumps(last)
        exchange = run.harness.exchanges[0]
        assert (exchange.stream_end, exchange.error and exchange.error.code) == ("blocked", "guardrail_blocked")


@every_dialect
async def test_harmless_stream_passes_byte_for_byte(shape: Shape) -> None:
    events = shape.events(cut("It takes 12 of 34, or 5-6: ask (Bob) at 7 p.m.\n", 3))
    async with guarded([guardrail("g", "pii", "stream_chunk")], [stream_reply(*events)]) as run:
        reply = await run.ask(shape, "hi", stream=True)
        assert (reply.is_complete, reply.body) == (True, b"".join(events))
        assert run.counts.items() == [(("g", "stream_chunk", "allow"), 1)]


@every_dialect
async def test_stream_of_a_response_guardrail_is_untouched_and_flagged_after_its_end(shape: Shape) -> None:
    events = shape.events(cut(f"the number is {CARD}.", 4))
    rail = guardrail("g", "pii", "response", settings={"action": "block"})
    async with guarded([rail], [stream_reply(*events)]) as run:
        reply = await run.ask(shape, "hi", stream=True)
        assert (reply.is_complete, reply.body) == (True, b"".join(events))
        assert run.counts.items() == [(("g", "response", "flag"), 1)]
        outcome = run.harness.exchanges[0].state[GUARDRAIL_OUTCOMES]
        assert [(each.guardrail, each.direction, each.outcome, each.rule) for each in outcome] == [
            ("g", "response", "flag", "card")
        ]


@every_dialect
async def test_repeat_without_stream_is_judged_like_the_stream(shape: Shape) -> None:
    text = f"the number is {CARD}."
    rail = guardrail("g", "pii", "stream_chunk", settings={"action": "block"})
    script: list[list[Step]] = [stream_reply(*shape.events(cut(text, 4))), [http_reply(shape.whole(text))]]
    async with guarded([rail], script) as run:
        assert not (await run.ask(shape, "hi", stream=True)).is_complete
        reply = await run.ask(shape, "hi")
        assert (reply.status, reply.header("X-Penstock-Error")) == (403, "guardrail_blocked")


async def test_frames_without_text_pass_at_once_and_stay_in_order() -> None:
    shape = SHAPES[3]
    events = shape.events(["plain. ", "4111 1111 ", "1111 1111", " ok"])
    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    events = [*events[:4], b": comment\n\n", *events[4:5], ping, *events[5:]]
    async with guarded([guardrail("g", "pii", "stream_chunk")], [stream_reply(*events)]) as run:
        reply = await run.ask(shape, "hi", stream=True)
        kinds = [line for line in reply.body.split(b"\n") if line.startswith((b"event:", b":"))]
        assert kinds == [line for line in b"".join(events).split(b"\n") if line.startswith((b"event:", b":"))]
        assert shape.said(reply.body) == "plain. [card] ok"


async def test_two_choices_of_one_stream_are_two_texts() -> None:
    def said(index: int, text: str) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": index, "delta": {"content": text}}]}).encode() + b"\n\n"

    events = [said(0, "4111 1111"), said(1, "hello "), said(0, " 1111 1111"), said(1, "world"), b"data: [DONE]\n\n"]
    async with guarded([guardrail("g", "pii", "stream_chunk")], [stream_reply(*events)]) as run:
        reply = await run.ask(SHAPES[0], "hi", stream=True)
        texts = {0: "", 1: ""}
        for line in reply.body.split(b"\n"):
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] += choice["delta"]["content"]
        assert texts == {0: "[card]", 1: "hello world"}
