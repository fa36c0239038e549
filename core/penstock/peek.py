"""An early look at a request body: the few members routing and metering need, never the whole tree.

The common body is read by one typed decoder that skips unknown members in C. A body it refuses is read again
by a tolerant route, so that nothing a provider might accept is refused here: only what Python's own parser
refuses too, or what is not an object, is an error. With duplicate names the last one counts on both routes.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from penstock import splice
from penstock.splice import Span, SpliceError

_MAX_PARTS = 1_000
_MAX_PART_HEAD = 16 * 1024
_MAX_FIELD = 64 * 1024


_ABSENT = msgspec.Raw()


class PeekError(ValueError):
    """Report a body that is not a JSON object, or not a multipart form."""


class RequestPeek(msgspec.Struct, frozen=True, kw_only=True):
    """Hold what a request says about itself; a member that is absent, null or of a wrong type is None."""

    model: str | None = None
    """The model asked for."""
    stream_value: bool | None = msgspec.field(default=None, name="stream")
    """The member ``stream``."""
    stream_options_value: msgspec.Raw = msgspec.field(default=_ABSENT, name="stream_options")
    """The member ``stream_options``, raw."""
    user: str | None = None
    """The member ``user``."""
    safety_identifier: str | None = None
    """The member of that name."""
    previous_response_id: str | None = None
    """The member of that name."""
    metadata: msgspec.Raw = _ABSENT
    """The member ``metadata``, raw."""
    max_tokens_legacy: int | None = msgspec.field(default=None, name="max_tokens")
    """The member ``max_tokens``."""
    max_completion_tokens: int | None = None
    """The member of that name."""
    max_output_tokens: int | None = None
    """The member of that name."""

    @property
    def wrong_types(self) -> tuple[str, ...]:
        """Name the members whose values had another type than the field."""
        return ()

    @property
    def stream(self) -> bool:
        """Tell whether a streamed answer is asked for."""
        return self.stream_value is True

    @property
    def stream_options(self) -> bytes | None:
        """Give the JSON bytes of stream_options."""
        raw = bytes(self.stream_options_value)
        return None if raw in {b"", b"null"} else raw

    @property
    def include_usage(self) -> bool | None:
        """Tell what stream_options.include_usage says; None where it is not set to true or false."""
        options = self.stream_options_value
        if options is _ABSENT:
            return None
        try:
            return _decode_options(options).include_usage
        except (ValueError, RecursionError):
            found = _inner(bytes(options), "include_usage", bool)
            return found if isinstance(found, bool) else None

    @property
    def metadata_user_id(self) -> str | None:
        """Give metadata.user_id."""
        found = None if self.metadata is _ABSENT else _inner(bytes(self.metadata), "user_id", str)
        return found if isinstance(found, str) else None

    @property
    def max_tokens(self) -> int | None:
        """Give the bound on output tokens, by whichever of its three names it was set."""
        for value in (self.max_completion_tokens, self.max_output_tokens, self.max_tokens_legacy):
            if value is not None:
                return value
        return None


class _OddPeek(RequestPeek, frozen=True, kw_only=True):
    odd: tuple[str, ...]

    @property
    def wrong_types(self) -> tuple[str, ...]:
        return self.odd


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


_TYPES: dict[str, tuple[str, type]] = {  # member → field, type
    "model": ("model", str),
    "stream": ("stream_value", bool),
    "stream_options": ("stream_options_value", msgspec.Raw),
    "user": ("user", str),
    "safety_identifier": ("safety_identifier", str),
    "previous_response_id": ("previous_response_id", str),
    "metadata": ("metadata", msgspec.Raw),
    "max_tokens": ("max_tokens_legacy", int),
    "max_completion_tokens": ("max_completion_tokens", int),
    "max_output_tokens": ("max_output_tokens", int),
}
_decode = msgspec.json.Decoder(RequestPeek).decode
_decode_options = msgspec.json.Decoder(_StreamOptions).decode


def peek_request(body: bytes) -> RequestPeek:
    """Look into a JSON request body (UTF-8, not compressed).

    Raises PeekError if it is not JSON or not an object.
    """
    try:
        return _decode(body)
    except (ValueError, RecursionError):
        return _peek_tolerantly(body)


def _peek_tolerantly(body: bytes) -> RequestPeek:
    members = {}
    try:
        root = splice.root(body)
        if body[root.start] != ord("{"):
            raise PeekError(f"expected a JSON object at offset {root.start}")
        for child in splice.children(body, root):
            start, end = child.value
            members[splice.key_of(body, child)] = body[start:end]
    except SpliceError as error:
        raise PeekError(f"not valid JSON: {error}") from None
    _check_json(body)
    return _build(members)


def _check_json(body: bytes) -> None:
    """Refuse what even a lenient parser does not read; numbers are not converted, however long."""
    try:
        json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str, strict=False).decode(
            body.decode("utf-8-sig", "replace")
        )
    except json.JSONDecodeError as error:
        raise PeekError(f"not valid JSON: character {error.pos}: {error.msg}") from None
    except RecursionError:  # too deep for this parser; its brackets do match
        return


def _build(members: dict[str, bytes]) -> RequestPeek:
    fields: dict[str, Any] = {}
    wrong = []
    for member, (field, kind) in _TYPES.items():
        raw = members.get(member)
        if raw is None or raw == b"null":
            continue
        value: object = msgspec.Raw(raw) if kind is msgspec.Raw else _scalar(raw, kind)
        if value is None:
            wrong.append(member)
        else:
            fields[field] = value
    return _OddPeek(**fields, odd=tuple(wrong)) if wrong else RequestPeek(**fields)


def _scalar(raw: bytes, kind: type) -> object:
    """Decode one value strictly as kind; None if it is anything else, text that is no Unicode included."""
    try:
        decoded: object = msgspec.json.decode(raw, type=kind)
        return decoded
    except (ValueError, RecursionError):
        pass
    if kind is not str or not raw.startswith(b'"'):
        return None
    try:
        text: str = json.loads(raw, strict=False)
        text.encode()
    except ValueError:
        return None
    return text


def _inner(body: bytes, name: str, kind: type) -> object:
    """Decode one member of a member."""
    try:
        span = splice.find(body, (name,))
    except SpliceError:
        return None
    return None if span is None else _scalar(body[span.start : span.end], kind)


def is_multipart(content_type: bytes | None) -> bool:
    """Tell whether a Content-Type means a multipart form."""
    return content_type is not None and content_type[:19].lower() == b"multipart/form-data"


_boundary = re.compile(rb';[ \t]*boundary=(?:"((?:[^"\\]|\\.)+)"|([^\s;"]+))', re.IGNORECASE).search
_field_name = re.compile(rb';[ \t]*name=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))', re.IGNORECASE).search
_file_name = re.compile(rb";[ \t]*filename\*?=", re.IGNORECASE).search
_delimiter_rest = re.compile(rb"--|[ \t]*(?=\r\n)").match
_disposition = re.compile(rb"^content-disposition:[ \t]*form-data([^\r\n]*)", re.IGNORECASE | re.MULTILINE).search


def peek_multipart(body: bytes, content_type: bytes) -> RequestPeek:
    """Look into a multipart/form-data body (RFC 7578); the contents of files are skipped, not read.

    At most 1,000 parts, 16 KiB of headers in each and 64 KiB of a field are looked at; of fields with one
    name the last counts. Raises PeekError if there is no boundary, or the body does not have it.
    """
    fields = {
        name: body[start:end].decode("utf-8", "replace")
        for name, start, end in _form_fields(body, content_type)
        if end - start <= _MAX_FIELD
    }
    stream = fields.get("stream", "").lower()
    known = {
        "model": fields.get("model"),
        "stream_value": {"true": True, "1": True, "false": False, "0": False}.get(stream),
        "user": fields.get("user"),
        "safety_identifier": fields.get("safety_identifier"),
    }
    if stream and known["stream_value"] is None:
        return _OddPeek(**known, odd=("stream",))  # type: ignore[arg-type]
    return RequestPeek(**known)  # type: ignore[arg-type]


def replace_form_field(body: bytes, content_type: bytes, name: str, value: bytes) -> bytes:
    """Replace the value of every field of that name in a multipart form; every other byte is kept.

    Raises PeekError if there is none, or the value cannot stand in this form.
    """
    if b"--" + _boundary_of(content_type) in value:
        raise PeekError("expected a value that does not contain the boundary of the form")
    spans = [Span(start, end) for found, start, end in _form_fields(body, content_type) if found == name]
    if not spans:
        raise PeekError(f"expected a form field {name}")
    return splice.edit(body, [(span, value) for span in spans])


def form_field_names(body: bytes, content_type: bytes) -> list[str]:
    """Return the names of the fields of a multipart form that are no files, duplicates included."""
    return [name for name, _, _ in _form_fields(body, content_type)]


def _boundary_of(content_type: bytes) -> bytes:
    found = _boundary(content_type)
    if not is_multipart(content_type) or found is None:
        raise PeekError("expected multipart/form-data with a boundary")
    return found[2] or re.sub(rb"\\(.)", rb"\1", found[1])


def _form_fields(body: bytes, content_type: bytes) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and end of each field of a form that is no file."""
    delimiter = b"--" + _boundary_of(content_type)
    line = _delimiter_line(body, delimiter, 0)
    if line is None:
        raise PeekError("expected the boundary in the multipart body")
    for _ in range(_MAX_PARTS):
        head = line[1]
        line = _delimiter_line(body, delimiter, head)
        if line is None:
            break
        head_end = body.find(b"\r\n\r\n", head, min(line[0], head + _MAX_PART_HEAD))
        name = None if head_end < 0 else _part_name(body[head + 2 : head_end])
        if name is not None:
            yield name, head_end + 4, line[0]


def _delimiter_line(body: bytes, delimiter: bytes, position: int) -> tuple[int, int] | None:
    """Find the next delimiter line: where the part before it ends, where the line break behind it starts."""
    if position == 0 and body.startswith(delimiter):
        found = _delimiter_rest(body, len(delimiter))
        if found is not None:
            return 0, found.end()
    while (start := body.find(b"\r\n" + delimiter, position)) >= 0:
        position = start + 2 + len(delimiter)
        found = _delimiter_rest(body, position)
        if found is not None:  # else a longer word that only starts like the boundary
            return start, found.end()
    return None


def _part_name(head: bytes) -> str | None:
    """Give the name of a form field; None for a file or a part without a name."""
    disposition = _disposition(head)
    if disposition is None or _file_name(disposition[1]):
        return None
    name = _field_name(disposition[1])
    return None if name is None else (name[1] if name[2] is None else name[2]).decode("utf-8", "replace")
