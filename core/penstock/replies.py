"""Heads the gateway writes to clients: the provider's own fields plus those that say what happened inside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any

from penstock.envelopes import header_stem
from penstock.errors import PluginError
from penstock.headers import forward_response_fields
from penstock.heads import ResponseHead
from penstock.models import Exchange, Response, fallbacks

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus} | {402: b"Payment Required"}

FRAMING_FIELDS = frozenset((b"transfer-encoding", b"content-length", b"connection", b"keep-alive"))
"""What the server alone says about a body and its connection."""
BODILESS_STATUS = frozenset((204, 304))
_is_name = re.compile(rb"[-!#$%&'*+.^_`|~0-9a-zA-Z]+").fullmatch
_is_value = re.compile(rb"[\t\x20-\x7e\x80-\xff]*").fullmatch


class FieldError(PluginError):
    """Report a response header field, written by a plugin, that would break the head; its value is never repeated."""

    def __init__(self, field: object) -> None:
        super().__init__("(unknown)", "response fields")
        self._fault = _fault_of_field(field)
        self.args = (f"a plugin's response header field {self._fault}",)

    def blame(self, plugins: Sequence[str]) -> None:
        """Say whose field it may be: the plugins that had a chance to add one."""
        if plugins:
            self.plugin = " or ".join(plugins)
            self.args = (f"a response header field of plugin {' or '.join(map(repr, plugins))}, {self._fault}",)


def _fault_of_field(field: Any) -> str:
    """Say which field it is, as far as that can be told, and what is wrong with it."""
    if isinstance(field, tuple | list) and len(field) == 2:
        name, value = field
        if isinstance(name, bytes) and isinstance(value, bytes):
            fault = "is malformed" if _is_name(name) is None else "holds control characters such as a line break"
            return f"{name[:100]!r}, {fault}"
        kinds = f"({type(name).__name__}, {type(value).__name__})"
        return f"{name[:100] if isinstance(name, str | bytes) else kinds!r}, must be a pair of bytes, is {kinds}"
    name = field[0] if isinstance(field, tuple | list) and field else field
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    shown = f"{name.partition(':')[0][:100]!r}, " if isinstance(name, str) else ""
    return f"{shown}must be a pair of bytes (name, value), is {type(field).__name__}"


def is_safe_field(name: bytes, value: bytes) -> bool:
    """Say whether a header field keeps to its line: a token, and no control bytes (RFC 9110 section 5)."""
    return _is_name(name) is not None and _is_value(value) is not None


def field_lines(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return header lines of what a plugin wrote, without framing fields. Raises FieldError."""
    lines = []
    for field in fields:
        try:
            name, value = field
            is_safe = is_safe_field(name, value)
        except (TypeError, ValueError):  # no pair, or none of bytes
            is_safe = False
        if not is_safe:
            raise FieldError(field)
        if name.lower() not in FRAMING_FIELDS:
            lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines)


class ReplyHeads:
    """Write response heads for one namespace; everything constant is put together once."""

    def __init__(self, namespace: str) -> None:
        stem = b"X-" + header_stem(namespace) + b"-"
        self.prefix = stem.lower()
        self._always = (
            stem + b"Request-Id: %b\r\n" + stem + b"Trace-Id: %b\r\n" + stem + b"Span-Id: %b\r\n"
            b"traceparent: 00-%b-%b-%b\r\n"
        )
        self._dropped = stem + b"Params-Dropped: %b\r\n"
        self._answered = (
            stem + b"Provider: %b\r\n" + stem + b"Model: %b\r\n" + stem + b"Fallback-Count: %d\r\n"
            + stem + b"Cache: %b\r\n" + stem + b"Cache-Mode: %b\r\n"
        )  # fmt: skip

    def relayed(self, exchange: Exchange, head: ResponseHead, framing: bytes, *, close: bool) -> bytes:
        """Return the head of a provider's answer. Raises FieldError."""
        return b"HTTP/1.1 %d %b\r\n%b%b%b%b\r\n" % (
            head.status,
            head.reason,
            forward_response_fields(head, self.prefix),
            self._own_fields(exchange),
            framing,
            b"connection: close\r\n" if close else b"",
        )

    def authored(self, exchange: Exchange | None, response: Response, *, close: bool) -> bytes:
        """Return the head of an answer written by the gateway or a plugin. Raises FieldError."""
        own = b"" if exchange is None else self._own_fields(exchange)
        bodiless = response.status in BODILESS_STATUS
        return b"HTTP/1.1 %d %b\r\n%b%b%b%b\r\n" % (
            response.status,
            _REASONS.get(response.status, b"Unknown"),
            field_lines(response.fields),
            own,
            b"" if bodiless else b"content-length: %d\r\n" % len(response.body),
            b"connection: close\r\n" if close else b"",
        )

    def _own_fields(self, exchange: Exchange) -> bytes:
        trace = exchange.trace
        own = self._always % (
            exchange.request_id, trace.trace_id, trace.span_id, trace.trace_id, trace.span_id, trace.flags
        )  # fmt: skip
        candidate = exchange.candidate
        if candidate is not None:
            attempts = exchange.attempts
            own += self._answered % (
                candidate.binding.type.encode(),
                _field_value(candidate.model),
                fallbacks(attempts) if len(attempts) > 1 else 0,
                _cache_outcome(exchange),
                exchange.cache_mode.encode(),
            )
        if exchange.params_dropped:
            own += self._dropped % _field_value(", ".join(exchange.params_dropped))
        if exchange.reply_fields:
            fields, exchange.reply_fields = exchange.reply_fields, []
            own += field_lines(fields)  # where this raises, the refusal goes out without them
            exchange.reply_fields = fields
        return own


def _cache_outcome(exchange: Exchange) -> bytes:
    if exchange.cache_mode == "disable":
        return b"bypass"
    if exchange.cache_mode == "force":
        return b"force"
    usage = exchange.usage
    if usage is None:
        return b"unknown"
    return b"hit" if usage.cache_read else b"miss"


def _field_value(text: str | None) -> bytes:
    """Return text as a field value: what RFC 9110 does not allow there is percent-encoded, so no client can split."""
    if text is None:
        return b""
    if text.isascii() and text.isprintable():
        return text.encode()
    return b"".join(
        character.encode() if character.isascii() and character.isprintable() else _percent(character)
        for character in text
    )


def _percent(character: str) -> bytes:
    return b"".join(b"%%%02X" % byte for byte in character.encode("utf-8", "surrogatepass"))
