"""The story of one exchange, one function per step.

    authenticate → pre_request → select_provider → build → send → relay → post_response

Invariants: nothing after the first client byte calls select_provider (commit once); every exchange runs post_response
exactly once (settle once); an unexpected exception before the commit is a 500 naming plugin and hook in the log (fail
closed).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from time import monotonic_ns
from typing import Any, Protocol

import anyio
import attrs

from penstock.awaited import open_relay
from penstock.dialects.estimate import estimate_usage
from penstock.editing import Chunk
from penstock.endpoints import ALL
from penstock.envelopes import error_response
from penstock.errors import PluginError, RequestError, UpstreamError
from penstock.hooks import Call, Hooks
from penstock.ids import new_span_id
from penstock.inspection import editable_body
from penstock.metering import BodyWindow
from penstock.models import Attempt, Candidate, Exchange, Principal, Response, Usage
from penstock.policies import NO_RULES
from penstock.providers import Transport, UpstreamRequest
from penstock.relay import Client, Relay
from penstock.replies import FieldError
from penstock.retrying import bounded, may_go_on, reason_of
from penstock.telemetry import Telemetry
from penstock.translation import TranslatorRegistry, UntranslatableError, build_translated
from penstock.whole import WholeRelay

SETTLE_SECONDS = 5.0
_ESTIMATED = frozenset({"chat", "responses", "messages", "completions", "embeddings"})
"""Operations whose tokens are guessed from text where the provider does not count them."""
_UNREACHED = "The provider could not be reached."
_TOLD_OTHERWISE = "The provider gave no answer."
_TOLD_OF_FAULT = {
    "connect": _UNREACHED,
    "dns": _UNREACHED,
    "tls": _UNREACHED,
    "timeout": "The provider did not answer in time.",
    "reset": "The provider closed the connection before answering.",
    "truncated": "The provider's answer broke off before any of it could be passed on.",
    "protocol": "The provider sent an invalid answer.",
}
"""What a client is told of an attempt that failed; hosts and addresses are nobody's business but the operator's."""


class Connection(Client, Protocol):
    """What the pipeline needs of a client connection beyond the relay."""

    def respond(self, exchange: Exchange, response: Response) -> None:
        """Write a whole answer authored by the gateway or a plugin."""
        ...


@attrs.frozen
class Drain:
    """Say how much of a stream is still read after its client has gone."""

    seconds: float
    """How long."""
    bytes: int
    """How much more than was already read."""


@attrs.frozen(eq=False)
class Pipeline:
    """Run exchanges through one generation of plugins."""

    hooks: Hooks
    transports: Transport
    telemetry: Telemetry
    max_body_bytes: int
    drain: Drain | None = None
    translators: TranslatorRegistry = attrs.Factory(TranslatorRegistry)
    unenforced: tuple[str, ...] = ()
    """Members of principals that hold only where a plugin enforces them, and none that is enabled does."""

    async def handle(self, exchange: Exchange, client: Connection) -> None:
        """Take an exchange from its parsed request to its settlement; the answer is written to ``client``."""
        try:
            answer = await self._answer(exchange, client)
            if answer is not None:
                exchange.status = answer.status
                client.respond(exchange, answer)
        except RequestError as error:
            self._refuse(exchange, client, error)
        except PluginError as error:
            self._report(exchange, error)
            self._refuse(exchange, client, RequestError("plugin_error", "A gateway plugin failed; see its log."))
        except asyncio.CancelledError:
            exchange.stream_end = exchange.stream_end or "client_gone"
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback reaches a client
            self.telemetry.report_fault(exchange, error)
            self._refuse(exchange, client, RequestError("internal_error", "The gateway failed; see its log."))
        finally:
            exchange.ended_ns = monotonic_ns()
            await self._settle(exchange)

    async def _answer(self, exchange: Exchange, client: Connection) -> Response | None:
        """Go through the steps; returns an answer to write, or None once a provider's was relayed."""
        if exchange.error is not None:
            raise exchange.error
        if self.hooks.sees_all_chunks and exchange.chunk_watchers is None:
            exchange.chunk_watchers = set()
        _check_endpoint(exchange)
        await self._authenticate(exchange)
        self._check_size(exchange)
        for call in self.hooks.pre_request:
            result = call.run(exchange)
            is_ready = result is None or isinstance(result, Response)
            answer: Response | None = result if is_ready else await call.wait(result)
            if answer is not None:
                return answer
        await self._relay_from_some_provider(exchange, client)
        return None

    async def _authenticate(self, exchange: Exchange) -> None:
        for call in self.hooks.authenticate:
            result = call.run(exchange)
            is_ready = result is None or isinstance(result, Principal)
            principal: Principal | None = result if is_ready else await call.wait(result)
            if principal is not None:
                exchange.principal = principal
                if self.unenforced:
                    _check_enforced(principal, self.unenforced)
                return
        if self.hooks.authenticate:
            message = "No virtual key was presented; send it as 'Authorization: Bearer <key>' or 'x-api-key'."
            raise RequestError("invalid_api_key", message)

    def _check_size(self, exchange: Exchange) -> None:
        if exchange.request.is_oversize:
            raise RequestError(
                "payload_too_large",
                f"The request body is larger than {self.max_body_bytes} bytes; send less or raise max_body_bytes.",
            )

    async def _relay_from_some_provider(self, exchange: Exchange, client: Connection) -> None:
        """Try candidates until one answers; the last failing answer is relayed when none is left."""
        last: Relay | None = None
        last_candidate: Candidate | None = None
        try:
            while True:
                candidate = await self._select(exchange)
                if candidate is None:
                    break
                attempt, request = self._prepare(exchange, candidate)
                if request is None:
                    continue
                if last is not None:
                    last.response.close()
                    last = None  # what went wrong with the next is not settled by this one's body
                last = await self._attempt(exchange, attempt, request, client)
                last_candidate = candidate
                if not may_go_on(exchange):
                    break
            exchange.candidate = last_candidate
            if last is None:
                raise self._nobody_answered(exchange)
            await self._relay(exchange, last)
        except BaseException:
            if last is not None:
                if not last.ended:
                    last.abandon()
                if exchange.attempts[-1].reason != "not_sent":  # else it was given up for the next, which failed here
                    exchange.window = last.meter.window()
            raise

    def _nobody_answered(self, exchange: Exchange) -> RequestError:
        """Return the refusal where nobody was asked, or why those that were asked gave no answer."""
        skips = [attempt for attempt in exchange.attempts if attempt.is_skipped]
        if skips and len(skips) == len(exchange.attempts) and exchange.excluded:
            refusal = exchange.excluded[skips[0].binding_id]
            return _with_attempts(exchange, refusal) if refusal.code == "circuit_open" else refusal
        if exchange.attempts:
            self.telemetry.report_exhausted(exchange)
        return _exhausted(exchange)

    async def _select(self, exchange: Exchange) -> Candidate | None:
        """Return the next candidate that may be asked; those that may not are noted as skipped attempts."""
        while True:
            candidate = await self._select_any(exchange)
            if candidate is None:
                return None
            exchange.candidate = candidate
            refusal = None if exchange.excluded is None else exchange.excluded.get(candidate.binding.id)
            if refusal is None and self.hooks.admit_attempt:
                refusal = await self._admit(exchange)
            if refusal is None:
                return candidate
            if not _note_skip(exchange, candidate, refusal):
                return None

    async def _select_any(self, exchange: Exchange) -> Candidate | None:
        for call in self.hooks.select_provider:
            result = call.run(exchange)
            is_ready = result is None or isinstance(result, Candidate)
            candidate: Candidate | None = result if is_ready else await call.wait(result)
            if candidate is not None:
                return candidate
        return None

    async def _admit(self, exchange: Exchange) -> RequestError | None:
        for call in self.hooks.admit_attempt:
            result = call.run(exchange)
            is_ready = result is None or isinstance(result, RequestError)
            refusal: RequestError | None = result if is_ready else await call.wait(result)
            if refusal is not None:
                return refusal
        return None

    def _prepare(self, exchange: Exchange, candidate: Candidate) -> tuple[Attempt, UpstreamRequest | None]:
        """Begin an attempt; without a request where the candidate cannot be asked this, and is skipped."""
        binding = candidate.binding
        number = len(exchange.attempts)
        attempt = Attempt(number, binding.id, binding.type, candidate.model, new_span_id(), monotonic_ns())
        exchange.attempts.append(attempt)
        try:
            return attempt, bounded(exchange, self._build(exchange, candidate))
        except UntranslatableError as error:
            attempt.reason, attempt.is_skipped = error.refusal.code, True
            exchange.exclude(binding.id, error.refusal)
            attempt.ended_ns = monotonic_ns()
            return attempt, None
        except BaseException:
            attempt.reason = "not_sent"
            attempt.ended_ns = monotonic_ns()
            raise

    async def _attempt(
        self, exchange: Exchange, attempt: Attempt, request: UpstreamRequest, client: Connection
    ) -> Relay | None:
        """Dial one candidate up to the point where its answer may be committed; None where there is no answer."""
        try:
            edits = self.hooks.edits_for(exchange, request.response_filter)
            waiting = monotonic_ns()
            try:
                response = await self.transports.send(request)
            finally:
                exchange.upstream_ns += monotonic_ns() - waiting
            attempt.status = response.head.status
            try:
                relay = open_relay(exchange, response, client, edits, request.translation)
            except BaseException:
                response.close()
                raise
            return await self._judge(exchange, attempt, request, relay)
        except UpstreamError as error:
            _note_fault(attempt, error)
            return None
        except asyncio.CancelledError:
            attempt.reason = "client_gone"
            raise
        except BaseException:
            attempt.reason = "not_sent" if attempt.status is None else "internal_error"
            raise
        finally:
            attempt.ended_ns = monotonic_ns()

    async def _judge(
        self, exchange: Exchange, attempt: Attempt, request: UpstreamRequest, relay: Relay
    ) -> Relay | None:
        """Wait until an answer may be committed, and note on the attempt why it should not be. Raises UpstreamError."""
        response = relay.response
        try:
            response.start(relay)
            verdict = relay.verdict
            if verdict is None:
                waiting = monotonic_ns()
                timeout = request.timeouts.first_byte - (waiting - attempt.started_ns) / 1e9
                verdict = await relay.wait_verdict(max(0.0, timeout))
                exchange.upstream_ns += monotonic_ns() - waiting
            if request.translation is not None:
                relay.look_ahead(request.translation)
        except BaseException as error:
            relay.abandon()
            if isinstance(error, asyncio.CancelledError):
                exchange.window = relay.meter.window()
            raise
        if verdict == "failed":
            response.close()
            raise relay.fault or relay.error or AssertionError("a failed answer says why")
        attempt.reason = reason_of(response.head.status, verdict)
        return relay

    def _build(self, exchange: Exchange, candidate: Candidate) -> UpstreamRequest:
        provider, endpoint = candidate.provider, exchange.request.endpoint
        translator = None
        if self.translators and endpoint.dialect not in provider.dialects:
            translator = self.translators.between(endpoint, provider)
        try:
            if translator is not None:
                return build_translated(exchange, candidate, translator)
            if exchange.upstream_endpoint is not None:
                exchange.upstream_endpoint, exchange.params_dropped = None, ()
            return provider.build(exchange, candidate)
        except (RequestError, UntranslatableError, PluginError):
            raise
        except Exception as error:
            raise PluginError(candidate.provider.type, "build") from error

    async def _relay(self, exchange: Exchange, relay: Relay) -> None:
        if isinstance(relay, WholeRelay):
            await self._review(exchange, relay)
        exchange.status = relay.response.head.status
        exchange.is_stream = relay.is_sse
        relay.commit()
        exchange.committed_ns = monotonic_ns()
        try:
            if not relay.ended:
                await relay.wait_end()
        except asyncio.CancelledError:
            if not relay.ended:
                if self.drain is not None:
                    await self._drain(relay, self.drain)
                exchange.stream_end = "client_gone"
            raise
        finally:
            if relay.fault is not None:
                self.telemetry.report_fault(exchange, relay.fault)
        if exchange.window is None:
            exchange.window = relay.meter.window()

    async def _review(self, exchange: Exchange, relay: WholeRelay) -> None:
        """Show a whole answer to whoever asked for it. Raises RequestError for one the client must not see."""
        body = relay.body
        for call in self.hooks.reviewers_of(exchange) if relay.response.head.status < 400 else ():
            body = await call.response(exchange, body)
        for call in relay.edits.calls:
            body = await call.chunk_async(exchange, Chunk(body, is_event_stream=False))
            body += await call.chunk_async(exchange, Chunk(b"", is_event_stream=False, is_end=True))
        if body is not relay.body:
            relay.replace(body)

    async def _drain(self, relay: Relay, drain: Drain) -> None:
        """Read on after the client has gone, within bounds, so that the provider's usage report arrives."""
        limit = relay.meter.total_bytes + drain.bytes

        def count(data: bytes) -> None:
            if relay.meter.total_bytes + len(data) > limit:
                relay.abandon()

        with anyio.move_on_after(drain.seconds, shield=True):
            relay.mute(count)
            relay.resume()
            if not relay.ended:
                await relay.wait_end()

    def _refuse(self, exchange: Exchange, client: Connection, error: RequestError) -> None:
        exchange.error = error
        if exchange.committed_ns is not None:
            client.close_after_write()
            return
        answer = error_response(error, exchange.request.endpoint.family, exchange.request_id, exchange.namespace)
        exchange.status = answer.status
        try:
            client.respond(exchange, answer)
        except PluginError as fault:  # what a plugin added to the refusal cannot be written
            self._report(exchange, fault)
            self._refuse(exchange, client, RequestError("plugin_error", "A gateway plugin failed; see its log."))

    def _report(self, exchange: Exchange, fault: PluginError) -> None:
        if isinstance(fault, FieldError):
            fault.blame(self.hooks.field_writers())
        self.telemetry.report_fault(exchange, fault)

    async def _settle(self, exchange: Exchange) -> None:
        """Run post_response of every plugin; shielded where one of them awaits, and never raising."""
        self._read_usage(exchange)
        for call in self.hooks.post_response:
            try:
                pending = call.run(exchange)
                if pending is not None:
                    await self._wait_settled(exchange, call, pending)
            except (RequestError, PluginError) as error:
                self.telemetry.report_fault(exchange, error)
        self.telemetry.record(exchange)

    async def _wait_settled(self, exchange: Exchange, call: Call, pending: Awaitable[Any]) -> None:
        """Give one plugin its time; the others are run whatever it does with it."""
        with anyio.move_on_after(SETTLE_SECONDS, shield=True) as scope:
            await call.wait(pending)
        if scope.cancelled_caught:
            late = f"post_response of plugin {call.plugin!r} took over {SETTLE_SECONDS:g} s"
            self.telemetry.report_fault(exchange, TimeoutError(late))

    def _read_usage(self, exchange: Exchange) -> None:
        candidate, window = exchange.candidate, exchange.window
        if candidate is None or window is None or exchange.usage is not None:
            return
        try:
            exchange.usage = candidate.provider.read_usage(exchange, window) or _estimated(exchange, window)
        except Exception as error:  # noqa: BLE001 - metering never breaks an exchange that was answered
            self.telemetry.report_fault(exchange, error)


