"""A gateway on sockets whose key has guardrails of the configuration file, and answers of each dialect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import attrs

from penstock import (
    BodyWindow,
    Candidate,
    Exchange,
    GuardrailCounts,
    HTTPProvider,
    Provider,
    UpstreamRequest,
    Usage,
    forward,
    hookimpl,
    new_key,
)
from penstock.testing import FakeUpstream, Harness, Reply, http_reply
from penstock.testing.harness import PEPPER
from penstock.testing.upstream import Step

CARD = "4111 1111 1111 1111"
MAIL = "jane.roe@example.org"


def event(payload: Mapping[str, Any], name: str | None = None, newline: str = "\n") -> bytes:
    head = "" if name is None else f"event: {name}{newline}"
    return f"{head}data: {json.dumps(payload)}{newline}{newline}".encode()


@attrs.frozen
class Shape:
    """One dialect: how it is asked, and how it says something, whole and in pieces."""

    name: str
    path: str
    stream_path: str

    def body(self, text: str, *, stream: bool = False) -> dict[str, Any]:
        if self.name == "gemini.generate":
            return {"contents": [{"role": "user", "parts": [{"text": text}]}]}
        asked: dict[str, Any] = {"model": "m", **({"stream": True} if stream else {})}
        if self.name == "openai.completions":
            return {**asked, "prompt": text}
        if self.name == "openai.responses":
            return {**asked, "input": text}
        if self.name == "anthropic.messages":
            return {**asked, "max_tokens": 9, "system": "be kind", "messages": [{"role": "user", "content": text}]}
        options = {"stream_options": {"include_usage": False}} if stream else {}
        return {**asked, **options, "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}

    def whole(self, text: str) -> bytes:
        return json.dumps(_WHOLE[self.name](text), indent=1).encode()

    def events(self, pieces: Sequence[str]) -> list[bytes]:
        return _EVENTS[self.name](pieces)

    def said(self, body: bytes) -> str:
        """Return the text of a stream's body, put together as a client would."""
        lines = body.replace(b"\r\n", b"\n").split(b"\n")
        return "".join(_SAID[self.name](json.loads(line[6:])) for line in lines if line.startswith(b"data: {"))

    def refusal(self, payload: Any) -> tuple[Any, Any]:
        error = payload["error"]
        if self.name == "gemini.generate":
            return error["status"], None
        return error["type"], error["code"]


def _chat_events(pieces: Sequence[str]) -> list[bytes]:
    def said(delta: dict[str, Any], reason: str | None = None) -> bytes:
        return event({"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    middle = [said({"content": piece}) for piece in pieces]
    return [said({"role": "assistant", "content": ""}), *middle, said({}, "stop"), b"data: [DONE]\n\n"]


def _completions_events(pieces: Sequence[str]) -> list[bytes]:
    middle = [event({"choices": [{"index": 0, "text": piece, "finish_reason": None}]}) for piece in pieces]
    return [*middle, event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}), b"data: [DONE]\n\n"]


