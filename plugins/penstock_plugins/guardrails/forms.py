"""Where the texts are in a multipart form (RFC 7578).

Parsers differ in what they make of odd forms, and a text that only some of them see would pass unjudged: what could be
read in two ways is refused.
"""

from __future__ import annotations

import re

from penstock.splice import Span
from penstock_plugins.guardrails.texts import Text, UnreadableError

_ODD = "its form could be read in more than one way"
_boundary = re.compile(
    rb'multipart/form-data[ \t]*;[ \t]*boundary=(?:"([^"\\]{1,200})"|([^\s;,"]{1,200}))', re.IGNORECASE
)
_behind_mark = re.compile(rb"[ \t]*\r\n").match
_value = rb'=(?:"(?>(?:[^"\\\r\n]|\\[^\r\n])*)"|[^\s;"]++)'
_disposition = re.compile(
    rb"content-disposition:[ \t]*form-data[ \t]*;[ \t]*name" + _value + rb"(?:[ \t]*;[ \t]*(filename)" + _value + rb")?"
    rb"(?:[ \t]*;[ \t]*(filename\*)" + _value + rb")?[ \t]*",
    re.IGNORECASE,
).fullmatch


def texts_in_form(body: bytes, content_type: bytes) -> list[Text]:
    """Return the fields of a form that are no files. Raises UnreadableError."""
    found = _boundary.match(content_type)
    if found is None or content_type.lower().count(b"boundary") != found[0].lower().count(b"boundary"):
        raise UnreadableError(_ODD)
    mark = b"--" + (found[1] or found[2])
    body_start = body.find(mark)
    if body_start not in (0, 2) or body[:body_start].strip(b"\r\n"):
        raise UnreadableError(_ODD)
    texts: list[Text] = []
    position = body_start + len(mark)
    while not body.startswith(b"--", position):
        line = _behind_mark(body, position)
        following = body.find(mark, position)
        if line is None or following < 0 or body[following - 2 : following] != b"\r\n":
            raise UnreadableError(_ODD)
        span = _field(body, line.end(), following - 2)
        if span is not None:
            text = body[span.start : span.end].decode("utf-8", "replace")
            texts.append(Text((len(texts),), span, text, is_raw=True))
        position = following + len(mark)
    if body[position + 2 :].strip():
        raise UnreadableError(_ODD)
    return texts


def _field(body: bytes, start: int, end: int) -> Span | None:
    """Return where the text of a part is, None for a file."""
    head_end = body.find(b"\r\n\r\n", start, end)
    if head_end < 0:
        raise UnreadableError(_ODD)
    lines = body[start:head_end].split(b"\r\n")
    dispositions = [line for line in lines if line.lower().startswith(b"content-disposition")]
    found = _disposition(dispositions[0]) if len(dispositions) == 1 else None
    if found is None or any(line[:1] in b" \t" or b"\n" in line for line in lines):
        raise UnreadableError(_ODD)
    return None if found[1] or found[2] else Span(head_end + 4, end)
