"""Ids of objects and the secrets of the management plane; sans-IO.

``ps_at_`` + 26-character ULID + 32 random base62 characters + 6 base62 characters of CRC-32 over all that: virtual
keys' format with another word in it, so that neither can be taken for the other.
"""

from __future__ import annotations

import secrets

from penstock.ids import new_ulid
from penstock.keys import _BASE62, _CHECK, _RANDOM, _TAIL, checksum, key_stem


def new_id(prefix: str) -> str:
    """Return a fresh id, such as ``vk_`` and a ULID."""
    return prefix + new_ulid()


def new_token(namespace: str = "penstock") -> str:
    """Return the secret of a fresh api token; nothing else keeps it."""
    body = f"{key_stem(namespace)}_at_{new_ulid()}" + "".join(secrets.choice(_BASE62) for _ in range(_RANDOM))
    return body + checksum(body.encode()).decode()


def is_token(secret: bytes, namespace: str = "penstock") -> bool:
    """Say whether a credential can be an api token: prefix, length and checksum, no look-up."""
    stem = key_stem(namespace).encode() + b"_at_"
    if len(secret) != len(stem) + _TAIL or not secret.startswith(stem):
        return False
    return checksum(secret[:-_CHECK]) == secret[-_CHECK:]


def token_prefix(secret: str) -> str:
    """Return the part of a token that may be shown: up to the sixth character of its ULID."""
    return secret[: len(secret) - _TAIL + 6]