def _messages_events(pieces: Sequence[str]) -> list[bytes]:
    def said(kind: str, **members: Any) -> bytes:
        return event({"type": kind, **members}, kind)

    return [
        said("message_start", message={"id": "m", "role": "assistant", "content": []}),
        said("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        said("ping"),
        *[said("content_block_delta", index=0, delta={"type": "text_delta", "text": piece}) for piece in pieces],
        said("content_block_stop", index=0),
        said("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 5}),
        said("message_stop"),
    ]


def _responses_events(pieces: Sequence[str]) -> list[bytes]:
    def said(kind: str, **members: Any) -> bytes:
        return event({"type": kind, **members}, kind)

    text = "".join(pieces)
    place = {"item_id": "i", "output_index": 0, "content_index": 0}
    item = {"type": "message", "content": [{"type": "output_text", "text": text}]}
    return [
        said("response.created", response={"id": "r", "output": []}),
        *[said("response.output_text.delta", **place, delta=piece) for piece in pieces],
        said("response.output_text.done", **place, text=text),
        said("response.output_item.done", output_index=0, item=item),
        said("response.completed", response={"id": "r", "output": [item]}),
    ]


def _gemini_events(pieces: Sequence[str]) -> list[bytes]:
    def said(text: str, **members: Any) -> bytes:
        content = {"role": "model", "parts": [{"text": text}]}
        return event({"candidates": [{"content": content, **members}]}, newline="\r\n")

    return [*[said(piece) for piece in pieces], said("", finishReason="STOP")]


_EVENTS = {
    "openai.chat": _chat_events,
    "openai.completions": _completions_events,
    "anthropic.messages": _messages_events,
    "openai.responses": _responses_events,
    "gemini.generate": _gemini_events,
}
_WHOLE: dict[str, Any] = {
    "openai.chat": lambda text: {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]},
    "openai.completions": lambda text: {"choices": [{"index": 0, "text": text}]},
    "anthropic.messages": lambda text: {"type": "message", "content": [{"type": "text", "text": text}]},
    "openai.responses": lambda text: {
        "id": "r", "output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}]
    },
    "gemini.generate": lambda text: {"candidates": [{"content": {"parts": [{"text": text}]}}]},
}  # fmt: skip
_SAID: dict[str, Any] = {
    "openai.chat": lambda found: (found["choices"][0]["delta"].get("content") or "") if "choices" in found else "",
    "openai.completions": lambda found: found["choices"][0]["text"] if "choices" in found else "",
    "anthropic.messages": lambda found: found.get("delta", {}).get("text", ""),
    "openai.responses": lambda found: found.get("delta", ""),
    "gemini.generate": lambda found: (
        found["candidates"][0]["content"]["parts"][0]["text"] if "candidates" in found else ""
    ),
}
_GEMINI = "/v1beta/models/m:"
SHAPES = (
    Shape("openai.chat", "/v1/chat/completions", "/v1/chat/completions"),
    Shape("openai.completions", "/v1/completions", "/v1/completions"),
    Shape("openai.responses", "/v1/responses", "/v1/responses"),
    Shape("anthropic.messages", "/v1/messages", "/v1/messages"),
    Shape("gemini.generate", _GEMINI + "generateContent", _GEMINI + "streamGenerateContent?alt=sse"),
)


@attrs.define(eq=False)
class Guarded:
    """A running gateway, and what tests ask of it."""

    harness: Harness
    upstream: FakeUpstream

    @property
    def counts(self) -> GuardrailCounts:
        return self.harness.gateway.generation.services.get(GuardrailCounts)

    async def ask(self, shape: Shape, text: str, *, stream: bool = False) -> Reply:
        path = shape.stream_path if stream else shape.path
        return await self.harness.request("POST", path, body=shape.body(text, stream=stream))


def guardrail(name: str, evaluator: str, *directions: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "evaluator": evaluator, "directions": list(directions or ("request",)), **more}


@asynccontextmanager
async def guarded(
    guardrails: Sequence[dict[str, Any]],
    script: Sequence[Sequence[Step]] | FakeUpstream | None = None,
    *,
    attach: Sequence[dict[str, Any]] | None = None,
    plugins: Sequence[Any] = (),
    config: Mapping[str, Any] | None = None,
    keys: Sequence[dict[str, Any]] = (),
    socket: bool = True,
) -> AsyncIterator[Guarded]:
    """Run a gateway with guardrails, all of them attached to its key unless ``attach`` says otherwise."""
    upstream = (
        script if isinstance(script, FakeUpstream) else FakeUpstream(script or [[http_reply(b"{}")]], repeat=True)
    )
    attached = [{"guardrail_id": each["name"]} for each in guardrails] if attach is None else list(attach)
    secret = new_key()
    table = {"name": "test", "secret": secret, "guardrails": attached}
    tables = {
        "virtual_keys": {"pepper": PEPPER, "keys": [table, *keys]},
        "guardrails": {"guardrails": list(guardrails)},
        **(config or {}),
    }
    names = [*plugins, "routing", "guardrails", ("gemini_fake", GeminiPlugin)]
    bindings = (
        {"name": "up", "type": "openai_compatible"},
        {"name": "anthropic", "type": "anthropic"},
        {"name": "gemini", "type": "gemini_fake"},
    )
    harness = Harness(names, tables, upstream, bindings=bindings, socket=socket)
    harness.key = secret
    async with harness:
        yield Guarded(harness, upstream)


@attrs.define(eq=False, kw_only=True)
class FakeGemini(HTTPProvider):
    """Forward Gemini's dialect as it is."""

    type: str = "gemini_fake"
    dialects: frozenset[str] = frozenset(("gemini.generate",))

    def build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        address = self.address(candidate.binding)
        return forward(exchange, candidate, address, path=exchange.request.path)

    def read_usage(self, exchange: Exchange, window: BodyWindow) -> Usage | None:
        return None


class GeminiPlugin:
    """Bring it."""

    @hookimpl
    def register_providers(self) -> list[Provider]:
        return [FakeGemini()]
