"""The contract between core and plugins: every hook, in the order of one exchange.

A plugin is a class whose methods carry ``@hookimpl``. Each per-exchange hook takes one argument, the exchange, and may
be ``def`` or ``async def``; a ``def`` other than ``on_stream_chunk`` may also return an awaitable when, for this
exchange, there is something to wait for. What is awaited is bounded by ``[gateway] hook_timeout``. Prefer ``def``
where nothing is awaited: it costs less. A hook that no enabled plugin implements costs nothing.

An exception other than RequestError out of any hook up to ``admit_attempt`` ends the exchange with 500
``plugin_error`` and a log line naming plugin and hook; out of ``on_stream_chunk`` it ends the stream; out of
``post_response`` it is logged and the other plugins still run.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

import pluggy

from penstock.errors import RequestError
from penstock.evaluators import Evaluator
from penstock.models import Candidate, Exchange, Principal, Response
from penstock.providers import Provider
from penstock.translation import Translator

if TYPE_CHECKING:
    import click

    from penstock.asgi import Mount
    from penstock.editing import Chunk

hookspec = pluggy.HookspecMarker("penstock")
hookimpl = pluggy.HookimplMarker("penstock")


# --- once, at start-up ------------------------------------------------------------------------------------------


@hookspec
def register_providers() -> Iterable[Provider]:
    """Return the providers this plugin brings.

    When: once, while the gateway is built, before any lifespan is entered; no I/O.
    Returns: Provider objects; two of one type are a configuration error.
    """
    raise AssertionError("specification only")


@hookspec
def register_translators() -> Iterable[Translator]:
    """Return what turns requests of one dialect into another, and the answers back.

    When: once, while the gateway is built; no I/O.
    Returns: Translator objects; two between the same dialects are a configuration error.
    """
    raise AssertionError("specification only")


@hookspec
def register_evaluators() -> Iterable[Evaluator]:
    """Return what guardrails may run.

    When: once, while the gateway is built; no I/O.
    Returns: Evaluator objects; two of one type are a configuration error.
    """
    raise AssertionError("specification only")


@hookspec
def register_routes() -> Iterable[Mount]:
    """Return ASGI applications to serve under a path prefix (management API, console, metrics).

    When: once, while the gateway is built. The data plane's own paths cannot be taken.
    """
    raise AssertionError("specification only")


@hookspec
def register_commands(cli: click.Group) -> None:
    """Add commands to ``penstock``; called when a configuration enables the plugin and a command line runs."""


@hookspec
def lifespan() -> AbstractAsyncContextManager[None]:
    """Return a context manager for resources and background tasks.

    When: entered in the order of the configuration before the gateway listens, left in reverse after the last
    exchange. May do I/O. An exception on entering stops the start, or has a reload refused.
    """
    raise AssertionError("specification only")


# --- per exchange, in this order ----------------------------------------------------------------------------------


@hookspec
def authenticate(exchange: Exchange) -> Principal | None:
    """Say on whose behalf the request runs.

    When: first, with the complete request in hand. First answer that is not None wins.
    Returns: a Principal, or None to let the next plugin decide; nobody knowing the caller is 401.
    Raises: RequestError (``invalid_api_key``, ``virtual_key_revoked``, …). May await; must not block.
    """


@hookspec
def pre_request(exchange: Exchange) -> Response | None:
    """Check, refuse, rewrite or answer the request.

    When: after authenticate, each plugin in the order of the configuration.
    Returns: None to go on, or a Response that answers the client without any upstream; plugins later in the order are
    then not asked. So what is to see every request stands before those that answer some: before routing, which answers
    model listings here.
    Raises: RequestError to refuse, with the same effect. Rewriting is assigning ``exchange.request`` a changed copy
    (see penstock.splice).
    """


@hookspec
def select_provider(exchange: Exchange) -> Candidate | None:
    """Choose where the next attempt goes.

    When: once per attempt, before the first byte to the client; ``exchange.attempts`` holds those that failed.
    Returns: a Candidate, or None when this plugin has none (left); first answer wins. None from all ends the exchange
    with the last upstream answer, or a refusal.
    Raises: RequestError (``model_not_recognized``, ``model_not_allowed``, …).
    """


@hookspec
def admit_attempt(exchange: Exchange) -> RequestError | None:
    """Let an attempt go ahead, or have its candidate skipped.

    When: once per attempt, after select_provider and before anything is sent; ``exchange.candidate`` is who would be
    asked. A limit of a binding belongs here: what was taken for an attempt that failed is given back at the next call,
    or in post_response.
    Returns: None to go ahead, or the refusal that answers the client if no other candidate is left. The skip is among
    ``exchange.attempts`` with the refusal's code as its reason.
    Raises: RequestError to end the exchange instead.
    """


@hookspec
def on_response(exchange: Exchange, body: bytes) -> bytes | None:
    """Judge or change an answer as a whole, before any of it reaches the client.

    When: once the body of an answer below 400 that is no event stream is complete, for plugins that asked for it with
    ``exchange.watch_response(name)``; ``body`` is in the client's dialect, without content coding. The answer is
    gathered for that, at most 64 MiB; on event streams ``on_stream_chunk`` is asked instead.
    Returns: None leaves the body as it is, bytes replace it.
    Raises: RequestError to answer with a refusal instead; what was used is settled all the same.
    """


@hookspec
def on_stream_chunk(exchange: Exchange, chunk: Chunk) -> bytes | None:
    """See, edit, hold back or stop the response on its way to the client.

    When: for each read of the response body, if the plugin declares ``sees_chunks = True`` or asked for this exchange
    with ``exchange.watch_chunks(name)``; on event streams a chunk is one or more whole events. A final call with
    ``chunk.is_end`` closes the body.
    Returns: None keeps the bytes as they are, b"" holds them back, other bytes replace them.
    Raises: RequestError to stop the stream (the client gets one terminal error event). ``def`` or ``async def``; a
    ``def`` returns bytes or None, never an awaitable: it is called where nothing can be awaited.
    A body with content codings is decoded before it gets here, and reaches the client without them.
    """


@hookspec
def post_response(exchange: Exchange) -> None:
    """Settle, record, export.

    When: exactly once per exchange, after the client has its last byte or is gone, refusals and shutdown included; in
    reverse order of the configuration; bounded in time and shielded from cancellation.
    ``exchange.usage``, ``exchange.status`` and ``exchange.stream_end`` say what happened.
    """
