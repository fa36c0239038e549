"""The endpoints of the data plane: which method and path speak which dialect.

A request whose path is not here belongs to a mounted ASGI application or is refused with the list of endpoints.
"""

from __future__ import annotations

import re

import attrs

from penstock.headers import Headers

_TAKE_FORMS = frozenset(("images_edits", "transcriptions"))


@attrs.frozen
class Endpoint:
    """Name one operation of the data plane."""

    dialect: str
    """The wire format, such as ``openai.chat`` or ``anthropic.messages``."""
    operation: str
    """The operation, such as ``chat``, ``messages`` or ``models``."""
    path: str
    """The path, with ``{…}`` for what varies."""
    methods: tuple[bytes, ...] = (b"POST",)
    """HTTP methods it takes; empty for a path that is none of ours."""
    has_model: bool = True
    """Whether the body (or the path) names a model."""
    family: str = attrs.field(init=False)
    """The vendor whose error envelope and headers the route uses: ``openai``, ``anthropic`` or ``gemini``."""

    @property
    def takes_form(self) -> bool:
        """Tell whether its requests may be multipart forms; a form anywhere else is nothing a provider expects."""
        return self.operation in _TAKE_FORMS

    @family.default
    def _family(self) -> str:
        return self.dialect.partition(".")[0]


_POST = (
    Endpoint("openai.chat", "chat", "/v1/chat/completions"),
    Endpoint("openai.responses", "responses", "/v1/responses"),
    Endpoint("anthropic.messages", "messages", "/v1/messages"),
    Endpoint("anthropic.messages", "count_tokens", "/v1/messages/count_tokens"),
    Endpoint("openai.completions", "completions", "/v1/completions"),
    Endpoint("openai.embeddings", "embeddings", "/v1/embeddings"),
    Endpoint("openai.moderations", "moderations", "/v1/moderations"),
    Endpoint("openai.images", "images_generations", "/v1/images/generations"),
    Endpoint("openai.images", "images_edits", "/v1/images/edits"),
    Endpoint("openai.audio", "speech", "/v1/audio/speech"),
    Endpoint("openai.audio", "transcriptions", "/v1/audio/transcriptions"),
)
MODELS = Endpoint("openai.models", "models", "/v1/models", (b"GET",), has_model=False)
MODEL = Endpoint("openai.models", "model", "/v1/models/{id}", (b"GET",), has_model=False)
RESPONSE_BY_ID = Endpoint("openai.responses", "response", "/v1/responses/{id}", (b"GET", b"DELETE"), has_model=False)
RESPONSE_CANCEL = Endpoint("openai.responses", "response_cancel", "/v1/responses/{id}/cancel", has_model=False)
RESPONSE_ITEMS = Endpoint(
    "openai.responses", "response_items", "/v1/responses/{id}/input_items", (b"GET",), has_model=False
)
GEMINI = Endpoint(
    "gemini.generate", "gemini", "/v1beta/{path}", (b"GET", b"POST", b"PUT", b"PATCH", b"DELETE"), has_model=True
)
UNKNOWN = Endpoint("openai.unknown", "unknown", "", (), has_model=False)
"""Stands for every path that is none of ours, so that a refusal too is an exchange with a log line and a trace."""
_UNKNOWN_ANTHROPIC = Endpoint("anthropic.unknown", "unknown", "", (), has_model=False)
_UNKNOWN_GEMINI = Endpoint("gemini.unknown", "unknown", "", (), has_model=False)
ALL = (*_POST, MODELS, MODEL, RESPONSE_BY_ID, RESPONSE_CANCEL, RESPONSE_ITEMS, GEMINI)
"""Every endpoint in the order the documentation lists them."""

EXACT: dict[bytes, Endpoint] = {endpoint.path.encode(): endpoint for endpoint in (*_POST, MODELS)}
_RESPONSES = b"/v1/responses/"
_is_response_id = re.compile(rb"[A-Za-z0-9_-]{1,128}").fullmatch
_walks_elsewhere = re.compile(rb"(?:/|%2[fF])(?:/|\.|%2[fF])|%2[eE]").search
"""What a provider could read as another path than the one that was judged here."""
_MODELS = b"/v1/models/"


def find_endpoint(path: bytes) -> Endpoint | None:
    """Return the endpoint of a path without its query, or None; whether the method fits is the caller's question."""
    endpoint = EXACT.get(path)
    if endpoint is not None:
        return endpoint
    if path.startswith(b"/v1beta/"):
        return None if _walks_elsewhere(path) else GEMINI
    if path.startswith(_MODELS) and len(path) > len(_MODELS):
        return MODEL
    if path.startswith(_RESPONSES):
        return _find_stored_response(path[len(_RESPONSES) :])
    return None


def unknown_endpoint(path: bytes, headers: Headers) -> Endpoint:
    """Return what stands for a path that is none of ours, in the dialect its client seems to speak."""
    if path.startswith(b"/v1/messages/") or b"anthropic-version" in headers:
        return _UNKNOWN_ANTHROPIC
    if path.startswith(b"/v1beta") or b"x-goog-api-key" in headers:
        return _UNKNOWN_GEMINI
    return UNKNOWN


def _find_stored_response(rest: bytes) -> Endpoint | None:
    identifier, slash, action = rest.partition(b"/")
    if not _is_response_id(identifier):
        return None
    if not slash:
        return RESPONSE_BY_ID
    return {b"cancel": RESPONSE_CANCEL, b"input_items": RESPONSE_ITEMS}.get(action)
