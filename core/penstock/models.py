"""The exchange and the values inside it.

Hooks get one argument, the exchange; new facts become new fields here, so signatures never grow. Everything an
exchange holds is frozen; a plugin changes the exchange by assigning whole values to its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from urllib.parse import unquote

import attrs

from penstock.endpoints import Endpoint
from penstock.errors import RequestError
from penstock.headers import Headers
from penstock.heads import RequestHead
from penstock.peek import PeekError, RequestPeek, is_multipart, peek_multipart, peek_request

if TYPE_CHECKING:
    from penstock.metering import BodyWindow
    from penstock.providers import Provider

MAX_MODEL_CHARACTERS = 512
"""Longest name of a model a client may ask for."""
T = TypeVar("T")
StreamEnd = Literal["complete", "client_gone", "upstream_failed", "blocked"]


class Secret:
    """Hold a value that never prints; ``reveal()`` is the only way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret('…')"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class StateKey(Generic[T]):
    """Name a plugin's own typed value on an exchange: ``exchange.state[KEY]``; compared by identity."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"StateKey({self.name!r})"


@attrs.frozen(eq=False)
class Request:
    """Hold a client's complete request; ``body`` is the bytes as they came, still content-coded if they were."""

    head: RequestHead
    path: bytes
    query: bytes = attrs.field(repr=False)
    endpoint: Endpoint
    body: bytes = attrs.field(repr=False)
    is_oversize: bool = False
    """The client announced or sent more than the limit; ``body`` is empty then."""
    _decoded: bytes | None = attrs.field(default=None, init=False, repr=False)

    def keep_decoded(self, body: bytes) -> None:
        """Remember the body with its content coding undone, which several steps read."""
        object.__setattr__(self, "_decoded", body)  # a memo: nothing observable changes

    @property
    def decoded(self) -> bytes | None:
        return self._decoded

    @property
    def method(self) -> bytes:
        return self.head.method

    @property
    def headers(self) -> Headers:
        return self.head.headers

    def with_body(self, body: bytes) -> Request:
        """Return the same request around another body."""
        return Request(self.head, self.path, self.query, self.endpoint, body)


@attrs.frozen
class Response:
    """Hold an answer written by the gateway or a plugin; the server adds framing and the exchange's own headers."""

    status: int
    body: bytes = attrs.field(default=b"", repr=False)
    fields: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)


@attrs.frozen(eq=False)
class Principal:
    """Say on whose behalf the call runs and what its virtual key allows; built once per key, shared by exchanges."""

    virtual_key_id: str
    key_name: str
    display_prefix: str
    bindings: tuple[str, ...] = ()
    """Names of provider bindings; the first is the primary."""
    principal_id: str = "user_default"
    project_id: str = "proj_default"
    team_id: str = "team_default"
    organization_id: str = "org_default"
    model_aliases: Mapping[str, str] = attrs.field(factory=dict)
    models_allowed: tuple[str, ...] | None = None
    """Globs over the resolved model, bare and ``type/model``; None allows all."""
    usage_frame: Literal["strip", "forward"] | None = None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Timeouts:
    """Bound an attempt, in seconds."""

    connect: float = 10.0
    """To a connection, TLS handshake included."""
    first_byte: float = 600.0
    """To the response head, and on a stream to its first event."""
    idle: float = 300.0
    """Between two reads of a body."""


@attrs.frozen(eq=False)
class ProviderBinding:
    """Describe a configured upstream account."""

    id: str
    name: str
    type: str
    base_url: str
    credential: Secret | None = None
    handle: str | None = None
    models: tuple[str, ...] = ()
    model_map: Mapping[str, str] = attrs.field(factory=dict)
    extra_headers: tuple[tuple[bytes, bytes], ...] = attrs.field(default=(), repr=False)
    timeouts: Timeouts = Timeouts()
    usage_frame: Literal["strip", "forward"] | None = None
    propagate_trace: bool = False
    proxy: str | None = None
    http2: bool = False
    settings: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """What the provider type alone understands, checked by the provider when the binding is made."""


@attrs.frozen(eq=False)
class Candidate:
    """Choose a binding for one attempt: the provider that builds the request and the model it will be asked for."""

    binding: ProviderBinding
    provider: Provider
    model: str | None
    model_source: str = "only"


@attrs.frozen
class Usage:
    """Count tokens in disjoint classes (``reasoning`` is a part of ``output``)."""

    input: int = 0
    cache_read: int = 0
    cache_write_5m: int = 0
    cache_write_1h: int = 0
    output: int = 0
    reasoning: int = 0
    source: Literal["provider", "estimated"] = "provider"

    @property
    def all_input(self) -> int:
        return self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h


