"""Answers kept for a day, so that a repeated creation answers byte for byte the same and makes nothing.

An answer may hold a secret that is shown once, so what is kept is sealed. Transactions come one after another: of two
requests with one key the second finds what the first has kept.
"""

from __future__ import annotations

import hashlib
import hmac

import attrs
import msgspec

from penstock.governance import Vault
from penstock_plugins.management.calls import Call
from penstock_plugins.management.faults import RefusedError

KEPT_MS = 24 * 3600 * 1000
MAX_KEY = 255


@attrs.frozen
class Once:
    """Name one request that is to have its effect once."""

    key: str
    """As the client sent it."""
    fingerprint: bytes
    """Of method, path and body, under the pepper: a body may hold a secret, and must not be guessed from this."""


def once_of(vault: Vault, key: str, method: str, path: str, body: bytes) -> Once:
    """Return how a request is recognised. Raises RefusedError for a key that is none."""
    if not 0 < len(key) <= MAX_KEY or not key.isascii() or not key.isprintable():
        rule = f"Idempotency-Key: must be 1 to {MAX_KEY} characters of printable ASCII"
        raise RefusedError("bad_request", rule, meta={"field": "Idempotency-Key"})
    request = b"idempotency\n%b\n%b\n%b" % (method.encode(), path.encode(), body)
    return Once(key, hmac.digest(vault.pepper, request, "sha256"))


class _Kept(msgspec.Struct, array_like=True):
    status: int
    version: int | None
    body: str


def _name(call: Call, once: Once) -> str:
    return f"{call.actor.id}:{hashlib.sha256(once.key.encode()).hexdigest()}"


def recall(call: Call, once: Once) -> tuple[int, int | None, bytes] | None:
    """Return status, version and body of the first answer; None where there is none. Raises RefusedError."""
    name = _name(call, once)
    found = call.tx.remembered(name, now_ms=call.now_ms)
    if found is None:
        return None
    fingerprint, sealed = found
    if fingerprint != once.fingerprint:
        message = "The Idempotency-Key was used for another request within the last 24 hours; take a fresh one."
        raise RefusedError("idempotency_mismatch", message)
    text = call.means.vault.open(sealed.decode(), context=_place(name))
    kept = msgspec.json.decode(text.encode(), type=_Kept)
    return kept.status, kept.version, kept.body.encode()


def keep(call: Call, once: Once, status: int, version: int | None, body: bytes) -> None:
    """Keep an answer, sealed."""
    name = _name(call, once)
    vault: Vault = call.means.vault
    text = msgspec.json.encode(_Kept(status, version, body.decode())).decode()
    sealed = vault.seal(text, context=_place(name)).encode()
    call.change.remember(name, once.fingerprint, sealed, expires_at_ms=call.now_ms + KEPT_MS)


def _place(name: str) -> str:
    return f"idempotency:{name}"
