"""The exchange and the values inside it.

Hooks get one argument, the exchange; new facts become new fields here, so signatures never grow. Everything an
exchange holds is frozen; a plugin changes the exchange by assigning whole values to its fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from urllib.parse import unquote

import attrs

from penstock.endpoints import Endpoint
from penstock.errors import RequestError
from penstock.headers import Headers
from penstock.heads import RequestHead
from penstock.peek import PeekError, RequestPeek, is_multipart, peek_multipart, peek_request
from penstock.policies import NO_RULES, CacheMode, Fallback, GuardrailAttachment, PolicyRules

if TYPE_CHECKING:
    from penstock.metering import BodyWindow
    from penstock.providers import Provider

UNREADABLE = "The request body cannot be read"
"""What a refusal of a body that is neither JSON nor a form begins with."""
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
        """Return the value."""
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
    """Request line and header fields as they were read."""
    path: bytes
    """The path as sent, percent-encoding kept, without the query."""
    query: bytes = attrs.field(repr=False)
    """What follows the question mark, as sent; empty without one."""
    endpoint: Endpoint
    """Which operation of which dialect it is."""
    body: bytes = attrs.field(repr=False)
    """Framing undone, content coding not: ``editable_body`` undoes that too."""
    is_oversize: bool = False
    """The client announced or sent more than the limit; ``body`` is empty then."""
    _decoded: bytes | None = attrs.field(default=None, init=False, repr=False)

    def keep_decoded(self, body: bytes) -> None:
        """Remember the body with its content coding undone, which several steps read."""
        object.__setattr__(self, "_decoded", body)  # a memo: nothing observable changes

    @property
    def decoded(self) -> bytes | None:
        """Return the body with its content coding undone, where somebody has asked `editable_body` for it."""
        return self._decoded

    @property
    def method(self) -> bytes:
        """Return the method, such as ``b"POST"``."""
        return self.head.method

    @property
    def headers(self) -> Headers:
        """Return the header fields."""
        return self.head.headers

    def with_body(self, body: bytes) -> Request:
        """Return the same request around another body.

        The header fields stay as they are: where they hold a Content-Encoding, the body has to be in it.
        """
        return Request(self.head, self.path, self.query, self.endpoint, body)


@attrs.frozen
class Response:
    """Hold an answer written by the gateway or a plugin; the server adds framing and the exchange's own headers."""

    status: int
    """From 200 to 599."""
    body: bytes = attrs.field(default=b"", repr=False)
    """The whole body."""
    fields: tuple[tuple[bytes, bytes], ...] = ((b"content-type", b"application/json"),)
    """Header fields; no framing fields, the server adds them."""


@attrs.frozen(eq=False)
class Principal:
    """Say on whose behalf the call runs and what its virtual key allows; built once per key, shared by exchanges."""

    virtual_key_id: str
    """Id of the key: ``vk_`` and its name."""
    key_name: str
    """What the configuration calls the key."""
    display_prefix: str
    """What of the secret may be shown."""
    bindings: tuple[str, ...] = ()
    """Names of provider bindings; the first is the primary."""
    principal_id: str = "user_default"
    """The user or service account."""
    project_id: str = "proj_default"
    """The project the key belongs to."""
    team_id: str = "team_default"
    """The team of the project."""
    organization_id: str = "org_default"
    """The organization of the team."""
    model_aliases: Mapping[str, str] = attrs.field(factory=dict)
    """What clients may ask for, and what they get."""
    models_allowed: tuple[str, ...] | None = None
    """Globs over the resolved model, bare and ``type/model``; None allows all."""
    usage_frame: Literal["strip", "forward"] | None = None
    """Whether the usage frame the gateway asks for is taken out again; None leaves it to the binding."""
    tags: tuple[str, ...] = ()
    """Words for plugins to match."""
    metadata: Mapping[str, str] = attrs.field(factory=dict)
    """Names and values for plugins to match."""
    group_ids: tuple[str, ...] = ()
    """Groups the user or service account is a member of."""
    rate_limits: RateLimits | None = None
    """Bounds of the key's traffic; None where there are none."""
    revision: int = 0
    """Grows when the key changes; the configuration file's keys do not."""
    routing_policy_id: str | None = None
    """The routing policy that chooses among bindings."""
    fallback: Fallback | None = None
    """When the next candidate is tried; None leaves it to the routing policy, and then to the defaults."""
    cache_mode: CacheMode | None = None
    """How prompt caching is passed through where neither header nor rule says; None is ``respect``."""
    policy_rules: PolicyRules = NO_RULES
    """What its requests may contain."""
    guardrails: tuple[GuardrailAttachment, ...] = ()
    """What looks at its requests and answers, in order."""