def _estimated(exchange: Exchange, window: BodyWindow) -> Usage | None:
    """Guess the usage of an answer that reported none; never silently nothing."""
    request = exchange.request
    attempt = exchange.attempts[-1] if exchange.attempts else None
    if attempt is None or attempt.status != 200:
        return None
    if attempt.reason is not None and (attempt.reason != "client_gone" or not window.total_bytes):
        return None
    if request.endpoint.operation not in _ESTIMATED:
        return None
    return estimate_usage(editable_body(request), window, is_stream=exchange.is_stream)


def _note_fault(attempt: Attempt, error: UpstreamError) -> None:
    attempt.reason = error.fault
    attempt.message = error.message


def _note_skip(exchange: Exchange, candidate: Candidate, refusal: RequestError) -> bool:
    """Record that a candidate was skipped; False where it was before, so that who selects has no other."""
    binding = candidate.binding
    is_new = all(not attempt.is_skipped or attempt.binding_id != binding.id for attempt in exchange.attempts)
    if is_new:
        now = monotonic_ns()
        number = len(exchange.attempts)
        attempt = Attempt(number, binding.id, binding.type, candidate.model, new_span_id(), now, now)
        attempt.reason, attempt.is_skipped = refusal.code, True
        exchange.attempts.append(attempt)
        exchange.exclude(binding.id, refusal)
    return is_new


