"""One cheap real call to a provider, and what came of it."""

from __future__ import annotations

import time
from typing import Any

import attrs
import msgspec

from penstock import (
    Candidate,
    ConfigurationError,
    Endpoint,
    Exchange,
    Fetch,
    Headers,
    ProviderBinding,
    Request,
    RequestError,
    RequestHead,
    Services,
    TraceContext,
    UpstreamError,
    UpstreamRequest,
)

TIMEOUT_SECONDS = 10.0
MAX_BYTES = 1024 * 1024
PROBE_ID = "gpc_probe"
"""Under which a provider keeps the address of what is tried, apart from the bindings in use."""
_CALLS: dict[str, tuple[str, str, str]] = {
    "openai.chat": ("chat", "/v1/chat/completions", "max_completion_tokens"),
    "anthropic.messages": ("messages", "/v1/messages", "max_tokens"),
}
"""Dialect → operation, path and what bounds the output, of a request for one token."""
_ADVICE = {
    401: "the provider refuses the credential",
    403: "the provider refuses the credential, or what it may do",
    404: "the base URL leads to nothing the provider knows",
    429: "the provider's rate limit is reached; the credential works",
}


@attrs.frozen
class Probe:
    """Say how a call went."""

    ok: bool
    status: int | None
    """HTTP status; None where no answer came."""
    latency_ms: int
    detail: str
    """In words, without anything the provider or the credential says."""


async def probe(services: Services, binding: ProviderBinding) -> Probe:
    """List the provider's models; where it has no list, ask the first declared model for one token."""
    began = time.monotonic()
    try:
        status = await _send(services, binding, _listing())
        detail = "the provider listed its models"
        if status in (404, 405, 501) and binding.models:
            status = await _send(services, binding, _one_token(services, binding))
            detail = "the model answered with one token"
    except UpstreamError as error:
        return Probe(False, None, _since(began), f"{error.fault}: the provider could not be asked")
    except (RequestError, ConfigurationError):
        return Probe(False, None, _since(began), "no request can be made for this binding")
    ok = status is not None and 200 <= status < 300
    if not ok:
        detail = _ADVICE.get(status or 0, f"the provider answered with status {status}")
    return Probe(ok, status, _since(began), detail)


def _since(began: float) -> int:
    return round((time.monotonic() - began) * 1000)


async def _send(services: Services, binding: ProviderBinding, request: Request) -> int:
    """Return the status of an answer. Raises UpstreamError, RequestError, ConfigurationError."""
    provider = services.provider_of(binding)
    provider.check(binding)
    model = binding.models[0] if request.endpoint.has_model else None
    trace = TraceContext(b"1".rjust(32, b"0"), b"1".rjust(16, b"0"))
    candidate = Candidate(binding, provider, model)
    exchange = Exchange(b"req_probe", request, trace, services.namespace, time.monotonic_ns(), time.time_ns())
    exchange.candidate = candidate
    upstream: UpstreamRequest = provider.build(exchange, candidate)
    fetch: Fetch = services.get(Fetch)  # type: ignore[type-abstract]
    answer = await fetch(upstream, timeout=TIMEOUT_SECONDS, max_bytes=MAX_BYTES)
    return answer.status


def _listing() -> Request:
    endpoint = Endpoint("openai.models", "models", "/v1/models", (b"GET",), has_model=False)
    return _request(b"GET", "/v1/models", endpoint, b"")


def _one_token(services: Services, binding: ProviderBinding) -> Request:
    dialects = services.provider_of(binding).dialects
    dialect = next((name for name in _CALLS if name in dialects), "openai.chat")
    operation, path, bound = _CALLS[dialect]
    body: dict[str, Any] = {"model": binding.models[0], "messages": [{"role": "user", "content": "1"}], bound: 1}
    return _request(b"POST", path, Endpoint(dialect, operation, path), msgspec.json.encode(body))


def _request(method: bytes, path: str, endpoint: Endpoint, body: bytes) -> Request:
    fields = [(b"accept", b"application/json"), (b"user-agent", b"penstock")]
    if body:
        fields.append((b"content-type", b"application/json"))
    block = b"".join([b"%b: %b\r\n" % field for field in fields])
    head = RequestHead(
        method=method,
        target=path.encode(),
        headers=Headers(fields),
        content_length=len(body) or None,
        chunked=False,
        keep_alive=True,
        expects_continue=False,
        is_http10=False,
        fields=block,
    )
    return Request(head, path.encode(), b"", endpoint, body)
