"""What the translators share: reading bodies, what is dropped, errors, data URLs, event streams. Sans-IO."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard, TypeVar
from urllib.parse import unquote_to_bytes

import attrs
import msgspec

from penstock import RequestError, UpstreamError
from penstock.sse import EventSplitter, SSEError, parse_event

T = TypeVar("T")
Raw = msgspec.Raw
Members = dict[str, msgspec.Raw]
"""A JSON object whose values are left as they are spelled: numbers keep their text."""
UNREADABLE = (ValueError, RecursionError)
"""What msgspec raises for JSON that is none, or of another shape."""
DROP_TUNING_PARAMS = "drop_tuning_params"
"""The member that says whether parameters may be dropped; it is the gateway's and goes to no provider."""
MAX_EVENT_BYTES = 16 * 1024 * 1024

encode = msgspec.json.encode
_decode_members = msgspec.json.Decoder(Members).decode
_NOTHING = frozenset({b"null", b"false", b'""', b"[]", b"{}"})
_LONGEST_NOTHING = 64
_no_base64 = re.compile(r"[^A-Za-z0-9+/=]").search
_path = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


# --- requests -----------------------------------------------------------------------------------------------------


def read_members(body: bytes | msgspec.Raw) -> Members:
    """Return the members of a request body. Raises RequestError ``bad_request`` for what is no JSON object."""
    try:
        return _decode_members(body)
    except UNREADABLE:
        raise RequestError("bad_request", "The body is no JSON object, so it cannot be translated.") from None


def read_as(kind: type[T], raw: bytes | msgspec.Raw, where: str = "") -> T:
    """Return a request's value as a type. Raises RequestError ``bad_request`` naming the place below ``where``."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNREADABLE as error:
        found = _path.search(str(error))
        path = found["path"] if found else ""
        separator = "." if where and path and not path.startswith("[") else ""
        param = f"{where}{separator}{path}" or None
        is_json = isinstance(error, msgspec.ValidationError)
        reason = str(error)[: found.start()] if found else str(error) if is_json else "it is no JSON"
        raise RequestError("bad_request", f"{param or 'The body'} cannot be read: {reason}.", param=param) from None


def read_member(members: Mapping[str, msgspec.Raw], name: str, kind: type[T], where: str = "") -> T | None:
    """Return a member as a type, None where it is missing or null. Raises RequestError ``bad_request``."""
    raw = members.get(name)
    if raw is None or is_null(raw):
        return None
    return read_as(kind, raw, f"{where}.{name}" if where else name)


def is_null(raw: msgspec.Raw | None) -> bool:
    """Tell whether a member is missing or null."""
    return raw is None or bytes(memoryview(raw)[:4]) == b"null"


def says_nothing(raw: msgspec.Raw | None) -> bool:
    """Tell whether a member is missing or empty: null, false, or without anything inside."""
    if raw is None:
        return True
    view = memoryview(raw)
    return len(view) <= _LONGEST_NOTHING and bytes(view).translate(None, b" \t\r\n") in _NOTHING


def is_text(raw: msgspec.Raw | None) -> TypeGuard[msgspec.Raw]:
    """Tell whether a member is a string."""
    return raw is not None and bytes(memoryview(raw)[:1]) == b'"'


def refuse(param: str, message: str) -> RequestError:
    """Return the refusal of what a request depends on and the other dialect does not have."""
    return RequestError("unsupported_parameter", message, param=param)


class Dropped:
    """Collect what has no equivalent, each place once, in the order of the request."""

    def __init__(self) -> None:
        self._paths: dict[str, None] = {}

    def add(self, path: str) -> None:
        """Note a member as left out; list positions are written ``[]``."""
        self._paths[path] = None

    def settle(self, members: Mapping[str, msgspec.Raw]) -> tuple[str, ...]:
        """Return the paths. Raises RequestError where the request says that nothing may be dropped."""
        if read_member(members, DROP_TUNING_PARAMS, bool) is False and self._paths:
            names = ", ".join(self._paths)
            message = f"The provider asked has no equivalent of {names}, and drop_tuning_params is false."
            raise RequestError(
                "unsupported_parameter", message, param=next(iter(self._paths)), meta={"dropped": [*self._paths]}
            )
        return tuple(self._paths)


@attrs.frozen
class DataURL:
    """Hold what a ``data:`` URL carries (RFC 2397)."""

    media_type: str
    """Such as ``image/png``, in lower case."""
    data: str
    """Base64."""


def read_data_url(url: str) -> DataURL | None:
    """Return what a ``data:`` URL carries; None for any other URL. Raises ValueError for a broken one."""
    if url[:5].lower() != "data:":
        return None
    about, comma, data = url[5:].partition(",")
    if not comma:
        raise ValueError("a data: URL needs a comma")
    media_type, *parameters = about.split(";")
    media_type = media_type.strip().lower() or "text/plain"
    if not (parameters and parameters[-1].strip().lower() == "base64"):
        return DataURL(media_type, base64.b64encode(unquote_to_bytes(data)).decode())
    if _no_base64(data):
        raise ValueError("what follows the comma of a data: URL is no base64")
    return DataURL(media_type, data)


def data_url(media_type: str, data: str) -> str:
    """Return a ``data:`` URL for base64 data."""
    return f"data:{media_type};base64,{data}"


# --- errors -------------------------------------------------------------------------------------------------------


@attrs.frozen
class ProviderError:
    """Hold what a provider says of a failure, in whatever dialect."""

    message: str
    kind: str | None = None
    """Its ``type``."""
    code: str | None = None
    param: str | None = None
    request_id: str | None = None


_OPENAI_TYPES = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_exceeded",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STATUS_OF_TYPE = {kind: status for status, kind in _ANTHROPIC_TYPES.items()}


def read_error(body: bytes) -> ProviderError:
    """Return what an error body or event says: OpenAI's or Anthropic's envelope, or any text. Never raises."""
    try:
        found: object = msgspec.json.decode(body)
    except UNREADABLE:
        return ProviderError(body[:2000].decode("utf-8", "replace").strip() or "The provider gave no reason.")
    envelope: dict[Any, Any] = found if isinstance(found, dict) else {}
    detail = envelope.get("error", envelope)
    if not isinstance(detail, dict):
        detail = {"message": detail}
    message = _text(detail.get("message")) or _text(envelope.get("message")) or _text(envelope.get("detail"))
    request_id = _text(envelope.get("request_id"))
    if not message:
        message = body[:2000].decode("utf-8", "replace")
    kind, code, param = [_text(detail.get(name)) for name in ("type", "code", "param")]
    return ProviderError(message, kind, code, param, request_id)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else str(value) if type(value) is int else None


def openai_error(error: ProviderError, status: int) -> bytes:
    """Return an error in OpenAI's envelope; ``code`` keeps the provider's own type."""
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    detail = {"message": error.message, "type": kind, "param": error.param, "code": error.code or error.kind}
    return encode({"error": detail})


def anthropic_error(error: ProviderError, status: int) -> bytes:
    """Return an error in Anthropic's envelope, its type by the status."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    envelope: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": error.message}}
    if error.request_id is not None:
        envelope["request_id"] = error.request_id
    return encode(envelope)


