"""Look at the start of an answer: may it be given to the client, or is it an error in disguise?"""

from __future__ import annotations

from typing import Literal

from penstock.codings import CodingError, decode_prefix
from penstock.framing import ChunkedDecoder, FramingError
from penstock.sse import Event, first_event, is_error_event

PROBE_BYTES = 64 * 1024
"""An event stream without a complete event in its first 64 KiB is committed as it is."""
_FIRST_LOOK = 2048

Verdict = Literal["ready", "error_event", "no_event", "failed"]
"""What an answer may be taken for; ``no_event``: a stream that ended before its first complete event."""


def probe_stream(start: bytes, *, is_chunked: bool, coding: bytes | None) -> Verdict | None:
    """Judge an event stream by its first event; None while there is none in fewer than PROBE_BYTES.

    ``is_chunked`` and ``coding`` say what is still around the events.
    """
    if len(start) > PROBE_BYTES:
        return "ready"
    event = _first_event(start[:_FIRST_LOOK], is_chunked, coding)
    if event is None and len(start) > _FIRST_LOOK:
        event = _first_event(start, is_chunked, coding)
    if event is None:
        return None
    return "error_event" if is_error_event(event) else "ready"


def _first_event(wire: bytes, is_chunked: bool, coding: bytes | None) -> Event | None:
    try:
        text = ChunkedDecoder(allow_extensions=True).feed(wire) if is_chunked else wire
        if coding is not None:
            text = decode_prefix(text, coding, PROBE_BYTES)
    except (FramingError, CodingError):
        return None
    found = first_event(text)
    return None if found is None else found[0]
