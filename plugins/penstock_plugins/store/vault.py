"""Secrets at rest: AES-256-GCM under a ring of keys, and the pepper of credentials.

A sealed secret is ``v1.<key id>.<nonce>.<ciphertext>``, the last two base64url without padding; the id of a key is the
beginning of its SHA-256. The first key of the ring seals, any of them opens. The pepper cannot be rotated: credentials
are hashed under it, and their secrets are known to their owners alone, so another pepper means new secrets for all.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Callable

KEY_BYTES = 32
MIN_PEPPER_BYTES = 16
CHECK_CONTEXT = "meta:check"
_NONCE_BYTES = 12
_VERSION = "v1"


class Ring:
    """Hold encryption keys, the one that seals first. Raises ValueError for what is no list of keys."""

    def __init__(self, text: str) -> None:
        words = [word for word in re.split(r"[\s,]+", text) if word]
        if not words:
            raise ValueError("holds no key")
        self.keys = {_id_of(key): key for key in map(_read_key, words)}
        self.first = next(iter(self.keys))

    def text(self) -> str:
        """Return the keys as a file holds them, one on a line."""
        return "".join(f"{key.hex()}\n" for key in self.keys.values())

    def with_new(self) -> Ring:
        """Return a ring with a new key in front of the one that sealed until now."""
        return Ring(f"{new_encryption_key()} {self.keys[self.first].hex()}")


def _read_key(word: str) -> bytes:
    """Return 32 bytes of hex or base64."""
    try:
        key = bytes.fromhex(word) if len(word) == 2 * KEY_BYTES else _unpack(word.replace("+", "-").replace("/", "_"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"must be {KEY_BYTES} bytes in hex or base64; 'openssl rand -hex {KEY_BYTES}' makes one")
    return key


def _id_of(key: bytes) -> str:
    return hashlib.sha256(b"penstock encryption key " + key).hexdigest()[:8]


def new_encryption_key() -> str:
    """Return a fresh key in hex."""
    return os.urandom(KEY_BYTES).hex()


def new_pepper() -> str:
    """Return a fresh pepper: 43 characters, to be used as they are."""
    return _pack(os.urandom(32))


class SealedVault:
    """Seal and open secrets. ``reread`` returns the ring anew, for secrets sealed under a key made meanwhile."""

    def __init__(self, ring: Ring, pepper: bytes, reread: Callable[[], Ring] | None = None) -> None:
        self._ring = ring
        self._pepper = pepper
        self._reread = reread

    @property
    def pepper(self) -> bytes:
        return self._pepper

    def seal(self, secret: str, *, context: str) -> str:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - start-up may need none

        nonce = os.urandom(_NONCE_BYTES)
        key_id = self._ring.first
        sealed = AESGCM(self._ring.keys[key_id]).encrypt(nonce, secret.encode(), context.encode())
        return f"{_VERSION}.{key_id}.{_pack(nonce)}.{_pack(sealed)}"

    def open(self, sealed: str, *, context: str) -> str:
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415

        version, key_id, nonce, ciphertext = _parts(sealed)
        if version != _VERSION:
            raise ValueError("this secret is sealed in a format that is not known here")
        try:
            return AESGCM(self._key(key_id)).decrypt(_unpack(nonce), _unpack(ciphertext), context.encode()).decode()
        except InvalidTag:
            raise ValueError("this secret is damaged, or sealed for another place") from None

    def is_sealed_by_first(self, sealed: str) -> bool:
        """Say whether the key that seals now has sealed this."""
        return _parts(sealed)[1] == self._ring.first

    def _key(self, key_id: str) -> bytes:
        key = self._ring.keys.get(key_id)
        if key is None and self._reread is not None:
            self._ring = self._reread()
            key = self._ring.keys.get(key_id)
        if key is None:
            raise ValueError(f"this secret is sealed with the encryption key {key_id}, which is not here")
        return key

    def check_value(self) -> str:
        """Return what tells later whether key and pepper are still those of the database."""
        return self.seal(self._mark(), context=CHECK_CONTEXT)

    def fault_of(self, check: str) -> str | None:
        """Say why key or pepper are not those that made a check value."""
        try:
            mark = self.open(check, context=CHECK_CONTEXT)
        except ValueError as error:
            return f"encryption_key: does not fit this database: {error}"
        if not hmac.compare_digest(mark, self._mark()):
            return "pepper: does not fit this database: its credentials are hashed under another"
        return None

    def _mark(self) -> str:
        return hmac.digest(self._pepper, b"penstock pepper", "sha256").hex()


def _parts(sealed: str) -> list[str]:
    parts = sealed.split(".")
    if len(parts) != 4:
        raise ValueError("this is no sealed secret")
    return parts


def _pack(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _unpack(text: str) -> bytes:
    try:
        return base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), altchars=b"-_", validate=True)
    except binascii.Error as error:
        raise ValueError(f"is no base64: {error}") from None
