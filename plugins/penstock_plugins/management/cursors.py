"""Cursors: where a list goes on, signed, and bound to the list, its filters and the actor they were made for."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping

import attrs
import msgspec

from penstock.governance import Vault
from penstock_plugins.management.faults import RefusedError

_MAC = 16
_MAX = 1024


@attrs.frozen
class ListPlace:
    """Name one list: whose, which and how it is narrowed."""

    actor: str
    path: str
    filters: Mapping[str, str]

    def digest(self, vault: Vault, after: bytes) -> bytes:
        """Return what proves that a cursor was made here, for this list."""
        bound = msgspec.json.encode([self.actor, self.path, sorted(self.filters.items())])
        key = hmac.digest(vault.pepper, b"penstock cursor", hashlib.sha256)
        return hmac.digest(key, b"%d:%b%b" % (len(bound), bound, after), hashlib.sha256)[:_MAC]


def write_cursor(vault: Vault, place: ListPlace, after: str) -> str:
    """Return the cursor of the page after the one that ends with ``after``."""
    text = after.encode()
    return base64.urlsafe_b64encode(place.digest(vault, text) + text).rstrip(b"=").decode()


def read_cursor(vault: Vault, place: ListPlace, cursor: str) -> str:
    """Return what the page before ended with. Raises RefusedError for a cursor of another list, filter or actor."""
    refused = RefusedError("bad_request", "cursor: is none of this list with these filters; begin without one",
                           meta={"field": "cursor"})  # fmt: skip
    if len(cursor) > _MAX or not cursor.isascii():
        raise refused
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
    except ValueError:
        raise refused from None
    digest, after = raw[:_MAC], raw[_MAC:]
    if not after or not hmac.compare_digest(digest, place.digest(vault, after)):
        raise refused
    return after.decode()
