"""OpenAI's embeddings, moderations, images and audio."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from penstock_plugins.providers.mock.calls import Call
from penstock_plugins.providers.mock.conversation import count_bytes, number, split_text
from penstock_plugins.providers.mock.replies import (
    CREATED,
    RefusedError,
    Reply,
    encode,
    json_reply,
    named,
    stream_reply,
)
from penstock_plugins.providers.mock.schemas import JSON

_DIMENSIONS = 1536
_MAX_DIMENSIONS = 8192
_FLAG_WORD = "mock-flag"
_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
_MP3_FRAME = b"\xff\xfb\x90\x00" + bytes(413)
"""MPEG-1 layer III, 128 kbit/s, 44.1 kHz: 26 ms of silence."""
_RATE = 24_000
_IMAGE_SIDE = 64
_MAX_IMAGES = 10


def vector(text: str, size: int) -> list[float]:
    """Return a vector of length one that follows from the text. Raises RefusedError for too large a size."""
    if size > _MAX_DIMENSIONS:
        raise RefusedError(400, f"dimensions must be at most {_MAX_DIMENSIONS}.", param="dimensions")
    numbers = struct.unpack(f"<{size}h", hashlib.shake_128(text.encode()).digest(2 * size))
    length = math.sqrt(sum([value * value for value in numbers])) or 1.0
    return [value / length for value in numbers]


def embed(call: Call) -> Reply:
    """Embed a text, texts, tokens or lists of tokens."""
    asked = call.document.get("input")
    if not asked or not isinstance(asked, str | list):
        raise RefusedError(400, "input must be a text or a list that is not empty.", param="input")
    entries = asked if isinstance(asked, list) and not isinstance(asked[0], int) else [asked]
    size = number(call.document.get("dimensions")) or _DIMENSIONS
    is_base64 = call.document.get("encoding_format") == "base64"
    rows = []
    tokens = 0
    for index, entry in enumerate(entries):
        text = entry if isinstance(entry, str) else encode(entry).decode()
        tokens += count_bytes(len(text.encode())) if isinstance(entry, str) else len(entry)
        floats = vector(text, size)
        packed: Any = base64.b64encode(struct.pack(f"<{size}f", *floats)).decode() if is_base64 else floats
        rows.append({"object": "embedding", "index": index, "embedding": packed})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_reply({"object": "list", "data": rows, "model": call.model, "usage": usage})


def moderate(call: Call) -> Reply:
    """Flag as violence whatever holds the word ``mock-flag``, and nothing else."""
    asked = call.document.get("input")
    is_parts = isinstance(asked, list) and bool(asked) and isinstance(asked[0], dict)
    entries = asked if isinstance(asked, list) and not is_parts else [asked]
    return json_reply(
        {"id": call.new_id("modr-"), "model": call.model, "results": [_verdict(entry) for entry in entries]}
    )


def _verdict(entry: JSON) -> dict[str, Any]:
    is_flagged = _FLAG_WORD in encode(entry).decode()
    hits = {name: is_flagged and name == "violence" for name in _CATEGORIES}
    return {
        "flagged": is_flagged,
        "categories": hits,
        "category_scores": {name: 0.99 if hit else 0.01 for name, hit in hits.items()},
        "category_applied_input_types": {name: ["text"] for name in _CATEGORIES},
    }


# --- images -----------------------------------------------------------------------------------------------


def draw(call: Call) -> Reply:
    """Draw squares of one colour that follows from the request."""
    count = number(call.document.get("n")) or 1
    if count > _MAX_IMAGES:
        raise RefusedError(400, f"n must be at most {_MAX_IMAGES}.", param="n")
    images = [base64.b64encode(_png(call.seed + bytes([index]))).decode() for index in range(count)]
    as_url = call.document.get("response_format") == "url"
    data = [{"url": f"data:image/png;base64,{image}"} if as_url else {"b64_json": image} for image in images]
    read, written = count_bytes(len(str(call.document.get("prompt", "")).encode())), 256 * count
    usage = {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": read, "image_tokens": 0},
        "output_tokens": written,
        "total_tokens": read + written,
    }
    return json_reply({"created": CREATED, "data": data, "usage": usage})


def _png(seed: bytes) -> bytes:
    colour = hashlib.blake2b(seed, digest_size=3).digest()
    side = _IMAGE_SIDE
    lines = zlib.compress((b"\0" + colour * side) * side)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", lines), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


# --- audio ------------------------------------------------------------------------------------------------


def speak(call: Call) -> Reply:
    """Return silence, the longer the longer the text: mp3, wav or pcm."""
    text = call.document.get("input")
    if not isinstance(text, str) or not text:
        raise RefusedError(400, "input must be a text.", param="input")
    form = call.document.get("response_format") or "mp3"
    tenths = min(count_bytes(len(text.encode())), 600)
    silence = bytes(2 * _RATE // 10 * tenths)
    if form == "mp3":
        return Reply(_MP3_FRAME * (4 * tenths), content_type=b"audio/mpeg")
    if form == "pcm":
        return Reply(silence, content_type=b"audio/pcm")
    if form != "wav":
        raise RefusedError(400, "The mock speaks mp3, wav and pcm.", param="response_format")
    layout = struct.pack(
        "<4sI4s4sIHHIIHH", b"RIFF", 36 + len(silence), b"WAVE", b"fmt ", 16, 1, 1, _RATE, 2 * _RATE, 2, 16
    )
    return Reply(layout + struct.pack("<4sI", b"data", len(silence)) + silence, content_type=b"audio/wav")


def transcribe(call: Call) -> Reply:
    """Say how many bytes were heard: as JSON, as text, or as a stream."""
    text = f"The mock provider heard a form of {len(call.body)} bytes."
    usage = {
        "type": "tokens",
        "input_tokens": count_bytes(len(call.body)),
        "output_tokens": count_bytes(len(text)),
        "total_tokens": count_bytes(len(call.body)) + count_bytes(len(text)),
    }
    if call.is_stream:
        return stream_reply(_stream_transcript(text, usage))
    form = call.document.get("response_format")
    if form == "text":
        return Reply(text.encode() + b"\n", content_type=b"text/plain; charset=utf-8")
    verbose = {"task": "transcribe", "language": "english", "duration": 1.0, "segments": []}
    return json_reply({**(verbose if form == "verbose_json" else {}), "text": text, "usage": usage})


def _stream_transcript(text: str, usage: dict[str, Any]) -> Iterator[bytes]:
    for word in split_text(text):
        yield named({"type": "transcript.text.delta", "delta": word, "logprobs": []})
    yield named({"type": "transcript.text.done", "text": text, "logprobs": [], "usage": usage})
