"""Edit one field of a multipart form in place; every other byte stays."""

from __future__ import annotations

import re

_BOUNDARY = re.compile(rb'boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE)
_NAME = re.compile(rb'name="([^"]*)"', re.IGNORECASE)


def replace_form_field(body: bytes, content_type: bytes, name: str, value: bytes) -> bytes:
    """Return the form with the value of every field ``name`` replaced (RFC 7578). Raises ValueError if there is none."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise ValueError("the form has no boundary")
    delimiter = b"--" + (found[1] or found[2])
    pieces = []
    kept = 0
    position = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    while 2 <= position or (position == 0 and body.startswith(delimiter)):
        head_start = body.find(b"\r\n", position) + 2
        head_end = body.find(b"\r\n\r\n", position)
        stop = body.find(b"\r\n" + delimiter, position + len(delimiter))
        if head_start < 2 or head_end < 0 or stop < 0:
            break
        named = _NAME.search(body, head_start, head_end)
        if named is not None and named[1].decode("utf-8", "replace") == name:
            pieces += [body[kept : head_end + 4], value]
            kept = stop
        position = stop + 2
    if not pieces:
        raise ValueError(f"the form has no field {name!r}")
    return b"".join((*pieces, body[kept:]))
