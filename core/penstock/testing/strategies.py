"""Hypothesis strategies for what goes over the wire: any spelling of it, and any segmentation."""

from __future__ import annotations

import gzip
import importlib.util
import json

import attrs
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

_MAX_CUTS = 12
_BYTEWISE_LIMIT = 512
_SPACE = st.sampled_from([b"", b"", b"", b" ", b"\n", b"\t", b" \r\n  "])
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "/": "\\/"}
_TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", "naïve", "日本語", "👩‍🚀 ok", "\u2028"]
)
_NUMBERS = st.sampled_from(
    [
        b"0",
        b"-0",
        b"1",
        b"0.1",
        b"-1.50",
        b"1e5",
        b"1E+400",
        b"-2.5e-3",
        str(10**40).encode(),
        b"12345678901234567890",
    ]
)
_LITERALS = st.sampled_from([b"true", b"false", b"null"])


# --- segmentation -------------------------------------------------------------------------------------------


@st.composite
def segmentations(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """Split ``data`` anywhere: whole, in a few pieces, or byte by byte; no piece is empty."""
    if len(data) < 2:
        return [data] if data else []
    if len(data) <= _BYTEWISE_LIMIT and draw(st.integers(0, 5)) == 0:
        return [data[at : at + 1] for at in range(len(data))]
    cuts = sorted(draw(st.sets(st.integers(1, len(data) - 1), max_size=min(_MAX_CUTS, len(data) - 1))))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def segmented(data: SearchStrategy[bytes]) -> SearchStrategy[list[bytes]]:
    """Draw bytes and split them anywhere."""
    return data.flatmap(segmentations)


# --- JSON ---------------------------------------------------------------------------------------------------


@st.composite
def json_strings(draw: st.DrawFn, texts: SearchStrategy[str] = _TEXT) -> bytes:
    """Spell a text as a JSON string: raw UTF-8, short escapes and ``\\u`` escapes mixed."""
    text = draw(texts)
    style = draw(st.sampled_from(["raw", "ascii", "mixed"]))
    if style == "ascii":
        return json.dumps(text).encode()
    pieces = []
    for number, character in enumerate(text):
        if character in _SHORT_ESCAPES and (character != "/" or style == "mixed"):
            pieces.append(_SHORT_ESCAPES[character])
        elif ord(character) < 0x20 or (style == "mixed" and number % 2 == 0):
            pieces.append(_escaped(character))
        else:
            pieces.append(character)
    return b'"' + "".join(pieces).encode() + b'"'


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))


@st.composite
def _arrays(draw: st.DrawFn, values: SearchStrategy[bytes]) -> bytes:
    items = [draw(_SPACE) + item + draw(_SPACE) for item in draw(st.lists(values, max_size=3))]
    return b"[" + (b",".join(items) or draw(_SPACE)) + b"]"


@st.composite
def _objects(draw: st.DrawFn, values: SearchStrategy[bytes]) -> bytes:
    members = draw(st.lists(st.tuples(json_strings(), values), max_size=3))
    repeats: bool = draw(st.booleans())
    if members and repeats:
        members.append((members[0][0], draw(values)))
    return joined_object(draw, members)


def joined_object(draw: st.DrawFn, members: list[tuple[bytes, bytes]]) -> bytes:
    """Return an object of spelled members, with odd white space between everything."""
    parts = [draw(_SPACE) + name + draw(_SPACE) + b":" + draw(_SPACE) + value + draw(_SPACE) for name, value in members]
    return b"{" + (b",".join(parts) or draw(_SPACE)) + b"}"


def json_values() -> SearchStrategy[bytes]:
    """Draw the bytes of any JSON value: odd white space, duplicate keys, huge numbers, escapes."""
    leaves = json_strings() | _NUMBERS | _LITERALS
    return st.recursive(leaves, lambda values: _arrays(values) | _objects(values), max_leaves=8)


def json_bodies() -> SearchStrategy[bytes]:
    """Draw a JSON body with white space around it."""
    return st.tuples(_SPACE, json_values(), _SPACE).map(b"".join)


@st.composite
def chat_bodies(draw: st.DrawFn, *, model: str = "gpt-4o-mini", stream: bool = False) -> bytes:
    """Draw a chat request: its own members in any order among unknown ones, all oddly spelled.

    A streaming one asks for usage itself, so the gateway has nothing to add.
    """
    messages = draw(st.lists(json_strings(), min_size=1, max_size=3))
    members = [
        (b'"model"', json.dumps(model).encode()),
        (
            b'"messages"',
            b"[" + b", ".join(b'{"role":"user","content":%b}' % text for text in messages) + b"]",
        ),
    ]
    if stream:
        members += [(b'"stream"', b"true"), (b'"stream_options"', b'{"include_usage" : true}')]
    members += [
        (b'"x-' + name[1:], value)
        for name, value in draw(st.lists(st.tuples(json_strings(), json_values()), max_size=3))
    ]
    return draw(_SPACE) + joined_object(draw, draw(st.permutations(members))) + draw(_SPACE)


# --- event streams ------------------------------------------------------------------------------------------

