"""Build upstream requests that forward the client's own bytes: the part every HTTP provider shares."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote_to_bytes, urlsplit

import attrs

from penstock import splice
from penstock.codings import trim_accept_encoding
from penstock.envelopes import header_stem
from penstock.errors import ConfigurationError, RequestError
from penstock.headers import CREDENTIAL_FIELDS, HOP_BY_HOP_FIELDS, Headers, forward_request_fields
from penstock.heads import RequestHead
from penstock.inspection import editable_body
from penstock.models import Candidate, Exchange, ProviderBinding, Request
from penstock.peek import form_field_names, is_multipart, replace_form_field
from penstock.providers import Origin, ResponseFilter, UpstreamRequest

_DEFAULT_PORTS = {"http": 80, "https": 443}
_OWN_FIELDS = HOP_BY_HOP_FIELDS | {b"host", b"content-length", b"expect", b"accept-encoding"}
"""What the gateway itself says on each hop: a second one beside it would be ambiguous."""


@attrs.frozen(eq=False)
class Address:
    """Where a binding's requests go, put together once."""

    origin: Origin
    """Where to connect."""
    base_path: bytes
    """What goes before the path, without a slash at its end."""
    first_fields: bytes = attrs.field(repr=False)
    """Host."""
    last_fields: bytes = attrs.field(repr=False)
    """The credential and the binding's extra headers."""
    namespace_prefix: bytes
    """What names of the gateway's own header fields begin with, lower-case."""
    key_name: bytes | None = None
    """Where the credential goes, if that is none of the headers clients send keys in: theirs stays here as well."""


def address_of(
    binding: ProviderBinding, default_base_url: str | None, credential: tuple[tuple[bytes, bytes], ...], namespace: str
) -> Address:
    """Return the address of a binding; ``credential`` are header fields. Raises ConfigurationError for a bad URL."""
    base_url = binding.base_url or default_base_url
    if not base_url:
        raise ConfigurationError(f"binding {binding.name!r}: base_url: is missing, and its type has no default")
    parts = urlsplit(base_url)
    try:
        port = parts.port
    except ValueError:
        raise ConfigurationError(f"binding {binding.name!r}: base_url: the port is no number") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ConfigurationError(f"binding {binding.name!r}: base_url: must be http://host… or https://host…")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigurationError(f"binding {binding.name!r}: base_url: takes no user, query or fragment")
    if not parts.path.isascii() or not f"{parts.netloc}{parts.path}".isprintable() or " " in base_url:
        raise ConfigurationError(f"binding {binding.name!r}: base_url: percent-encode what is no plain ASCII")
    host = parts.hostname if ":" not in parts.hostname else f"[{parts.hostname}]"
    authority = host if port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{host}:{port}"
    last = b"".join([b"%b: %b\r\n" % field for field in (*credential, *binding.extra_headers)])
    return Address(
        Origin(parts.scheme, parts.hostname, port or _DEFAULT_PORTS[parts.scheme], binding.proxy, binding.http2),
        parts.path.rstrip("/").encode(),
        b"host: %b\r\n" % authority.encode("idna" if not authority.isascii() else "ascii"),
        last,
        b"x-" + header_stem(namespace).lower() + b"-",
        next((name for name, _ in credential if name not in CREDENTIAL_FIELDS), None),
    )


def bearer(binding: ProviderBinding, header: bytes = b"authorization") -> tuple[tuple[bytes, bytes], ...]:
    """Return the binding's credential as a header field; none where it has no credential.

    ``header`` is lower-case. Raises ConfigurationError for a credential that would break a head.
    """
    if binding.credential is None:
        return ()
    secret = binding.credential.reveal()
    if not secret.isascii() or not secret.isprintable():
        raise ConfigurationError(f"binding {binding.name!r}: credential: may hold printable ASCII only")
    value = secret.encode()
    return ((header, b"Bearer " + value if header == b"authorization" else value),)


def forward(
    exchange: Exchange,
    candidate: Candidate,
    address: Address,
    *,
    path: bytes,
    body: bytes | None = None,
    response_filter: ResponseFilter | None = None,
) -> UpstreamRequest:
    """Return the client's request for the candidate's upstream.

    ``path`` is appended to the base path, the client's query follows. ``body`` is given where it was edited; the model
    is spliced here if the candidate's differs from the one asked for.
    """
    request = exchange.request
    head: RequestHead = request.head
    body = request.body if body is None else body
    if candidate.model is not None and request.endpoint.has_model and _must_put_model(exchange, candidate.model):
        body = put_model(request, editable_body(request) if body is request.body else body, candidate.model)
    if body is not request.body and b"content-encoding" in head.headers:
        head = without_fields(head, b"content-encoding")
    if address.key_name is not None and address.key_name in head.headers:
        head = without_fields(head, address.key_name)
    fields = [address.first_fields, forward_request_fields(head, address.namespace_prefix)]
    accepted = trim_accept_encoding(head.headers.get(b"accept-encoding"))
    if response_filter is not None or exchange.chunk_watchers is not None:
        accepted = b"identity"  # a coded body passes filters and chunk hooks unread
    if accepted is not None:
        fields.append(b"accept-encoding: %b\r\n" % accepted)
    fields.append(address.last_fields)
    if candidate.binding.propagate_trace:
        fields.append(_trace_fields(exchange))
    target = address.base_path + path
    query = request.query and _query_without_key(request)
    if query:
        target += b"?" + query
    return UpstreamRequest(
        address.origin, head.method, target or b"/", b"".join(fields), body, candidate.binding.timeouts, response_filter
    )


