"""The canonical requests and answers checkers run plugins through: one per endpoint, streaming and not."""

from __future__ import annotations

import time

import attrs

from penstock.endpoints import UNKNOWN, find_endpoint
from penstock.heads import read_request_head
from penstock.ids import new_request_id, new_trace
from penstock.models import Exchange, Principal, Request
from penstock.testing.client import request_bytes
from penstock.testing.upstream import LAST_CHUNK, STREAM_HEAD, Step, chunk, http_reply

CLIENT_KEY = "ps_vk_test_a_client_s_own_credential"
"""What sample requests present; no provider may let it through."""
_FORM_TYPE = b"multipart/form-data; boundary=seam"
_FORM = (
    b'--seam\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'
    b'--seam\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n\r\n\x00\xff\r\n--seam--\r\n'
)
_USAGE = b'"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"input_tokens":3,"output_tokens":2}'
ANSWER = (
    b'{"id":"x1","object":"chat.completion","model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"Hi"}}],"content":[{"type":"text","text":"Hi"}],' + _USAGE + b"}"
)
_CHAT_EVENTS = (
    b'data: {"id":"x1","choices":[{"index":0,"delta":{"content":"H\xc3\xa9"}}]}\n\n',
    b'data: {"id":"x1","choices":[],' + _USAGE + b"}\n\n",
    b"data: [DONE]\n\n",
)
_ANTHROPIC_EVENTS = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n',
    b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"H"}}\n\n',
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":2}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
)
_RESPONSES_EVENTS = (
    b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"H"}\n\n',
    b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"resp_1",' + _USAGE + b"}}\n\n",
)


@attrs.frozen
class Sample:
    """One request worth trying."""

    method: str
    """Such as ``POST``."""
    path: str
    """Path and query."""
    body: bytes = b""
    """The whole body."""
    content_type: bytes = b"application/json"
    """Sent where there is a body."""
    is_stream: bool = False
    """Whether an event stream is asked for."""

    def wire(self, key: str | None = None) -> bytes:
        """Return the request as it goes over the wire."""
        fields = [(b"Content-Type", self.content_type)] if self.body else []
        return request_bytes(self.method, self.path, fields, self.body, key=key)

    def answer(self) -> list[Step]:
        """Return the steps of a fitting answer."""
        return [STREAM_HEAD, *map(chunk, self.events), LAST_CHUNK] if self.is_stream else [http_reply(ANSWER)]

    @property
    def events(self) -> tuple[bytes, ...]:
        """Return the events of a fitting stream."""
        if self.path == "/v1/messages":
            return _ANTHROPIC_EVENTS
        return _RESPONSES_EVENTS if self.path == "/v1/responses" else _CHAT_EVENTS

    def __str__(self) -> str:
        return f"{self.method} {self.path}{' (stream)' if self.is_stream else ''}"


def _json(model: bytes, members: bytes) -> bytes:
    return b'{ "model" : "%b" , "n":1.0, "n":1e0,%b}' % (model, members)


_MESSAGES = b'"messages":[{"role":"user","content":"Gr\xc3\xbc\\u00dfe"}]'
SAMPLES = (
    Sample("POST", "/v1/chat/completions", _json(b"gpt-4o-mini", _MESSAGES)),
    Sample(
        "POST",
        "/v1/chat/completions",
        _json(b"gpt-4o-mini", _MESSAGES + b',"stream":true,"stream_options":{"include_usage":true}'),
        is_stream=True,
    ),
    Sample("POST", "/v1/responses", _json(b"gpt-4o-mini", b'"input":"Hi"')),
    Sample("POST", "/v1/responses", _json(b"gpt-4o-mini", b'"input":"Hi","stream":true'), is_stream=True),
    Sample("POST", "/v1/messages", _json(b"claude-x", b'"max_tokens":9,' + _MESSAGES)),
    Sample(
        "POST",
        "/v1/messages",
        _json(b"claude-x", b'"max_tokens":9,"stream":true,' + _MESSAGES),
        is_stream=True,
    ),
    Sample("POST", "/v1/messages/count_tokens", _json(b"claude-x", _MESSAGES)),
    Sample("POST", "/v1/completions", _json(b"davinci-x", b'"prompt":"Hi"')),
    Sample("POST", "/v1/embeddings", _json(b"text-embedding-x", b'"input":["Hi"]')),
    Sample("POST", "/v1/moderations", _json(b"omni-moderation-x", b'"input":"Hi"')),
    Sample("POST", "/v1/images/generations", _json(b"dall-e-x", b'"prompt":"Hi"')),
    Sample("POST", "/v1/images/edits", _FORM % b"dall-e-x", _FORM_TYPE),
    Sample("POST", "/v1/audio/speech", _json(b"tts-x", b'"input":"Hi"')),
    Sample("POST", "/v1/audio/transcriptions", _FORM % b"whisper-x", _FORM_TYPE),
    Sample("GET", "/v1/models"),
    Sample("GET", "/v1/models/gpt-4o-mini"),
    Sample("GET", "/v1/responses/resp_1"),
    Sample("POST", "/v1beta/models/gemini-x:generateContent", b'{"contents":[{"parts":[{"text":"Hi"}]}]}'),
)
"""Every kind of endpoint, streaming where it can."""
ODD = (
    Sample("POST", "/v1/chat/completions", b"not JSON"),
    Sample("POST", "/v1/chat/completions", b'"a string"'),
    Sample("POST", "/v1/chat/completions", b'{"model":7,"messages":{}}'),
    Sample("POST", "/v1/chat/completions"),
    Sample("POST", "/v1/messages", b'{"model":"claude-x","messages":[[[]]],"system":[1]}'),
    Sample("POST", "/v1/no/such/endpoint", b"{}"),
    Sample("DELETE", "/v1/chat/completions"),
)
"""Requests that are wrong in themselves: they may be refused or forwarded, and nothing may break."""


def sample_exchange(sample: Sample, fields: tuple[tuple[bytes, bytes], ...] = ()) -> Exchange:
    """Return an exchange around a sample request, authenticated, as ``Provider.build`` gets it."""
    wire = sample.wire(CLIENT_KEY)
    head_bytes = wire[: len(wire) - len(sample.body) - 2]
    head_bytes += b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n"
    head = read_request_head(head_bytes)
    path, _, query = head.target.partition(b"?")
    now = time.time_ns()
    exchange = Exchange(
        new_request_id(now),
        Request(head, path, query, find_endpoint(path) or UNKNOWN, sample.body),
        new_trace(None, None),
        "penstock",
        time.monotonic_ns(),
        now,
        ("192.0.2.1", 1),
    )
    exchange.principal = Principal("vk_check", "check", "ps_vk_test_check")
    exchange.is_stream = sample.is_stream
    return exchange
