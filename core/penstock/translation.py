"""Ask a provider in another dialect than the client's: find who translates, build the request, turn the answer round.

A translator is sans-IO: bytes of one dialect in, bytes of the other out. It is the only place where a body is rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import attrs

from penstock.editing import Edits
from penstock.endpoints import EXACT, Endpoint
from penstock.errors import ConfigurationError, PenstockError, PluginError, RequestError, UpstreamError
from penstock.forwarding import with_headers
from penstock.heads import RequestHead, ResponseHead
from penstock.inspection import editable_body

if TYPE_CHECKING:
    from penstock.models import Candidate, Exchange
    from penstock.providers import Provider, ResponseFilter, UpstreamRequest

_PATHS = {endpoint.dialect: path for path, endpoint in reversed(EXACT.items()) if endpoint.has_model}
"""Where each dialect is spoken; of those with several paths, the first."""
_VENDOR_FIELDS = (b"anthropic-", b"openai-", b"x-stainless-", b"x-goog-")
"""What begins the names of header fields that mean something to one vendor only."""
_BODY_FIELDS = (b"content-type", b"content-encoding", b"content-length", b"accept")
_ANTHROPIC_VERSION = (b"anthropic-version", b"2023-06-01")


class ReplyTranslation(Protocol):
    """Turn one answer into the client's dialect. Sync and sans-IO; made for one attempt."""

    def begin(self, status: int, *, is_event_stream: bool) -> None:
        """Take the head: whether an error, a whole body or an event stream follows."""
        ...

    def feed(self, payload: bytes) -> bytes:
        """Return what the client may see of these de-framed body bytes; of a stream whole events only.

        Raises UpstreamError for what cannot be read: before the commit the next candidate is asked, and of a stream
        what came with its first event is read before the commit.
        """
        ...

    def finish(self) -> bytes:
        """Return the rest, or a body that was gathered. Raises UpstreamError where the answer ended too early."""
        ...


@attrs.frozen(eq=False)
class Translated:
    """Hold a request in the provider's dialect."""

    body: bytes = attrs.field(repr=False)
    """The whole body, JSON."""
    reply: ReplyTranslation
    """What turns the answer round."""
    dropped: tuple[str, ...] = ()
    """Members that have no equivalent and were left out, as paths such as ``logit_bias``."""


class Translator(Protocol):
    """Translate requests of one dialect into another, and the answers back."""

    @property
    def source(self) -> str:
        """Return the client's dialect."""
        ...

    @property
    def target(self) -> str:
        """Return the provider's dialect."""
        ...

    def translate(self, body: bytes, model: str | None) -> Translated:
        """Return the request for a model, in the provider's dialect.

        ``body`` is the client's, content coding undone. Raises RequestError ``bad_request`` for one that cannot be
        read, ``unsupported_parameter`` for what the request depends on and the other dialect does not have.
        """
        ...