@attrs.frozen(kw_only=True)
class RateLimits:
    """Bound traffic; None is no bound."""

    rpm: int | None = None
    """Requests a minute."""
    tpm: int | None = None
    """Tokens a minute."""
    rpd: int | None = None
    """Requests a day (UTC)."""
    concurrency: int | None = None
    """Exchanges under way at once."""


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
    """``gpc_`` and the name."""
    name: str
    """What keys and messages call it."""
    type: str
    """The type of the provider that speaks for it."""
    base_url: str
    """Empty takes the provider's default."""
    credential: Secret | None = None
    """The provider's key."""
    handle: str | None = None
    """Lets clients ask for ``handle/model``."""
    models: tuple[str, ...] = ()
    """Models declared."""
    model_map: Mapping[str, str] = attrs.field(factory=dict)
    """What a model is called upstream."""
    extra_headers: tuple[tuple[bytes, bytes], ...] = attrs.field(default=(), repr=False)
    """Header fields added to every request."""
    timeouts: Timeouts = Timeouts()
    """Bounds of an attempt."""
    usage_frame: Literal["strip", "forward"] | None = None
    """Whether the usage frame the gateway asks for is taken out again; the key's wins."""
    propagate_trace: bool = False
    """Whether trace context is sent upstream."""
    proxy: str | None = None
    """URL of a proxy."""
    http2: bool = False
    """Whether to speak HTTP/2 to an https:// address."""
    settings: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """What the provider type alone understands, checked by the provider when the binding is made."""
    rate_limits: RateLimits | None = None
    """Bounds of what is sent to the account; None where there are none."""
    organization_id: str | None = None
    """Whose keys alone may use it; None where there are no organizations."""


@attrs.frozen(eq=False)
class Candidate:
    """Choose a binding for one attempt: the provider that builds the request and the model it will be asked for."""

    binding: ProviderBinding
    """The account that is asked."""
    provider: Provider
    """The provider of the binding's type."""
    model: str | None
    """The model it is asked for; None where the endpoint has none."""
    model_source: str = "only"
    """Which rule chose the model, for the trace."""


@attrs.frozen
class Usage:
    """Count tokens in disjoint classes (``reasoning`` is a part of ``output``)."""

    input: int = 0
    """Input tokens that no cache had a part in."""
    cache_read: int = 0
    """Input tokens read from a cache."""
    cache_write_5m: int = 0
    """Input tokens written to a cache for five minutes."""
    cache_write_1h: int = 0
    """Input tokens written to a cache for an hour."""
    output: int = 0
    """Output tokens, reasoning included."""
    reasoning: int = 0
    """The part of the output that is reasoning."""
    source: Literal["provider", "estimated"] = "provider"
    """Whether the provider counted, or the gateway guessed from text."""
    input_audio: int = 0
    """The part of ``input`` that is audio."""
    cache_read_audio: int = 0
    """The part of ``cache_read`` that is audio."""
    output_audio: int = 0
    """The part of the output that is audio."""

    @property
    def all_input(self) -> int:
        """Return all input tokens, cached ones included."""
        return self.input + self.cache_read + self.cache_write_5m + self.cache_write_1h


@attrs.define(eq=False)
class Attempt:
    """Record one try at one binding, or a skip without a dial (``is_skipped``)."""

    number: int
    """From 0."""
    binding_id: str
    """Id of the binding tried."""
    provider: str
    """Type of its provider."""
    model: str | None
    """The model it was asked for."""
    span_id: bytes
    """Id of its span, 16 hex digits."""
    started_ns: int
    """Monotonic clock, nanoseconds."""
    ended_ns: int = 0
    """When its answer could be committed, or it had failed; 0 until then."""
    status: int | None = None
    """HTTP status of its answer; None where none came."""
    reason: str | None = None
    """Why it did not answer: an UpstreamFault, ``status``, ``error_event``, ``client_gone`` (before there was an answer
    to relay), ``not_sent`` (no request could be made), ``internal_error``, or a skip reason."""
    message: str | None = None
    """Details for the operator; may name hosts, so it is not for clients."""
    is_skipped: bool = False
    """Whether nothing was dialled."""

    @property
    def outcome(self) -> str:
        """Return the reason, or ``answered``."""
        return self.reason or "answered"


def fallbacks(attempts: Sequence[Attempt]) -> int:
    """Return how many of these came before the last that was no skip; all but one where all were skipped."""
    number = len(attempts) - 1
    while number > 0 and attempts[number].is_skipped:
        number -= 1
    return max(0, len(attempts) - 1) if not number and attempts and attempts[0].is_skipped else max(0, number)


@attrs.frozen
class TraceContext:
    """Hold W3C trace context; ids are lower-case hex bytes (32 and 16 digits)."""

    trace_id: bytes
    """32 digits; the same for client, gateway and provider."""
    span_id: bytes
    """16 digits; the exchange's own span."""
    parent_id: bytes | None = None
    """16 digits; the caller's span, if it sent one."""
    flags: bytes = b"01"
    """Two digits, as W3C trace-flags."""
    state: bytes | None = None
    """The ``tracestate`` of the caller."""