def _check_enforced(principal: Principal, names: Iterable[str]) -> None:
    """Refuse a key whose rules nobody would keep: a plugin left out must not mean that anything goes."""
    for name in names:
        if getattr(principal, name) not in (None, (), NO_RULES):
            raise RequestError(
                "policy_rules_invalid",
                f"This virtual key has {name.replace('_', ' ')}, and no enabled plugin enforces them; the operator "
                f'must add "{name}" to [gateway] plugins, or take them from the key.',
            )


def _check_endpoint(exchange: Exchange) -> None:
    request = exchange.request
    endpoint = request.endpoint
    if request.method in endpoint.methods:
        return
    if not endpoint.methods:
        known = sorted({known.path for known in ALL})
        raise RequestError("not_found", f"There is no such endpoint; the endpoints are {', '.join(known)}.")
    if endpoint.operation == "responses" and b"websocket" in (request.headers.get(b"upgrade") or b"").lower():
        raise RequestError(
            "websocket_unavailable",
            'WebSocket mode is not available on this endpoint; use POST with "stream": true.',
            fields=((b"upgrade", b"HTTP/1.1"),),
        )
    allowed = b", ".join(endpoint.methods)
    raise RequestError(
        "method_not_allowed", f"This endpoint takes {allowed.decode()} only.", fields=((b"allow", allowed),)
    )


def _attempts_of(exchange: Exchange) -> list[dict[str, Any]]:
    """Return what a client is told of each candidate."""
    return [
        {"binding": attempt.binding_id, "model": attempt.model, "reason": attempt.outcome, "status": attempt.status}
        for attempt in exchange.attempts
    ]


def _with_attempts(exchange: Exchange, refusal: RequestError) -> RequestError:
    """Return a refusal that lists each candidate."""
    meta = {**refusal.meta, "attempts": _attempts_of(exchange)}
    return RequestError(refusal.code, refusal.message, meta=meta, fields=refusal.fields, status=refusal.status)


def _exhausted(exchange: Exchange) -> RequestError:
    """Say why no candidate answered, listing each."""
    attempts = exchange.attempts
    meta = {"attempts": _attempts_of(exchange)}
    if not attempts:
        return RequestError("provider_not_bound", "No provider binding of this virtual key can serve the request.")
    made = [attempt for attempt in attempts if not attempt.is_skipped]
    reason = (made or attempts)[-1].outcome
    code = "upstream_timeout" if reason == "timeout" else "provider_error"
    return RequestError(code, _TOLD_OF_FAULT.get(reason, _TOLD_OTHERWISE), meta=meta)