class UntranslatableError(PenstockError):
    """Report a request that a candidate's dialect cannot express; another candidate may take it as it is."""

    refusal: RequestError
    """What the client is told where there is none."""

    def __init__(self, refusal: RequestError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


_MEMBERS = ("source", "target")


class TranslatorRegistry:
    """Find translators by dialects."""

    def __init__(self) -> None:
        self._by_dialects: dict[tuple[str, str], Translator] = {}

    def add(self, translator: Translator) -> None:
        """Add one. Raises ConfigurationError where there is one between these dialects, or it is none."""
        missing = [name for name in _MEMBERS if not isinstance(getattr(translator, name, None), str)]
        if missing or not callable(getattr(translator, "translate", None)):
            raise ConfigurationError(f"registers a translator without {', '.join(missing) or 'translate'}")
        key = translator.source, translator.target
        if key in self._by_dialects:
            raise ConfigurationError(f"two plugins translate {key[0]} into {key[1]}; enable only one of them")
        if key[1] not in _PATHS:
            raise ConfigurationError(f"registers a translator into {key[1]!r}, which no endpoint speaks")
        self._by_dialects[key] = translator

    def between(self, endpoint: Endpoint, provider: Provider) -> Translator | None:
        """Return who translates requests to an endpoint for a provider that does not speak its dialect.

        Of several the one whose target sorts first; None where there is none.
        """
        if endpoint.path not in _PATHS_TEXT:
            return None  # counting tokens, stored responses: there is nothing the other side would take for it
        targets = sorted(target for source, target in self._by_dialects if source == endpoint.dialect)
        found = next((target for target in targets if target in provider.dialects), None)
        return None if found is None else self._by_dialects[endpoint.dialect, found]

    def __bool__(self) -> bool:
        return bool(self._by_dialects)

    def __iter__(self) -> Iterator[Translator]:
        return iter(self._by_dialects.values())


_PATHS_TEXT = frozenset(path.decode() for path in _PATHS.values())


def build_translated(exchange: Exchange, candidate: Candidate, translator: Translator) -> UpstreamRequest:
    """Return the request for a candidate that does not speak the client's dialect.

    Raises UntranslatableError for what that dialect cannot express, PluginError for a translator that fails.
    """
    request = exchange.request
    name = type(translator).__name__
    if request.query and b"beta=" not in request.query and request.endpoint.family == "gemini":
        message = "This request's query has no equivalent in the dialect of the provider."
        raise UntranslatableError(RequestError("bad_request", message))
    try:
        translated = translator.translate(editable_body(request), candidate.model)
    except RequestError as refusal:
        raise UntranslatableError(refusal) from refusal
    except Exception as error:
        raise PluginError(name, "translate") from error
    path = _PATHS[translator.target]
    endpoint = EXACT[path]
    head = _head_for(request.head, endpoint)
    view = attrs.evolve(
        exchange,
        request=attrs.evolve(request, head=head, path=path, query=b"", endpoint=endpoint, body=translated.body),
        chunk_watchers=exchange.chunk_watchers or set(),  # so that the answer is asked for without content coding
    )
    built = candidate.provider.build(view, candidate)
    exchange.upstream_endpoint, exchange.params_dropped = endpoint, translated.dropped
    return attrs.evolve(built, translation=Through(name, built.response_filter, translated.reply))


def _head_for(head: RequestHead, endpoint: Endpoint) -> RequestHead:
    """Return the client's head without what only its own dialect knows."""
    names = [name for name, _ in head.headers if name.lower().startswith(_VENDOR_FIELDS)]
    own = [(b"content-type", b"application/json")]
    if endpoint.family == "anthropic":
        own.append(_ANTHROPIC_VERSION)
    return with_headers(head, head.headers.without((*names, *_BODY_FIELDS)).with_fields(own))


@attrs.define(eq=False)
class Through:
    """Take an answer through the provider's own filter and then through its translation.

    Raises UpstreamError for what cannot be read, PluginError for a translator that fails.
    """

    name: str
    """Who translates."""
    own: ResponseFilter | None
    reply: ReplyTranslation
    _ahead: bytes = b""
    """What was translated before it was asked for."""
    _ahead_of: int = 0
    """How many of the next bytes that was made from."""

    def begin(self, head: ResponseHead, *, is_event_stream: bool) -> ResponseHead:
        """Take the provider's head; returns the client's."""
        with self._named():
            self.reply.begin(head.status, is_event_stream=is_event_stream)
        kind = b"text/event-stream; charset=utf-8" if is_event_stream else b"application/json"
        headers = head.headers.without((b"content-type",)).with_fields([(b"content-type", kind)])
        block = b"".join([b"%b: %b\r\n" % field for field in headers])
        return attrs.evolve(head, headers=headers, fields=block)

    def look_ahead(self, payload: bytes) -> None:
        """Translate what the next ``feed`` will begin with, to learn whether it can be read."""
        self._ahead, self._ahead_of = self.feed(payload), len(payload)

    def feed(self, payload: bytes) -> bytes:
        """Return what the client may see of these body bytes."""
        ahead = b""
        if self._ahead_of:
            ahead, payload = self._ahead, payload[self._ahead_of :]
            self._ahead, self._ahead_of = b"", 0
        try:
            return ahead + self.reply.feed(payload if self.own is None else self.own.feed(payload))
        except UpstreamError:
            raise
        except Exception as error:
            raise PluginError(self.name, "reply") from error

    def finish(self) -> bytes:
        """Return what is still held back."""
        with self._named():
            if self.own is None:
                return self.reply.finish()
            rest = self.own.finish()
            return (self.reply.feed(rest) if rest else b"") + self.reply.finish()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say whose fault an unexpected exception is."""
        try:
            yield
        except (UpstreamError, PluginError):
            raise
        except Exception as error:
            raise PluginError(self.name, "reply") from error


def translated_edits(edits: Edits, through: Through) -> Edits:
    """Return the edits of a translated answer."""
    return attrs.evolve(edits, filter=through, writes_whole_events=True)