@attrs.define(eq=False)
class Attempt:
    """Record one try at one binding, or a skip without a dial (``is_skipped``)."""

    number: int
    binding_id: str
    provider: str
    model: str | None
    span_id: bytes
    started_ns: int
    ended_ns: int = 0
    status: int | None = None
    reason: str | None = None
    """Why it did not answer: an UpstreamFault, ``status``, ``error_event``, ``client_gone`` (before there was an answer
    to relay), ``not_sent`` (no request could be made), ``internal_error``, or a skip reason."""
    message: str | None = None
    """Details for the operator; may name hosts, so it is not for clients."""
    is_skipped: bool = False

    @property
    def outcome(self) -> str:
        return self.reason or "answered"


@attrs.frozen
class TraceContext:
    """Hold W3C trace context; ids are lower-case hex bytes (32 and 16 digits)."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes | None = None
    flags: bytes = b"01"
    state: bytes | None = None


@attrs.define(eq=False)
class Exchange:
    """Carry one client request and everything until it is settled; the only argument of every hook."""

    request_id: bytes
    request: Request
    trace: TraceContext
    namespace: str
    started_ns: int
    """Monotonic clock, nanoseconds."""
    started_at_ns: int
    """Wall clock, nanoseconds since the epoch."""
    client: tuple[str, int] | None = None
    principal: Principal | None = None
    candidate: Candidate | None = None
    attempts: list[Attempt] = attrs.Factory(list)
    """Those that failed or were skipped, in order, then the one that answered."""
    reply_fields: list[tuple[bytes, bytes]] = attrs.Factory(list)
    """Header fields a plugin adds to the client's response before the commit point."""
    state: dict[StateKey[Any], Any] = attrs.Factory(dict)
    error: RequestError | None = None
    status: int | None = None
    """What the client was answered; None if nothing reached it."""
    is_stream: bool = False
    stream_end: StreamEnd | None = None
    committed_ns: int | None = None
    upstream_ns: int = 0
    """Time spent waiting for upstream heads, nanoseconds."""
    ended_ns: int = 0
    bytes_out: int = 0
    chunks_out: int = 0
    usage: Usage | None = None
    cache_mode: str = "respect"
    window: BodyWindow | None = attrs.field(default=None, repr=False)
    """What the meter kept of the response body, once it has ended."""
    chunk_watchers: set[str] | None = None
    _peek: RequestPeek | None = attrs.field(default=None, repr=False)
    _peeked: Request | None = attrs.field(default=None, repr=False)

    @property
    def peek(self) -> RequestPeek:
        """Look at the members of the request body that routing needs, decoded once per body.

        Raises RequestError ``bad_request`` for a body that is neither JSON nor a form.
        """
        request = self.request
        if self._peek is None or self._peeked is not request:
            self._peek = _bounded(look_into(request))
            self._peeked = request
        return self._peek

    def watch_chunks(self, plugin: str) -> None:
        """Ask that the named plugin's on_stream_chunk sees this exchange's response."""
        if self.chunk_watchers is None:
            self.chunk_watchers = set()
        self.chunk_watchers.add(plugin)


def _bounded(peek: RequestPeek) -> RequestPeek:
    """Refuse a model whose name would fill headers, logs and spans."""
    if peek.model is not None and len(peek.model) > MAX_MODEL_CHARACTERS:
        message = f"The name of the model has more than {MAX_MODEL_CHARACTERS} characters."
        raise RequestError("bad_request", message, param="model")
    return peek


def look_into(request: Request) -> RequestPeek:
    """Return the peek of a request's body; content-coded bodies are decoded within bounds first."""
    if request.endpoint.family == "gemini":
        return _look_into_path(request.path)
    from penstock.inspection import inspectable_body  # noqa: PLC0415 - rare imports stay out of start-up

    coding = request.headers.get(b"content-encoding")
    body = request.body if coding is None else inspectable_body(request, coding)
    content_type = request.headers.get(b"content-type") or b""
    try:
        if is_multipart(content_type):
            return peek_multipart(body, content_type)
        return peek_request(body)
    except PeekError as error:
        raise RequestError("bad_request", f"The request body cannot be read: {error}.") from None


def _look_into_path(path: bytes) -> RequestPeek:
    """Return what a Gemini path says: ``/v1beta/models/{model}:{method}``."""
    _, found, rest = path.partition(b"/models/")
    model, _, method = rest.partition(b":")
    return RequestPeek(
        model=unquote(model.decode("latin-1")) if found and model else None, stream_value=method.startswith(b"stream")
    )
