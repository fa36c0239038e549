"""One request to the mock as its answering functions see it."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import attrs
import msgspec

from penstock import Endpoint, UpstreamRequest
from penstock.codings import CodingError, decode
from penstock.peek import PeekError, peek_multipart
from penstock_plugins.providers.mock.behaviour import Behaviour
from penstock_plugins.providers.mock.memory import Memory
from penstock_plugins.providers.mock.replies import RefusedError, identifier, seed_of

_MAX_BODY = 64 * 1024 * 1024


@attrs.frozen(eq=False)
class Call:
    """Hold what was asked: a path behind ``/v1``, a decoded body, the model's name without its words."""

    endpoint: Endpoint
    method: bytes
    path: str
    query: dict[str, str]
    headers: dict[bytes, bytes]
    body: bytes
    document: dict[str, Any]
    """The body, where it is JSON; else the fields of the form that matter."""
    memory: Memory
    seed: bytes
    """Ids are made of it."""
    model: str = "mock"
    behaviour: Behaviour = attrs.Factory(Behaviour)

    @property
    def is_stream(self) -> bool:
        return self.document.get("stream") is True

    def new_id(self, prefix: str, number: int = 0) -> str:
        return identifier(self.seed, prefix, number)


def read_call(request: UpstreamRequest, endpoint: Endpoint, memory: Memory) -> Call:
    """Read an upstream request as a provider would. Raises RefusedError."""
    raw_path, _, raw_query = request.path.partition(b"?")
    headers = _read_fields(request.fields)
    body = request.body
    if b"content-encoding" in headers:
        try:
            body = decode(body, headers[b"content-encoding"], _MAX_BODY)
        except CodingError as error:
            raise RefusedError(400, f"The request body cannot be decoded: {error}.") from None
    return Call(
        endpoint,
        request.method,
        raw_path.removeprefix(b"/v1").decode("latin-1"),
        dict(parse_qsl(raw_query.decode("latin-1"))),
        headers,
        body,
        _read_document(body, headers.get(b"content-type", b"")),
        memory,
        seed_of(raw_path, body),
    )


def _read_fields(block: bytes) -> dict[bytes, bytes]:
    fields = {}
    for line in block.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if colon:
            fields[name.lower()] = value.strip()
    return fields


def _read_document(body: bytes, content_type: bytes) -> dict[str, Any]:
    if not body:
        return {}
    if content_type.startswith(b"multipart/"):
        try:
            peek = peek_multipart(body, content_type)
        except PeekError as error:
            raise RefusedError(400, f"The form cannot be read: {error}.") from None
        return {"model": peek.model, "stream": peek.stream}
    try:
        document = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "The request body is not valid JSON.") from None
    if not isinstance(document, dict):
        raise RefusedError(400, "The request body is not a JSON object.")
    return document
