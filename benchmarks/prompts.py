"""Requests as the official SDKs send them, no two alike."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Literal

import attrs

VARIANTS = 32
WORDS = (
    "gate",
    "water",
    "turbine",
    "wheel",
    "river",
    "valve",
    "pipe",
    "meter",
    "pressure",
    "flow",
    "dam",
    "head",
    "spillway",
    "intake",
    "runner",
    "shaft",
    "generator",
    "grid",
    "voltage",
    "frequency",
    "load",
    "storage",
    "season",
    "rain",
    "snow",
    "melt",
    "level",
    "gauge",
    "crest",
)


SYSTEM = "You answer questions about hydro-electric power, briefly."
MARKER = {"cache_control": {"type": "ephemeral"}}
TOOLS = ("read_meter", "open_gate")
LINK = "https://docs.example.com/turbines"


@attrs.frozen
class Prompt:
    """What to ask: sizes are bytes of the JSON body, about; pace and events are for the mock upstream."""

    body_size: int = 1000
    model: str = "gpt-4o-mini"
    streams: bool = False
    wants_usage: bool = True
    pace_ms: int = 0
    events: int = 0
    dialect: Literal["chat", "messages"] = "chat"
    """Chat completions, or Anthropic's messages."""
    has_markers: bool = False
    """Two cache markers, on the system prompt and on the last message; in messages only."""
    has_tools: bool = False
    """Two tools and a link, which policy rules look at; in chat completions only."""
    key: str = "bench"
    """Name of the virtual key that asks."""


def build_requests(prompt: Prompt, port: int, secret: str, count: int = VARIANTS) -> list[bytes]:
    """Build requests that differ in id, text and length; the same arguments give the same bytes.

    Half of them start with the messages, as the Python SDK writes them, half with the model.
    """
    write_head = _head_of_messages if prompt.dialect == "messages" else _head_of_chat
    return [
        f"{write_head(port, secret, request_id)}Content-Length: {len(body)}\r\n\r\n".encode() + body
        for request_id, body in _bodies(prompt, count)
    ]


def write_requests(path: Path, requests: list[bytes]) -> Path:
    """Write requests the way the load generator reads them: size, line feed, bytes."""
    path.write_bytes(b"".join(b"%d\n%s" % (len(request), request) for request in requests))
    return path


@lru_cache(maxsize=8)
def _bodies(prompt: Prompt, count: int) -> list[tuple[str, bytes]]:
    """Return ids and bodies; kept, because 32 long prompts take longer to write than to measure."""
    random = Random(prompt.body_size)
    write = _messages_body if prompt.dialect == "messages" else _chat_body
    return [
        (f"{random.getrandbits(128):032x}", json.dumps(write(prompt, number, random)).encode())
        for number in range(count)
    ]


def _head_of_chat(port: int, secret: str, request_id: str) -> str:
    return (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        "Accept: application/json\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\n"
        "Content-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 1.99.1\r\n"
        "X-Stainless-Lang: python\r\n"
        f"X-Request-Id: {request_id}\r\n"
        f"Authorization: Bearer {secret}\r\n"
    )


def _head_of_messages(port: int, secret: str, request_id: str) -> str:
    return (
        "POST /v1/messages HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        "Accept: application/json\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\n"
        "Content-Type: application/json\r\n"
        "User-Agent: Anthropic/Python 0.70.0\r\n"
        "X-Stainless-Lang: python\r\n"
        f"X-Request-Id: {request_id}\r\n"
        "anthropic-version: 2023-06-01\r\n"
        f"x-api-key: {secret}\r\n"
    )


def _chat_body(prompt: Prompt, number: int, random: Random) -> dict[str, object]:
    options: dict[str, object] = {"temperature": 0.7, "max_tokens": 256}
    metadata = {"turn": str(number)}
    if prompt.streams:
        options["stream"] = True
        if prompt.wants_usage:
            options["stream_options"] = {"include_usage": True}
    if prompt.pace_ms:
        metadata["pace_ms"] = str(prompt.pace_ms)
    if prompt.events:
        metadata["events"] = str(prompt.events)
    options["metadata"] = metadata
    taken = 240
    if prompt.has_tools:
        options["tools"] = [_tool(name) for name in TOOLS]
        taken += len(json.dumps(options["tools"])) + len(LINK) + 20
    text = _text(_size(prompt, random, taken), random)
    if prompt.has_tools:
        text = f"{LINK} {text}"
    return _in_turn(prompt, number, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}], options)


def _messages_body(prompt: Prompt, number: int, random: Random) -> dict[str, object]:
    marker = MARKER if prompt.has_markers else {}
    options: dict[str, object] = {"max_tokens": 256, "temperature": 0.7}
    if prompt.streams:
        options["stream"] = True
    options["system"] = [{"type": "text", "text": SYSTEM, **marker}]
    text = _text(_size(prompt, random, 280), random)
    asked: dict[str, object] = {"role": "user", "content": [{"type": "text", "text": text, **marker}]}
    return _in_turn(prompt, number, [asked], options)


def _in_turn(
    prompt: Prompt, number: int, messages: list[dict[str, object]], options: dict[str, object]
) -> dict[str, object]:
    if number % 2:
        return {"model": prompt.model, "messages": messages, **options}
    return {"messages": messages, "model": prompt.model, **options}


def _tool(name: str) -> dict[str, object]:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def _size(prompt: Prompt, random: Random, taken: int) -> int:
    return prompt.body_size - taken + random.randrange(-40, 40)


def _text(size: int, random: Random) -> str:
    words: list[str] = []
    left = size
    while left > 0:
        word = random.choice(WORDS)
        # Now and then what real prompts hold: a line end and a quotation, which JSON escapes.
        if random.random() < 0.05:
            word = f'"{word}"\n'
        words.append(word)
        left -= len(json.dumps(word)) - 1
    return " ".join(words)
