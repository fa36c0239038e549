"""Header fields plugins write: none may break the head, and none may contradict the server's own framing."""

from __future__ import annotations

import re
from typing import Any

import pytest

from penstock import Exchange, RequestError, Response, hookimpl
from penstock.models import Request
from penstock.replies import FieldError, ReplyHeads, field_lines
from penstock.testing import FakeUpstream, Harness, Reply, http_reply
from penstock.testing.samples import SAMPLES, sample_exchange

pytestmark = pytest.mark.anyio

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": []}
Field = tuple[bytes, bytes]
MALFORMED: list[Field] = [
    (b"x-a", b"1\r\nx-b: 2"),
    (b"x-a", b"1\nx-b: 2"),
    (b"x-a", b"\x00"),
    (b"x-a", b"\x1b[2J"),
    (b"x-a", b"\x7f"),
    (b"x-a", b"1\r\n\r\n"),
    (b"x a", b"1"),
    (b"x-a:", b"1"),
    (b"x-a\r\nx-b", b"1"),
    (b"", b"1"),
]
FRAMING: tuple[Field, ...] = (
    (b"Content-Length", b"1"),
    (b"transfer-encoding", b"chunked"),
    (b"CONNECTION", b"close"),
    (b"keep-alive", b"timeout=1"),
)


class Answering:
    """Answer with, refuse with, or add the fields a test sets."""

    fields: tuple[Field, ...] = ()
    how = "answer"
    status = 200

    @hookimpl
    def pre_request(self, exchange: Exchange) -> Response | None:
        if self.how == "add":
            exchange.reply_fields += self.fields
        elif self.how == "refuse":
            raise RequestError("bad_request", "No.", fields=self.fields)
        else:
            return Response(self.status, b"{}", self.fields)
        return None


async def told(fields: tuple[Field, ...], how: str, status: int = 200) -> tuple[Reply, Harness]:
    plugin = Answering()
    plugin.fields, plugin.how, plugin.status = fields, how, status
    upstream = FakeUpstream([[http_reply(b'{"id":"x"}')]], repeat=True)
    async with Harness([("answering", plugin)], upstream=upstream) as harness:
        reply = await harness.request("POST", CHAT, body=BODY)
        again = await harness.request("POST", CHAT, body=BODY)
        assert again.status == reply.status
        await harness.wait_settled(2)
    return reply, harness


@pytest.mark.parametrize("field", MALFORMED)
@pytest.mark.parametrize("how", ["answer", "refuse", "add"])
async def test_malformed_field_of_a_plugin_becomes_a_plugin_error(how: str, field: Field) -> None:
    reply, harness = await told(((b"x-fine", b"1"), field), how)
    assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
    assert reply.header("x-b") is None
    assert reply.header("x-fine") is None
    assert harness.exchanges[0].status == 500
    assert {type(fault) for fault in harness.faults} == {FieldError}


@pytest.mark.parametrize("how", ["answer", "refuse", "add"])
async def test_framing_fields_of_a_plugin_are_left_out(how: str) -> None:
    reply, _ = await told((*FRAMING, (b"x-fine", b"1")), how)
    head = reply.raw.partition(b"\r\n\r\n")[0].lower()
    assert reply.header("x-fine") == "1"
    assert head.count(b"content-length:") == 1
    assert b"content-length: %d" % len(reply.body) in head
    assert b"transfer-encoding" not in head
    assert b"\r\nconnection:" not in head
    assert b"keep-alive" not in head


@pytest.mark.parametrize("status", [204, 304])
async def test_answer_without_a_body_by_its_status_has_none(status: int) -> None:
    reply, _ = await told((), "answer", status)
    assert reply.status == status
    assert b"content-length" not in reply.raw.lower()
    assert reply.raw.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("field", [(b"x-a", b"\tcaf\xc3\xa9 \x80"), (b"x-a", b""), (b"!#$%&'*+.^_`|~", b"1")])
def test_whatever_a_head_may_hold_passes(field: Field) -> None:
    assert field_lines([field]) == b"%b: %b\r\n" % field


def test_refused_fields_are_gone_from_the_exchange() -> None:
    exchange = sample_exchange(SAMPLES[0])
    exchange.reply_fields = [(b"x-a", b"\r\n")]
    heads = ReplyHeads("penstock")
    with pytest.raises(FieldError, match="b'x-a'"):
        heads.authored(exchange, Response(200), close=False)
    assert b"x-a" not in heads.authored(exchange, Response(200), close=False)


@pytest.mark.parametrize("shown", [lambda request: request, lambda request: request.head])
def test_requests_never_print_their_secrets(shown: Any) -> None:
    request = sample_exchange(SAMPLES[0], ((b"Cookie", b"sesame"),)).request
    head = request.head
    secret = Request(
        type(head)(
            head.method, b"/v1/x?key=sesame", head.headers, None, False, True, False, False, head.fields
        ), request.path, b"key=sesame", request.endpoint, b"sesame",
    )  # fmt: skip
    text = repr(shown(secret))
    assert b"sesame" in head.fields
    assert "sesame" not in text
    assert head.headers.index[b"authorization"].decode() not in text


STRANGE: list[tuple[Any, str]] = [
    ((b"X-Project", "proj"), "X-Project.*must be a pair of bytes, is .bytes, str."),
    (("X-Project", b"proj"), "X-Project.*must be a pair of bytes, is .str, bytes."),
    ((b"X-Project", 7), "X-Project.*is .bytes, int."),
    ((b"X-Project", None), "X-Project.*is .bytes, NoneType."),
    ((b"X-Project",), "X-Project.*a pair of bytes"),
    (b"X-Project: proj", "X-Project.*a pair of bytes"),
    (7, "must be a pair of bytes .name, value., is int"),
    ((b"X-Project", b"a\r\nb: c"), "X-Project.*control"),
    ((b"X Project", b"a"), "X Project.*is malformed"),
]


@pytest.mark.parametrize(("field", "told_of"), STRANGE)
@pytest.mark.parametrize("how", ["answer", "refuse", "add"])
async def test_field_that_cannot_be_written_is_named_with_its_plugin(how: str, field: Any, told_of: str) -> None:
    reply, harness = await told(((b"x-fine", b"1"), field), how)
    assert (reply.status, reply.header("X-Penstock-Error")) == (500, "plugin_error")
    for fault in harness.faults:
        assert isinstance(fault, FieldError)
        assert fault.plugin == "answering"
        assert re.search(told_of, str(fault))
        assert "proj" not in str(fault).replace("X-Project", "")  # what is in it may be a secret


class Bystander:
    """Take part in the same hook without a word."""

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None: ...

    @hookimpl
    def post_response(self, exchange: Exchange) -> None: ...


async def test_of_several_plugins_each_that_could_have_added_the_field_is_named() -> None:
    plugin = Answering()
    plugin.fields, plugin.how = ((b"x-a", b"\n"),), "add"
    upstream = FakeUpstream([[http_reply()]])
    async with Harness([("answering", plugin), ("bystander", Bystander)], upstream=upstream) as harness:
        assert (await harness.request("POST", CHAT, body=BODY)).status == 500
        (fault,) = harness.faults
    assert isinstance(fault, FieldError)
    assert fault.plugin == "answering or bystander"
    assert "of plugin 'answering' or 'bystander'" in str(fault)