@attrs.define(eq=False)
class Exchange:
    """Carry one client request and everything until it is settled; the only argument of every hook."""

    request_id: bytes
    """``req_`` and 30 hex digits; the client gets it as a header."""
    request: Request
    """What the client asks; a plugin rewrites it by assigning a changed copy."""
    trace: TraceContext
    """Trace context of the exchange."""
    namespace: str
    """The configured namespace: ``penstock`` unless it was changed."""
    started_ns: int
    """Monotonic clock, nanoseconds."""
    started_at_ns: int
    """Wall clock, nanoseconds since the epoch."""
    client: tuple[str, int] | None = None
    """The client's address and port."""
    principal: Principal | None = None
    """On whose behalf the call runs; None where nobody authenticates."""
    candidate: Candidate | None = None
    """Who is asked, or has answered."""
    chain: Sequence[Candidate] = ()
    """Whom the request may go to, in order, once routing has resolved its model: in pre_request, for the plugins
    after it. Empty where there is none, or another plugin selects."""
    fallback: Fallback = Fallback()
    """How long and how often candidates are tried; whoever resolves the chain sets it, in pre_request."""
    excluded: dict[str, RequestError] | None = None
    """Why bindings may not be asked, by id; see ``exclude``."""
    attempts: list[Attempt] = attrs.Factory(list)
    """Those that failed or were skipped, in order, then the one that answered."""
    reply_fields: list[tuple[bytes, bytes]] = attrs.Factory(list)
    """Header fields a plugin adds to the client's response before the commit point."""
    state: dict[StateKey[Any], Any] = attrs.Factory(dict)
    """Plugins' own values, each under its own StateKey."""
    error: RequestError | None = None
    """The refusal or fault of the gateway; None where the answer is the provider's."""
    status: int | None = None
    """What the client was answered; None if nothing reached it."""
    is_stream: bool = False
    """Whether the **answer** is an event stream; what the client asked for is ``peek.stream``."""
    stream_end: StreamEnd | None = None
    """How the provider's body ended, whether it was a stream or not: complete, client_gone, upstream_failed or blocked.

    None where the gateway or a plugin answered.
    """
    committed_ns: int | None = None
    """When the provider's answer began to go to the client; monotonic clock, nanoseconds."""
    upstream_ns: int = 0
    """Time spent waiting for upstream heads, nanoseconds."""
    ended_ns: int = 0
    """When the client had its last byte; monotonic clock, nanoseconds."""
    bytes_out: int = 0
    """Size of the response body, bytes."""
    chunks_out: int = 0
    """How many pieces the response body was written in."""
    usage: Usage | None = None
    """Tokens used."""
    cache_mode: str = "respect"
    """How prompt caching is passed through: ``respect``, ``disable`` or ``force``."""
    cache_rule_id: str | None = None
    """The cache rule that chose the mode; None where header, key or default did."""
    window: BodyWindow | None = attrs.field(default=None, repr=False)
    """What the meter kept of the response body, once it has ended."""
    upstream_endpoint: Endpoint | None = None
    """The endpoint the candidate was asked at, where that speaks another dialect than the client; None where not."""
    params_dropped: tuple[str, ...] = ()
    """Members of the request that a translation left out."""
    response_watchers: set[str] | None = None
    """Names given to ``watch_response``."""
    chunk_watchers: set[str] | None = None
    """Names given to ``watch_chunks``; None where no chunk hook sees the response."""
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

    @property
    def fallback_count(self) -> int:
        """Return how many candidates were tried or skipped before the one that answered, or that was asked last."""
        return fallbacks(self.attempts)

    def exclude(self, binding_id: str, refusal: RequestError) -> None:
        """Keep the exchange from a binding: its candidates are skipped, and ``refusal`` answers if no other is left."""
        if self.excluded is None:
            self.excluded = {}
        self.excluded.setdefault(binding_id, refusal)

    def watch_chunks(self, plugin: str) -> None:
        """Ask that the named plugin's on_stream_chunk sees this exchange's response.

        ``plugin`` is its name in the configuration; without the hook there the exchange ends in ``plugin_error``.
        To be called before the attempt whose answer is meant, in pre_request at best.
        """
        if self.chunk_watchers is None:
            self.chunk_watchers = set()
        self.chunk_watchers.add(plugin)

    def watch_response(self, plugin: str) -> None:
        """Ask that the named plugin's on_response sees this exchange's answer as a whole, unless it is a stream.

        ``plugin`` is its name in the configuration. To be called before the attempt whose answer is meant.
        """
        if self.response_watchers is None:
            self.response_watchers = set()
        self.response_watchers.add(plugin)


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
        raise RequestError("bad_request", f"{UNREADABLE}: {error}.") from None


def _look_into_path(path: bytes) -> RequestPeek:
    """Return what a Gemini path says: ``/v1beta/models/{model}:{method}``."""
    _, found, rest = path.partition(b"/models/")
    model, _, method = rest.partition(b":")
    return RequestPeek(
        model=unquote(model.decode("latin-1")) if found and model else None, stream_value=method.startswith(b"stream")
    )
