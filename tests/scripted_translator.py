"""A translator too simple to be wrong, from anthropic.messages into openai.chat, and a plugin that reviews answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import attrs

from penstock import Exchange, RequestError, Translated, UpstreamError, hookimpl
from penstock.sse import EventSplitter, parse_event

MESSAGES = "/v1/messages"
ASK = b'{"model":"m","max_tokens":9,"messages":[]}'
ASK_STREAM = b'{"model":"m","max_tokens":9,"stream":true,"messages":[]}'
STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'


def delta(payload: bytes) -> bytes:
    """Return the event a chat frame becomes."""
    return b'event: content_block_delta\ndata: {"type":"content_block_delta","frame":%b}\n\n' % payload


def wrapped(body: bytes, status: int = 200) -> bytes:
    """Return what a whole body becomes."""
    return b'{"status":%d,"from":%b}' % (status, body)


@attrs.define(eq=False)
class ScriptedReply:
    """Wrap what comes; a payload that says ``unreadable`` cannot be read, one that says ``crash`` finds a bug."""

    status: int = 0
    is_stream: bool = False
    is_done: bool = False
    gathered: bytes = b""
    frames: list[bytes] = attrs.field(factory=list)
    splitter: EventSplitter = attrs.field(factory=lambda: EventSplitter(max_event_bytes=1 << 20))

    def begin(self, status: int, *, is_event_stream: bool) -> None:
        self.status, self.is_stream = status, is_event_stream

    def feed(self, payload: bytes) -> bytes:
        if self.is_stream:
            return b"".join([self._event(parse_event(raw).payload) for raw in self.splitter.feed(payload)])
        self.gathered += payload
        return b""

    def _event(self, payload: bytes) -> bytes:
        self.frames.append(payload)
        if b"unreadable" in payload:
            raise UpstreamError("protocol", "one of its events cannot be read")
        if b"crash" in payload:
            raise ZeroDivisionError
        if payload == b"[DONE]":
            self.is_done = True
            return STOP
        return delta(payload) if payload else b""

    def finish(self) -> bytes:
        if self.is_stream:
            if not self.is_done:
                raise UpstreamError("truncated", "the stream ended before its last event")
            return b""
        if b"crash" in self.gathered:
            raise ZeroDivisionError
        try:
            json.loads(self.gathered)
        except ValueError:
            raise UpstreamError("protocol", "its answer is no JSON") from None
        return wrapped(self.gathered, self.status)


class ScriptedTranslator:
    """Translate by what the request says of itself."""

    source = "anthropic.messages"
    target = "openai.chat"

    def __init__(self) -> None:
        self.replies: list[ScriptedReply] = []

    def translate(self, body: bytes, model: str | None) -> Translated:
        asked = json.loads(body)
        if "unsupported" in asked:
            raise RequestError("unsupported_parameter", "There is no 'unsupported' there.", param="unsupported")
        if "crash" in asked:
            raise ZeroDivisionError
        reply = ScriptedReply()
        self.replies.append(reply)
        made: dict[str, Any] = {"model": model, "messages": [], **({"stream": True} if asked.get("stream") else {})}
        dropped = tuple(name for name in ("top_k", "thinking") if name in asked)
        return Translated(json.dumps(made).encode(), reply, dropped)


@attrs.define(eq=False)
class Translating:
    """Bring one translator."""

    translator: ScriptedTranslator = attrs.field(factory=ScriptedTranslator)

    @hookimpl
    def register_translators(self) -> Iterable[Any]:
        return [self.translator]


@attrs.define(eq=False)
class Reviewer:
    """Look at whole answers; ``judge`` says what becomes of one."""

    judge: Callable[[Exchange, bytes], bytes | Awaitable[bytes | None] | None] = lambda _exchange, _body: None
    seen: list[bytes] = attrs.field(factory=list)
    name: str = "reviewer"

    @hookimpl
    def pre_request(self, exchange: Exchange) -> None:
        exchange.watch_response(self.name)

    @hookimpl
    def on_response(self, exchange: Exchange, body: bytes) -> Any:
        self.seen.append(body)
        return self.judge(exchange, body)


def translated(count: int = 1, *natives: str) -> Sequence[dict[str, Any]]:
    """Return settings of bindings that declare the model, some of other types than the chat provider."""
    return [{"models": ["m"], "type": kind} for kind in (*["openai_compatible"] * count, *natives)]
