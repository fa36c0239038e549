"""Requests as the official SDKs send them, no two alike."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

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


@attrs.frozen
class Prompt:
    """What to ask: sizes are bytes of the JSON body, about; pace and events are for the mock upstream."""

    body_size: int = 1000
    model: str = "gpt-4o-mini"
    streams: bool = False
    wants_usage: bool = True
    pace_ms: int = 0
    events: int = 0


def build_requests(prompt: Prompt, port: int, secret: str, count: int = VARIANTS) -> list[bytes]:
    """Build requests that differ in id, text and length; the same arguments give the same bytes.

    Half of them start with the messages, as the Python SDK writes them, half with the model.
    """
    random = Random(prompt.body_size)
    return [_build_request(prompt, port, secret, number, random) for number in range(count)]


def write_requests(path: Path, requests: list[bytes]) -> Path:
    """Write requests the way the load generator reads them: size, line feed, bytes."""
    path.write_bytes(b"".join(b"%d\n%s" % (len(request), request) for request in requests))
    return path


def _build_request(prompt: Prompt, port: int, secret: str, number: int, random: Random) -> bytes:
    body = json.dumps(_body(prompt, number, random)).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        "Accept: application/json\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\n"
        "Content-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 1.99.1\r\n"
        "X-Stainless-Lang: python\r\n"
        f"X-Request-Id: {random.getrandbits(128):032x}\r\n"
        f"Authorization: Bearer {secret}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _body(prompt: Prompt, number: int, random: Random) -> dict[str, object]:
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
    text = _text(prompt.body_size - 240 + random.randrange(-40, 40), random)
    messages = [
        {"role": "system", "content": "You answer questions about hydro-electric power, briefly."},
        {"role": "user", "content": text},
    ]
    if number % 2:
        return {"model": prompt.model, "messages": messages, **options}
    return {"messages": messages, "model": prompt.model, **options}


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
