"""The format of virtual keys: how a secret is made, recognised without a look-up, and hashed.

``ps_vk_{live|test}_`` + 26-character ULID + 32 random base62 characters + 6 base62 characters of CRC-32 over all that.
"""

from __future__ import annotations

import functools
import hashlib
import secrets
import zlib
from typing import Literal

from penstock.ids import new_ulid

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_STEMS = {"penstock": "ps", "langwatch": "lw"}
_RANDOM = 32
_CHECK = 6
_BLOCK = 64
_TAIL = 26 + _RANDOM + _CHECK


def key_stem(namespace: str) -> str:
    """Return what key prefixes begin with: ``ps`` for penstock, ``lw`` for langwatch, else the namespace itself."""
    return _STEMS.get(namespace, namespace)


def new_key(namespace: str = "penstock", env: Literal["live", "test"] = "live") -> str:
    """Return a fresh secret; nothing else keeps it."""
    body = f"{key_stem(namespace)}_vk_{env}_{new_ulid()}" + "".join(secrets.choice(_BASE62) for _ in range(_RANDOM))
    return body + checksum(body.encode()).decode()


_PAIRS = [(high + low).encode() for high in _BASE62 for low in _BASE62]


def checksum(text: bytes) -> bytes:
    """Return six base62 digits of CRC-32."""
    rest, low = divmod(zlib.crc32(text), 3844)
    high, middle = divmod(rest, 3844)
    return _PAIRS[high] + _PAIRS[middle] + _PAIRS[low]


@functools.lru_cache(maxsize=8)
def _shape(namespace: str) -> tuple[tuple[bytes, bytes], int]:
    """Return what secrets of a namespace begin with, and how long they are."""
    stem = key_stem(namespace).encode() + b"_vk_"
    return (stem + b"live_", stem + b"test_"), len(stem) + 5 + _TAIL


def is_well_formed(secret: bytes, namespace: str = "penstock") -> bool:
    """Say whether a credential can be one of ours: prefix, length and checksum, no look-up."""
    prefixes, length = _shape(namespace)
    if len(secret) != length or not secret.startswith(prefixes):
        return False
    return checksum(secret[:-_CHECK]) == secret[-_CHECK:]


def display_prefix(secret: str) -> str:
    """Return the part of a secret that may be shown: up to the sixth character of its ULID."""
    return secret[: len(secret) - _TAIL + 6]


class KeyHasher:
    """Hash keys under one pepper; the two halves of HMAC (RFC 2104) are prepared once."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, pepper: bytes) -> None:
        block = (hashlib.sha256(pepper).digest() if len(pepper) > _BLOCK else pepper).ljust(_BLOCK, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def hash(self, secret: bytes) -> bytes:
        """Return HMAC-SHA256 of the secret, 32 bytes: the only form a key is stored in."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(secret)
        outer.update(inner.digest())
        return outer.digest()


def hash_key(pepper: bytes, secret: bytes) -> bytes:
    """Return HMAC-SHA256 of the secret under the pepper, 32 bytes."""
    return KeyHasher(pepper).hash(secret)