def status_of(error: ProviderError) -> int:
    """Guess the status of an error that came as an event of a stream."""
    return _STATUS_OF_TYPE.get(error.kind or "", 500)


# --- answers ------------------------------------------------------------------------------------------------------


def sse(payload: object, name: str | None = None) -> bytes:
    """Return an event; a payload that is not bytes is encoded as JSON."""
    data = payload if isinstance(payload, bytes) else encode(payload)
    return b"data: %b\n\n" % data if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class Answer(Protocol):
    """Turn the parts of one answer round. ValueErrors of msgspec mean that the answer cannot be read."""

    def whole(self, body: bytes) -> bytes:
        """Return a whole body below 400 in the client's dialect."""
        ...

    def error(self, status: int, body: bytes) -> bytes:
        """Return the body of an error in the client's dialect; see ``read_error``."""
        ...

    def event(self, name: str | None, payload: bytes) -> bytes:
        """Return what an event of the stream becomes: whole events or nothing."""
        ...

    def end(self) -> bytes:
        """Return what is left at the end of a stream. Raises UpstreamError ``truncated`` where it came too early."""
        ...


class Reply:
    """Be the ReplyTranslation around an Answer: gather whole bodies, cut streams into events, tell faults.

    A fault behind events of one read is raised with the next call, so that the client gets those events.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._status = 200
        self._gathered: list[bytes] = []
        self._splitter: EventSplitter | None = None
        self._fault: UpstreamError | None = None

    def begin(self, status: int, *, is_event_stream: bool) -> None:
        self._status = status
        if is_event_stream and status < 400:
            self._splitter = EventSplitter(max_event_bytes=MAX_EVENT_BYTES)

    def feed(self, payload: bytes) -> bytes:
        if self._splitter is None:
            self._gathered.append(payload)
            return b""
        fault = None
        try:
            events = self._splitter.feed(payload)
        except SSEError as error:
            events, fault = error.events, UpstreamError("protocol", f"its event stream cannot be read: {error}")
        return self._through(events, fault)

    def finish(self) -> bytes:
        if self._splitter is not None:
            return self._through(self._splitter.finish(), None, is_last=True) + self._answer.end()
        body = b"".join(self._gathered)
        self._gathered.clear()
        if self._status >= 400:
            return self._answer.error(self._status, body)
        try:
            return self._answer.whole(body)
        except UNREADABLE:
            raise UpstreamError("protocol", "its answer cannot be read") from None

    def _through(self, events: list[bytes], fault: UpstreamError | None, *, is_last: bool = False) -> bytes:
        if self._fault is not None:
            raise self._fault
        out: list[bytes] = []
        try:
            for raw in events:
                event = parse_event(raw)
                if event.payload:
                    out.append(self._answer.event(event.name, event.payload))
        except UpstreamError as error:
            fault = error
        except UNREADABLE:
            fault = UpstreamError("protocol", "an event of its stream cannot be read")
        passed = b"".join(out)
        if fault is not None:
            self._fault = fault
            if is_last or not passed:
                raise fault
        return passed
