"""``http``: ask a program of the operator's, in any language.

It gets a POST with a JSON object and answers 200 with ``{"verdict": "allow" | "block" | "modify"}``, with ``texts`` as
many as it got where it modifies, and ``rule`` and ``reason`` where it likes. All else is a failure.
"""

from __future__ import annotations

import json
from typing import Any

import attrs

from penstock import (
    ALL_DIRECTIONS,
    ALLOW,
    Address,
    Check,
    ConfigurationError,
    Fetch,
    ProviderBinding,
    Services,
    Subject,
    UpstreamRequest,
    Verdict,
    address_of,
)
from penstock_plugins.guardrails.environment import check_name, read_secret
from penstock_plugins.guardrails.texts import difference

MAX_ANSWER = 16 * 1024 * 1024
_SECONDS = 60.0


@attrs.frozen(kw_only=True)
class RemoteSettings:
    """Settings of ``http``."""

    url: str
    """Where requests are posted."""
    key_env: str | None = None
    """Environment variable with what is sent as ``Authorization: Bearer``; begins with ``PENSTOCK_GUARDRAIL_``."""
    hold_back: int = 64
    """Characters held back on streams: at least the longest text to be found there, and one."""


class RemoteCheck(Check):
    """Post texts, read a verdict."""

    is_costly = True

    def __init__(self, settings: RemoteSettings, address: Address, services: Services) -> None:
        self.hold_back = settings.hold_back
        self._key_env = settings.key_env
        self._address = address
        self._services = services

    async def judge(self, subject: Subject) -> Verdict:
        """Ask. Raises UpstreamError, ValueError."""
        address = self._address
        fields = address.first_fields + b"content-type: application/json\r\naccept: application/json\r\n"
        if self._key_env is not None:
            fields += b"authorization: Bearer %b\r\n" % read_secret(self._key_env).encode()
        request = UpstreamRequest(address.origin, b"POST", address.base_path or b"/", fields, question(subject))
        fetch: Fetch = self._services.get(Fetch)  # type: ignore[type-abstract]
        answer = await fetch(request, timeout=_SECONDS, max_bytes=MAX_ANSWER)
        if answer.status != 200:
            raise ValueError(f"it answered {answer.status}")
        return read_verdict(json.loads(answer.body), subject)


def question(subject: Subject) -> bytes:
    """Return what is posted."""
    exchange, principal = subject.exchange, subject.exchange.principal
    told = {
        "version": 1,
        "direction": subject.direction,
        "texts": subject.texts,
        "before": subject.before,
        "offset": subject.offset,
        "is_end": subject.is_end,
        "request_id": exchange.request_id.decode(),
        "dialect": exchange.request.endpoint.dialect,
        "model": exchange.peek.model if exchange.request.endpoint.has_model else None,
        "virtual_key_id": None if principal is None else principal.virtual_key_id,
    }
    return json.dumps(told).encode()


def read_verdict(answer: Any, subject: Subject) -> Verdict:
    """Return the verdict of an answer. Raises ValueError."""
    if not isinstance(answer, dict):
        raise ValueError("its answer is no JSON object")
    action = answer.get("verdict")
    rule, reason = (str(answer.get(name) or "") for name in ("rule", "reason"))
    if action == "allow":
        return ALLOW
    if action == "block":
        return Verdict("block", rule[:80], reason=reason[:400])
    texts: Any = answer.get("texts")
    is_whole = isinstance(texts, list) and len(texts) == len(subject.texts)
    if action != "modify" or not is_whole or not all(isinstance(text, str) for text in texts):
        raise ValueError("its answer is no verdict")
    pairs = enumerate(zip(subject.texts, texts, strict=True))
    edits = tuple(difference(before, after, number) for number, (before, after) in pairs if before != after)
    return Verdict("modify", rule[:80], edits, reason[:400]) if edits else ALLOW


@attrs.frozen
class Remote:
    """Ask a program of the operator's over HTTP."""

    services: Services
    type = "http"
    directions = ALL_DIRECTIONS
    settings = RemoteSettings

    def prepare(self, settings: RemoteSettings) -> RemoteCheck:
        """Return the check. Raises ValueError."""
        if settings.key_env is not None:
            check_name("key_env", settings.key_env)
        if not 0 <= settings.hold_back <= 16_384:
            raise ValueError("hold_back: must be from 0 to 16384")
        binding = ProviderBinding(id="", name="", type="", base_url=settings.url)
        try:
            address = address_of(binding, None, (), self.services.namespace)
        except ConfigurationError as error:
            raise ValueError(f"url: {error.faults[0].rpartition('base_url: ')[2]}") from None
        return RemoteCheck(settings, address, self.services)