_OPENAI = b'{"id":"c1","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":%b}}]}'
_RESPONSES = b'{"type":"response.output_text.delta","delta":%b}'
_ANTHROPIC = b'{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":%b}}'


@st.composite
def sse_streams(draw: st.DrawFn, *, dialect: str | None = None) -> bytes:
    """Draw an event stream of one dialect: mixed line ends, comments, blank lines, multi-byte text.

    ``dialect``: openai.chat, openai.responses or anthropic.messages; None draws one.
    """
    spoken = dialect or draw(st.sampled_from(["openai.chat", "openai.responses", "anthropic.messages"]))
    parts: list[bytes] = []
    for text in draw(st.lists(json_strings(), min_size=1, max_size=5)):
        lines = _event_lines(spoken, text)
        if draw(st.integers(0, 3)) == 0:
            lines.insert(0, b": keep-alive")
        parts.append(_with_line_ends(draw, [*lines, b""]))
    if spoken == "openai.chat":
        parts.append(_with_line_ends(draw, [b"data: [DONE]", b""]))
    return b"".join(parts)


def _event_lines(dialect: str, text: bytes) -> list[bytes]:
    if dialect == "openai.chat":
        return [b"data: " + _OPENAI % text]
    if dialect == "openai.responses":
        return [b"event: response.output_text.delta", b"data: " + _RESPONSES % text]
    return [b"event: content_block_delta", b"data:" + _ANTHROPIC % text]


def _with_line_ends(draw: st.DrawFn, lines: list[bytes]) -> bytes:
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))
    return b"".join(line + end for line in lines)


# --- responses ----------------------------------------------------------------------------------------------


@attrs.frozen
class WireResponse:
    """Hold a response in all its forms."""

    status: int
    """HTTP status."""
    fields: tuple[tuple[bytes, bytes], ...]
    """Header fields, framing included."""
    content: bytes
    """Before content coding."""
    body: bytes
    """After content coding, before framing."""
    raw: bytes = attrs.field(repr=False)
    """The wire's bytes, head included."""
    is_close_delimited: bool = False
    """The connection's end is the body's: send ``Close()`` after ``raw``."""


def codings() -> tuple[str, ...]:
    """Return the content codings this machine can produce."""
    modules = (("br", "brotli"), ("zstd", "zstandard"))
    return ("gzip", *[name for name, module in modules if importlib.util.find_spec(module) is not None])


def encode(content: bytes, coding: str) -> bytes:
    """Apply a content coding."""
    if coding == "gzip":
        return gzip.compress(content, mtime=0)
    if coding == "br":
        import brotli  # noqa: PLC0415 - optional

        return bytes(brotli.compress(content))
    import zstandard  # noqa: PLC0415 - optional

    return bytes(zstandard.ZstdCompressor().compress(content))


STATUSES = st.sampled_from([200, 200, 200, 201, 400, 401, 403, 422, 429, 500, 503, 529])
_ODD_FIELDS = st.sampled_from([(b"X-Odd", b"a, b"), (b"x-odd", b"\xc3\xa9"), (b"Server", b"fake")])


@st.composite
def http_responses(
    draw: st.DrawFn,
    *,
    statuses: SearchStrategy[int] = STATUSES,
    is_stream: bool | None = None,
) -> WireResponse:
    """Draw a response: any framing (length, chunks of any size, the connection's end) and content coding."""
    streams = draw(st.booleans()) if is_stream is None else is_stream
    content = draw(sse_streams() if streams else json_bodies() | st.binary(max_size=200))
    fields = [(b"Content-Type", b"text/event-stream; charset=utf-8" if streams else b"application/json")]
    fields += draw(st.lists(_ODD_FIELDS, max_size=2))
    coding = draw(st.sampled_from(["", "", *codings()]))
    body = encode(content, coding) if coding else content
    if coding:
        fields.append((b"Content-Encoding", coding.encode()))
    framing = draw(st.sampled_from(["length", "chunked", "close"]))
    if framing == "length":
        fields.append((b"Content-Length", b"%d" % len(body)))
    elif framing == "chunked":
        fields.append((b"Transfer-Encoding", b"chunked"))
    status = draw(statuses)
    head = b"HTTP/1.1 %d Drawn\r\n" % status + b"".join(b"%b: %b\r\n" % field for field in fields) + b"\r\n"
    framed = draw(chunked_bodies(body)) if framing == "chunked" else body
    return WireResponse(status, tuple(fields), content, body, head + framed, framing == "close")


@st.composite
def chunked_bodies(draw: st.DrawFn, body: bytes, *, extensions: bool = True) -> bytes:
    """Frame a body in chunks of any size, sizes spelled in either case and with zeros, trailers at times."""
    spelling = draw(st.sampled_from([b"%x", b"%X", b"%04x"]))
    extension = draw(st.sampled_from([b"", b"", b";x=1"])) if extensions else b""
    chunks = [spelling % len(piece) + extension + b"\r\n" + piece + b"\r\n" for piece in draw(segmentations(body))]
    trailer = draw(st.sampled_from([b"", b"", b"X-Checksum: 1\r\n"])) if extensions else b""
    return b"".join(chunks) + b"0\r\n" + trailer + b"\r\n"
