"""A provider for Penstock that answers a chat completion with the last user message."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import attrs

import penstock
from penstock import hookimpl

_HEAD = b"HTTP/1.1 %d Echo\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"


@attrs.define(eq=False)
class EchoResponse:
    """A whole answer in memory; ``start`` delivers it at once."""

    head: penstock.ResponseHead
    body: bytes
    is_raw: bool = False  # the body is payload, without the wire's chunk framing
    framing: None = None  # which goes with raw bodies only

    def start(self, receiver: penstock.Receiver) -> None:
        receiver.receive(self.body)
        receiver.finish()

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def close(self) -> None: ...


@attrs.frozen
class EchoTransport:
    """Answer in this process what other transports carry over a network."""

    prefix: str

    async def send(self, request: penstock.UpstreamRequest) -> penstock.UpstreamResponse:
        """Return the echo, or 400 for a body that is no chat request."""
        status, content_type = 200, b"application/json"
        try:
            call = json.loads(request.body)
            texts = [message["content"] for message in call["messages"] if message["role"] == "user"]
            body = answer(call, self.prefix + texts[-1])
            content_type = b"text/event-stream" if call.get("stream") else content_type
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            status, body = 400, b'{"error":{"message":"there is no user message of plain text to echo"}}'
        return EchoResponse(penstock.read_response_head(_HEAD % (status, content_type, len(body))), body)


def answer(call: dict[str, Any], text: str) -> bytes:
    """Return a chat completion that says ``text``, as an event stream where the call asks for one."""
    usage = {"prompt_tokens": len(text.split()), "completion_tokens": len(text.split())}
    base = {"id": "chatcmpl-echo", "created": 0, "model": call["model"]}
    message = {"role": "assistant", "content": text}
    if not call.get("stream"):
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return json.dumps({**base, "object": "chat.completion", "choices": choices, "usage": usage}).encode()
    frames: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": message, "finish_reason": "stop"}]}]
    if call.get("stream_options", {}).get("include_usage"):
        frames.append({"choices": [], "usage": usage})
    events = [json.dumps({**base, "object": "chat.completion.chunk", **frame}) for frame in frames]
    return "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()


@attrs.define(eq=False, kw_only=True)
class EchoProvider(penstock.OpenAIProvider):
    """Speak OpenAI's chat dialect. Without the transport this is a whole provider over HTTP."""

    type: str = "echo"
    default_base_url: str | None = "http://echo.invalid/v1"
    dialects: frozenset[str] = frozenset({"openai.chat"})
    transport: EchoTransport

    def build(self, exchange: penstock.Exchange, candidate: penstock.Candidate) -> penstock.UpstreamRequest:
        """Forward the client's request as every OpenAI-like provider does, through our own transport."""
        return attrs.evolve(super().build(exchange, candidate), transport=self.transport)


@attrs.define(eq=False)
class Echo:
    """Bring the provider type ``echo``."""

    @attrs.frozen(kw_only=True)
    class Config:
        """The ``[plugins.echo]`` table."""

        prefix: str = ""
        """What every echo begins with."""

    config: Config
    services: penstock.Services

    @hookimpl
    def register_providers(self) -> Iterable[penstock.Provider]:
        """Return the one provider; a binding asks for it with ``type = "echo"``."""
        return [EchoProvider(namespace=self.services.namespace, transport=EchoTransport(self.config.prefix))]