def _must_put_model(exchange: Exchange, model: str) -> bool:
    if model != exchange.peek.model:
        return True
    principal = exchange.principal
    return principal is not None and principal.models_allowed is not None and _names_models_twice(exchange.request)


def _names_models_twice(request: Request) -> bool:
    """Say whether the body names more than one model: a provider may read another than the one that was judged.

    Raises RequestError ``bad_request`` for a spelling like ``Model``, which lenient parsers take for ``model``.
    """
    if request.endpoint.family == "gemini":
        return False  # the path names it
    body = editable_body(request)
    content_type = request.headers.get(b"content-type") or b""
    try:
        names = form_field_names(body, content_type) if is_multipart(content_type) else _top_names(body)
    except (splice.SpliceError, ValueError) as error:
        raise RequestError("bad_request", f"The request body cannot be read: {error}.") from None
    found = [name for name in names if name.casefold() == "model"]
    if any(name != "model" for name in found):
        message = 'This virtual key may call some models only, so the body must spell "model" in lower case.'
        raise RequestError("bad_request", message, param="model")
    return len(found) > 1


def _top_names(body: bytes) -> list[str]:
    """Return the names of the top-level members; those no escape hides are taken as they stand."""
    names = []
    for child in splice.children(body, splice.root(body)):
        name = body[child.key.start + 1 : child.key.end - 1]
        names.append(splice.key_of(body, child) if b"\\" in name else name.decode("latin-1"))
    return names


def put_model(request: Request, body: bytes, model: str) -> bytes:
    """Return the body with its model replaced and every other byte kept."""
    content_type = request.headers.get(b"content-type") or b""
    try:
        if is_multipart(content_type):
            return replace_form_field(body, content_type, "model", model.encode())
        return splice.replace(body, ("model",), splice.quote(model))
    except (splice.SpliceError, ValueError) as error:
        raise RequestError("bad_request", f"The model cannot be replaced in this body: {error}.") from None


def without_fields(head: RequestHead, *names: bytes) -> RequestHead:
    """Return a head without some header fields."""
    headers = head.headers.without(names)
    return with_headers(head, headers)


def with_headers(head: RequestHead, headers: Headers) -> RequestHead:
    """Return a head with other headers."""
    block = b"".join([b"%b: %b\r\n" % field for field in headers])
    return attrs.evolve(head, headers=headers, fields=block)


def header_fields(table: Mapping[str, str], *, where: str) -> tuple[tuple[bytes, bytes], ...]:
    """Turn configured extra headers into fields. Raises ConfigurationError for what would break a head."""
    fields = []
    for name, value in table.items():
        if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
            raise ConfigurationError(f"{where}: {name!r} is no header name")
        if name.lower().encode() in _OWN_FIELDS:
            raise ConfigurationError(f"{where}: {name!r} is set by the gateway itself")
        if not value.isascii() or not value.isprintable():
            raise ConfigurationError(f"{where}: the value of {name!r} may hold printable ASCII only")
        fields.append((name.encode(), value.encode()))
    return tuple(fields)


def _trace_fields(exchange: Exchange) -> bytes:
    trace = exchange.trace
    span_id = exchange.attempts[-1].span_id if exchange.attempts else trace.span_id
    fields = [b"traceparent: 00-%b-%b-%b\r\n" % (trace.trace_id, span_id, trace.flags)]
    if trace.state is not None:
        fields.append(b"tracestate: %b\r\n" % trace.state)
    fields += [b"baggage: %b\r\n" % value for value in exchange.request.headers.get_all(b"baggage")]
    return b"".join(fields)


def _query_without_key(request: Request) -> bytes:
    """Return the query without the ``key`` of Gemini's clients: it is the gateway's, not the provider's."""
    query = request.query
    if request.endpoint.dialect != "gemini.generate":
        return query
    pairs = query.split(b"&")
    return b"&".join([pair for pair in pairs if unquote_to_bytes(pair.partition(b"=")[0]) != b"key"])
